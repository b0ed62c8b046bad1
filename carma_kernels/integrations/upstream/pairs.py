"""Which tokens the published loss compares: the pairs of a batch and their negatives.

`W` words, `M` pair terms: with the cross product over the batch, each of the `P` pairs once for every sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Ints = NDArray[np.int64]


class Span(Protocol):
    """The published `TokenSpan`, as far as the loss reads it: tokens `[start_idx, end_idx)`."""

    @property
    def start_idx(self) -> int:
        """First token."""

    @property
    def end_idx(self) -> int:
        """One past the last token."""


@dataclass(frozen=True)
class PairTerms:
    """Terms of the loss in the published order: sequence, word, pair; anchor and positive are positions in it."""

    sequence: Ints  # [M]
    anchor: Ints  # [M]
    positive: Ints  # [M]
    gap_start: Ints  # [M] the word, whose tokens are no negatives
    gap_length: Ints  # [M]
    candidates: Ints  # [M] how many negatives there are to draw from

    def draw(self, uniform: NDArray[np.float64]) -> Ints:
        """Positions of the negatives `[L, M, K]` for uniform numbers `[L, M, K]`, ascending for each pair.

        A pair that has nothing to draw from gets its anchor, which brings no other token into play.
        """
        position = (uniform * self.candidates[:, None]).astype(np.int64)  # among those outside of the word
        position.sort(axis=-1)
        position += (position >= self.gap_start[:, None]) * self.gap_length[:, None]
        if not self.candidates.all():
            nothing = self.candidates == 0
            position[:, nothing] = self.anchor[nothing, None]
        return position


def pair_terms(
    token_spans: Sequence[Sequence[Span]],
    shape: tuple[int, int],
    *,
    per_sample: bool,
    include_last_span: bool,
    padding_negatives: bool,
) -> PairTerms:
    """The terms of a batch.

    Args:
        token_spans: the words of each sample.
        shape: `(B, T)`.
        per_sample: a sample's pairs on its own sequence only, instead of on every sequence.
        include_last_span: take each sample's last span, too.
        padding_negatives: draw from all T positions, instead of those before the end of the sequence's last span.
    """
    B, T = shape
    spans = [span for sample in token_spans for span in (sample if include_last_span else sample[:-1])]
    sizes = [len(sample) - (not include_last_span and len(sample) > 0) for sample in token_spans]
    owner = np.repeat(np.arange(len(token_spans)), sizes)  # [spans]
    start, end = (
        np.array([getattr(span, name) for span in spans], dtype=np.int64) for name in ("start_idx", "end_idx")
    )
    is_word = end - start > 1
    owner, start, end = owner[is_word], start[is_word], end[is_word]  # [W]
    first = _first_positions(start, end, T)
    word, before, after = _pairs_in_words(end - start)  # [P]
    gap_start, gap_end = np.maximum(start, 0), np.maximum(end, 0)  # a span counted from the end leaves no gap
    limit = np.full(B, T) if padding_negatives else _real_lengths(token_spans, T)  # [B]

    if per_sample:
        sequence = owner[word]
    else:
        sequence = np.repeat(np.arange(B), len(word))
        word, before, after = (np.tile(of_pair, B) for of_pair in (word, before, after))  # [M]
    gap_end = np.minimum(gap_end[word], limit[sequence])
    gap_start = np.minimum(gap_start[word], limit[sequence])
    return PairTerms(
        sequence=sequence,
        anchor=first[word] + before,
        positive=first[word] + after,
        gap_start=gap_start,
        gap_length=gap_end - gap_start,
        candidates=limit[sequence] - (gap_end - gap_start),
    )


def places_in_gram(terms: PairTerms, negatives: Ints, T: int) -> tuple[Tensor, Tensor | None]:
    """Where `PairSimilarity` finds the similarities of `negatives` `[L, M, K]`, and of the positives before them.

    Returns:
        `[L, M, 1+K]` places in `[B, A, T]`, and the positions `[A]` of the anchors, or None where every position is
        taken for one: above half of them, a product of all tokens with all is faster, as it serves both sides of pairs.
    """
    anchors, slot = np.unique(terms.anchor, return_inverse=True)  # [A], [M]
    every_position = 2 * len(anchors) > T
    if every_position:
        anchors, slot = np.arange(T), terms.anchor
    L, M, K = negatives.shape
    places = np.empty((L, M, 1 + K), dtype=np.int64)
    places[..., 0] = terms.positive
    places[..., 1:] = negatives
    places += ((terms.sequence * len(anchors) + slot) * T)[:, None]
    return torch.from_numpy(places), None if every_position else torch.from_numpy(anchors)


def check_strictly(token_spans: Sequence[Sequence[Span]]) -> None:
    """Refuse words that the published code takes in its own way: from the end, empty, overlapping or repeated."""
    for index, sample in enumerate(token_spans):
        reached = 0
        for span in sample:
            if not reached <= span.start_idx < span.end_idx:
                raise ValueError(
                    f"token_spans[{index}] must hold words in order that are not empty and do not overlap, got "
                    f"[{span.start_idx}, {span.end_idx}) after token {reached}. Leave strict=True out to take them as "
                    "published."
                )
            reached = span.end_idx


def _first_positions(start: Ints, end: Ints, T: int) -> Ints:
    """Where words begin; a negative index counts from the end of the sequence, as in a slice."""
    first, stop = (np.where(bound < 0, bound + T, bound) for bound in (start, end))
    outside = (first < 0) | (stop > T) | (stop - first != end - start)
    if outside.any():
        at = int(outside.argmax())
        raise ValueError(
            f"token_spans must lie within the {T} tokens of the sequences, got [{start[at]}, {end[at]}). Cut the spans "
            "to the length that the tokenizer truncates to."
        )
    return first


def _pairs_in_words(lengths: Ints) -> tuple[Ints, Ints, Ints]:
    """Of every pair: its word, and the places `i < j` of its tokens in the word; `[P]` each."""
    pairs = [_pairs_of(int(length)) for length in lengths]
    word = np.repeat(np.arange(len(pairs)), [len(of_word) for of_word in pairs])
    both = np.concatenate([np.empty((0, 2), dtype=np.int64), *pairs])
    return word, both[:, 0], both[:, 1]


@lru_cache(maxsize=256)
def _pairs_of(length: int) -> Ints:
    """`[pairs, 2]` in lexicographic order."""
    return np.stack(np.triu_indices(length, k=1), axis=1)


def _real_lengths(token_spans: Sequence[Sequence[Span]], T: int) -> Ints:
    """Tokens up to the end of each sample's last span, `[B]`."""
    return np.array([min(max(sample[-1].end_idx, 0), T) if sample else 0 for sample in token_spans], dtype=np.int64)
