"""WordNet definitions as the published data loader hands them to its training loop, and small models that read them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from carma_kernels.demo.definitions import read_definitions
from carma_kernels.demo.text import prompt, train_tokenizer
from tests.architecture.sources import ROOT
from tests.integration.upstream.published import Span

STEPS, BATCH_SIZE, TOKENS, LAYERS = 20, 2, 58, 4
VOCABULARY, WIDTH = 800, 32


class Batches:
    """One batch an epoch, another in each: the published loop keeps the mean of an epoch only."""

    batch_size = BATCH_SIZE

    def __init__(self) -> None:
        definitions = read_definitions(ROOT / "examples" / "data" / "idm_wordnet.jsonl")[: STEPS * BATCH_SIZE]
        tokenizer = train_tokenizer(definitions, VOCABULARY)
        encoding = tokenizer(
            [prompt(entry.definition) for entry in definitions],
            padding="max_length",
            truncation=True,
            max_length=TOKENS,
            return_tensors="pt",
        )
        labels = [tokenizer(entry.word)["input_ids"][0] for entry in definitions]
        samples = []
        for index, label in enumerate(labels):
            words = groupby(range(TOKENS), encoding.word_ids(index).__getitem__)
            spans = [list(tokens) for word, tokens in words if word is not None]
            samples.append(
                {
                    "input_ids": encoding["input_ids"][index],
                    "attention_mask": encoding["attention_mask"][index],
                    "labels": torch.tensor(label),
                    "annotations": {"token_spans": [Span(tokens[0], tokens[-1] + 1) for tokens in spans]},
                }
            )
        self._batches = [samples[at : at + BATCH_SIZE] for at in range(0, len(samples), BATCH_SIZE)]
        self._epoch = 0

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[dict[str, Any]]:
        samples = self._batches[self._epoch % STEPS]
        self._epoch += 1
        yield {
            name: column if name == "annotations" else torch.stack(column)
            for name in samples[0]
            for column in [[sample[name] for sample in samples]]
        }


def small_model(name: str) -> PreTrainedModel:
    """Of random weights, the same each time, with dropout where the family has it."""
    torch.manual_seed(0)
    if name == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=VOCABULARY,
                n_positions=TOKENS,
                n_embd=WIDTH,
                n_layer=LAYERS,
                n_head=2,
                bos_token_id=None,
                eos_token_id=None,
                use_cache=False,
            )
        )
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            max_position_embeddings=TOKENS,
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=2,
            bos_token_id=None,
            eos_token_id=None,
            use_cache=False,
        )
    )
