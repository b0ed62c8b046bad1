"""Words as a real fast tokenizer sees them: a byte-level BPE so small that most words split."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from carma_kernels import TokenSpans

TEXT = "the keeper keeps bees; beekeeping keeps the beekeeper busy, and a busy bee keeps the keeper"
SHORT, LONG = "beekeeper keeps bees", "the beekeepers of Zürich keep bees"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=275,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<pad>", "<sep>"],
        show_progress=False,
    )
    bpe.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", sep_token="<sep>")


def words_of(tokenizer: PreTrainedTokenizerFast, batch, spans: TokenSpans) -> list[list[str]]:
    """The text of each word, read back from its tokens."""
    return [
        [tokenizer.decode(batch["input_ids"][b][start:end]).strip() for start, end in words]
        for b, words in enumerate(spans.to_lists())
    ]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("tensors", [None, "pt"])
def test_words_of_a_padded_batch(tokenizer, side, tensors):
    batch = tokenizer([SHORT, LONG], padding=True, padding_side=side, return_tensors=tensors)
    spans = TokenSpans.from_encoding(batch)
    mask = torch.as_tensor(batch["attention_mask"]) != 0
    assert spans.shape == mask.shape
    assert torch.equal(spans.attention_mask, mask)
    assert not mask.all()
    assert mask[0, -1 if side == "left" else 0]
    assert words_of(tokenizer, batch, spans) == [SHORT.split(), LONG.split()]
    assert spans.num_pairs > 10  # so that words do split


def test_each_word_is_one_words_tokens(tokenizer):
    batch = tokenizer([LONG])
    [words] = TokenSpans.from_encoding(batch).to_lists()
    of_token = batch.word_ids(0)
    assert [set(of_token[start:end]) for start, end in words] == [{number} for number in range(len(words))]
    assert words[0][0] == 0
    assert words[-1][1] == len(of_token)


def test_special_tokens_are_valid_and_in_no_word(tokenizer):
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<sep> $A <sep>", special_tokens=[("<sep>", 1)]
    )
    try:
        batch = tokenizer([SHORT])
    finally:
        tokenizer.backend_tokenizer.post_processor = processors.Sequence([])
    spans = TokenSpans.from_encoding(batch)
    [words] = spans.to_lists()
    T = spans.shape[1]
    assert batch["input_ids"][0][0] == batch["input_ids"][0][-1] == 1
    assert (words[0][0], words[-1][1]) == (1, T - 1)
    assert spans.attention_mask.all()


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_words_of_a_pair_of_texts_stay_apart(tokenizer, side):
    """Word ids start again at 0 in the second text: two texts of one word each would otherwise become one word."""
    batch = tokenizer(["beekeeper", SHORT], ["beekeeper", "keeper bees"], padding=True, padding_side=side)
    assert batch.encodings[0].word_ids[-1 if side == "left" else 0] == 0
    spans = TokenSpans.from_encoding(batch)
    assert words_of(tokenizer, batch, spans) == [["beekeeper", "beekeeper"], [*SHORT.split(), "keeper", "bees"]]


def test_words_split_beforehand(tokenizer):
    """The caller's own words, which may hold several of the tokenizer's."""
    batch = tokenizer([["bee keeper", "bees"]], is_split_into_words=True)
    spans = TokenSpans.from_encoding(batch)
    assert words_of(tokenizer, batch, spans) == [["bee keeper", "bees"]]


def test_truncation_cuts_the_last_word(tokenizer):
    batch = tokenizer([LONG, SHORT], truncation=True, max_length=4, padding=True)
    spans = TokenSpans.from_encoding(batch)
    assert spans.shape == (2, 4)
    assert all(words[-1][1] == 4 for words in spans.to_lists())


def test_a_single_text_is_a_batch_of_one(tokenizer):
    for text in (SHORT, ""):
        assert TokenSpans.from_encoding(tokenizer(text)) == TokenSpans.from_encoding(tokenizer([text]))


def test_word_ids_of_the_batch_give_the_same(tokenizer):
    batch = tokenizer([SHORT, LONG], padding=True)
    by_ids = TokenSpans.from_word_ids([batch.word_ids(b) for b in range(2)], batch["attention_mask"])
    assert by_ids.to_lists() == TokenSpans.from_encoding(batch).to_lists()


@pytest.mark.parametrize("tensors", [None, "np", "pt"])
def test_rows_that_were_reordered_are_refused(tokenizer, tensors):
    """Their words would be those of the other rows."""
    batch = tokenizer([SHORT, LONG], padding=True, return_tensors=tensors)
    spans = TokenSpans.from_encoding(batch)
    batch["input_ids"] = batch["input_ids"][::-1] if tensors != "pt" else batch["input_ids"].flip(0)
    with pytest.raises(ValueError, match=r"from row 0 on: it was sorted.*spans\[order\]"):
        TokenSpans.from_encoding(batch)
    assert words_of(tokenizer, batch, spans[[1, 0]]) == [LONG.split(), SHORT.split()]


def test_nothing_is_read_from_a_device(tokenizer):
    batch = tokenizer([SHORT, LONG], padding=True, return_tensors="pt")
    assert TokenSpans.from_encoding(batch) == TokenSpans.from_encoding(batch.to("meta"))


def test_a_copy_without_encodings_is_not_a_slow_tokenizers(tokenizer):
    batch = tokenizer([SHORT])
    for copied in (dict(batch), {**batch}):
        with pytest.raises(TypeError, match=r"dict\(batch\) or \{\*\*batch\} leaves them behind\. Pass what the token"):
            TokenSpans.from_encoding(copied)
    with pytest.raises(TypeError, match=r"use_fast=True .*tokenizer\.pad knows no words"):
        TokenSpans.from_encoding(tokenizer.pad({"input_ids": [[1, 2]]}))


def test_texts_of_different_lengths_are_refused(tokenizer):
    batch = tokenizer([SHORT, LONG])
    lengths = sorted(len(ids) for ids in batch["input_ids"])
    with pytest.raises(
        ValueError, match=rf"batch holds sequences of {lengths[0]} to {lengths[1]} tokens.*padding=True"
    ):
        TokenSpans.from_encoding(batch)


def test_what_carries_no_word_ids_is_refused(tokenizer):
    for batch in (dict(tokenizer([SHORT])), tokenizer.pad({"input_ids": [[1, 2]]}), None, "text"):
        with pytest.raises(
            TypeError, match=r"batch must be the BatchEncoding of a fast tokenizer, got \w+ without word ids"
        ):
            TokenSpans.from_encoding(batch)


def test_a_tokenizer_that_does_not_split_texts_into_words():
    """As Gemma's and Llama 2's: spaces become a mark on pieces, and word ids hold the whole text for one word."""
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.Replace(" ", "\u2581")
    trainer = trainers.BpeTrainer(vocab_size=60, special_tokens=["<pad>"], show_progress=False)
    bpe.train_from_iterator(["keeps bees busy keeps bees busy bees"], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>")
    batch = tokenizer(["bees keep busy", "bees"], padding=True)
    assert set(batch.word_ids(0)) == {0}
    spans = TokenSpans.from_encoding(batch)
    texts = [["".join(batch.tokens(b)[s:e]) for s, e in words] for b, words in enumerate(spans.to_lists())]
    assert texts == [["bees", "\u2581keep", "\u2581busy"], ["bees"]]
