"""Small random batches for the proofs: ragged masks on either side, words of 1 to 4 tokens, tokens in no word."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from carma_kernels.spans import PairIndex, TokenSpans


@dataclass(frozen=True)
class Case:
    hidden: Tensor  # [L, B, T, D] fp64, NaN in the padding
    words: list[list[tuple[int, int]]]
    valid: Tensor  # [B, T] bool
    spans: TokenSpans


def random_case(
    seed: int, *, pad: str = "right", L: int = 2, B: int = 3, T: int = 7, D: int = 3, poison: bool = True
) -> Case:
    """A batch in which the last sequence has one word that covers all its valid tokens, if B > 1."""
    rng = random.Random(seed)
    words, rows = [], []
    for b in range(B):
        length = T if b == 0 else rng.randint(2, T - 1)
        first = T - length if pad == "left" else 0
        end = first + length
        if b == B - 1 and B > 1:
            row = [(first, end)]
        else:
            row, at = [(first, first + 2)], first + 2
            while at < end:
                stop = min(end, at + rng.randint(1, 4))
                row += [(at, stop)] * (rng.random() < 0.8)
                at = stop
        words.append(row)
        rows.append([first <= t < end for t in range(T)])
    valid = torch.tensor(rows)
    hidden = torch.randn(L, B, T, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if poison:
        hidden[:, ~valid] = float("nan")
    return Case(hidden, words, valid, TokenSpans.from_lists(words, seq_len=T, attention_mask=valid))


def random_pairs(case: Case, seed: int, *, num_layers: int | None = None) -> PairIndex:
    """Sampled pairs with repetition, some slots empty, and one pair without any negative."""
    generator = torch.Generator().manual_seed(seed)
    pairs = case.spans.sample_pairs(k=4, generator=generator, num_layers=num_layers)
    negatives = pairs.negatives.clone()  # [(L,) P, K]
    negatives[torch.rand(negatives.shape, generator=generator) < 0.25] = -1
    negatives[..., 0, :] = -1
    return PairIndex(pairs.anchor, pairs.positive, negatives, pairs.shape)
