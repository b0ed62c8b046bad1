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
    """The rectangular tables of `ContrastTable` for groups given as rows of tokens.

    Args:
        word, valid, is_anchor: `[S, N]`: of each token its word, and whether it is valid and an anchor.
        first_token: `[S]` flat index of each row's first token.
    """
    token = first_token[:, None] + np.arange(word.shape[1], dtype=np.int32)  # [S, N]
    slot = np.cumsum(valid, axis=1, dtype=np.int32) - 1  # [S, N] place among the row's valid tokens
    key_token, is_key = _left_aligned(token, valid)
    anchor_slot, is_anchor_slot = _left_aligned(slot, is_anchor)
    return {
        "key_token": key_token,
        "key_word": np.where(is_key, _left_aligned(word, valid)[0], NO_WORD),
        "anchor_slot": anchor_slot,
        "anchor_word": np.where(is_anchor_slot, _left_aligned(word, is_anchor)[0], _PAD_ANCHOR),
    }


def _left_aligned(values: np.ndarray, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The chosen values of each row `[S, N]`, from the left, then copies of the first; and which are which."""
    if chosen.all():
        return values, chosen
    count = chosen.sum(axis=1)
    filled = np.arange(count.max(initial=0)) < count[:, None]  # [S, max count]
    first = values[np.arange(len(values)), chosen.argmax(axis=1)]
    table = np.repeat(first[:, None], filled.shape[1], axis=1)
    table[filled] = values[chosen]
    return table, filled
