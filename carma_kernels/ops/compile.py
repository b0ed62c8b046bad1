"""Compile every kernel as it would be launched, for devices that are not there, and look at what came out.

    python -m carma_kernels.ops.compile [--targets sm_90 gfx942] [--subset] [--markdown]

The operators are called on problems that together take every turn of the launch table. Where a kernel would be launched
it is compiled instead, for each target, by Triton's own assemblers: neither a GPU nor a driver is needed. The exit code
is 1 if a kernel spills registers, needs more shared memory than the target has, or, for halves, multiplies tiles
without the matrix units or without a load of 16 bytes.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from carma_kernels._terms import MITerm, Similarity, StabilityTerm
from carma_kernels.kernels import launch
from carma_kernels.ops import carma_terms, layers, pairwise_similarity
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
class Resources:
    """What a compiled kernel needs, and which instructions it uses."""

    registers: int
    shared_memory: int
    spilled: int  # bytes
    matrix_instructions: int
    wide_loads: int  # of 16 bytes, from global memory
    multiplies_tiles: bool


@dataclass(frozen=True)
class Compiled:
    """A kernel, as launched, for a target."""

    kernel: str
    arguments: str  # what is constant in it
    dtype: torch.dtype
    target: launch.Target
    resources: Resources | str  # or why it does not compile

    def faults(self, wide: bool = True) -> list[str]:
        """What is wrong with it.

        Args:
            wide: the layers are aligned to 16 bytes and so is their width, so that wide loads can be expected.
        """
        found = self.resources
        if isinstance(found, str):
            return [found]
        faults = []
        if found.spilled:
            faults.append(f"spills {found.spilled} bytes")
        if found.shared_memory > self.target.shared_memory:
            faults.append(f"needs {found.shared_memory} of {self.target.shared_memory} bytes of shared memory")
        if self.dtype.itemsize == 2 and found.multiplies_tiles:
            if not found.matrix_instructions:
                faults.append("multiplies without the matrix units")
            if wide and not found.wide_loads:
                faults.append("has no load of 16 bytes")
        return faults


Problem = Callable[[torch.dtype], None]


def problems(subset: bool) -> dict[str, Problem]:
    """Calls of the operators, forward and backward, that together launch every kernel in every configuration.

    Args:
        subset: one of each kind only.
    """
    found: dict[str, Problem] = {}
    for T in (256,) if subset else (16, 32, 64, 256):
        for cosine in (True, False):
            for masked in (True,) if subset else (True, False):
                name = f"similarity T={T} {'cosine' if cosine else 'dot'}{' masked' * masked}"
                found[name] = _similarity(T, cosine, masked)
    for T in (64, 256) if subset else (16, 32, 64, 256, 4096):
        for cosine in (True, False):
            for learned in (False,) if subset or not cosine else (False, True):
                name = f"carma T={T} {'cosine' if cosine else 'dot'}{' learned' * learned}"
                found[name] = _carma(T, 256, cosine, learned, masked=not cosine)
                if not subset:
                    found["mi " + name] = _carma(T, 256, cosine, learned, masked=False, stability=False)
    widths = (768,) if subset else (32, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
    for D in widths:
        found[f"stability D={D}"] = _carma(16, D, True, False, masked=D % 512 == 0, mi=False)
        found[f"listed D={D}"] = _listed(D, cosine=D % 512 > 0, stability=D > 512)
    return found


def _hidden(T: int, D: int, dtype: torch.dtype) -> Tensor:
    """`[3, 1, T, D]`"""
    return torch.zeros(3, 1, T, D, dtype=dtype, requires_grad=True)


def _similarity(T: int, cosine: bool, masked: bool) -> Problem:
    def run(dtype: torch.dtype) -> None:
        mask = torch.ones(1, T, dtype=torch.bool) if masked else None
        hidden = _hidden(T, 256, dtype)
        pairwise_similarity(hidden, range(3), Similarity(cosine, 0.1), mask, torch.float32).sum().backward()

    return run


def _carma(
    T: int, D: int, cosine: bool, learned: bool, masked: bool, mi: bool = True, stability: bool = True
) -> Problem:
    def run(dtype: torch.dtype) -> None:
        spans = TokenSpans.from_lists([[(s, s + 3) for s in range(0, T - 3, 8)]], seq_len=T)
        temperature = torch.tensor(0.1, requires_grad=True) if learned else 0.1
        table = spans.contrast_table("sequence")
        mask = torch.ones(1, T, dtype=torch.bool) if masked else None
        mi_term = MITerm(range(3), table, Similarity(cosine, temperature), None) if mi else None
        stability_term = StabilityTerm(range(3), mask, 1e-8) if stability else None
        sums, changes = carma_terms(_hidden(T, D, dtype), mi_term, stability_term)
        (sums.sum() + changes.sum()).backward()

    return run


def _listed(D: int, cosine: bool, stability: bool) -> Problem:
    def run(dtype: torch.dtype) -> None:
        zeros = torch.zeros(4, dtype=torch.int32)
        pairs = PairIndex(zeros, zeros, zeros[:, None].expand(4, 5).contiguous(), (1, 16))
        mi_term = MITerm(range(3), pairs, Similarity(cosine, 0.1), None)
        stability_term = StabilityTerm(range(3), None, 1e-8) if stability else None
        sums, changes = carma_terms(_hidden(16, D, dtype), mi_term, stability_term)
        (sums.sum() + changes.sum()).backward()

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
        self._target = launch.TARGETS[target]
        self._done: set[tuple[str, str, torch.dtype]] = set()

    def compile(self, problem: Problem, dtype: torch.dtype) -> Iterator[Compiled]:
        """The kernels that a problem launches and that were not compiled before."""
        with self._recorded() as launches:
            problem(dtype)
        for kernel, args, kwargs in launches:
            constants = {name: value for name, value in kwargs.items() if name not in ("DTYPE", "INTERPRETED")}
            arguments = ", ".join(f"{name}={value}" for name, value in constants.items())
            key = (kernel.__name__, arguments, dtype)
            if key not in self._done:
                self._done.add(key)
                yield Compiled(*key, self._target, self._compile(kernel, args, kwargs))

    @contextmanager
    def _recorded(self) -> Iterator[list[tuple[Any, tuple[Any, ...], dict[str, Any]]]]:
        launches = []

        def record(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:  # noqa: ARG001
            launches.append((kernel, args, kwargs))

        with (
            patch.object(triton.JITFunction, "run", record),
            patch.object(layers, "_target", lambda _device: self._target),
        ):
            yield launches

    def _compile(self, kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Resources | str:
        triton.runtime.driver.set_active(_Driver(self._target.name))
        try:
            compiled = kernel.run(*args, grid=(1,), warmup=True, **kwargs)
        except Exception as error:  # whatever a compiler pass raises is the finding
            return f"does not compile: {_reason(error)}"
        inspect = _of_amd if GPU_TARGETS[self._target.name].backend == "hip" else _of_nvidia
        return inspect(compiled)


def _reason(error: BaseException) -> str:
    """What an error comes from, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    words = " ".join(f"{type(error).__name__}: {error}".split())
    return words if len(words) < 400 else f"{words[:100]} ... {words[-300:]}"


