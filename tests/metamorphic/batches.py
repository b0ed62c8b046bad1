"""Random sequences that hypothesis can shrink, and the batches in which they can be laid out."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

import carma_kernels as ck
from tests.cases import FP64, Backend, padded, read

L, D = 3, 4


@st.composite
def sequences(draw: st.DrawFn, min_size: int = 1) -> list[str]:
    """Rows as in `DRAWINGS`, without padding: words of one to four tokens, tokens in no word, nothing at all."""
    pieces = st.lists(st.tuples(st.integers(1, 4), st.booleans()), max_size=4)
    rows = draw(st.lists(pieces, min_size=min_size, max_size=4))
    letters = cycle("abcdefgh")
    return ["".join(length * (next(letters) if is_word else ".") for length, is_word in row) for row in rows]


@dataclass(frozen=True)
class Layout:
    """How the sequences of a batch are padded."""

    extra: int = 0  # tokens more than the longest sequence has
    side: str = "right"
    fill: float = 0.0  # what the padding holds


layouts = st.builds(
    Layout,
    st.integers(0, 9),
    st.sampled_from(["left", "right", "both"]),
    st.sampled_from([0.0, -1.5, 1e30, torch.inf, torch.nan]),
)
seeds = st.integers(0, 2**16)


def tokens_of(rows: list[str], seed: int) -> list[Tensor]:
    """Hidden states of the real tokens, `[L, n, D]` fp64 for each sequence."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(L, len(row), D, generator=generator, dtype=FP64) for row in rows]


@dataclass(frozen=True)
class LaidOut:
    """A batch, and where its real tokens lie."""

    hidden: Tensor  # [L, B, T, D]
    spans: ck.TokenSpans
    mask: Tensor  # [B, T] bool

    def tokens(self, of: Tensor) -> list[Tensor]:
        """The real tokens of `[L, B, T, D]`, `[L, n, D]` for each sequence."""
        return [of[:, b, self.mask[b]] for b in range(len(self.mask))]


def lay_out(rows: list[str], tokens: list[Tensor], layout: Layout, backend: Backend) -> LaidOut:
    T = max(map(len, rows), default=0) + layout.extra
    drawing = [padded(row.ljust(T, "_"), layout.side) for row in rows]
    words, valid = read(drawing)
    hidden = torch.full((L, len(rows), T, D), layout.fill, dtype=FP64)
    for b, states in enumerate(tokens):
        hidden[:, b, valid[b]] = states
    return LaidOut(
        hidden.to(backend.device, backend.sharpest),
        ck.TokenSpans.from_lists(words, seq_len=T, attention_mask=valid).to(backend.device),
        valid.to(backend.device),
    )


LOSSES = ["sequence", "batch", "dot", "stability", "carma"]


def run(name: str, batch: LaidOut, backend: Backend, **more: Any) -> tuple[Tensor, Tensor]:
    """The loss `[L]`, `[L-1]` or 0-d, and the gradient of its sum, `[L, B, T, D]`."""
    hidden = batch.hidden.clone().requires_grad_()
    options = {"backend": backend.name, **more}
    if name == "stability":
        loss = ck.stability_loss(hidden, mask=batch.mask, reduction="none", **options)
    elif name == "carma":
        config = ck.CarmaConfig(temperature=0.3, match_negatives=5)
        loss = ck.carma_loss(hidden, batch.spans, config, **options).loss
    else:
        asked: dict[str, Any] = {"negatives": name} if name != "dot" else {"metric": "dot"}
        loss = ck.mi_loss(hidden, batch.spans, temperature=0.3, reduction="none", **asked, **options)
    (gradient,) = torch.autograd.grad(loss.sum(), hidden)
    return loss.detach(), gradient


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """Up to the order of additions."""
    eps = torch.finfo(expected.dtype).eps
    largest = expected.abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(actual, expected, rtol=0, atol=1000 * eps * max(largest, eps))
