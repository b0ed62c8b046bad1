"""The order in which the general MI kernels go through a group's tokens: anchors, other valid tokens, padding.

In this *rank space* tiles are dense: no row of a tile of anchors is wasted on another token, and no tile holds padding
between its tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from torch import Tensor

RANK_ALIGNMENT = 256
"""`R` is a multiple of it, so that a tile of ranks ends within the tables: the largest tile there is."""


class RankTable(NamedTuple):
    """S groups of N tokens each, `S*N = B*T`: group s holds the flat tokens `s*N .. (s+1)*N - 1`, padding included.

    `negatives="sequence"`: a group for each sequence. `negatives="batch"`: one group. R is N, rounded up.
    """

    token: Tensor  # [S, R] int32, place in its group of the token of each rank; 0 beyond N
    word: Tensor  # [S, R] int32, its batch-unique word; -1 for padding and beyond N
    size: Tensor  # [S, 2] int32, anchors and valid tokens (none in a sequence without anchors): these come after those
    first_pair: Tensor  # [S, A+1] int32, the first pair of the anchor of each rank, and where its group's pairs end
    num_negatives: Tensor  # [S, A] int32, of the anchor of each rank
    num_pairs: int


class AnchorNumbers(NamedTuple):
    """Of the batch's anchors in token order."""

    first_pair: np.ndarray  # [anchors + 1], and the number of pairs
    word_length: np.ndarray  # [anchors + 1], and a 0


def anchor_numbers(word_length: np.ndarray) -> AnchorNumbers:
    """From the lengths `[W]` of the words of two tokens or more, in the order of the batch."""
    num_anchors = word_length - 1  # [W]; they have word_length - 1, .., 2, 1 pairs
    length = np.repeat(word_length, num_anchors)  # [anchors]
    place = np.arange(len(length)) - np.repeat(np.cumsum(num_anchors) - num_anchors, num_anchors)
    first_pair = np.zeros(len(length) + 1, np.int64)
    np.cumsum(length - 1 - place, out=first_pair[1:])
    return AnchorNumbers(first_pair, np.append(length, 0))


def rank_tables(
    word: np.ndarray, is_valid: np.ndarray, is_anchor: np.ndarray, anchors: AnchorNumbers
) -> dict[str, np.ndarray]:
    """The tensors of a `RankTable`.

    Args:
        word, is_valid, is_anchor: `[S, N]`, of each token of each group.
        anchors: of the batch.
    """
    S, N = word.shape
    R = -(-N // RANK_ALIGNMENT) * RANK_ALIGNMENT
    num_anchors, num_valid = is_anchor.sum(axis=1), is_valid.sum(axis=1)  # [S] each
    place = np.arange(N, dtype=np.int32)
    anchors_so_far = np.cumsum(is_anchor, axis=1, dtype=np.int32)  # [S, N], this token included
    valid_so_far = np.cumsum(is_valid, axis=1, dtype=np.int32)
    rank_of_other = num_anchors[:, None].astype(np.int32) + valid_so_far - anchors_so_far - 1
    rank = np.where(is_anchor, anchors_so_far - 1, rank_of_other)  # [S, N]
    if not is_valid.all():
        rank = np.where(is_valid, rank, num_valid[:, None].astype(np.int32) + place - valid_so_far)
    rank += (np.arange(S, dtype=np.int32) * R)[:, None]  # flat
    token = np.zeros(S * R, np.int32)
    token[rank] = place
    rank_word = np.full(S * R, -1, np.int32)
    rank_word[rank] = word

    A = int(num_anchors.max(initial=0))
    before = np.cumsum(num_anchors) - num_anchors  # [S]
    anchor = before[:, None] + np.minimum(np.arange(A + 1), num_anchors[:, None])  # [S, A+1]
    return {
        "token": token.reshape(S, R),
        "word": rank_word.reshape(S, R),
        "size": np.stack([num_anchors, num_valid], axis=1),
        "first_pair": anchors.first_pair[anchor],
        "num_negatives": num_valid[:, None] - anchors.word_length[anchor[:, :A]],
    }