def _of_nvidia(compiled: Any) -> Resources:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _output(tools / "cuobjdump", "--dump-resource-usage", cubin)
        sass = _output(tools / "nvdisasm", "--print-code", cubin)
    loads_and_stores_of_spills = re.findall(r"\b(?:LDL|STL)\b", sass)
    stack = int(re.findall(r"STACK:(\d+)", usage)[-1])
    return Resources(
        registers=int(re.findall(r"REG:(\d+)", usage)[-1]),
        shared_memory=compiled.metadata.shared,
        spilled=max(stack, len(loads_and_stores_of_spills)),
        matrix_instructions=len(re.findall(r"\b(?:HGMMA|HMMA|UTC\w*MMA)\b", sass)),
        wide_loads=len(re.findall(r"\b(?:LDG|LDGSTS)\.\S*128\b|\bUTMALDG|\bUBLKCP", sass)),
        multiplies_tiles="tt.dot" in compiled.asm["ttir"],
    )


def _of_amd(compiled: Any) -> Resources:
    assembly = compiled.asm["amdgcn"]

    def total(name: str) -> int:
        return sum(int(number) for number in re.findall(rf"\.{name}:\s+(\d+)", assembly))

    return Resources(
        registers=total("vgpr_count"),
        shared_memory=compiled.metadata.shared,
        # scalar registers are spilled to lanes of vector registers, not to memory
        spilled=max(total("private_segment_fixed_size"), 4 * total("vgpr_spill_count")),
        matrix_instructions=len(re.findall(r"\bv_s?mfma", assembly)),
        wide_loads=len(re.findall(r"\b(?:global|buffer)_load_dwordx4\b", assembly)),
        multiplies_tiles="tt.dot" in compiled.asm["ttir"],
    )


def _output(*command: Any) -> str:
    return subprocess.run([str(word) for word in command], check=True, capture_output=True, text=True).stdout


COLUMNS = ("target", "kernel", "dtype", "constants", "registers", "shared KiB", "spilled", "matrix", "16-byte loads")


def row(compiled: Compiled) -> tuple[str, ...]:
    """A line of the table, as `COLUMNS`."""
    dtype = str(compiled.dtype).removeprefix("torch.")
    head = (compiled.target.name, compiled.kernel.strip("_").removesuffix("_kernel"), dtype, compiled.arguments)
    found = compiled.resources
    if isinstance(found, str):
        return (*head, found)
    return (
        *head,
        str(found.registers),
        f"{found.shared_memory / 1024:.0f}",
        str(found.spilled),
        str(found.matrix_instructions) if found.multiplies_tiles else "",
        str(found.wide_loads),
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
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    asked = parser.parse_args(arguments)
    if layers.INTERPRETED:
        parser.error("Triton's interpreter is on, which compiles nothing: unset TRITON_INTERPRET.")
    dtypes = [getattr(torch, name) for name in asked.dtypes or []] or (DTYPES[:1] if asked.subset else DTYPES)

    def write(cells: Sequence[str], stream: TextIO = sys.stdout) -> None:
        stream.write((" | ".join(cells) if asked.markdown else "\t".join(cells)) + "\n")
        stream.flush()

    write(COLUMNS)
    if asked.markdown:
        write(["---"] * len(COLUMNS))
    begin, count, failed = time.monotonic(), 0, []
    for target in asked.targets:
        compiler = Compiler(target)
        for dtype in dtypes:
            for name, problem in problems(asked.subset).items():
                if asked.only not in name:
                    continue
                for compiled in compiler.compile(problem, dtype):
                    write(row(compiled))
                    count += 1
                    failed += [(*row(compiled)[:4], fault) for fault in compiled.faults()]
    write([f"{count} kernels in {time.monotonic() - begin:.0f} s, {len(failed)} faults"], sys.stderr)
    for fault in failed:
        write(fault, sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
