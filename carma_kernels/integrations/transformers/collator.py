"""A collator around a collator: the batch gains the words of its sequences."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from carma_kernels._encodings import words_of
from carma_kernels.spans import NO_WORD, TokenSpans

WORD_IDS = "word_ids"
"""The column of an example that holds the word of each of its tokens."""

_WordIds = list[int | None]


@dataclass
class CarmaCollator:
    """Lets another collator make the batch, and adds the `TokenSpans` of its words under `key`.

    Where the words of an example come from, in this order:

    1. its column `word_ids`, one entry a token, None or negative for a token in no word (it is kept from `collator`);
    2. what a fast tokenizer knows of it, where the example is the `BatchEncoding` that the tokenizer returned;
    3. `tokenizer`: the example's `input_ids` are decoded and split into words as `tokenizer` splits that text;
    4. what a fast tokenizer knows of the batch, where `collator` tokenizes texts and returns the `BatchEncoding`.

    The words move with the padding, on either side, that `collator` adds. It works in a `DataLoader` with workers and
    pinned memory: a `TokenSpans` is picklable and has `pin_memory` and `to`, which is what Accelerate looks for.

    Args:
        collator: takes a list of examples and returns a mapping with `input_ids` `[B, T]` and, where it pads,
            `attention_mask` `[B, T]`; those of `transformers` and TRL do, and your own may.
        tokenizer: a fast one; not needed where the examples know their words.
        key: the batch's entry for the spans.

    Raises:
        TypeError: `tokenizer` is not fast.
        ValueError: the words of an example are not to be had, or `collator` cuts, joins or packs sequences.
    """

    collator: Callable[[list[Any]], Mapping[str, Any]]
    tokenizer: Any = None
    key: str = "spans"

    def __post_init__(self) -> None:
        """Check the tokenizer."""
        if self.tokenizer is not None and not getattr(self.tokenizer, "is_fast", False):
            raise TypeError(
                f"tokenizer must be a fast one, which knows words, got {type(self.tokenizer).__name__}. Load it with "
                f"AutoTokenizer, or leave it out and give each example a column {WORD_IDS!r}."
            )

    def __call__(self, examples: Sequence[Any]) -> dict[str, Any]:
        """The batch of `collator`, and its spans."""
        words = [self._words(example) for example in examples]
        batch = self.collator([_without_words(example) for example in examples])
        known = [word_ids for word_ids in words if word_ids is not None]
        spans = _place(known, examples, batch) if len(known) == len(words) else _spans_of_encodings(batch)
        return {**batch, self.key: spans}

    def _words(self, example: Any) -> _WordIds | None:
        """One entry a token of the example; None where the batch has to tell."""
        if not isinstance(example, Mapping) or "input_ids" not in example:
            return None
        if WORD_IDS in example:
            return list(example[WORD_IDS])
        if encodings := getattr(example, "encodings", None):
            return words_of(encodings[0])
        return None if self.tokenizer is None else self._read_words(example)

    def _read_words(self, example: Mapping[str, Any]) -> _WordIds:
        """The words of a text of which only the tokens are left."""
        token_ids = _listed(example["input_ids"])
        places = np.flatnonzero(_mask_of(example)).tolist()
        kept = [token_ids[place] for place in places]
        encoding = self.tokenizer(self._decode(kept), add_special_tokens=False, verbose=False).encodings[0]
        words = words_of(encoding)
        if encoding.ids != kept:
            # What is left of a truncated word is tokenized differently, say: go by the letter a token ends with.
            ends = (len(self._decode(kept[: stop + 1])) for stop in range(len(kept)))
            at = (encoding.char_to_token(max(end - 1, 0)) for end in ends)
            words = [None if token is None else words[token] for token in at]
        special = set(self.tokenizer.all_special_ids)
        read: _WordIds = [None] * len(token_ids)
        for place, token, word in zip(places, kept, words, strict=True):
            read[place] = None if token in special else word
        return read

    def _decode(self, token_ids: list[int]) -> str:
        text: str = self.tokenizer.decode(token_ids, clean_up_tokenization_spaces=False)
        return text


def _without_words(example: Any) -> Any:
    if not isinstance(example, Mapping) or WORD_IDS not in example:
        return example
    return {name: value for name, value in example.items() if name != WORD_IDS}


def _spans_of_encodings(batch: Mapping[str, Any]) -> TokenSpans:
    if getattr(batch, "encodings", None):
        return TokenSpans.from_encoding(batch)
    raise ValueError(
        f"the examples have no column {WORD_IDS!r}, and CarmaCollator has no tokenizer to find their words with. Pass "
        f"CarmaCollator(collator, tokenizer), or tokenize with example[{WORD_IDS!r}] = tokenizer(text).word_ids(); "
        "transformers.Trainer drops that column unless it is a CarmaTrainerMixin or has remove_unused_columns=False."
    )


def _place(words: Sequence[_WordIds], examples: Sequence[Mapping[str, Any]], batch: Mapping[str, Any]) -> TokenSpans:
    """The words of the examples, each where the padded batch has its tokens."""
    B, T = batch["input_ids"].shape
    if len(words) != B:
        raise ValueError(
            f"the collator made {B} sequence(s) of {len(words)} examples: in a packed or padding-free batch texts take "
            "each other's tokens for negatives. Turn that off (packing=False, padding_free=False)."
        )
    padded = batch.get("attention_mask")
    ids = np.full((B, T), NO_WORD, dtype=np.int64)
    valid = np.zeros((B, T), dtype=bool)
    for b, (word_ids, example) in enumerate(zip(words, examples, strict=True)):
        own = _mask_of(example)  # [n]
        n = len(own)
        if len(word_ids) != n:
            raise ValueError(
                f"example {b} has {n} tokens and {len(word_ids)} word ids, which must be one a token. Truncate both, "
                f"or drop the column {WORD_IDS!r} and pass CarmaCollator a tokenizer."
            )
        start = next((at for at in (0, T - n) if _fits(own, at, T, None if padded is None else padded[b])), None)
        if start is None:
            raise ValueError(
                f"sequence {b} of the batch, of {T} tokens, is not example {b}, of {n}, with padding on one side. "
                "Truncate before collating, and have the collator return the attention_mask of what it pads."
            )
        row = np.array([NO_WORD if word is None else word for word in word_ids], dtype=np.int64)
        ids[b, start : start + n] = np.where(own, row, NO_WORD)
        valid[b, start : start + n] = own
    return TokenSpans.from_word_ids(ids, valid)


def _fits(own: np.ndarray, start: int, T: int, padded: Any) -> bool:
    """Whether the example's mask `[n]`, from `start` on, is the batch's `[T]`; without one, nothing was padded."""
    n = len(own)
    if padded is None or start < 0:
        return n == T
    mask = np.zeros(T, dtype=bool)
    mask[start : start + n] = own
    return np.array_equal(mask, np.asarray(padded) != 0)


def _mask_of(example: Mapping[str, Any]) -> np.ndarray:
    """Which tokens of the example, before the collator pads it, are valid: `[n]`."""
    if "attention_mask" in example:
        return np.asarray(_listed(example["attention_mask"]), dtype=bool)
    return np.ones(len(example["input_ids"]), dtype=bool)


def _listed(values: Any) -> list[int]:
    return list(values.tolist() if isinstance(values, Tensor | np.ndarray) else values)
