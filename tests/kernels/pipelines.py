"""Every kernel of halves as launched on sm_90, and one that is wrong: which tiles are overwritten, as JSON lines.

Run as a process of its own, in which Triton is no interpreter. Compiled as far as Triton's GPU IR only: what comes
after it takes most of the time.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.nvidia.compiler import CUDABackend

from carma_kernels.ops import compile
from carma_kernels.ops.machine_code import overwritten_tiles


@triton.jit
def two_uses_kernel(x_ptr, out_ptr, D, BLOCK: tl.constexpr):
    """A tile that is multiplied and summed."""
    row = tl.arange(0, BLOCK)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    gram = tl.zeros((BLOCK, BLOCK), tl.float32)
    energy = tl.zeros((BLOCK,), tl.float32)
    for first in tl.range(0, D, BLOCK, num_stages=3):
        x = tl.load(x_ptr + row * D + first + column)
        gram = tl.dot(x, tl.trans(x), gram)
        energy += tl.sum(x.to(tl.float32), 1)
    tl.store(out_ptr + row * BLOCK + column, gram + energy[:, None])


class GPUIR(Exception):  # noqa: N818 (a way out of the compiler)
    """Carries what has been compiled so far."""


class Pipelines(compile.Compiler):
    def _compile(self, kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        triton.runtime.driver.set_active(compile._Driver("sm_90"))
        try:
            compiled = kernel.run(*args, grid=(1,), warmup=True, **kwargs)
        except GPUIR as reached:
            return str(reached)
        return compiled.asm["ttgir"]  # Triton's cache had all of it


def stop(_backend: Any, ir: Any, *_: Any) -> None:
    raise GPUIR(str(ir))


def report(kernel: str, constants: str, ttgir: str) -> None:
    row = {
        "kernel": kernel,
        "constants": constants,
        "pipelined products": ttgir.count("isAsync = true"),
        "overwritten": overwritten_tiles(ttgir),
    }
    sys.stdout.write(json.dumps(row) + "\n")


def main() -> None:
    CUDABackend.make_llir = stop
    compiler = Pipelines("sm_90")
    x = torch.zeros(64, 512, dtype=torch.float16)
    wrong = compiler._compile(two_uses_kernel, (x, torch.zeros(64, 64), 512), {"BLOCK": 64, "num_warps": 8})
    report("two_uses", "", wrong)
    for problem in compile.problems(subset=False).values():
        for dtype in (torch.bfloat16, torch.float16):
            for compiled in compiler.compile(problem, dtype):
                report(compiled.kernel_name, f"{compiled.dtype_name} {compiled.arguments}", str(compiled.resources))


if __name__ == "__main__":
    main()
