"""The kernels compile without a GPU, and the tool that says so says no when it should."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from tests.kernels.test_versions import compiled

pytest.importorskip("triton")


def run(*arguments: str, before: str = "") -> subprocess.CompletedProcess[str]:
    """The tool in a process of its own, after some statements: here the interpreter may be on."""
    code = f"{before}\nfrom carma_kernels.ops.compile import main\nraise SystemExit(main({list(arguments)!r}))"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_listed_pairs_compile(target: str) -> None:
    result = run("--targets", target, "--subset", "--only", "listed")
    assert result.returncode == 0, result.stderr
    lines = [line.split("\t") for line in result.stdout.splitlines()]
    kernels = {line[1]: line for line in lines if line[0] == target}
    assert {"pairs_forward", "pairs_backward", "stability_forward"} <= kernels.keys()
    assert int(kernels["pairs_backward"][4]) > 8  # registers
    assert int(kernels["pairs_backward"][8]) > 0  # 16-byte loads


@pytest.mark.parametrize("target", ["sm_80", "gfx942"])
def test_the_longest_short_groups_compile(target: str) -> None:
    """The kernels with the most in registers."""
    result = run("--targets", target, "--subset", "--only", "carma T=128 cosine")
    assert result.returncode == 0, result.stderr
    assert "short_forward" in result.stdout
    assert "BLOCK_T=128" in result.stdout


def test_parts_of_the_work() -> None:
    """Every kernel is in one part, and a part that does not exist is refused."""
    before = "from carma_kernels.ops import compile\ncompile.Compiler._compile = lambda *_: compile.Resources(*[1] * 7)"
    whole, *parts = (
        run("--subset", "--targets", "sm_90", "--only", "D=768", *part, before=before).stdout.splitlines()[1:]
        for part in ((), ("--part", "1/2"), ("--part", "2/2"))
    )
    names = [{line.split("\t")[1] for line in lines} for lines in (whole, *parts)]
    assert names[0] == names[1] | names[2]
    assert "stability_backward" in names[1] - names[2]
    assert "pairs_backward" in names[2] - names[1]
    assert run("--part", "3/2").returncode == 2


def test_a_spill_is_a_fault() -> None:
    """128 x 128 scores are 128 registers a thread at four warps, the coefficients as many again."""
    tile = "launch.Configuration({'BLOCK_T': 128, 'BLOCK_D': 64})"
    before = f"from carma_kernels.kernels import launch\nlaunch.TABLE['similarity_tiles'] = [{tile}]"
    result = run("--targets", "sm_80", "--subset", "--only", "similarity T=256 cosine", before=before)
    assert result.returncode == 1
    assert "similarity_projection" in result.stderr
    assert "spills" in result.stderr


def test_what_does_not_compile_is_a_fault() -> None:
    blocks = "launch.Configuration({'BLOCK_D': 100})"
    before = f"from carma_kernels.kernels import launch\nlaunch.TABLE['pairs_forward'] = [{blocks}]"
    result = run("--targets", "sm_90", "--subset", "--only", "listed", before=before)
    assert result.returncode == 1
    assert "does not compile" in result.stderr
    assert "power of 2" in result.stderr


def test_faults() -> None:
    from carma_kernels import _runtime
    from carma_kernels.ops.compile import Compiled, Resources

    good = Resources(128, 64 * 1024, spilled=0, matrix_instructions=4, wide_loads=24, multiplies_tiles=True)

    def faults(
        target: str = "sm_90", dtype: torch.dtype = torch.bfloat16, arguments: str = "ALIGNMENT=16", **changed: int
    ) -> str:
        found = replace(good, **changed)  # type: ignore[arg-type]
        return "; ".join(Compiled("kernel", arguments, dtype, _runtime.TARGETS[target], found).faults)

    assert not faults()
    assert not faults("gfx942")
    assert faults(spilled=4) == "spills 4 bytes"
    assert "overwrites 1 tile" in faults(overwritten_tiles=1)
    assert "shared memory" in faults("gfx942", shared_memory=64 * 1024 + 1)
    assert not faults(shared_memory=64 * 1024 + 1)
    assert "matrix units" in faults(matrix_instructions=0)
    assert "16 bytes" in faults(wide_loads=0)
    assert not faults(wide_loads=0, spilled=4, arguments="COSINE=True, ALIGNMENT=2")
    assert not faults(dtype=torch.float32, matrix_instructions=0)
    assert not faults(matrix_instructions=0, wide_loads=0, multiplies_tiles=False)


def test_a_line_of_the_table() -> None:
    from carma_kernels import _runtime
    from carma_kernels.ops.compile import COLUMNS, Compiled, Resources, row

    target = _runtime.TARGETS["sm_80"]
    spilled = Resources(255, 98304, 8, 0, 2, multiplies_tiles=False)
    line = row(Compiled("_short_kernel", "BLOCK_T=64, num_warps=8", torch.bfloat16, target, spilled))
    assert line == (
        "sm_80",
        "short",
        "bfloat16",
        "BLOCK_T=64, num_warps=8",
        "255",
        "96",
        "8",
        "",
        "2",
        "spills 8 bytes",
    )
    line = row(Compiled("_other_kernel", "BLOCK=1", torch.float32, target, "does not compile: so"))
    assert line == ("sm_80", "other", "float32", "BLOCK=1", "", "", "", "", "", "does not compile: so")
    assert len(line) == len(COLUMNS)


def test_the_interpreter_cannot_compile(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from carma_kernels.ops import compile

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit):
        compile.main([])
    assert "TRITON_INTERPRET" in capsys.readouterr().err


KEYS = """
import json, torch, triton
from carma_kernels.ops import compile

class Keys(compile.Compiler):
    def _compile(self, kernel, args, kwargs):
        triton.runtime.driver.set_active(compile._Driver("sm_90"))
        found = []
        triton.JITFunction._do_compile = lambda self, key, *_: found.append(key)
        kernel.run(*args, grid=(1,), warmup=True, **kwargs)
        print(json.dumps([kernel.__name__, compile.constants(kwargs), found[0]]))

for D in (16, 24, 32, 33, 48, 100, 1000):
    listed = compile._listed(D, cosine=True, stability=True, masked=True)
    for problem in (compile._carma(16, D), listed, compile._carma(256, D)):
        list(Keys("sm_90").compile(problem, torch.float16))
"""


def test_a_row_is_one_compilation() -> None:
    """What Triton compiles, apart from the target, follows from the constants in the table: no width makes another."""
    keys: dict[tuple[str, str], set[str]] = {}
    for kernel, constants, key in map(json.loads, compiled("-c", KEYS)):
        keys.setdefault((kernel, constants), set()).add(key)
    assert len({kernel for kernel, _ in keys}) >= 10
    assert [row for row, found in keys.items() if len(found) > 1] == []


def test_every_launch_of_a_call_is_compiled() -> None:
    """Each loss with each of its options, in the ways that users call them, is among the tool's problems."""
    launched = [json.loads(line) for line in compiled("-m", "tests.kernels.launched")]
    calls = " ".join({row["call"] for row in launched})
    assert all(kind in calls for kind in ("carma_loss all", "carma_loss listed", "mi_loss", "stability_loss", "sim"))
    assert len({row["kernel"] for row in launched}) >= 14
    assert [row for row in launched if not row["compiled"]] == []
