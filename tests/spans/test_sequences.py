"""A batch's spans are as a tuple of its sequences: cut, sorted, joined and compared."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from carma_kernels import TokenSpans
from tests.spans.batches import EXAMPLE, EXAMPLE_WORDS, Batch, batches

META = torch.device("meta")


def of_rows(batch: Batch, rows: list[int]) -> TokenSpans:
    """Built from the lists of these sequences alone."""
    T = batch.shape[1]
    ids = [[-1 if word is None else word for word in batch.ids[b]] for b in rows]
    return TokenSpans.from_word_ids(np.array(ids, np.int64).reshape(len(rows), T), batch.mask[rows] if rows else None)


def assert_same_tables(one: TokenSpans, other: TokenSpans) -> None:
    """All that is public, so that equality cannot be all too lenient."""
    assert (one.shape, one.num_pairs, one.num_anchors) == (other.shape, other.num_pairs, other.num_anchors)
    assert (one.is_padded, one.to_lists()) == (other.is_padded, other.to_lists())
    assert torch.equal(one.word, other.word)
    assert torch.equal(one.attention_mask, other.attention_mask)
    for negatives in ("sequence", "batch"):
        ours, theirs = one.contrast_table(negatives), other.contrast_table(negatives)
        assert ours.ranks is not None
        assert theirs.ranks is not None
        for a, b in zip((*ours[:-1], *ours.ranks), (*theirs[:-1], *theirs.ranks), strict=True):
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    pairs = [spans.sample_pairs(3, torch.Generator().manual_seed(0)) for spans in (one, other)]
    for name in ("anchor", "positive", "negatives"):
        assert torch.equal(getattr(pairs[0], name), getattr(pairs[1], name))


INDICES: list[Any] = [
    0,
    -1,
    np.int64(2),
    torch.tensor(1),
    slice(None),
    slice(1, None),
    slice(0, 0),
    slice(None, None, -1),
    slice(-1, None, -2),
    slice(5, 9),
    [],
    [2, 0],
    (1, 1, -3),
    range(2),
    np.array([2, 1]),
    np.array([], np.int32),
    torch.tensor([0, 2], dtype=torch.int32),
    [True, False, True],
    torch.tensor([False, True, True]),
]


@pytest.mark.parametrize("index", INDICES, ids=repr)
def test_sequences_at_an_index(index: Any):
    chosen = index if isinstance(index, int | slice) else np.asarray(index, None if len(np.shape(index)) else int)
    chosen = chosen.astype(int) if getattr(chosen, "size", 1) == 0 else chosen
    rows = np.atleast_1d(np.arange(3)[chosen]).tolist()
    part = EXAMPLE.spans[index]
    assert part.shape == (len(rows), 6)
    assert part.to_lists() == [EXAMPLE_WORDS[b] for b in rows]
    assert part == of_rows(EXAMPLE, rows)


@settings(max_examples=60)
@given(batches(), st.data())
def test_tables_are_those_of_the_sequences_alone(batch: Batch, data: st.DataObject):
    B = batch.shape[0]
    rows = data.draw(st.lists(st.integers(0, B - 1), max_size=5) if B else st.just([]))
    part, alone = batch.spans[rows], of_rows(batch, rows)
    assert_same_tables(part, alone)
    assert part == alone


@settings(max_examples=60)
@given(batches(), st.data())
def test_what_is_cut_can_be_joined(batch: Batch, data: st.DataObject):
    spans = batch.spans
    i, j = sorted(data.draw(st.tuples(*[st.integers(0, len(spans))] * 2)))
    joined = TokenSpans.cat([spans[:i], spans[i:j], spans[j:]])
    assert joined == spans
    assert_same_tables(joined, spans)
    order = data.draw(st.permutations(range(len(spans))))
    assert spans[order][np.argsort(order)] == spans


def test_iteration_gives_one_sequence_after_the_other():
    spans = EXAMPLE.spans
    assert len(spans) == 3
    assert [one.shape for one in spans] == [(1, 6)] * 3
    assert [words for one in spans for words in one.to_lists()] == EXAMPLE_WORDS
    assert TokenSpans.cat(spans) == spans
    assert TokenSpans.cat(one for one in reversed(spans)) == spans[::-1]  # type: ignore[call-overload]


def test_parts_lie_where_the_whole_lies(monkeypatch: pytest.MonkeyPatch):
    moved = EXAMPLE.spans.to(META)  # nothing can be read from it
    copies = []
    to = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *args, **kwargs: copies.append(1) or to(self, *args, **kwargs))
    parts = [moved[1:], moved[0], moved[[2, 1]], TokenSpans.cat([moved, moved])]
    assert len(copies) == len(parts), "one copy each"
    assert {part.device for part in parts} == {META}
    assert TokenSpans.cat([moved, moved]).to_lists() == EXAMPLE_WORDS * 2


def test_equal_are_those_of_the_same_shape_words_and_mask():
    spans = EXAMPLE.spans
    others = [
        TokenSpans.from_word_ids([row[:-1] for row in EXAMPLE.ids], EXAMPLE.mask[:, :-1]),  # another shape
        TokenSpans.from_lists([[(0, 5)], *EXAMPLE_WORDS[1:]], seq_len=6, attention_mask=EXAMPLE.mask),
        TokenSpans.from_lists(EXAMPLE_WORDS, seq_len=6),
        TokenSpans.from_word_ids(spans.word, EXAMPLE.mask),  # tokens in no word are now words of one token
    ]
    assert spans == EXAMPLE.spans == spans.to(META)
    assert hash(spans) == hash(EXAMPLE.spans) == hash(spans.to(META))
    assert not spans != EXAMPLE.spans  # noqa: SIM202
    assert all(spans != other for other in others)
    assert len({spans, EXAMPLE.spans, *others}) == 1 + len(others)


def test_shapes_without_a_token_differ():
    shapes = [(0, 0), (0, 5), (2, 0)]
    assert len({TokenSpans.from_word_ids(np.zeros(shape, int)) for shape in shapes}) == 3


@pytest.mark.parametrize("other", [None, EXAMPLE_WORDS, (3, 6), EXAMPLE.mask])
def test_nothing_else_is_equal_to_spans(other: Any):
    assert EXAMPLE.spans.__eq__(other) is NotImplemented


@settings(max_examples=60)
@given(batches())
def test_copies_are_equal(batch: Batch):
    for duplicate in (copy.copy, copy.deepcopy, lambda spans: pickle.loads(pickle.dumps(spans))):
        again = duplicate(batch.spans)
        assert again == batch.spans
        assert_same_tables(again, batch.spans)
