"""The tables of anchors and keys, against loops over the tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode, is_fake

from carma_kernels.spans import NO_WORD, ContrastTable, TokenSpans
from tests.spans.batches import EXAMPLE, Batch, batches

Pairs = set[tuple[int, int]]


def relations(table: ContrastTable) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """What a loss reads of the table: anchor with positive and anchor with negative, as flat tokens, slot by slot."""
    positives, negatives = [], []
    for tokens, words, slots, anchor_words in zip(
        table.key_token.tolist(),
        table.key_word.tolist(),
        table.anchor_slot.tolist(),
        table.anchor_word.tolist(),
        strict=True,
    ):
        for slot, anchor_word in zip(slots, anchor_words, strict=True):
            for key, (token, word) in enumerate(zip(tokens, words, strict=True)):
                if word == anchor_word and key > slot:
                    positives.append((tokens[slot], token))
                if word not in (anchor_word, NO_WORD) and anchor_word >= 0:
                    negatives.append((tokens[slot], token))
    return positives, negatives


def relations_by_definition(batch: Batch, negatives: str) -> tuple[Pairs, Pairs]:
    """From the definitions: a pair is two tokens of a word; a negative any valid token outside the anchor's word."""
    T = batch.shape[1]
    valid = [(b, t) for b, row in enumerate(batch.valid) for t, is_valid in enumerate(row) if is_valid]
    pairs, others = set(), set()
    for b, words in enumerate(batch.words):
        for start, end in words:
            for i in range(start, end - 1):
                pairs |= {(b * T + i, b * T + j) for j in range(i + 1, end)}
                for c, n in valid:
                    outside = c != b or not start <= n < end
                    if outside and (c == b or negatives == "batch"):
                        others.add((b * T + i, c * T + n))
    return pairs, others


@pytest.mark.parametrize("negatives", ["sequence", "batch"])
@settings(max_examples=60)
@given(batch=batches())
def test_every_pair_and_every_negative_once(negatives: str, batch: Batch):
    positives, others = relations(batch.spans.contrast_table(negatives))
    expected_positives, expected_others = relations_by_definition(batch, negatives)
    assert len(positives) == len(set(positives)) == batch.spans.num_pairs
    assert set(positives) == expected_positives
    assert len(others) == len(set(others))
    assert set(others) == expected_others


