"""Compile every kernel as it would be launched, for devices that are not there, and look at what came out.

    python -m carma_kernels.ops.compile [--targets sm_90 gfx942] [--subset] [--part 1/4]

The operators are called on problems that together take every turn of the launch table. Where a kernel would be launched
it is compiled instead, for each target, by Triton's own assemblers: neither a GPU nor a driver is needed. The exit code
is 1 if a kernel spills registers, needs more shared memory than the target has, or, for halves, multiplies tiles
without the matrix units or without a load of 16 bytes; or overwrites a tile that is still being multiplied.

All of it takes a core one to two hours. Triton keeps what it has compiled (`TRITON_CACHE_DIR`), so a run that was
stopped goes on where it was, several at a time do not get in each other's way (`--part 1/2`, `--part 2/2`), and the run
after them, which prints the whole table, takes minutes.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any, TextIO
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from carma_kernels import _runtime
from carma_kernels._terms import MITerm, Similarity, StabilityTerm
from carma_kernels.kernels import launch
from carma_kernels.ops import carma_terms, mi, pairwise_similarity
from carma_kernels.ops.machine_code import Resources, resources
from carma_kernels.pairs import PairIndex
from carma_kernels.spans import TokenSpans

GPU_TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Compiled:
    """A kernel, as launched, for a target."""

    kernel: str
    arguments: str  # what is constant in it
    dtype: torch.dtype
    target: _runtime.Target
    resources: Resources | str  # or why it does not compile

    @property
    def kernel_name(self) -> str:
        """As it is called in the launch table, if it is there."""
        return self.kernel.strip("_").removesuffix("_kernel")

    @property
    def dtype_name(self) -> str:
        """Without torch's."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def faults(self) -> list[str]:
        """What is wrong with it. Of layers at any address, loaded element by element, less is asked."""
        found = self.resources
        if isinstance(found, str):
            return [found]
        faults = []
        aligned = "ALIGNMENT" not in self.arguments or "ALIGNMENT=16" in self.arguments
        if found.spilled and aligned:
            faults.append(f"spills {found.spilled} bytes")
        if found.shared_memory > self.target.shared_memory:
            faults.append(f"needs {found.shared_memory} of {self.target.shared_memory} bytes of shared memory")
        if found.overwritten_tiles:
            faults.append(f"overwrites {found.overwritten_tiles} tiles that a product may be reading")
        if self.dtype.itemsize == 2 and found.multiplies_tiles:
            if not found.matrix_instructions:
                faults.append("multiplies without the matrix units")
            if aligned and not found.wide_loads:
                faults.append("has no load of 16 bytes")
        return faults


Problem = Callable[[torch.dtype], None]

_STABILITY = ((True, True), (True, False), (False, False))
"""Whether there is a stability loss, and a mask for it; by default there are both"""


