"""From definitions to batches: a byte-level BPE learnt from the text itself, prompts, labels and word spans."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from carma_kernels import PairIndex, TokenSpans
from carma_kernels.demo.definitions import Definition

MAX_TOKENS = 128
"""Of a prompt; a longer definition loses its beginning, as the question stands at the end."""
_PADDING = "<pad>"


def prompt(definition: str) -> str:
    """What the model reads; the defined word is what comes next."""
    return f'{definition} is called a "'


def train_tokenizer(definitions: Sequence[Definition], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE like GPT-2's, with at most `vocab_size` tokens, learnt from these definitions and words."""
    byte_pairs = Tokenizer(models.BPE())
    # the split into words ignores the leading space, which GPT-2 counts as part of the word
    byte_pairs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_pairs.decoder = decoders.ByteLevel()
    byte_pairs.train_from_iterator(
        (f'{prompt(definition)}{word}"' for definition, word in definitions),
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[_PADDING],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=byte_pairs,
        pad_token=_PADDING,
        padding_side="right",
        truncation_side="left",
        model_max_length=MAX_TOKENS,
    )


@dataclass(frozen=True)
class TextStatistics:
    """What the tokenizer makes of the text."""

    vocab_size: int
    words: int
    """words of all prompts, each occurrence counted"""
    split_words: int
    """of them, those of two tokens or more: the ones the MI loss is about"""
    longest: int
    """tokens of the longest prompt, before truncation"""
    truncated: int
    """prompts longer than `MAX_TOKENS`"""

    @property
    def split_share(self) -> float:
        """Share of the words that are split."""
        return self.split_words / self.words


def text_statistics(tokenizer: PreTrainedTokenizerFast, definitions: Sequence[Definition]) -> TextStatistics:
    """Count words and tokens of the prompts."""
    encodings = tokenizer.backend_tokenizer.encode_batch([prompt(entry.definition) for entry in definitions])
    tokens_per_word = [Counter(encoding.word_ids) for encoding in encodings]
    lengths = [len(encoding.ids) for encoding in encodings]
    return TextStatistics(
        vocab_size=len(tokenizer),
        words=sum(len(words) for words in tokens_per_word),
        split_words=sum(tokens > 1 for words in tokens_per_word for tokens in words.values()),
        longest=max(lengths),
        truncated=sum(length > MAX_TOKENS for length in lengths),
    )


@dataclass(frozen=True)
class Batch:
    """B prompts of T tokens, padded on the right."""

    input_ids: Tensor  # [B, T] int64
    attention_mask: Tensor  # [B, T] int64, 0 for padding
    labels: Tensor  # [B] int64, first token of the defined word
    spans: TokenSpans | PairIndex

    @property
    def last_token(self) -> Tensor:
        """Position of the last real token, `[B]`."""
        return self.attention_mask.sum(dim=1) - 1

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`."""
        return Batch(*(getattr(self, field.name).to(device) for field in dataclasses.fields(self)))


@dataclass
class Collator:
    """Turns definitions into a `Batch`; the words' spans are built here, on the host, beside the token ids.

    `num_negatives`: draw so many negatives for each pair, from `generator`; None leaves the choice to the loss.
    """

    tokenizer: PreTrainedTokenizerFast
    num_negatives: int | None = None
    generator: torch.Generator | None = None

    def __call__(self, definitions: Sequence[Definition]) -> Batch:
        """Tokenize, pad, and find the words."""
        prompts = [prompt(entry.definition) for entry in definitions]
        encoding = self.tokenizer(
            prompts, padding=True, truncation=True, return_tensors="pt", return_token_type_ids=False
        )
        words = self.tokenizer([entry.word for entry in definitions], return_attention_mask=False)["input_ids"]
        spans = TokenSpans.from_encoding(encoding)
        return Batch(
            input_ids=encoding["input_ids"],
            attention_mask=encoding["attention_mask"],
            labels=torch.tensor([tokens[0] for tokens in words]),
            spans=spans if self.num_negatives is None else spans.sample_pairs(self.num_negatives, self.generator),
        )


def training_batches(
    definitions: Sequence[Definition], batch_size: int, collator: Collator, seed: int
) -> Iterable[Batch]:
    """Full batches for ever, shuffled anew in every epoch, the same ones for the same seed."""
    loader: DataLoader[Batch] = DataLoader(
        list(definitions),  # type: ignore[arg-type]  # a list is a map-style dataset
        batch_size=batch_size,
        shuffle=True,
        drop_last=True,
        collate_fn=collator,
        generator=torch.Generator().manual_seed(seed),
    )
    while True:
        yield from loader
