"""Where kernels run: what a device is to them, and their launch.

`target` is the only function of the package that asks which hardware there is, and `launch` the only one that launches:
whoever compiles for a device that is not there, counts launches or leaves them out replaces these two.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

INTERPRET = "TRITON_INTERPRET"
"""Triton's own switch: 1 when Triton is imported, and its kernels run on CPU tensors, slowly, in Python"""


@dataclass(frozen=True)
class Target:
    """What decides about a device."""

    name: str
    shared_memory: int
    """Bytes a program may use."""
    multiprocessors: int
    """AMD's compute units"""
    capability: tuple[int, int] | None = None
    """NVIDIA's compute capability; None for AMD."""


TARGETS = {
    target.name: target
    for target in (
        Target("sm_80", 163 * 1024, 108, (8, 0)),
        Target("sm_90", 227 * 1024, 132, (9, 0)),
        Target("sm_100", 227 * 1024, 148, (10, 0)),
        Target("gfx942", 64 * 1024, 304),
    )
}
"""Those that the kernels are compiled for ahead of time"""
INTERPRETER = Target("interpreter", 227 * 1024, 132, (9, 0))
"""Triton's interpreter, on tensors of any device, with the block sizes and programs of an H100"""


MOST_PROGRAMS = 2**31 - 1
"""Along the first axis of a grid, where kernels count all that a batch may have many of"""


def target(device: torch.device) -> Target | None:
    """What runs kernels on tensors of a device; None if nothing does."""
    if os.environ.get(INTERPRET) == "1":
        return INTERPRETER
    return _gpu(device) if device.type == "cuda" else None  # ROCm's devices have this type, too


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> Any:
    """Launch a kernel on the current device and stream; returns it as compiled, or None from the interpreter.

    Args:
        kernel: a `triton.jit` function.
        grid: programs along each axis.
        arguments: of the kernel.
        options: its compile-time constants, and how it is compiled (`num_warps` and so on).

    Raises:
        ValueError: there are more programs than a device can number.
    """
    if grid[0] > MOST_PROGRAMS:
        raise ValueError(
            f"hidden_states are so many sequences and layers that a kernel would take {grid[0]} programs; a GPU "
            "launches up to 2^31 - 1. Use smaller batches or fewer layers, or backend='torch'."
        )
    return kernel[grid](*arguments, **options)


@cache
def _gpu(device: torch.device) -> Target | None:
    if not torch.cuda.is_available():
        return None
    properties: Any = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        name = properties.gcnArchName.partition(":")[0]
        return Target(name, 64 * 1024, properties.multi_processor_count)
    capability = (properties.major, properties.minor)
    return Target(
        "sm_{}{}".format(*capability),
        properties.shared_memory_per_block_optin,
        properties.multi_processor_count,
        capability,
    )
