"""The pages about the kernels say what the kernels are."""

from __future__ import annotations

import importlib.util
import itertools
import re
from types import ModuleType

import pytest

from carma_kernels import _runtime
from carma_kernels.kernels import launch
from tests.architecture.sources import ROOT

DOCS = ROOT / "docs"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_kernel_is_explained() -> None:
    page = (DOCS / "kernels.md").read_text()
    kernels = {
        name
        for file in (ROOT / "carma_kernels" / "kernels").glob("*.py")
        for name in re.findall(r"^def _(\w+)_kernel\(", file.read_text(), re.MULTILINE)
    }
    assert len(kernels) > 10
    assert not {name for name in kernels if f"`{name}`" not in page}


def test_the_computed_bytes_are_those_of_the_launch_table() -> None:
    """Red? `python docs/kernel_bytes.py` prints what belongs there."""
    assert "\n".join(script("kernel_bytes").page()).strip() in (DOCS / "kernels.md").read_text()


def test_every_picture_is_there() -> None:
    pytest.importorskip("matplotlib")
    page = (DOCS / "kernels.md").read_text()
    for draw in script("draw_kernels").DRAWINGS:
        assert (DOCS / "pictures" / f"{draw.__name__}.svg").exists()
        assert f"pictures/{draw.__name__}.svg" in page


def test_a_page_of_two_versions() -> None:
    """A row for a kernel's constants, a cell for each target, the versions in turn where they differ."""
    columns = ("target", "kernel", "dtype", "constants", "registers", "shared KiB", "spilled", "faults")
    constants = "COSINE=True, HAS_MASK=False, ALIGNMENT=16, BLOCK_T=64, num_warps=8"

    def row(target: str, *found: str) -> dict[str, str]:
        return dict(zip(columns, (target, "short", "bfloat16", constants, *found), strict=True))

    old = [row("sm_80", "128", "96", "0", ""), row("sm_90", "255", "0", "8", "spills 8 bytes")]
    new = [row("sm_80", "128", "96", "0", ""), row("sm_90", "", "", "", "does not compile: so")]
    page = list(script("compile_table").page({"3.6.0": old, "3.7.1": new, "3.9.0": old[:1]}))
    assert (
        "| bfloat16 | COSINE ALIGNMENT=16 | BLOCK_T=64 num_warps=8 | 128 / 96 | "
        "255 / 0 **spills 8**, **does not compile**, – |"
    ) in page
    assert "- Triton 3.6.0: 2 compilations, 1 faults." in page
    assert "  - `short`, sm_90, bfloat16: spills 8 bytes" in page
    assert "- Triton 3.9.0: 1 compilations, 0 faults." in page


def test_the_page_is_that_of_the_tables() -> None:
    """Red? `python docs/compile_table.py > docs/compile_table.md`."""
    made = script("compile_table")
    assert (DOCS / "compile_table.md").read_text().splitlines() == list(made.page(made.tables()))


@pytest.mark.parametrize("version", ["3.6.0", "3.7.1", "3.9.0"])
def test_every_configuration_has_been_compiled(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Red? `python -m carma_kernels.ops.compile > docs/compile_table/triton-VERSION.tsv`, with that version."""
    table = script("compile_table").tables()[version]
    assert {row["target"] for row in table} == set(_runtime.TARGETS)
    assert not [row for row in table if row["faults"]]
    compiled = {(row["target"], row["constants"]) for row in table}
    monkeypatch.setattr(launch, "_triton", lambda: tuple(map(int, version.split(".")[:2])))
    for kernel, configurations in launch.TABLE.items():
        sizes = {min(configuration.max_size, 2**12) for configuration in configurations}
        for name, size, element_bytes in itertools.product(_runtime.TARGETS, sizes, (2, 4)):
            chosen = launch.choose(kernel, _runtime.TARGETS[name], int(size), element_bytes)
            if chosen is not None:
                blocks = ", ".join(f"{option}={value}" for option, value in chosen.options.items())
                found = any(target == name and constants.endswith(blocks) for target, constants in compiled)
                assert found, f"{kernel} on {name}: {blocks}"
