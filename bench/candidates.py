"""Configurations of the kernels that may be better than the launch table's: all that is measured, and the few first."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from carma_kernels.kernels.launch import Configuration


def _grid(
    blocks: Sequence[dict[str, int]], warps: Sequence[int], stages: Sequence[int] = (3,)
) -> Iterator[Configuration]:
    for constants, num_warps, num_stages in itertools.product(blocks, warps, stages):
        yield Configuration(constants, num_warps=num_warps, num_stages=num_stages)


def _short(registers: Sequence[int | None]) -> Iterator[Configuration]:
    for tokens, width, buffers, most in itertools.product((16, 32, 64, 128), (16, 32, 64, 128), (2, 3), registers):
        for rows in sorted({min(tokens, rows) for rows in (32, 64)}):
            constants = {"BLOCK_M": rows, "BLOCK_T": tokens, "BLOCK_D": width, "NUM_BUFFERS": buffers}
            for warps in (4, 8):
                yield Configuration(constants, num_warps=warps, max_size=tokens, max_registers=most)


def _tiles() -> Iterator[Configuration]:
    """Where a multiprocessor holds one program anyway, the largest has the most arithmetic for its loads."""
    for rows, columns, warps in ((128, 256, 8), (128, 128, 8), (64, 128, 4), (64, 64, 4)):
        for width, stages, most in itertools.product((64, 32), (3, 4, 2), (None, 128)):
            constants = {"BLOCK_M": rows, "BLOCK_N": columns, "BLOCK_D": width, "PIECES": max(4, columns // 16)}
            yield Configuration(constants, num_warps=warps, num_stages=stages, max_registers=most)


def _products() -> Iterator[Configuration]:
    for rows, depth, width, pieces, warps in (
        (128, 64, 256, 8, 8),
        (128, 32, 256, 8, 8),
        (128, 64, 128, 4, 8),
        (128, 32, 128, 4, 8),
        (64, 64, 128, 4, 4),
        (64, 64, 64, 2, 4),
    ):
        constants = {"BLOCK_M": rows, "BLOCK_K": depth, "BLOCK_D": width, "PIECES": pieces}
        yield from _grid([constants], [warps], (3, 4, 2))


def _rows(most: int) -> Iterator[Configuration]:
    for width, elements in itertools.product((512, 1024, 2048, 4096), (1024, 2048, 4096, 8192)):
        if width <= most:
            yield from _grid([{"BLOCK_ROWS": max(1, elements // width), "BLOCK_D": width}], (4, 8, 16))


CANDIDATES: dict[str, Callable[[], Iterator[Configuration]]] = {
    "stability_forward": partial(_rows, 4096),
    "stability_backward": partial(_rows, 4096),
    "short_forward": partial(_short, (None,)),
    "short_backward": partial(_short, (None, 128)),
    "mi_scores": _tiles,
    "mi_weights": _tiles,
    "mi_gradient": _products,
    "similarity_tiles": lambda: _grid(
        [{"BLOCK_T": t, "BLOCK_D": d} for t in (32, 64, 128) for d in (32, 64, 128)], (4, 8)
    ),
    "similarity_backward": lambda: _grid(
        [{"BLOCK_T": t, "BLOCK_J": j, "BLOCK_D": 128} for t in (32, 64, 128) for j in (32, 64)], (4, 8), (2, 3)
    ),
    "pairs_forward": lambda: _grid([{"BLOCK_D": d} for d in (128, 256, 512, 1024)], (1, 2, 4)),
    "pairs_backward": lambda: _grid([{"BLOCK_D": d} for d in (512, 1024, 2048, 4096)], (1, 2, 4, 8)),
}
"""By the kernels' names in the launch table; `similarity_norms` is too short to matter."""

QUICK = ("short_backward", "mi_scores", "mi_weights", "mi_gradient")
"""Kernels of which a few candidates may matter much."""


def quick(kernel: str, own: Configuration) -> list[Configuration]:
    """Of the candidates of one of `QUICK` those few; `own` is what the table chooses."""
    return [candidate for candidate in CANDIDATES[kernel]() if _IS_QUICK[kernel](candidate, own)]


def _is_own_but_for_registers(candidate: Configuration, own: Configuration) -> bool:
    """With or without a bound that lets two programs share a multiprocessor."""
    return candidate.constants == own.constants and candidate.num_warps == own.num_warps


def _is_large_tile(candidate: Configuration, _own: Configuration) -> bool:
    """With fewer registers only those whose accumulator leaves some."""
    constants, free = candidate.constants, candidate.max_registers is None
    is_large = constants["BLOCK_M"] == 128 and constants["BLOCK_D"] == 64 and candidate.num_stages >= 3
    return is_large and (free or constants["BLOCK_N"] == 128)


def _is_large_product(candidate: Configuration, _own: Configuration) -> bool:
    constants = candidate.constants
    return constants["BLOCK_M"] == 128 and constants["BLOCK_K"] == 64 and candidate.num_stages >= 3


_IS_QUICK = {
    "short_backward": _is_own_but_for_registers,
    "mi_scores": _is_large_tile,
    "mi_weights": _is_large_tile,
    "mi_gradient": _is_large_product,
}
