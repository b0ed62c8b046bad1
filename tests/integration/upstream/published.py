"""The published losses' semantics in plain loops, the drop-in's oracle: every token fetched, every number drawn alone.

After the behaviour of github.com/nura-j/CARMA, `src/optm_losses.py`, commit 0106af6; the words are ours.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

Word = tuple[int, int]
Drawer = Callable[[], float]


@dataclass(frozen=True)
class Span:
    """As the loss reads the published `TokenSpan`."""

    start_idx: int
    end_idx: int


def as_spans(words: Sequence[Sequence[Word]]) -> list[list[Span]]:
    return [[Span(start, end) for start, end in sample] for sample in words]


def as_cache(layers: Sequence[Tensor], prefix: str = "transformer.h.") -> dict[str, Tensor]:
    return {f"{prefix}{number}": h for number, h in enumerate(layers)}


def mi_loss(
    layers: Sequence[Tensor],
    words: Sequence[Sequence[Word]],
    *,
    temperature: float = 0.1,
    num_negatives: int = 5,
    metric: str = "cosine",
) -> Tensor:
    """L times `[B, T, D]` to 0-d."""
    of_layers = [torch.stack(layer_terms(h, words, temperature, num_negatives, metric)).mean() for h in layers]
    return torch.stack(of_layers).mean()


def layer_terms(
    h: Tensor, words: Sequence[Sequence[Word]], temperature: float, num_negatives: int, metric: str
) -> list[Tensor]:
    """What each pair of each word of each sample costs, on each sequence in turn."""
    terms = []
    for sequence in h:  # [T, D]
        for sample in words:
            for start, end in sample[:-1]:
                for i, j in combinations(range(start, end), 2):
                    drawn = draw(start, end, len(sequence), num_negatives)
                    positive, *negatives = (
                        (similarity(sequence[i], sequence[other], metric) / temperature).exp() for other in (j, *drawn)
                    )
                    terms.append(-(positive / (positive + sum(negatives))).log())
    return terms


def draw(start: int, end: int, T: int, k: int, uniform: Drawer = random.random) -> list[int]:
    """Positions outside of the word, ascending."""
    outside = [t for t in range(T) if t < start or t >= end]
    return sorted(outside[math.floor(uniform() * len(outside))] for _ in range(k))


def similarity(one: Tensor, other: Tensor, metric: str) -> Tensor:
    return F.cosine_similarity(one, other, dim=0) if metric == "cosine" else one @ other


def stability_loss(layers: Sequence[Tensor]) -> Tensor | float:
    """L times `[B, T, D]` to 0-d, or to a Python number for a single layer."""
    return sum(
        (
            ((following - h) ** 2).mean() / ((h**2).mean() + (following**2).mean() + 1e-8)
            for h, following in pairwise(layers)
        ),
        0.0,
    )
