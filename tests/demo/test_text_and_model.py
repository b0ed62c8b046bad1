"""Batches: words that split, spans that fit, labels that follow."""

from __future__ import annotations

import itertools

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from carma_kernels import PairIndex, TokenSpans
from carma_kernels.demo.definitions import Definition, Split, read_definitions, shipped_file, split_definitions
from carma_kernels.demo.model import build_gpt2, word_logits
from carma_kernels.demo.text import (
    MAX_TOKENS,
    Batch,
    Collator,
    prompt,
    text_statistics,
    train_tokenizer,
    training_batches,
)


@pytest.fixture(scope="module")
def split() -> Split:
    return split_definitions(read_definitions(shipped_file()), 32, 0, shipped_file())


@pytest.fixture(scope="module")
def tokenizer(split: Split) -> PreTrainedTokenizerFast:
    return train_tokenizer(split.training, 1000)


@pytest.fixture(scope="module")
def batch(split: Split, tokenizer: PreTrainedTokenizerFast) -> Batch:
    return Collator(tokenizer)(split.held_out[:8])


def test_a_third_of_the_words_split(split: Split, tokenizer: PreTrainedTokenizerFast) -> None:
    statistics = text_statistics(tokenizer, split.training)
    assert statistics.vocab_size == 1000
    assert statistics.split_share == pytest.approx(0.31, abs=0.02)
    assert statistics.truncated == 0


def test_spans_are_the_words_of_the_prompt(split: Split, tokenizer: PreTrainedTokenizerFast, batch: Batch) -> None:
    assert isinstance(batch.spans, TokenSpans)
    tokens_of_words = []
    for entry, ids, words in zip(split.held_out, batch.input_ids, batch.spans.to_lists(), strict=False):
        pieces = [tokenizer.decode(ids[start:end]) for start, end in words]
        assert "".join(pieces) == prompt(entry.definition)
        assert all(" " not in piece.lstrip(" ") for piece in pieces)
        tokens_of_words += [end - start for start, end in words]
    assert max(tokens_of_words) > 1


def test_label_is_the_token_that_follows_the_last_one(
    split: Split, tokenizer: PreTrainedTokenizerFast, batch: Batch
) -> None:
    for row, entry in enumerate(split.held_out[:8]):
        whole = tokenizer(prompt(entry.definition) + entry.word)["input_ids"]
        last = int(batch.last_token[row])
        assert whole[: last + 2] == [*batch.input_ids[row, : last + 1].tolist(), int(batch.labels[row])]


def test_long_definition_keeps_its_end(tokenizer: PreTrainedTokenizerFast) -> None:
    long = Definition("unquestionably " * 100 + "a cat", "cat")
    batch = Collator(tokenizer)([long])
    assert batch.input_ids.shape == (1, MAX_TOKENS)
    assert tokenizer.decode(batch.input_ids[0]).endswith('a cat is called a "')
    assert text_statistics(tokenizer, [long]).truncated == 1


def test_sampled_negatives_come_with_the_batch(split: Split, tokenizer: PreTrainedTokenizerFast) -> None:
    collator = Collator(tokenizer, num_negatives=5, generator=torch.Generator().manual_seed(0))
    pairs = collator(split.held_out[:8]).spans
    assert isinstance(pairs, PairIndex)
    assert pairs.negatives.shape == (pairs.num_pairs, 5)


def test_batches_go_on_over_epochs_and_follow_the_seed(split: Split, tokenizer: PreTrainedTokenizerFast) -> None:
    def first_tokens(seed: int) -> list[list[int]]:
        batches = training_batches(split.training[:20], 8, Collator(tokenizer), seed)
        return [batch.labels.tolist() for batch in itertools.islice(batches, 5)]

    assert [len(labels) for labels in first_tokens(0)] == [8] * 5
    assert first_tokens(0) == first_tokens(0) != first_tokens(1)


def test_logits_are_those_of_the_last_real_token(batch: Batch) -> None:
    model = build_gpt2(vocab_size=1000, layers=2, width=16, heads=2, seed=0)
    all_logits = model(batch.input_ids, attention_mask=batch.attention_mask).logits  # [B, T, V]
    logits = word_logits(model, batch)
    assert len(set(batch.attention_mask.sum(dim=1).tolist())) > 1
    for row, length in enumerate(batch.attention_mask.sum(dim=1)):
        torch.testing.assert_close(logits[row], all_logits[row, length - 1])
