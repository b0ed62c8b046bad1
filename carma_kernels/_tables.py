"""The tables of a batch's words, and one tensor of them all."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from carma_kernels._ranks import RankTable
from carma_kernels._span_inputs import NO_WORD

_PAD_ANCHOR = -2  # differs from every word and from NO_WORD, so a padding slot has neither positive nor negative

_NUMBERS_IN_16_BYTES = 4  # int32
Layout = dict[str, tuple[int, tuple[int, ...]]]  # where in the packed tensor each table lies, and its shape


class ContrastTable(NamedTuple):
    """Who is compared with whom, as rectangular tables: S independent groups of A anchors against V keys.

    `negatives="sequence"`: one group a sequence that has an anchor. `negatives="batch"`: one group in all.
    A padding key is a padding token of the group's sequence, which nothing may read, and carries the word `NO_WORD`; a
    padding anchor is some slot without an anchor, and carries a word nobody has. So no two slots are of one row, and
    what is made for them all can be written at once.
    """

    key_token: Tensor  # [S, V] int32, flat index b*T+t of each key, in token order
    key_word: Tensor  # [S, V] int32, the batch-unique word of each key
    anchor_slot: Tensor  # [S, A] int32, the anchor's position among its group's keys
    anchor_word: Tensor  # [S, A] int32
    num_positives: Tensor  # [S, A] int32, of the anchor: they are in so many slots right after its own
    distance: Tensor  # [M] int32, 1 .. M: how far after its anchor a positive can be; M + 1 is the longest word
    covers_batch: bool  # the keys are all B*T tokens, in order: the hidden states can be used as they lie
    word: Tensor | None = None  # [B, T] int32, as `TokenSpans.word`, but NO_WORD in groups without an anchor
    ranks: RankTable | None = None  # the same groups, and those without an anchor, in the order of the Triton kernels


def as_numbers(flags: np.ndarray) -> np.ndarray:
    """The bytes of booleans, four in an int32; the last one may hold fewer."""
    numbers = np.zeros(-(-flags.size // 4), np.int32)
    numbers.view(np.bool_)[: flags.size] = flags.reshape(-1)
    return numbers


def concatenate(tables: dict[str, np.ndarray]) -> tuple[Tensor, Layout]:
    """One int32 tensor of all tables, each at a multiple of 16 bytes, which Triton compiles other versions without."""
    layout: Layout = {}
    offset = 0
    for name, table in tables.items():
        layout[name] = (offset, table.shape)
        offset += -(-table.size // _NUMBERS_IN_16_BYTES) * _NUMBERS_IN_16_BYTES
    packed = np.zeros(offset, np.int32)
    for (start, _), table in zip(layout.values(), tables.values(), strict=True):
        packed[start : start + table.size] = table.reshape(-1)
    return torch.from_numpy(packed), layout


def contrast_tables(
    word: np.ndarray, valid: np.ndarray, is_anchor: np.ndarray, first_token: np.ndarray, num_positives: np.ndarray
) -> dict[str, np.ndarray]:
    """The rectangular tables of `ContrastTable` for groups given as rows of tokens, all but `distance`.

    Args:
        word, valid, is_anchor: `[S, N]`: of each token its word, and whether it is valid and an anchor.
        first_token: `[S]` flat index of each row's first token.
        num_positives: of each anchor, in the order of the rows.
    """
    token = first_token[:, None] + np.arange(word.shape[1], dtype=np.int32)  # [S, N]
    is_key, (key_token, key_word, is_anchor) = _chosen_first(valid, token, word, is_anchor)  # [S, V] each
    slot = np.broadcast_to(np.arange(is_key.shape[1], dtype=np.int32), is_key.shape)
    found, (anchor_slot, anchor_word) = _chosen_first(is_anchor, slot, key_word)  # [S, A] each
    counts = np.zeros(found.shape, np.int32)
    counts[found] = num_positives
    return {
        "key_token": key_token,
        "key_word": np.where(is_key, key_word, NO_WORD),
        "anchor_slot": anchor_slot,
        "anchor_word": np.where(found, anchor_word, _PAD_ANCHOR),
        "num_positives": counts,
    }


def _chosen_first(chosen: np.ndarray, *tables: np.ndarray) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
    """Of each row `[S, N]` the chosen values, in order, then as many of the others as fill it up to the fullest row.

    Returns:
        Which of the values are chosen ones, and the values of each of the tables.
    """
    if chosen.all():
        return chosen, tables
    count = chosen.sum(axis=1)
    most = int(count.max(initial=0))
    room = most - count  # [S]
    filled = np.arange(most) < count[:, None]  # [S, most]
    if not room.any():
        return filled, tuple(table[chosen].reshape(filled.shape) for table in tables)
    spare = ~chosen & (np.cumsum(~chosen, axis=1) <= room[:, None])  # [S, N] the first others
    found = []
    for table in tables:
        aligned = np.empty(filled.shape, table.dtype)
        aligned[filled] = table[chosen]
        aligned[~filled] = table[spare]
        found.append(aligned)
    return filled, tuple(found)
