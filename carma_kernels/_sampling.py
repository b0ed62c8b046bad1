"""Pairs of a batch's words, and negatives drawn for each."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from carma_kernels.pairs import NO_TOKEN


def pairs_with_negatives(
    spans: np.ndarray, valid: np.ndarray, valid_tokens: Tensor, size: tuple[int, ...], generator: torch.Generator | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Every pair, and tokens drawn from the valid ones of its sequence outside its word: flat int32, on the device.

    Args:
        spans: `[W, 3]`, of each word its sequence, start and end.
        valid: `[B, T]` bool.
        valid_tokens: flat int32, in order, on the device that is to draw.
        size: of the negatives, with -1 for the number of pairs P.
        generator: on that device, or None for torch's own.

    Returns:
        Anchors `[P]`, positives `[P]`, and negatives, of which a pair without candidates has -1 in every slot.
    """
    T = valid.shape[1]
    anchor, positive, first, length = _pairs(spans, T)
    before = np.zeros(valid.size + 1, np.int64)  # valid tokens ahead of each
    np.cumsum(valid.reshape(-1), out=before[1:])
    sequence_start = anchor // max(T, 1) * T
    before_sequence = before[sequence_start]
    num_candidates = before[sequence_start + T] - before_sequence - length
    columns = np.stack(
        [
            anchor,
            positive,
            num_candidates,
            np.maximum(num_candidates, 1),
            before[first] - before_sequence,  # candidates ahead of the word
            np.where(num_candidates > 0, length, 0),  # valid tokens to skip after them
            before_sequence,
        ]
    )
    of_pairs = torch.from_numpy(columns.astype(np.int32)).to(valid_tokens.device)
    candidates, choices, ahead, skipped, valid_before = of_pairs[2:, :, None]  # [P, 1] each

    shape = tuple(len(anchor) if number == -1 else number for number in size)
    drawn = torch.empty(shape, dtype=torch.int32, device=valid_tokens.device)
    # one of 2^31 numbers: the chances of n candidates differ by one part in 2^31 / n at most
    drawn.random_(generator=generator).remainder_(choices)
    drawn.add_((drawn >= ahead) * skipped).add_(valid_before)  # from the number of a candidate to that of a valid token
    negatives = valid_tokens.index_select(0, drawn.view(-1)).view(shape)
    if (num_candidates <= 0).any():
        negatives.masked_fill_(candidates <= 0, NO_TOKEN)
    return of_pairs[0].clone(), of_pairs[1].clone(), negatives


def _pairs(spans: np.ndarray, T: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Anchor, positive, first token of the word (all flat) and length of the word, `[P]` each."""
    spans = spans[spans[:, 2] - spans[:, 1] > 1].astype(np.int64)
    length = spans[:, 2] - spans[:, 1]
    first = spans[:, 0] * T + spans[:, 1]  # [W] flat
    word = np.repeat(np.arange(len(spans)), length * (length - 1) // 2)  # [P]
    # anchors of a word of n tokens: the i-th one has n - 1 - i positives
    anchor_word = np.repeat(np.arange(len(spans)), length)  # [sum of lengths]
    anchor_place = np.arange(len(anchor_word)) - np.repeat(np.cumsum(length) - length, length)
    num_positives = np.repeat(length, length) - 1 - anchor_place
    place = np.repeat(anchor_place, num_positives)  # [P] the anchor's place in its word
    offset = np.arange(len(place)) - np.repeat(np.cumsum(num_positives) - num_positives, num_positives)
    anchor = first[word] + place
    return anchor, anchor + 1 + offset, first[word], length[word]
