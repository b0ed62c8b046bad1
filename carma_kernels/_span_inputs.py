"""Words and masks as a caller passes them, made into checked arrays."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
from torch import Tensor

NO_WORD = -1


def host_array(value: Any, name: str) -> np.ndarray:
    if isinstance(value, Tensor):
        if value.device.type != "cpu":
            raise ValueError(
                f"{name} is on {value.device}; spans are built on the host, in the collator, so that training never "
                f"waits for the device. Pass {name}.cpu(), or build the spans before moving the batch."
            )
        return (value.detach().double() if value.is_floating_point() else value).numpy()
    return np.asarray(value)


def check_size(B: int, T: int) -> None:
    if B * T >= 2**31:
        raise ValueError(f"a batch of {B} x {T} tokens is beyond the 2^31 - 1 that a token index can hold; split it.")


def check_input_ids(input_ids: Any, encoded: list[list[int]]) -> None:
    """Refuse a batch whose tokens, where the host has them, are no longer those that its tokenizer encoded."""
    if input_ids is None or (isinstance(input_ids, Tensor) and input_ids.device.type != "cpu"):
        return
    rows = input_ids.tolist() if isinstance(input_ids, Tensor | np.ndarray) else list(input_ids)
    rows = [rows] if not rows or is_index(rows[0]) else [list(row) for row in rows]  # one text: without a batch
    if rows == encoded:
        return
    end = min(len(rows), len(encoded))
    b = next((b for b in range(end) if rows[b] != encoded[b]), end)
    raise ValueError(
        f"batch['input_ids'] is not what the tokenizer encoded, from row {b} on: it was sorted, cut or replaced, and "
        "the word ids were not. Build the spans before that, and index them like the batch: spans = "
        "TokenSpans.from_encoding(batch), then spans[order]."
    )


def word_id_array(word_ids: Any) -> np.ndarray:
    if isinstance(word_ids, Tensor | np.ndarray):
        dtype = word_ids.dtype
        ids = host_array(word_ids, "word_ids")
        if ids.ndim != 2:
            raise ValueError(f"word_ids must be [B, T], got shape {list(ids.shape)}. One row a sequence.")
        if not np.issubdtype(ids.dtype, np.integer):
            raise TypeError(
                f"word_ids must be integers (negative: no word), got {dtype}. Convert them to torch.int64 or np.int64."
            )
        check_size(*ids.shape)
        return ids.astype(np.int64)
    if not isinstance(word_ids, Sequence) or not all(isinstance(row, Sequence | np.ndarray) for row in word_ids):
        raise TypeError(
            "word_ids must be one list of word ids for each sequence, or an integer tensor [B, T], got "
            f"{type(word_ids).__name__}. For one sequence pass [word_ids]."
        )
    lengths = {len(row) for row in word_ids}
    if len(lengths) > 1:
        raise ValueError(
            f"word_ids has rows of {min(lengths)} to {max(lengths)} tokens; all must have the length of the model's "
            "input. Pad the rows with None where the input is padded, and pass attention_mask."
        )
    flat = [NO_WORD if word is None else word for word in chain.from_iterable(word_ids)]
    ids = np.array(flat) if flat else np.zeros(0, np.int64)
    if not np.issubdtype(ids.dtype, np.integer):
        names = ", ".join(sorted({type(word).__name__ for word in flat if not isinstance(word, int | np.integer)}))
        raise TypeError(f"word_ids must hold ints, or None for a token in no word, got {names or ids.dtype}.")
    return ids.astype(np.int64, copy=False).reshape(len(word_ids), max(lengths, default=0))


def mask_array(attention_mask: Any, shape: tuple[int, ...]) -> np.ndarray:
    if attention_mask is None:
        return np.ones(shape, dtype=bool)
    try:
        mask = host_array(attention_mask, "attention_mask")
    except ValueError as error:
        if isinstance(attention_mask, Tensor):
            raise
        raise ValueError(
            "attention_mask must be [B, T] with 0 for padding, got rows of different lengths. Pad them like the words."
        ) from error
    if not mask.size and 0 in shape:  # no sequences: a list has no second dimension then
        return np.ones(shape, dtype=bool)
    if mask.shape != shape:
        raise ValueError(
            f"attention_mask has shape {list(mask.shape)}, the words {list(shape)}; both must be [B, T] of the same "
            "padded batch."
        )
    if mask.dtype == object:
        raise TypeError("attention_mask must hold numbers or booleans, 0 for padding, got objects.")
    if mask.dtype.kind == "f" and (other := (mask != 0) & (mask != 1)).any():
        b, t = np.unravel_index(other.argmax(), shape)
        raise ValueError(
            f"attention_mask holds {mask[b, t]:g} for token {t} of sequence {b}; a mask of floats must hold 0 for "
            "padding and 1 alone. Pass (mask == 0) for an additive mask of 0 and -inf, (mask != 0) for weights."
        )
    return np.asarray(mask != 0)


def span_arrays(spans: Sequence[Sequence[tuple[int, int]]], seq_len: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sequence, start and end of every span, `[W]` each, checked."""
    bounds = _bounds_of_lists(spans)
    if bounds is None:  # anything else that is as good, or an error to be named
        _check_spans(spans)
        bounds = np.array(list(chain.from_iterable(spans)), dtype=np.int64).reshape(-1, 2)
    sequence = np.repeat(np.arange(len(spans)), [len(row) for row in spans]).astype(np.int64)
    start, end = bounds[:, 0], bounds[:, 1]
    if (wrong := (start < 0) | (end > seq_len) | (start >= end)).any():
        at = int(wrong.argmax())
        raise ValueError(
            f"spans[{sequence[at]}] holds ({start[at]}, {end[at]}); a word is a half-open token range with "
            f"0 <= start < end <= seq_len = {seq_len}. Drop empty words and cut words where the text was truncated."
        )
    return sequence, start, end


