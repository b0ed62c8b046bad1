"""Which tokens form a word: packed on the host, once a batch, and copied to the device in one piece.

A *word* is a half-open token range `[start, end)` of one sequence. Words of two tokens or more give pairs `(i, j)`,
`start <= i < j < end`: `i` is the anchor, `j` the positive.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np
import torch
from torch import Tensor

from carma_kernels._encodings import FastEncoding, words_of
from carma_kernels._ranks import RankTable, anchor_numbers, rank_tables
from carma_kernels._sampling import pairs_with_negatives
from carma_kernels._span_inputs import NO_WORD as NO_WORD
from carma_kernels._span_inputs import (
    check_input_ids,
    check_size,
    is_index,
    mask_array,
    sequence_numbers,
    span_arrays,
    word_id_array,
)
from carma_kernels._tables import ContrastTable as ContrastTable
from carma_kernels._tables import Layout, as_numbers, concatenate, contrast_tables
from carma_kernels.pairs import PairIndex


@dataclass(frozen=True, eq=False, repr=False)
class TokenSpans:
    """The words of a batch of `B` sequences of `T` tokens, and everything the losses need to know about them.

    Build it in the collator with `from_encoding`, `from_word_ids` or `from_lists`, then `.to(device)`. It is immutable
    and holds one int32 tensor: moving it is one copy. The host keeps its own copy, so that counts, comparisons, and
    `to_lists()` never wait for the device.

    To its sequences it is as a tuple: `len(spans)`, `spans[2]`, `spans[4:]`, `spans[order]`, `for one in spans`, each
    giving `TokenSpans` on the same device, which `TokenSpans.cat` joins. Two are equal that have the same shape, words
    and valid tokens, wherever they lie. `torch.load(file, weights_only=True)` loads what `torch.save` has saved.
    """

    shape: tuple[int, int]
    """`(B, T)`"""
    num_pairs: int
    """`P`: pairs `(i, j)` of tokens of one word, `i` before `j`"""
    _host: Tensor
    _packed: Tensor
    _layout: Layout

    @classmethod
    def from_encoding(cls, batch: Any) -> TokenSpans:
        """Words of a padded batch, as a fast Hugging Face tokenizer saw them.

        Args:
            batch: the `BatchEncoding` that a fast tokenizer returned for a list of texts with `padding=`. Word ids and
                attention masks are read from its host-side encodings. Its `input_ids` have to be those of the
                encodings still, which is looked at where they are on the host; tensors on a device are not touched.

        Raises:
            TypeError: `batch` does not come from a fast tokenizer.
            ValueError: the sequences differ in length, or `input_ids` was reordered, cut or replaced.
        """
        encodings = getattr(batch, "encodings", None)
        if not encodings and isinstance(batch, Mapping) and not hasattr(batch, "encodings"):
            raise TypeError(
                f"batch must be the BatchEncoding of a fast tokenizer, got {type(batch).__name__} without word ids: a "
                "copy like dict(batch) or {**batch} leaves them behind. Pass what the tokenizer returned, before it is "
                "copied, or use TokenSpans.from_word_ids or TokenSpans.from_lists."
            )
        if not encodings or not all(isinstance(encoding, FastEncoding) for encoding in encodings):
            raise TypeError(
                f"batch must be the BatchEncoding of a fast tokenizer, got {type(batch).__name__} without word ids. "
                "Load the tokenizer with use_fast=True and pass what it returns for texts (tokenizer.pad knows no "
                "words), or use TokenSpans.from_word_ids or TokenSpans.from_lists."
            )
        lengths = {len(encoding.word_ids) for encoding in encodings}
        if len(lengths) > 1:
            raise ValueError(
                f"batch holds sequences of {min(lengths)} to {max(lengths)} tokens; all must have the length of the "
                "model's input. Tokenize with padding=True, or pad the word ids yourself and use "
                "TokenSpans.from_word_ids."
            )
        if isinstance(batch, Mapping):
            check_input_ids(batch.get("input_ids"), [encoding.ids for encoding in encodings])
        return cls.from_word_ids(list(map(words_of, encodings)), [encoding.attention_mask for encoding in encodings])

    @classmethod
    def from_word_ids(
        cls, word_ids: Sequence[Sequence[int | None]] | np.ndarray | Tensor, attention_mask: Any = None
    ) -> TokenSpans:
        """Words from the word id of each token: a run of equal ids is one word.

        Args:
            word_ids: `[B, T]`, lists or an integer array or CPU tensor. `None` in a list, or any negative number: the
                token is in no word (a special token, padding).
            attention_mask: `[B, T]`, zero for padding, on either side; lists, array or CPU tensor, of floats only 0 and
                1. `None`: every token is valid, so padded batches need it.

        Raises:
            TypeError: not integers.
            ValueError: not rectangular, on a device, or a word on padding.
        """
        ids = word_id_array(word_ids)  # [B, T] int64
        valid = mask_array(attention_mask, ids.shape)  # [B, T] bool
        return cls._pack(ids, valid)

    @classmethod
    def from_lists(
        cls, spans: Sequence[Sequence[tuple[int, int]]], *, seq_len: int, attention_mask: Any = None
    ) -> TokenSpans:
        """Words from explicit token ranges.

        Args:
            spans: for each of the `B` sequences its words as `(start, end)`, `0 <= start < end <= seq_len`, in any
                order. Tokens in no word may be left out: they are negatives for others, like one-token words.
            seq_len: `T`.
            attention_mask: as in `from_word_ids`.

        Raises:
            TypeError: not pairs of integers.
            ValueError: a span that is empty, out of range, on padding, or that overlaps another one.
        """
        if not is_index(seq_len) or seq_len < 0:
            raise ValueError(f"seq_len must be the number of tokens of each sequence, an int >= 0, got {seq_len!r}.")
        seq_len = int(seq_len)
        if isinstance(spans, str | Mapping) or not isinstance(spans, Sequence):
            raise TypeError(
                f"spans must be a list with one list of (start, end) for each sequence, got {type(spans).__name__}."
            )
        check_size(len(spans), seq_len)
        ids = np.full((len(spans), seq_len), NO_WORD, dtype=np.int64)
        valid = mask_array(attention_mask, ids.shape)
        sequence, start, end = span_arrays(spans, seq_len)
        word, flat = _tokens(sequence * seq_len + start, end - start)
        if (taken := np.bincount(flat, minlength=ids.size) > 1).any():
            b, t = divmod(int(taken.argmax()), seq_len)
            raise ValueError(
                f"spans[{b}] overlap at token {t}; a token belongs to one word at most. Merge the spans or drop one."
            )
        ids.reshape(-1)[flat] = word
        return cls._pack(ids, valid)

    @classmethod
    def cat(cls, spans: Iterable[TokenSpans]) -> TokenSpans:
        """The sequences of several batches as one batch, in order, on the device of the batches.

        Args:
            spans: at least one, all of the same number of tokens `T` and on one device.

        Raises:
            TypeError: not a list of `TokenSpans`.
            ValueError: none, or of several lengths or devices.
        """
        parts = list(spans) if isinstance(spans, Iterable) else [spans]
        if foreign := [type(part).__name__ for part in parts if not isinstance(part, TokenSpans)]:
            raise TypeError(f"spans must be a list of TokenSpans, got {foreign[0]}. Pass [chosen, rejected], say.")
        if not parts:
            raise ValueError("spans must hold one TokenSpans at least, which says how long sequences are, got none.")
        lengths = sorted({one.shape[1] for one in parts})
        if len(lengths) > 1:
            raise ValueError(
                f"spans have sequences of {' and '.join(map(str, lengths))} tokens; all must have the length of the "
                f"joined input. Pad the batches to one length, tokenizer(texts, padding='max_length', "
                f"max_length={lengths[-1]}) for instance, and build their spans from that."
            )
        devices = {one.device for one in parts}
        if len(devices) > 1:
            raise ValueError(
                f"spans are on {' and '.join(sorted(map(str, devices)))}; they must be on one device. Join them first, "
                "then move them: TokenSpans.cat(spans).to(device)."
            )
        check_size(sum(map(len, parts)), lengths[0])
        ids = np.concatenate([one._word_ids() for one in parts])
        valid = np.concatenate([one._host_mask() for one in parts])
        return cls._pack(ids, valid).to(devices.pop())

    @classmethod
    def _pack(cls, ids: np.ndarray, valid: np.ndarray) -> TokenSpans:
        B, T = ids.shape
        in_word = ids >= 0  # [B, T]
        if (stray := in_word & ~valid).any():
            b, t = divmod(int(stray.argmax()), T)
            raise ValueError(
                f"sequence {b} has a word on token {t}, which attention_mask marks as padding. Give padding no word "
                "(None or -1), or pass the attention mask of these tokens."
            )
        starts = np.ones_like(in_word)  # [B, T] the token begins a word, or is in none
        starts[:, 1:] = ~in_word[:, 1:] | (ids[:, 1:] != ids[:, :-1])
        starts &= valid
        number = np.cumsum(starts.reshape(-1), dtype=np.int32).reshape(B, T) - 1
        word = number if valid.all() else np.where(valid, number, np.int32(NO_WORD))  # [B, T]
        continues = np.zeros_like(in_word)  # [B, T] the next token belongs to the same word: this one is an anchor
        continues[:, :-1] = (word[:, 1:] == word[:, :-1]) & valid[:, 1:]

        first = np.flatnonzero(starts & in_word)  # [W] flat index of each word's first token
        last = np.flatnonzero(in_word & ~continues)  # [W] and of its last
        sequence = first // max(T, 1)
        spans = np.stack([sequence, first - sequence * T, last + 1 - sequence * T], axis=-1)  # [W, 3]
        length = last + 1 - first

        has_anchor = np.logical_or.reduce(continues, axis=1)  # [B]
        active = np.flatnonzero(has_anchor).astype(np.int32)  # [S] sequences that have an anchor
        of_active = slice(None) if len(active) == B else active
        compared = np.where(has_anchor[:, None], word, np.int32(NO_WORD))  # [B, T] with the anchors of a sequence
        anchors = anchor_numbers(length[length > 1])
        num_positives = np.diff(anchors.first_pair)  # [anchors]
        sequence_tables = contrast_tables(
            word[of_active], valid[of_active], continues[of_active], active * np.int32(T), num_positives
        )
        in_one_row = (word.reshape(1, B * T), valid.reshape(1, B * T), continues.reshape(1, B * T))
        batch_tables = contrast_tables(*in_one_row, np.zeros(1, np.int32), num_positives)
        host, layout = concatenate(
            {
                "word": word,
                "attention_mask": as_numbers(valid),
                "sequence_word": compared,
                "spans": spans,
                "distance": np.arange(1, length.max(initial=1), dtype=np.int32),
                **{f"sequence_{name}": table for name, table in sequence_tables.items()},
                **{f"batch_{name}": table for name, table in batch_tables.items()},
                **{
                    f"sequence_rank_{name}": table
                    for name, table in rank_tables(compared, compared != NO_WORD, continues, anchors).items()
                },
                **{f"batch_rank_{name}": table for name, table in rank_tables(*in_one_row, anchors).items()},
            }
        )
        num_pairs = int((length * (length - 1) // 2).sum())
        return cls((B, T), num_pairs, host, host, layout)

    @property
    def device(self) -> torch.device:
        """Where the packed tensor lies."""
        return self._packed.device

    @property
    def num_anchors(self) -> int:
        """`A`: tokens that have a later token in their word."""
        return self._layout["batch_anchor_slot"][1][1]

    @property
    def word(self) -> Tensor:
        """`[B, T]` int32: a number for each word of the batch, tokens in no word having their own; -1 for padding."""
        return self._view("word")

    @property
    def attention_mask(self) -> Tensor:
        """`[B, T]` bool: the token is valid. A view, which costs a device nothing."""
        return self._kept_attention_mask if _views_are_real() else self._attention_mask()

    @cached_property
    def _kept_attention_mask(self) -> Tensor:
        return self._attention_mask()

    def _attention_mask(self) -> Tensor:
        B, T = self.shape
        return self._view("attention_mask").view(torch.bool)[: B * T].view(B, T)

    @property
    def is_padded(self) -> bool:
        """Some token is not valid; known on the host."""
        B, T = self.shape
        return self._num_valid < B * T

    @property
    def _num_valid(self) -> int:
        return self._layout["batch_key_token"][1][1]

    def __len__(self) -> int:
        """`B`."""
        return self.shape[0]

    def __getitem__(self, index: int | slice | Sequence[int] | np.ndarray | Tensor) -> TokenSpans:
        """The sequences at `index`, in its order, as `TokenSpans` on the same device; for an int, one sequence.

        Args:
            index: an int, a slice, or a list, array or CPU tensor of ints (or of B booleans), as numpy takes them.

        Raises:
            IndexError: outside the batch.
            TypeError: none of these.
        """
        rows = sequence_numbers(index, len(self))
        return self._pack(self._word_ids()[rows], self._host_mask()[rows]).to(self.device)

    def __iter__(self) -> Iterator[TokenSpans]:
        """One sequence after the other."""
        return (self[b] for b in range(len(self)))

    def __eq__(self, other: object) -> bool:
        """Whether shape, words and valid tokens are the same; read on the host."""
        if not isinstance(other, TokenSpans):
            return NotImplemented
        return self._content() == other._content()

    def __hash__(self) -> int:
        """Of what `==` compares."""
        return hash(self._content())

    def _content(self) -> tuple[tuple[int, int], bytes, bytes]:
        return self.shape, self._host_view("spans").numpy().tobytes(), self._host_mask().tobytes()

    def __getstate__(self) -> dict[str, Tensor]:
        """The words, of which any version can make its tables; an empty tensor tells `map_location` where they lay."""
        return {
            "word_ids": torch.from_numpy(self._word_ids()),
            "attention_mask": torch.from_numpy(self._host_mask().copy()),
            "device": torch.empty(0, device=self.device),
        }

    def __setstate__(self, state: dict[str, Tensor]) -> None:
        """Build them anew."""
        built = self.from_word_ids(state["word_ids"].cpu(), state["attention_mask"].cpu()).to(state["device"].device)
        for field in fields(self):
            object.__setattr__(self, field.name, getattr(built, field.name))

    def contrast_table(self, negatives: str) -> ContrastTable:
        """The anchors and keys of `negatives="sequence"` or `"batch"`."""
        if negatives not in ("sequence", "batch"):
            raise ValueError(f"negatives must be 'sequence' or 'batch', got {negatives!r}.")
        if not _views_are_real():
            return self._contrast_table(negatives)
        if negatives not in self._contrast_tables:
            self._contrast_tables[negatives] = self._contrast_table(negatives)
        return self._contrast_tables[negatives]

    @cached_property
    def _contrast_tables(self) -> dict[str, ContrastTable]:
        """Those that were asked for: a step of training asks again, and a view of each table takes the host time."""
        return {}

    def _contrast_table(self, negatives: str) -> ContrastTable:
        B, T = self.shape
        key_token = self._view(f"{negatives}_key_token")
        return ContrastTable(
            key_token,
            self._view(f"{negatives}_key_word"),
            self._view(f"{negatives}_anchor_slot"),
            self._view(f"{negatives}_anchor_word"),
            self._view(f"{negatives}_num_positives"),
            self._view("distance"),
            covers_batch=not self.is_padded and key_token.numel() == B * T,
            word=self.word if negatives == "batch" else self._view("sequence_word"),
            ranks=self._rank_table(negatives),
        )

    def _rank_table(self, negatives: str) -> RankTable:
        tables = {name: self._view(f"{negatives}_rank_{name}") for name in RankTable._fields[:-1]}
        return RankTable(num_pairs=self.num_pairs, **tables)

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> TokenSpans:
        """The same spans on `device`, in one copy; `self` if they are there already."""
        packed = self._packed.to(device, non_blocking=non_blocking)
        if packed is self._packed:
            return self
        return replace(self, _packed=packed)

    def pin_memory(self) -> TokenSpans:
        """The same spans in page-locked host memory, as `DataLoader(pin_memory=True)` asks of a batch."""
        pinned = self._host.pin_memory()
        return replace(self, _host=pinned, _packed=pinned)

    def to_lists(self) -> list[list[tuple[int, int]]]:
        """The words of each sequence as `(start, end)`, in order, one-token words included."""
        lists: list[list[tuple[int, int]]] = [[] for _ in range(self.shape[0])]
        for sequence, start, end in self._host_view("spans").tolist():
            lists[sequence].append((start, end))
        return lists

    def sample_pairs(
        self, k: int = 5, generator: torch.Generator | None = None, num_layers: int | None = None
    ) -> PairIndex:
        """Every pair with `k` negatives drawn uniformly, with repetition, from the valid tokens outside its word.

        The published code's sampling, without its faults: padding is never drawn and a pair stays in its own sequence.

        Args:
            k: negatives a pair, `K`.
            generator: on the spans' device; the same state gives the same draws.
            num_layers: `L` for fresh draws in every layer, `negatives` `[L, P, K]`; `None` for one draw, `[P, K]`.

        Returns:
            A `PairIndex` on the spans' device, with their attention mask if they are padded. A pair whose word covers
            its sequence gets -1 in every slot.
        """
        for name, value in (("k", k), ("num_layers", 1 if num_layers is None else num_layers)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be an int >= 1, got {value!r}.")
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(
                f"generator must be a torch.Generator, got {generator!r}. From a seed: "
                "torch.Generator().manual_seed(seed)."
            )
        if generator is not None and generator.device.type != self.device.type:
            raise ValueError(
                f"generator is on {generator.device}, the spans on {self.device}: sample before .to(), or make the "
                f"generator with torch.Generator({self.device.type!r})."
            )
        size = (-1, k) if num_layers is None else (num_layers, -1, k)
        valid_tokens = self._view("batch_key_token").view(-1)
        spans = self._host_view("spans").numpy()  # [W, 3]
        anchor, positive, negatives = pairs_with_negatives(spans, self._host_mask(), valid_tokens, size, generator)
        mask = self.attention_mask.clone()  # a view would take all tables into a file
        return PairIndex(anchor, positive, negatives, self.shape, mask)

    def _word_ids(self) -> np.ndarray:
        """`[B, T]` int32, as `from_word_ids` takes them: a number for each word, -1 for a token in none."""
        ids = np.full(self.shape, NO_WORD, np.int32)
        sequence, start, end = self._host_view("spans").numpy().astype(np.int64).T  # [W] each
        word, flat = _tokens(sequence * self.shape[1] + start, end - start)
        ids.reshape(-1)[flat] = word
        return ids

    def _host_mask(self) -> np.ndarray:
        """`[B, T]` bool."""
        B, T = self.shape
        return self._host_view("attention_mask").numpy().view(np.bool_)[: B * T].reshape(B, T)

    def _view(self, name: str) -> Tensor:
        offset, shape = self._layout[name]
        return self._packed[offset : offset + math.prod(shape)].view(shape)

    def _host_view(self, name: str) -> Tensor:
        offset, shape = self._layout[name]
        return self._host[offset : offset + math.prod(shape)].view(shape)

    def __repr__(self) -> str:
        """Shape, counts and device."""
        B, T = self.shape
        return f"TokenSpans(B={B}, T={T}, anchors={self.num_anchors}, pairs={self.num_pairs}, device={self.device})"


torch.serialization.add_safe_globals([TokenSpans])


def _views_are_real() -> bool:
    """Whether a view may be kept: under a dispatch mode it may be a fake tensor, which knows no number."""
    return not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack() == 0


def _as_they_lie(spans: TokenSpans) -> tuple[type[TokenSpans], tuple[Any, ...]]:
    return TokenSpans, tuple(getattr(spans, field.name) for field in fields(spans))


# Between processes, in shared memory: the one that trains has nothing to build.
ForkingPickler.register(TokenSpans, _as_they_lie)


def _tokens(first: np.ndarray, length: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of W words, given the flat index of the first token and the length of each: all tokens' word and flat index."""
    word = np.repeat(np.arange(len(first)), length)
    within = np.arange(len(word)) - np.repeat(np.cumsum(length) - length, length)
    return word, first[word] + within
