"""A collator around a collator: the batch gains the words of its sequences."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from carma_kernels._encodings import words_of
from carma_kernels._span_inputs import check_input_ids
from carma_kernels.integrations.transformers.packing import TURN_PACKING_OFF, refuse_packed_batch, refuse_packed_example
from carma_kernels.integrations.transformers.spelling import UnknownWordsError
from carma_kernels.integrations.transformers.words import WordReader
from carma_kernels.spans import NO_WORD, TokenSpans

WORD_IDS = "word_ids"
"""The column of an example that holds the word of each of its tokens."""
WORD_SPANS = "word_spans"
"""The column of an example that holds its words, entities or phrases as token ranges `(start, end)`."""
COLUMNS = (WORD_IDS, WORD_SPANS)
"""What a trainer has to leave to the collator of the columns that its model does not take."""

_WordIds = list[int | None]
_MAKE_COLUMN = (
    f"encoding = tokenizer(text, truncation=True); example = {{**encoding, {WORD_SPANS!r}: "
    "TokenSpans.from_encoding(encoding).to_lists()[0]}"
)


@dataclass
class CarmaCollator:
    """Lets another collator make the batch, and adds the `TokenSpans` of its words under `key`.

    Where the words of an example come from, in this order:

    1. its column `word_spans`, token ranges `(start, end)`: words, entities, phrases, whatever belongs together; or its
       column `word_ids`, one entry a token, None or negative for a token in no word. An example has one of the two at
       most, of its own tokens, before padding; `collator` does not see it;
    2. what a fast tokenizer knows of it, where the example is the `BatchEncoding` that the tokenizer returned;
    3. `tokenizer`: the words are read from the example's `input_ids`. They are those of the text's encoding, or an
       error where the tokens do not tell: unknown tokens, a text cut within a character, a tokenizer without blanks;
    4. what a fast tokenizer knows of the batch, where `collator` tokenizes texts and returns the `BatchEncoding`.

    The words move with the padding, on either side, that `collator` adds; nothing is cut to fit. It works in a
    `DataLoader` with workers and pinned memory: a `TokenSpans` is picklable and has `pin_memory` and `to`, which is
    what Accelerate looks for.

    Args:
        collator: takes a list of examples and returns a mapping with `input_ids` `[B, T]` and, where it pads,
            `attention_mask` `[B, T]`; those of `transformers` and TRL do, and your own may.
        tokenizer: a fast one; not needed where the examples know their words.
        key: the batch's entry for the spans.

    Raises:
        TypeError: `tokenizer` is not fast.
        ValueError: the words of an example are not to be had, a column does not fit its tokens, or a sequence was cut
            by `collator` or holds several texts, packed or flattened.
    """

    collator: Callable[[list[Any]], Mapping[str, Any]]
    tokenizer: Any = None
    key: str = "spans"
    _reader: tuple[tuple[int, str], WordReader] | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Check the tokenizer."""
        if self.tokenizer is not None and not getattr(self.tokenizer, "is_fast", False):
            raise TypeError(
                f"tokenizer must be a fast one, which knows words, got {type(self.tokenizer).__name__}. Load it with "
                f"AutoTokenizer, or leave it out and give each example a column {WORD_SPANS!r} or {WORD_IDS!r}."
            )

    def __getstate__(self) -> dict[str, Any]:
        """Workers make a reader of their own."""
        return self.__dict__ | {"_reader": None}

    def __call__(self, examples: Sequence[Any]) -> dict[str, Any]:
        """The batch of `collator`, and its spans."""
        words = [self._words(number, example) for number, example in enumerate(examples)]
        batch = self.collator([_without_words(example) for example in examples])
        known = [word_ids for word_ids in words if word_ids is not None]
        spans = _place(known, examples, batch) if len(known) == len(words) else _spans_of_encodings(batch, examples)
        refuse_packed_batch(batch, spans.attention_mask)
        return {**batch, self.key: spans}

    def _words(self, number: int, example: Any) -> _WordIds | None:
        """One entry a token of the example; None where the batch has to tell."""
        if not isinstance(example, Mapping) or "input_ids" not in example:
            return None
        refuse_packed_example(number, example)
        if WORD_IDS in example and WORD_SPANS in example:
            raise ValueError(
                f"example {number} has both columns, {WORD_IDS!r} and {WORD_SPANS!r}, which may contradict each other. "
                "Drop one of them."
            )
        if WORD_SPANS in example:
            return _numbered(number, example)
        if WORD_IDS in example:
            return list(example[WORD_IDS])
        if encodings := getattr(example, "encodings", None):
            check_input_ids(example["input_ids"], [encodings[0].ids])
            return words_of(encodings[0])
        return None if self.tokenizer is None else self._read_words(number, example)

    def _read_words(self, number: int, example: Mapping[str, Any]) -> _WordIds:
        """The words of a text of which only the tokens are left."""
        token_ids = _listed(example["input_ids"])
        places = np.flatnonzero(_mask_of(example)).tolist()
        read: _WordIds = [None] * len(token_ids)
        try:
            state = len(self.tokenizer), self.tokenizer.truncation_side  # which users change
            if self._reader is None or self._reader[0] != state:
                self._reader = state, WordReader(self.tokenizer)
            words = self._reader[1]([token_ids[place] for place in places])
        except UnknownWordsError as error:
            raise ValueError(
                f"the tokens of example {number} do not tell its words: {error}. Give the examples a column "
                f"{WORD_SPANS!r} or {WORD_IDS!r} when they are tokenized: {_MAKE_COLUMN}."
            ) from error
        for place, word in zip(places, words, strict=True):
            read[place] = word
        return read