def _bounds_of_lists(spans: Sequence[Any]) -> np.ndarray | None:
    """`[W, 2]` of lists of pairs of Python's own ints, without a step of Python for each; None of others."""
    if not {list, tuple}.issuperset(map(type, spans)):
        return None
    pairs = list(chain.from_iterable(spans))
    if not {list, tuple}.issuperset(map(type, pairs)) or not {2}.issuperset(map(len, pairs)):
        return None
    numbers = list(chain.from_iterable(pairs))
    return np.array(numbers, dtype=np.int64).reshape(-1, 2) if {int}.issuperset(map(type, numbers)) else None


def _check_spans(spans: Sequence[Any]) -> None:
    for b, row in enumerate(spans):
        if not _is_list(row):
            raise TypeError(f"spans[{b}] must be the list of one sequence's (start, end) words, got {row!r}.")
        for span in row:
            if not _is_list(span) or len(span) != 2 or not all(map(is_index, span)):
                raise TypeError(
                    f"spans[{b}] must hold (start, end) pairs of ints, got {span!r}. spans is a list with one list of "
                    "words for each sequence; for a single sequence pass [words]."
                )


def sequence_numbers(index: Any, B: int) -> np.ndarray:
    """The sequences of a batch of B that an index names, in its order: `[rows]`."""
    chosen = index
    if isinstance(index, Tensor):
        if index.device.type != "cpu":
            raise TypeError(
                f"index is on {index.device}; spans are cut on the host, which must not wait for a device. Pass "
                "index.cpu()."
            )
        chosen = index.numpy()
    if not isinstance(chosen, slice):
        chosen = np.asarray(chosen)
        chosen = chosen if chosen.size else chosen.astype(np.int64)  # a list without numbers is one of floats to numpy
        if chosen.ndim > 1 or chosen.dtype.kind not in "iub" or (chosen.dtype.kind == "b" and chosen.ndim == 0):
            raise TypeError(
                f"index must be an int, a slice, or a list, array or 1-d tensor of ints, got {reprlib.repr(index)}; "
                "it chooses sequences; of their tokens none can be cut: build the spans of a shorter input anew."
            )
    try:
        return np.atleast_1d(np.arange(B)[chosen])
    except IndexError as error:
        raise IndexError(
            f"index must name sequences of a batch of {B}, from -{B} to {B - 1}, got {reprlib.repr(index)}."
        ) from error


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence | np.ndarray) and not isinstance(value, str)


def is_index(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)
