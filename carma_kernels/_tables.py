"""The tables of a batch's words, and one tensor of them all."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from carma_kernels._span_inputs import NO_WORD

_PAD_ANCHOR = -2  # differs from every word and from NO_WORD, so a padding slot has neither positive nor negative

_NUMBERS_IN_16_BYTES = 4  # int32
Layout = dict[str, tuple[int, tuple[int, ...]]]  # where in the packed tensor each table lies, and its shape


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
    word: np.ndarray, valid: np.ndarray, is_anchor: np.ndarray, first_token: np.ndarray
) -> dict[str, np.ndarray]:
    """The rectangular tables of `ContrastTable` for groups given as rows of tokens, all but `distance`.

    Args:
        word, valid, is_anchor: `[S, N]`: of each token its word, and whether it is valid and an anchor.
        first_token: `[S]` flat index of each row's first token.
    """
    token = first_token[:, None] + np.arange(word.shape[1], dtype=np.int32)  # [S, N]
    is_key, (key_token, key_word, is_anchor) = _chosen_first(valid, token, word, is_anchor)  # [S, V] each
    slot = np.broadcast_to(np.arange(is_key.shape[1], dtype=np.int32), is_key.shape)
    word_ends = np.where(is_anchor, np.int32(is_key.shape[1]), slot)  # [S, V] its last slot, at that slot
    last = np.minimum.accumulate(word_ends[:, ::-1], axis=1)[:, ::-1]  # [S, V] of the slot's word
    found, (anchor_slot, anchor_word, num_positives) = _chosen_first(is_anchor, slot, key_word, last - slot)
    return {
        "key_token": key_token,
        "key_word": np.where(is_key, key_word, NO_WORD),
        "anchor_slot": anchor_slot,
        "anchor_word": np.where(found, anchor_word, _PAD_ANCHOR),
        "num_positives": num_positives,
    }


def _chosen_first(chosen: np.ndarray, *tables: np.ndarray) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
    """Of each row `[S, N]` the chosen values, in order, then as many of the others as fill it up to the fullest row.

    Returns:
        Which of the values are chosen ones, and the values of each of the tables.
    """
    if chosen.all():
        return chosen, tables
    count = chosen.sum(axis=1)
    room = count.max(initial=0) - count  # [S]
    filled = np.arange(count.max(initial=0)) < count[:, None]  # [S, max count]
    spare = ~chosen & (np.cumsum(~chosen, axis=1) <= room[:, None])  # [S, N] the first others
    found = []
    for table in tables:
        aligned = np.empty(filled.shape, table.dtype)
        aligned[filled] = table[chosen]
        aligned[~filled] = table[spare]
        found.append(aligned)
    return filled, tuple(found)
