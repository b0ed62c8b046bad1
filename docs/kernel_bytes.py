"""What the kernels of both losses move and multiply, by formula; `python docs/kernel_bytes.py` prints the tables.

Nothing here is measured. "Floor" is what any implementation moves: the hidden states read once and, backward, their
gradient written once. "Asked for" is what the programs load and store; what one has loaded, another often finds in the
L2 cache. Sequences are full, with 30 % of the tokens anchors, and negatives are those of the sequence.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from math import ceil
from typing import NamedTuple

from carma_kernels import _runtime
from carma_kernels.kernels import launch

BANDWIDTH, MATRIX_RATE = 3.0e12, 798e12  # an H100's, bytes and FLOP a second
ANCHORS = 0.3
ELEMENT = 2  # bytes: bf16


class Problem(NamedTuple):
    """Hidden states `[L, B, T, D]`."""

    L: int
    B: int
    T: int
    D: int

    @property
    def anchors(self) -> int:
        """Anchors of a sequence."""
        return round(ANCHORS * self.T)

    @property
    def row(self) -> int:
        """Bytes of a token, in all sequences and layers."""
        return self.L * self.B * self.D * ELEMENT

    def blocks(self, kernel: str) -> dict[str, int]:
        """A kernel's constants on an H100."""
        size = self.D if kernel.startswith("stability") else self.T
        configuration = launch.choose(kernel, _runtime.TARGETS["sm_90"], size, ELEMENT)
        assert configuration is not None
        return dict(configuration.constants)


class Cost(NamedTuple):
    """A kernel's, of all its launches."""

    kernel: str
    floor: float  # bytes
    asked: float  # bytes
    flop: float


def short_path(p: Problem) -> Iterator[Cost]:
    """Groups of up to 128 tokens."""
    T, states = p.T, p.row * p.T
    blocks = ceil(T / p.blocks("short_forward")["BLOCK_M"])
    own = T if blocks > 1 else 0  # a program's rows are loaded besides all tokens
    gram = 2 * T * T * p.L * p.B * p.D
    # tokens and rows for the product, then both again for the sums of squares, and the next layer
    yield Cost("short_forward", states, p.row * (2 * (blocks * T + own) + T), gram)
    blocks = ceil(T / p.blocks("short_backward")["BLOCK_M"])
    own = T if blocks > 1 else 0
    # the scores; M times all tokens, the rows, their two neighbours, and what is written
    yield Cost("short_backward", 2 * states, p.row * (blocks * T + own + blocks * T + 3 * T + T), 2 * gram)


def general_path(p: Problem) -> Iterator[Cost]:
    """Longer groups."""
    T, A, states, sequences = p.T, p.anchors, p.row * p.T, p.L * p.B
    yield Cost("stability_forward", states, states, 0)
    product = 2 * A * T * p.D * sequences
    weights = A * T * ELEMENT * sequences  # bytes of M'
    for kernel, written in (("mi_scores", 0), ("mi_weights", weights)):
        BM, BN = (p.blocks(kernel)[name] for name in ("BLOCK_M", "BLOCK_N"))
        tiles = ceil(A / BM) * ceil(T / BN)
        yield Cost(kernel, states, p.row * tiles * (BM + BN) + written, product)
    BM, BD = (p.blocks("mi_gradient")[name] for name in ("BLOCK_M", "BLOCK_D"))
    hidden = p.row * (ceil(A / BM) * T + ceil((T - A) / BM) * A)
    read_weights = weights * (1 + (T - A) / T) * ceil(p.D / BD)
    rows = (3 + 1) * states  # the rows, their two neighbours, and what is written
    yield Cost("mi_gradient", 2 * states, hidden + read_weights + rows, product * (1 + (T - A) / T))


def table(p: Problem) -> Iterator[str]:
    """The lines of a Markdown table, and what they add up to."""
    costs = list(short_path(p) if p.T <= 128 else general_path(p))
    states = p.row * p.T
    yield "| kernel | floor, MB | asked for, MB | times the floor | GFLOP | floor, us |"
    yield "| --- | ---: | ---: | ---: | ---: | ---: |"
    for cost in costs:
        yield _line(cost)
    flop = sum(cost.flop for cost in costs)
    both = Cost("**both losses, forward and backward**", 3 * states, sum(cost.asked for cost in costs), flop)
    yield _line(both)


def _line(cost: Cost) -> str:
    name = cost.kernel if cost.kernel.startswith("*") else f"`{cost.kernel}`"
    microseconds = max(cost.floor / BANDWIDTH, cost.flop / MATRIX_RATE) * 1e6
    numbers = (cost.floor / 1e6, cost.asked / 1e6, cost.asked / cost.floor, cost.flop / 1e9, microseconds)
    return f"| {name} | " + " | ".join(f"{number:.1f}" for number in numbers) + " |"


def page() -> Iterator[str]:
    """Everything."""
    for B, T in ((16, 64), (16, 124), (8, 1024), (1, 8192)):
        p = Problem(16, B, T, 2048)
        yield f"Llama-3.2-1B (L = {p.L}, D = {p.D}), B = {B}, T = {T}, bf16, H = {p.row * T / 1e6:.1f} MB:"
        yield ""
        yield from table(p)
        yield ""


if __name__ == "__main__":
    sys.stdout.write("\n".join(page()))