@pytest.mark.parametrize("negatives", ["sequence", "batch"])
@settings(max_examples=60)
@given(batch=batches())
def test_every_slot_of_a_group_is_another_one(negatives: str, batch: Batch):
    """So nothing is written twice: padding keys are the sequence's padding tokens, padding anchors no anchor's slot."""
    table = batch.spans.contrast_table(negatives)
    T = batch.shape[1]
    word = batch.spans.word.flatten().tolist()
    for tokens, words in zip(table.key_token.tolist(), table.key_word.tolist(), strict=True):
        keys = [token for token, key_word in zip(tokens, words, strict=True) if key_word != NO_WORD]
        assert tokens[: len(keys)] == keys == sorted(keys)
        assert words == [word[token] for token in tokens]
        assert len(set(tokens)) == len(tokens)
        assert negatives == "batch" or len({token // T for token in tokens}) == 1
    for tokens, slots, words in zip(
        table.key_token.tolist(), table.anchor_slot.tolist(), table.anchor_word.tolist(), strict=True
    ):
        anchors = [slot for slot, anchor_word in zip(slots, words, strict=True) if anchor_word >= 0]
        assert slots[: len(anchors)] == anchors == sorted(anchors)
        assert words[: len(anchors)] == [word[tokens[slot]] for slot in anchors]
        assert len(set(slots)) == len(slots)
        assert set(slots) <= set(range(len(tokens)))
        assert len(set(words[len(anchors) :])) <= 1
        assert not set(words[len(anchors) :]) & {NO_WORD, *word}


@pytest.mark.parametrize("negatives", ["sequence", "batch"])
@settings(max_examples=60)
@given(batch=batches())
def test_the_positives_are_so_many_slots_after_their_anchor(negatives: str, batch: Batch):
    table = batch.spans.contrast_table(negatives)
    longest = max((end - start for words in batch.words for start, end in words), default=1)
    assert table.distance.tolist() == list(range(1, longest))
    for words, slots, anchor_words, counts in zip(
        table.key_word.tolist(),
        table.anchor_slot.tolist(),
        table.anchor_word.tolist(),
        table.num_positives.tolist(),
        strict=True,
    ):
        for slot, anchor_word, count in zip(slots, anchor_words, counts, strict=True):
            positives = [key for key, word in enumerate(words) if word == anchor_word and key > slot]
            assert positives == list(range(slot + 1, slot + 1 + count))


@settings(max_examples=60)
@given(batch=batches(), negatives=st.sampled_from(["sequence", "batch"]))
def test_shapes(batch: Batch, negatives: str):
    table = batch.spans.contrast_table(negatives)
    with_anchor = [
        (b, sum(end - start - 1 for start, end in words))
        for b, words in enumerate(batch.words)
        if any(end - start > 1 for start, end in words)
    ]
    if negatives == "sequence":
        groups = len(with_anchor)
        keys = max((sum(batch.valid[b]) for b, _ in with_anchor), default=0)
        anchors = max((count for _, count in with_anchor), default=0)
    else:
        groups, keys, anchors = 1, sum(map(sum, batch.valid)), sum(count for _, count in with_anchor)
    assert table.key_token.shape == table.key_word.shape
    assert table.anchor_slot.shape == table.anchor_word.shape
    if groups:
        assert table.key_token.shape == (groups, keys)
        assert table.anchor_slot.shape == (groups, anchors)
    else:
        assert table.key_token.shape[0] == table.anchor_slot.shape[0] == 0
    assert table.num_positives.shape == table.anchor_slot.shape
    assert {tensor.dtype for tensor in table[:6]} == {torch.int32}


@settings(max_examples=60)
@given(batch=batches(), negatives=st.sampled_from(["sequence", "batch"]))
def test_covers_batch_means_that_the_keys_are_all_tokens_in_order(batch: Batch, negatives: str):
    table = batch.spans.contrast_table(negatives)
    keys = table.key_token[table.key_word != NO_WORD].tolist()
    assert table.covers_batch == (keys == list(range(batch.mask.numel())))


def test_covers_batch_can_be_either():
    dense = Batch([[0, 0], [1, 1]], [[True] * 2] * 2).spans
    one_without_words = Batch([[0, 0], [None, None]], [[True] * 2] * 2).spans
    padded = EXAMPLE.spans
    assert [spans.contrast_table("sequence").covers_batch for spans in (dense, one_without_words, padded)] == [
        True,
        False,
        False,
    ]
    assert [spans.contrast_table("batch").covers_batch for spans in (dense, one_without_words, padded)] == [
        True,
        True,
        False,
    ]


@given(batch=batches())
def test_tables_begin_at_multiples_of_16_bytes(batch: Batch) -> None:
    """Triton compiles a kernel again for a pointer that is not, which another number of words would make one."""
    for negatives in ("sequence", "batch"):
        table = batch.spans.contrast_table(negatives)
        assert table.word is not None
        assert table.ranks is not None
        for tensor in (*table[:6], table.word, *table.ranks[:-1], batch.spans.attention_mask):
            assert tensor.storage_offset() * tensor.element_size() % 16 == 0


@pytest.mark.parametrize("negatives", ["sequence", "batch"])
def test_what_a_mode_has_seen_is_not_kept(negatives: str):
    """Under fake tensors a view is fake, too: kept, it would be read as numbers later."""
    spans = TokenSpans.from_word_ids([[0, 0, 1, 1, 2, None]] * 2)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert is_fake(spans.contrast_table(negatives).key_token)
        assert is_fake(spans.attention_mask)
    table = spans.contrast_table(negatives)
    assert not any(is_fake(field) for field in table if isinstance(field, torch.Tensor))
    assert not is_fake(spans.attention_mask)
    assert spans.contrast_table(negatives) is table  # this one is