def problems(subset: bool) -> dict[str, Problem]:
    """Calls of the operators, forward and backward, that together launch every kernel in every configuration.

    Args:
        subset: one of each kind only.
    """
    found: dict[str, Problem] = {}
    for T in (256,) if subset else (16, 32, 64, 256):
        for cosine, masked, learned in product((True, False), repeat=3):
            if not subset or (masked and not learned):
                name = _named(f"similarity T={T}", cosine=cosine, learned=learned, masked=masked)
                found[name] = _similarity(T, cosine, learned, masked)
    for T in (128, 256) if subset else (16, 32, 64, 128, 256):
        for cosine, learned, matched in product((True, False), repeat=3):
            for stability, masked in _STABILITY:
                if not subset or (masked and not learned and not matched):
                    options = {"learned": learned, "matched": matched, "masked": masked}
                    name = _named(f"{'carma' if stability else 'mi'} T={T}", cosine=cosine, **options)
                    found[name] = _carma(T, 256, cosine=cosine, stability=stability, **options)
    if not subset:
        for T in (127, 255):  # a width that is no multiple of a block's; and rows at any address
            found[f"carma T={T} D=208"] = _carma(T, 208, masked=True)
            found[f"carma T={T} D=17"] = _carma(T, 17, masked=True)
    found["carma T=512 dense cosine"] = _dense(_carma(512, 256, cosine=True))
    if not subset:
        found["carma T=512 dense dot"] = _dense(_carma(512, 256, cosine=False, masked=True))
        found["carma T=512 dense learned"] = _dense(_carma(512, 256, learned=True, matched=True, masked=True))
        found["mi T=512 dense"] = _dense(_carma(512, 256, cosine=True, stability=False))
        found["carma T=1024 dense windows"] = _dense(_carma(1024, 256, cosine=True), workspace=2**19)
        for D in (208, 17):
            found[f"carma T=513 dense D={D}"] = _dense(_carma(513, D, cosine=True))
    widths = (768,) if subset else (32, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
    for D in widths:
        for masked in (True,) if subset else (True, False):
            found[_named(f"stability D={D}", masked=masked)] = _carma(16, D, masked=masked, mi=False)
        for cosine in (True,) if subset else (True, False):
            for stability, masked in _STABILITY[:1] if subset else _STABILITY:
                name = _named(f"listed{'' if stability else ' mi'} D={D}", cosine=cosine, masked=masked)
                found[name] = _listed(D, cosine, stability, masked)
    return found


def _named(begin: str, *, cosine: bool | None = None, **options: bool) -> str:
    """A problem's name: how it begins, the metric if it has one, and the options that it has."""
    metric = [] if cosine is None else ["cosine" if cosine else "dot"]
    return " ".join((begin, *metric, *(name for name, has in options.items() if has)))


def _temperature(learned: bool) -> Tensor | float:
    return torch.tensor(0.1, requires_grad=True) if learned else 0.1


def _hidden(T: int, D: int, dtype: torch.dtype) -> Tensor:
    """`[3, 1, T, D]`"""
    return torch.zeros(3, 1, T, D, dtype=dtype, requires_grad=True)


def _mask(T: int, masked: bool) -> Tensor | None:
    return torch.ones(1, T, dtype=torch.bool) if masked else None


def _similarity(T: int, cosine: bool, learned: bool, masked: bool) -> Problem:
    def run(dtype: torch.dtype) -> None:
        similarity = Similarity(cosine, _temperature(learned))
        pairwise_similarity(
            _hidden(T, 256, dtype), range(3), similarity, _mask(T, masked), torch.float32
        ).sum().backward()

    return run


def _carma(
    T: int,
    D: int,
    *,
    cosine: bool = True,
    learned: bool = False,
    matched: bool = False,
    masked: bool = False,
    mi: bool = True,
    stability: bool = True,
) -> Problem:
    def run(dtype: torch.dtype) -> None:
        spans = TokenSpans.from_lists([[(s, s + 3) for s in range(0, T - 3, 8)]], seq_len=T)
        similarity = Similarity(cosine, _temperature(learned))
        table = spans.contrast_table("sequence")
        mi_term = MITerm(range(3), table, similarity, 5.0 if matched else None) if mi else None
        stability_term = StabilityTerm(range(3), _mask(T, masked), 1e-8) if stability else None
        carma_terms(_hidden(T, D, dtype), mi_term, stability_term).loss.backward()

    return run


def _dense(problem: Problem, workspace: int = mi.WORKSPACE_BYTES) -> Problem:
    """The same with the library's products."""

    def run(dtype: torch.dtype) -> None:
        with patch.object(launch, "LONG_PATH", "dense"), patch.object(mi, "WORKSPACE_BYTES", workspace):
            problem(dtype)

    return run


def _listed(D: int, cosine: bool, stability: bool, masked: bool) -> Problem:
    def run(dtype: torch.dtype) -> None:
        zeros = torch.zeros(4, dtype=torch.int32)
        pairs = PairIndex(zeros, zeros, zeros[:, None].expand(4, 5).contiguous(), (1, 16))
        mi_term = MITerm(range(3), pairs, Similarity(cosine, 0.1), None)
        stability_term = StabilityTerm(range(3), _mask(16, masked), 1e-8) if stability else None
        carma_terms(_hidden(16, D, dtype), mi_term, stability_term).loss.backward()

    return run


class _Driver:
    """What a launch asks of a driver before it compiles."""

    def __init__(self, target: str) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return GPU_TARGETS[self._target]

    def get_current_device(self) -> str:
        return self._target

    def get_current_stream(self, _device: str) -> int:
        return 0


class Compiler:
    """Compiles the launches of problems, each kernel once for the same constants."""

    def __init__(self, target: str) -> None:
        """Take the name of a target."""
        self._target = _runtime.TARGETS[target]
        self._done: set[tuple[str, str, torch.dtype]] = set()

    def compile(self, problem: Problem, dtype: torch.dtype) -> Iterator[Compiled]:
        """The kernels that a problem launches and that were not compiled before."""
        with self._recorded() as launches:
            problem(dtype)
        for kernel, args, kwargs in launches:
            key = (kernel.__name__, constants(kwargs), dtype)
            if key not in self._done:
                self._done.add(key)
                yield Compiled(*key, self._target, self._compile(kernel, args, kwargs))

    @contextmanager
    def _recorded(self) -> Iterator[list[tuple[Any, tuple[Any, ...], dict[str, Any]]]]:
        launches = []

        def record(kernel: Any, _grid: Any, *args: Any, **kwargs: Any) -> None:
            launches.append((kernel, args, kwargs))

        with patch.object(_runtime, "launch", record), patch.object(_runtime, "target", lambda _device: self._target):
            yield launches

    def _compile(self, kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Resources | str:
        triton.runtime.driver.set_active(_Driver(self._target.name))
        try:
            compiled = kernel.run(*args, grid=(1,), warmup=True, **kwargs)
        except Exception as error:  # whatever a compiler pass raises is the finding
            return f"does not compile: {_reason(error)}"
        return resources(compiled)


def _reason(error: BaseException) -> str:
    """What an error comes from, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    words = " ".join(f"{type(error).__name__}: {error}".split())
    return words if len(words) < 400 else f"{words[:100]} ... {words[-300:]}"


def constants(options: Mapping[str, Any]) -> str:
    """What is constant in a kernel, of the keyword arguments of its launch, as the table names it."""
    return ", ".join(f"{name}={value}" for name, value in options.items() if name not in ("DTYPE", "INTERPRETED"))


COLUMNS = (
    *("target", "kernel", "dtype", "constants"),
    *("registers", "shared KiB", "spilled", "matrix", "16-byte loads", "faults"),
)
"""`matrix`: how many matrix instructions, of kernels that multiply tiles"""


def row(compiled: Compiled) -> tuple[str, ...]:
    """A line of the table, as `COLUMNS`."""
    head = (compiled.target.name, compiled.kernel_name, compiled.dtype_name, compiled.arguments)
    found, faults = compiled.resources, "; ".join(compiled.faults)
    if isinstance(found, str):
        return (*head, *[""] * 5, faults)
    return (
        *head,
        str(found.registers),
        f"{found.shared_memory / 1024:.0f}",
        str(found.spilled),
        str(found.matrix_instructions) if found.multiplies_tiles else "",
        str(found.wide_loads),
        faults,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m carma_kernels.ops.compile", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--targets", nargs="+", choices=GPU_TARGETS, default=list(GPU_TARGETS))
    parser.add_argument("--dtypes", nargs="+", choices=[str(d).removeprefix("torch.") for d in DTYPES])
    parser.add_argument("--only", default="", help="problems whose name contains this")
    parser.add_argument("--subset", action="store_true", help="one problem of each kind, in bfloat16 unless told")
    parser.add_argument("--part", type=_part, default=(1, 1), metavar="I/N", help="every Nth problem, from the Ith on")
    asked = parser.parse_args(arguments)
    if _runtime.target(torch.device("cpu")) is _runtime.INTERPRETER:
        parser.error("Triton's interpreter is on, which compiles nothing: unset TRITON_INTERPRET.")
    dtypes = [getattr(torch, name) for name in asked.dtypes or []] or (DTYPES[:1] if asked.subset else DTYPES)
    names = {name: problem for name, problem in problems(asked.subset).items() if asked.only in name}
    if not names:
        parser.error(f"--only {asked.only}: no problem's name contains that.")

    def write(line: str, stream: TextIO = sys.stdout) -> None:
        stream.write(line + "\n")
        stream.flush()

    compilers = {target: Compiler(target) for target in asked.targets}
    jobs = [
        (compilers[target], dtype, problem) for target in compilers for dtype in dtypes for problem in names.values()
    ]
    part, parts = asked.part
    begin, table = time.monotonic(), []
    write("\t".join(COLUMNS))
    for compiler, dtype, problem in _with_progress(jobs[part - 1 :: parts]):
        for compiled in compiler.compile(problem, dtype):
            table.append(compiled)
            write("\t".join(row(compiled)))
    failed = ["\t".join((*row(compiled)[:4], fault)) for compiled in table for fault in compiled.faults]
    write(f"{len(table)} kernels in {time.monotonic() - begin:.0f} s, {len(failed)} faults", sys.stderr)
    for fault in failed:
        write(fault, sys.stderr)
    return 1 if failed else 0


def _part(text: str) -> tuple[int, int]:
    """`2/4` as numbers."""
    part, parts = (int(number) for number in text.split("/"))
    if not 1 <= part <= parts:
        raise ValueError(text)
    return part, parts


def _with_progress(jobs: Sequence[Any]) -> Iterable[Any]:
    """The jobs, with a bar on a terminal's error stream."""
    if not sys.stderr.isatty():
        return jobs
    from rich.console import Console
    from rich.progress import track

    return track(jobs, "compiling", console=Console(stderr=True), transient=True)


if __name__ == "__main__":
    sys.exit(main())