def _without_words(example: Any) -> Any:
    if not isinstance(example, Mapping) or not any(column in example for column in COLUMNS):
        return example
    return {name: value for name, value in example.items() if name not in COLUMNS}


def _numbered(number: int, example: Mapping[str, Any]) -> _WordIds:
    """The words of an example's column of token ranges."""
    own = _mask_of(example)
    column = example[WORD_SPANS]
    ranges = column.tolist() if isinstance(column, Tensor | np.ndarray) else column
    try:
        words = TokenSpans.from_lists([ranges], seq_len=len(own), attention_mask=own[None]).to_lists()[0]
    except (TypeError, ValueError) as error:
        raise type(error)(f"{WORD_SPANS} of example {number}, which has {len(own)} tokens: {error}") from error
    word_ids: _WordIds = [None] * len(own)
    for word, (start, end) in enumerate(words):
        word_ids[start:end] = [word] * (end - start)
    return word_ids


def _spans_of_encodings(batch: Mapping[str, Any], examples: Sequence[Any]) -> TokenSpans:
    if getattr(batch, "encodings", None):
        return TokenSpans.from_encoding(batch)
    if not any(isinstance(example, Mapping) and "input_ids" in example for example in examples):
        raise ValueError(
            "the examples have no 'input_ids', whose words CARMA takes. Preference data (chosen and rejected answers) "
            "is not supported; a collator that tokenizes texts must return the tokenizer's BatchEncoding."
        )
    raise ValueError(
        f"the examples have no column {WORD_SPANS!r} or {WORD_IDS!r}, and CarmaCollator has no tokenizer to find their "
        f"words with. Pass CarmaCollator(collator, tokenizer), or tokenize with {_MAKE_COLUMN}; transformers.Trainer "
        "drops such columns unless it is a CarmaTrainerMixin or has remove_unused_columns=False."
    )


def _place(words: Sequence[_WordIds], examples: Sequence[Mapping[str, Any]], batch: Mapping[str, Any]) -> TokenSpans:
    """The words of the examples, each where the padded batch has its tokens."""
    B, T = batch["input_ids"].shape
    if len(words) != B:
        raise ValueError(f"the collator made {B} sequence(s) of {len(words)} examples: {TURN_PACKING_OFF}")
    padded = batch.get("attention_mask")
    ids = np.full((B, T), NO_WORD, dtype=np.int64)
    valid = np.zeros((B, T), dtype=bool)
    for b, (word_ids, example) in enumerate(zip(words, examples, strict=True)):
        own = _mask_of(example)  # [n]
        n = len(own)
        if len(word_ids) != n:
            raise ValueError(
                f"example {b} has {n} tokens and {len(word_ids)} word ids, which must be one a token. Truncate both, "
                f"or drop the column and pass CarmaCollator a tokenizer."
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


def _listed(values: Any) -> list[Any]:
    return list(values.tolist() if isinstance(values, Tensor | np.ndarray) else values)
