"""The losses once more, with nothing but Python's numbers: lists in, floats out, `h[l][b][t]` a list of D floats.

Written differently from `csrc_ref` wherever there is another way to say it, so that no slip can be in both.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

Vector = list[float]
Layer = list[list[Vector]]  # [B][T][D]
Token = tuple[int, int]  # (b, t)


def similarity(x: Vector, y: Vector, metric: str, temperature: float) -> float:
    dot = math.fsum(a * b for a, b in zip(x, y, strict=True))
    if metric == "dot":
        return dot / temperature
    lengths = math.hypot(*x), math.hypot(*y)
    return 0.0 if min(lengths) <= 1e-8 else dot / (lengths[0] * lengths[1] * temperature)


def pair_cost(
    h: Layer, i: Token, j: Token, others: list[Token], metric: str, temperature: float, k: float | None
) -> float:
    """`-log(e^s_ij / (e^s_ij + sum_n e^s_in)) = log(1 + sum_n e^(s_in - s_ij))`, the sum scaled by `k / |N(i)|`."""
    anchor, positive = (h[b][t] for b, t in (i, j))
    s_ij = similarity(anchor, positive, metric, temperature)
    odds = math.fsum(math.exp(similarity(anchor, h[b][t], metric, temperature) - s_ij) for b, t in others)
    if k is not None and others:
        odds *= k / len(others)
    return math.log1p(odds)


def pairs_of_words(
    words: list[list[tuple[int, int]]], valid: list[list[bool]], negatives: str
) -> Iterator[tuple[Token, Token, list[Token]]]:
    """Anchor, positive and negatives of every pair."""
    for b, row in enumerate(words):
        for start, end in row:
            others = [
                (c, t)
                for c, mask in enumerate(valid)
                for t, is_valid in enumerate(mask)
                if is_valid and (c == b or negatives == "batch") and not (c == b and start <= t < end)
            ]
            for i in range(start, end):
                for j in range(i + 1, end):
                    yield (b, i), (b, j), others


def stability_terms(h: list[Layer], valid: list[list[bool]] | None, eps: float) -> list[float]:
    """The `L-1` terms; the counts of the three means cancel but for `eps`."""
    terms = []
    for layer, after in pairwise(h):
        elements = [
            (x, y)
            for b, row in enumerate(layer)
            for t, vector in enumerate(row)
            if valid is None or valid[b][t]
            for x, y in zip(vector, after[b][t], strict=True)
        ]
        change = math.fsum((y - x) ** 2 for x, y in elements)
        size = math.fsum(x * x + y * y for x, y in elements)
        terms.append(change / (size + eps * len(elements)) if elements else 0.0)
    return terms
