"""With which sizes the kernels are launched: one table, with the reason for each; nothing is tuned while training runs.

A kernel has a list of configurations, and a launch takes the first that fits. A test that wants small tiles replaces a
kernel's entry in `TABLE`. Versions of Triton differ in the registers that they take: one that spills some, often a
handful of bytes for another program on a multiprocessor, has a row of its own. docs/compile_table.md holds what each
configuration compiles to with each version.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from carma_kernels._runtime import Target


@cache
def _triton() -> tuple[int, int]:
    """The version that compiles. Imported here alone, so that a process may still choose to have it interpret."""
    import triton

    major, minor, *_ = triton.__version__.split(".")
    return int(major), int(minor)


@dataclass(frozen=True)
class Configuration:
    """Block sizes, and where they may be used."""

    constants: Mapping[str, int]
    """Compile-time constants of the kernel."""
    num_warps: int = 4
    num_stages: int = 3
    max_size: float = math.inf
    """Largest size that decides (see `TABLE`) for which this configuration is meant."""
    min_bytes: int = 2
    max_bytes: int = 4
    """Bytes of an element, at least and at most."""
    shared_memory: int = 0
    """Bytes of shared memory that a device must have: those of a program, or of several where one would not do."""
    max_registers: int | None = None
    """Registers a thread may use, at most; None to leave it to the compiler. NVIDIA only."""
    only_with: tuple[tuple[int, int], ...] = ()
    """Versions of Triton with which a later configuration spills registers, and this one does not; () for any."""
    only_on: tuple[tuple[int, int], ...] = ()
    """Compute capabilities of NVIDIA's, where that is so on some alone; () for any device."""

    def fits(self, target: Target, size: int, element_bytes: int) -> bool:
        """Whether it can be used."""
        return (
            size <= self.max_size
            and self.min_bytes <= element_bytes <= self.max_bytes
            and self.shared_memory <= target.shared_memory
            and (self.max_registers is None or target.capability is not None)
            and (not self.only_with or _triton() in self.only_with)
            and (not self.only_on or target.capability in self.only_on)
        )

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of the launch."""
        options = {**self.constants, "num_warps": self.num_warps, "num_stages": self.num_stages}
        return options if self.max_registers is None else {**options, "maxnreg": self.max_registers}


_WIDEST = 16384


def _rows(elements: int, widest: int = _WIDEST, **rest: Any) -> list[Configuration]:
    """A program holds whole rows, or blocks of those wider than `widest`; `elements` in all, at 4 warps."""
    return [
        Configuration(
            {"BLOCK_ROWS": max(1, elements // width), "BLOCK_D": width},
            num_warps=min(16, max(4, 4 * width // elements)),
            max_size=width if width < widest else _WIDEST,
            **rest,
        )
        for width in (32, 128, 512, 1024, 2048, 4096, 8192, 16384)
        if width <= widest
    ]


def _short(tokens: int, columns: int, buffers: int, rows: int = 64, **rest: Any) -> Configuration:
    """Rows of the score matrix of up to `tokens`: 64 at most, because those of 128 would not stay in registers."""
    constants = {"BLOCK_M": min(tokens, rows), "BLOCK_T": tokens, "BLOCK_D": columns, "NUM_BUFFERS": buffers}
    return Configuration(constants, max_size=tokens, **rest)


_TWO_OF_96_KB = 2 * 97 * 1024  # with the kilobyte that the system takes of each program's


def _tile(rows: int, columns: int, width: int, pieces: int, **rest: Any) -> Configuration:
    """A tile of a Gram matrix, its epilogue in pieces."""
    constants = {"BLOCK_M": rows, "BLOCK_N": columns, "BLOCK_D": width, "PIECES": pieces}
    return Configuration(constants, **rest)


def _rows_of_product(rows: int, depth: int, width: int, pieces: int, **rest: Any) -> Configuration:
    """A tile of a matrix product, `depth` of the inner dimension at a time, its epilogue in pieces."""
    constants = {"BLOCK_M": rows, "BLOCK_K": depth, "BLOCK_D": width, "PIECES": pieces}
    return Configuration(constants, **rest)


LONG_PATH: Literal["tiles", "dense", "kept"] = "tiles"
"""What computes the MI loss of groups of 512 tokens and more: our own tiles (`kernels.mi`); or `torch.bmm`, with
kernels around it (`kernels.mi_dense`), which "kept" spares a product by keeping the dot products for the backward. The
other two are off until a GPU has measured them."""

TABLE: dict[str, list[Configuration]] = {
    # size: D. A tile and the one before it: 80 registers a thread. Whole rows: a row's sum needs no second program.
    # Narrow ones are half as much: 4096 elements spill where a mask is read or the rows are not aligned
    "stability_forward": [
        *_rows(2048, max_registers=168)[:2],
        *_rows(4096, min_bytes=4, max_registers=112, only_with=((3, 6), (3, 9)))[2:],
        *_rows(4096),
    ],
    # size: D. Three tiles in fp32: half as many elements keep as many programs on a multiprocessor; fp32 the same bytes
    "stability_backward": [*_rows(2048, widest=4096, max_bytes=2), *_rows(1024, widest=4096)],
    # size: tokens of a group. Up to 128: of more, two programs a multiprocessor would not hold the rows
    "short_forward": [
        _short(16, 128, 3, max_bytes=2),
        _short(32, 128, 3, max_bytes=2),
        _short(64, 64, 3, max_bytes=2, num_warps=8),
        _short(128, 64, 2, rows=32, max_bytes=2, num_warps=8, only_with=((3, 6),), only_on=((10, 0),)),
        _short(128, 32, 3, max_bytes=2, num_warps=8, shared_memory=3 * 57 * 1024),  # 64 columns spill
        _short(128, 64, 3, rows=32, max_bytes=2, num_warps=8, shared_memory=2 * 67 * 1024, only_with=((3, 9),)),
        _short(128, 64, 2, rows=32, max_bytes=2, num_warps=8, shared_memory=3 * 45 * 1024),  # 64 spill on sm_80
        _short(128, 64, 2, max_bytes=2, num_warps=8),
        *(_short(tokens, 16, 2, only_with=((3, 7),), only_on=((10, 0),)) for tokens in (16, 32)),
        *(_short(tokens, 32, 2, only_with=((3, 6), (3, 7))) for tokens in (16, 32)),
        *(_short(tokens, 16, 2) for tokens in (16, 32)),
        _short(64, 32, 3, rows=32, num_warps=8, shared_memory=2 * 57 * 1024, only_with=((3, 6),)),
        _short(64, 16, 3, num_warps=8, only_with=((3, 7),), only_on=((10, 0),)),
        _short(64, 32, 3, num_warps=8),
        _short(128, 16, 2, rows=16, num_warps=8, max_registers=128, only_with=((3, 6),), only_on=((10, 0),)),
        _short(128, 16, 3, rows=32, num_warps=8, shared_memory=3 * 23 * 1024),  # 64 spill, but not on gfx942
        _short(128, 16, 2, num_warps=8),
    ],
    # size: tokens of a group
    "short_backward": [
        _short(16, 64, 3, max_bytes=2, shared_memory=80 * 1024),  # gfx942's loads are of 16 bytes with 128 columns
        _short(16, 128, 3, max_bytes=2),
        _short(32, 64, 3, max_bytes=2),
        # two programs a multiprocessor
        _short(*(64, 64, 2), max_bytes=2, num_warps=8, shared_memory=88 * 1024, max_registers=128, only_with=((3, 9),)),
        _short(64, 64, 3, max_bytes=2, num_warps=8, shared_memory=88 * 1024, max_registers=128),
        _short(64, 32, 2, max_bytes=2),
        _short(128, 64, 2, max_bytes=2, num_warps=8, shared_memory=80 * 1024),
        _short(128, 32, 2, max_bytes=2, num_warps=8),
        _short(16, 32, 2),
        _short(32, 32, 2, only_with=((3, 6),)),
        _short(32, 32, 3),
        _short(64, 16, 2, rows=32, num_warps=8, shared_memory=3 * 28 * 1024),  # 64 spill on sm_100, 32 on gfx942
        _short(64, 32, 2, num_warps=8),
        _short(128, 16, 2, rows=32, num_warps=8, shared_memory=2 * 33 * 1024),  # likewise
        _short(128, 16, 2, num_warps=8),
    ],
    # size: tokens of a group, in all three. A multiprocessor holds two programs of 8 warps at 128 registers a thread,
    # with 96 KB of shared memory each; where it does not have that, smaller tiles, as for fp32 without tensor cores.
    "mi_scores": [
        _tile(64, 64, 32, pieces=8, min_bytes=4, only_with=((3, 9),)),
        _tile(64, 64, 32, pieces=4, min_bytes=4),
        _tile(128, 128, 64, pieces=8, num_warps=8, shared_memory=_TWO_OF_96_KB),
        _tile(64, 128, 64, pieces=8, shared_memory=72 * 1024),
        _tile(64, 128, 64, pieces=8, num_stages=2),
    ],
    "mi_weights": [
        _tile(64, 64, 32, pieces=4, min_bytes=4, max_registers=168, only_with=((3, 6),)),
        _tile(64, 64, 32, pieces=4, min_bytes=4),
        _tile(128, 128, 64, pieces=8, num_warps=8, shared_memory=_TWO_OF_96_KB, max_registers=128),
        _tile(64, 64, 64, pieces=4, shared_memory=72 * 1024),
        _tile(64, 64, 64, pieces=4, num_stages=2),
    ],
    "mi_gradient": [
        _rows_of_product(64, 16, 64, pieces=2, num_warps=8, min_bytes=4, max_registers=128, only_with=((3, 6), (3, 9))),
        _rows_of_product(64, 16, 64, pieces=2, num_warps=8, min_bytes=4),
        _rows_of_product(128, 64, 128, pieces=8, num_warps=8, shared_memory=_TWO_OF_96_KB, only_with=((3, 9),)),
        _rows_of_product(128, 64, 128, pieces=4, num_warps=8, shared_memory=_TWO_OF_96_KB),
        _rows_of_product(64, 64, 128, pieces=4, num_warps=8, shared_memory=72 * 1024, only_with=((3, 9),)),
        _rows_of_product(64, 64, 128, pieces=4, shared_memory=72 * 1024),
        _rows_of_product(64, 64, 128, pieces=4, num_stages=2),
    ],
    # size: tokens of a group, in all four: what is around the library's products (`LONG_PATH`). They multiply no tiles
    "dense_gather": [Configuration({"BLOCK_M": 8, "BLOCK_D": 256})],
    "dense_statistics": [Configuration({"BLOCK_N": 512})],
    "dense_weights": [
        Configuration({"BLOCK_M": 32, "BLOCK_N": 64}, only_with=((3, 6),)),
        Configuration({"BLOCK_M": 32, "BLOCK_N": 128}, num_warps=8),
    ],
    "dense_rows": [Configuration({"BLOCK_M": 8, "BLOCK_D": 256})],
    # size: T
    "similarity_norms": [Configuration({"BLOCK_T": 16, "BLOCK_D": 256})],
    # size: T. A tile of the matrix, square because its mirror image is stored too; a larger one spills
    "similarity_tiles": [
        Configuration({"BLOCK_T": 16, "BLOCK_D": 128}, max_size=16),
        Configuration({"BLOCK_T": 32, "BLOCK_D": 64}, max_size=32),
        Configuration({"BLOCK_T": 64, "BLOCK_D": 64}, max_bytes=2),
        Configuration({"BLOCK_T": 32, "BLOCK_D": 64}),
    ],
    # size: T
    "similarity_backward": [
        Configuration({"BLOCK_T": 16, "BLOCK_J": 16, "BLOCK_D": 128}, max_size=16),
        Configuration(
            {"BLOCK_T": 64, "BLOCK_J": 32, "BLOCK_D": 128}, num_warps=8, num_stages=2, max_bytes=2, only_with=((3, 6),)
        ),
        Configuration({"BLOCK_T": 64, "BLOCK_J": 32, "BLOCK_D": 128}, num_warps=8, max_bytes=2),
        Configuration({"BLOCK_T": 32, "BLOCK_J": 32, "BLOCK_D": 64}, num_stages=2, only_with=((3, 6),)),
        Configuration({"BLOCK_T": 32, "BLOCK_J": 32, "BLOCK_D": 128}, num_warps=8, num_stages=2),
    ],
    # size: D
    "pairs_forward": [Configuration({"BLOCK_D": 256})],
    # size: D. Whole rows, or blocks of wider ones
    "pairs_backward": [
        Configuration({"BLOCK_D": width}, num_warps=max(1, width // 512), max_size=width if width < 4096 else math.inf)
        for width in (128, 256, 512, 1024, 2048, 4096)
    ],
}


def choose(kernel: str, target: Target, size: int, element_bytes: int) -> Configuration | None:
    """The configuration of a launch, None if the kernel has none for it.

    Args:
        kernel: its name in `TABLE`.
        target: the device.
        size: what decides for this kernel, see `TABLE`.
        element_bytes: of the hidden states.
    """
    for configuration in TABLE[kernel]:
        if configuration.fits(target, size, element_bytes):
            return configuration
    return None


def longest(kernel: str, target: Target, element_bytes: int) -> float:
    """The largest size for which the kernel has a configuration; a single number to compare with."""
    return max((found.max_size for found in TABLE[kernel] if found.fits(target, 0, element_bytes)), default=0)
