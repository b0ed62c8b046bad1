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
    count: Tensor  # [S, 2] int32, anchors and valid tokens: the former have the first ranks, then come the others
    first_pair: Tensor  # [S, A+1] int32, the first pair of the anchor of each rank, and where its group's pairs end
    num_negatives: Tensor  # [S, A] int32, of the anchor of each rank
    num_pairs: int


def rank_tables(
    word: np.ndarray, is_valid: np.ndarray, is_anchor: np.ndarray, word_length: np.ndarray
) -> dict[str, np.ndarray]:
    """The tensors of a `RankTable`.

    Args:
        word, is_valid, is_anchor: `[S, N]`, of each token of each group.
        word_length: `[W]` tokens of each word of two or more, in the order of the batch.
    """
    S, N = word.shape
    R = -(-N // RANK_ALIGNMENT) * RANK_ALIGNMENT
    kind = np.where(is_anchor, np.int8(0), np.where(is_valid, np.int8(1), np.int8(2)))  # [S, N]
    order = np.argsort(kind, axis=1, kind="stable")  # [S, N]; of bytes, hence a radix sort
    num_anchors, num_valid = is_anchor.sum(axis=1), is_valid.sum(axis=1)  # [S] each
    token = np.zeros((S, R), np.int32)
    token[:, :N] = order
    rank_word = np.full((S, R), -1, np.int32)
    rank_word[:, :N] = np.take_along_axis(word, order, axis=1)

    # of the batch's anchors in token order: a word of n tokens has n - 1, of n - 1, n - 2, .. 1 pairs
    first = np.cumsum(word_length - 1) - (word_length - 1)  # [W] a word's first anchor
    length = np.repeat(word_length, word_length - 1)  # [anchors]
    num_positives = length - 1 - (np.arange(len(length)) - np.repeat(first, word_length - 1))
    first_pair = np.concatenate([[0], np.cumsum(num_positives)])  # [anchors + 1]

    A = int(num_anchors.max(initial=0))
    anchors_before = np.cumsum(num_anchors) - num_anchors  # [S]
    anchor = anchors_before[:, None] + np.minimum(np.arange(A + 1), num_anchors[:, None])  # [S, A+1]
    length = np.append(length, 0)
    return {
        "token": token,
        "word": rank_word,
        "count": np.stack([num_anchors, num_valid], axis=1),
        "first_pair": first_pair[anchor],
        "num_negatives": num_valid[:, None] - length[anchor[:, :A]],
    }
