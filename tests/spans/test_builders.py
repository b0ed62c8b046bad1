"""Words in, words out: every builder, counts, numbering and mask."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from carma_kernels import TokenSpans, _span_inputs
from tests.spans.batches import EXAMPLE, EXAMPLE_WORDS, Batch, batches

AS_NUMBERS = [[-1 if word is None else word for word in row] for row in EXAMPLE.ids]


def assert_is_example(spans: TokenSpans) -> None:
    assert spans.shape == (3, 6)
    assert spans.to_lists() == EXAMPLE_WORDS
    assert spans.num_pairs == 3 + 1 + 3 + 1
    assert spans.num_anchors == 2 + 1 + 2 + 1
    assert spans.attention_mask.tolist() == EXAMPLE.valid
    assert spans.attention_mask.dtype == torch.bool
    assert spans.device == torch.device("cpu")


@pytest.mark.parametrize(
    "word_ids",
    [
        EXAMPLE.ids,
        tuple(tuple(row) for row in EXAMPLE.ids),
        AS_NUMBERS,
        [np.array(row) for row in AS_NUMBERS],
        np.array(AS_NUMBERS, dtype=np.int16),
        torch.tensor(AS_NUMBERS),
        torch.tensor(AS_NUMBERS, dtype=torch.int32),
        torch.tensor(AS_NUMBERS).T.contiguous().T,
        torch.tensor([[-100 if word < 0 else word for word in row] for row in AS_NUMBERS]),
    ],
    ids=["lists", "tuples", "numbers", "rows", "int16 array", "int64", "int32", "strided", "-100"],
)
def test_from_word_ids(word_ids):
    assert_is_example(TokenSpans.from_word_ids(word_ids, EXAMPLE.valid))


@pytest.mark.parametrize(
    "mask",
    [
        EXAMPLE.valid,
        [[int(valid) for valid in row] for row in EXAMPLE.valid],
        np.array(EXAMPLE.valid),
        EXAMPLE.mask,
        EXAMPLE.mask.long(),
        EXAMPLE.mask.float().requires_grad_(),
        EXAMPLE.mask.bfloat16(),
        np.array(EXAMPLE.valid, np.float16),
    ],
    ids=["lists", "ints", "array", "bool", "int64", "fp32", "bf16", "fp16 array"],
)
def test_masks(mask):
    assert_is_example(TokenSpans.from_word_ids(EXAMPLE.ids, mask))
    assert_is_example(TokenSpans.from_lists(EXAMPLE_WORDS, seq_len=6, attention_mask=mask))


@pytest.mark.parametrize(
    "words",
    [
        EXAMPLE_WORDS,
        [list(reversed(row)) for row in EXAMPLE_WORDS],
        tuple(tuple([start, end] for start, end in row) for row in EXAMPLE_WORDS),
        [np.array(row) for row in EXAMPLE_WORDS],
    ],
    ids=["lists", "any order", "tuples", "arrays"],
)
def test_from_lists(words):
    assert_is_example(TokenSpans.from_lists(words, seq_len=6, attention_mask=EXAMPLE.valid))


def test_lists_of_ints_take_no_step_of_python_for_each_span(monkeypatch: pytest.MonkeyPatch):
    """A batch has tens of thousands: that took fifteen times as long as word ids."""

    def refuse(_: object) -> None:
        raise AssertionError("looked at one by one")

    monkeypatch.setattr(_span_inputs, "_check_spans", refuse)
    for spans in (EXAMPLE_WORDS, tuple(map(tuple, EXAMPLE_WORDS)), [list(map(list, row)) for row in EXAMPLE_WORDS]):
        assert_is_example(TokenSpans.from_lists(spans, seq_len=6, attention_mask=EXAMPLE.valid))
    for others in ([[(True, 2)]], [[(0, np.int64(2))]], [np.array([[0, 2]])], [[(0, 1, 2)]]):
        with pytest.raises(AssertionError, match="one by one"):
            TokenSpans.from_lists(others, seq_len=6)


@pytest.mark.parametrize("integer", [int, np.int64, np.uint8])
def test_seq_len_is_any_integer(integer):
    spans = TokenSpans.from_lists(EXAMPLE_WORDS, seq_len=integer(6), attention_mask=EXAMPLE.valid)
    assert_is_example(spans)
    assert type(spans.shape[1]) is int


def test_without_a_mask_every_token_is_valid():
    for spans in (TokenSpans.from_lists([[(0, 2)], []], seq_len=3), TokenSpans.from_word_ids([[0, 0, 1], [None] * 3])):
        assert spans.attention_mask.all()
        assert spans.attention_mask.shape == (2, 3)
        assert not spans.is_padded


def test_equal_ids_that_do_not_touch_are_two_words():
    spans = TokenSpans.from_word_ids([[3, 3, None, 3, 3]])
    assert spans.to_lists() == [[(0, 2), (3, 5)]]
    spans = TokenSpans.from_word_ids([[3, 3, None, 3, 3]], [[1, 1, 0, 1, 1]])
    assert spans.to_lists() == [[(0, 2), (3, 5)]]


def test_a_word_does_not_reach_into_the_next_sequence():
    spans = TokenSpans.from_word_ids([[1, 1], [1, 1]])
    assert spans.to_lists() == [[(0, 2)], [(0, 2)]]
    assert spans.num_pairs == 2
    assert spans.word.tolist() == [[0, 0], [1, 1]]


def test_words_are_numbered_and_so_are_tokens_in_no_word():
    spans = EXAMPLE.spans
    assert spans.word.tolist() == [[0, 0, 0, 1, 1, -1], [2, 3, 3, 3, 4, 5], [-1, -1, 6, 6, 7, 8]]
    assert spans.word.dtype == torch.int32


@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (2, 0), (1, 1)])
def test_nothing_to_pair(shape):
    B, T = shape
    for spans in (
        TokenSpans.from_lists([[] for _ in range(B)], seq_len=T),
        TokenSpans.from_word_ids(np.full(shape, -1)),
        TokenSpans.from_word_ids(torch.zeros(shape, dtype=torch.long), torch.ones(shape)),
    ):
        assert spans.shape == shape
        assert (spans.num_pairs, spans.num_anchors) == (0, 0)
        assert spans.word.shape == spans.attention_mask.shape == shape
        assert not spans.is_padded


def test_inputs_are_left_alone():
    ids, mask = np.array(AS_NUMBERS), np.array(EXAMPLE.valid)
    before = ids.copy(), mask.copy()
    spans = TokenSpans.from_word_ids(ids, mask)
    assert (ids == before[0]).all()
    assert (mask == before[1]).all()
    ids[:], mask[:] = 0, True  # and the spans do not change with them either
    assert_is_example(spans)


@settings(max_examples=60)
@given(batches())
def test_any_batch(batch: Batch):
    spans = batch.spans
    lengths = [end - start for words in batch.words for start, end in words]
    assert spans.shape == batch.shape
    assert spans.to_lists() == batch.words
    assert spans.num_pairs == sum(n * (n - 1) // 2 for n in lengths)
    assert spans.num_anchors == sum(n - 1 for n in lengths)
    assert spans.word.tolist() == batch.word_of_token()
    assert torch.equal(spans.attention_mask, batch.mask)
    assert spans.is_padded == (not batch.mask.all())


@settings(max_examples=60)
@given(batches(), st.randoms(use_true_random=False))
def test_the_lists_build_the_same_spans(batch: Batch, rng):
    spans = batch.spans
    words = spans.to_lists()
    for row in words:
        rng.shuffle(row)
    again = TokenSpans.from_lists(words, seq_len=batch.shape[1], attention_mask=spans.attention_mask)
    assert torch.equal(again.word, spans.word)
    assert (again.num_pairs, again.num_anchors) == (spans.num_pairs, spans.num_anchors)
    assert again.to_lists() == spans.to_lists()


@settings(max_examples=60)
@given(batches())
def test_the_numbers_of_the_words_build_the_same_spans(batch: Batch):
    """`.word` numbers a token in no word like a word of one token, which is the same to every loss."""
    spans = batch.spans
    again = TokenSpans.from_word_ids(spans.word, spans.attention_mask)
    assert torch.equal(again.word, spans.word)
    assert (again.num_pairs, again.num_anchors) == (spans.num_pairs, spans.num_anchors)


def test_repr_says_what_it_holds():
    assert repr(EXAMPLE.spans) == "TokenSpans(B=3, T=6, anchors=6, pairs=8, device=cpu)"
