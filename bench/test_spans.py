"""Packing the words of a batch of 64 x 1024 tokens, as a collator does for every step."""

from __future__ import annotations

import json
from itertools import cycle
from pathlib import Path

import pytest
import torch

import carma_kernels as ck

pytestmark = pytest.mark.smoke

B, T = 64, 1024
WORDNET = Path(__file__).parent / "data" / "gpt2_wordnet_spans.jsonl"


@pytest.fixture(scope="module")
def word_ids():
    """Real words until each sequence is full, with a token of no word after every prompt."""
    prompts = cycle(json.loads(line)["spans"] for line in WORDNET.read_text().splitlines())
    batch = []
    for _ in range(B):
        ids: list[int | None] = []
        word = 0
        while len(ids) < T:
            for start, end in next(prompts):
                ids += [word] * (end - start)
                word += 1
            ids.append(None)
        batch.append(ids[:T])
    return batch


def num_pairs(batch):
    lengths = [sum(1 for i in ids if i == word) for ids in batch for word in set(ids) - {None}]
    return sum(n * (n - 1) // 2 for n in lengths)


@pytest.mark.parametrize("form", ["list", "tensor"])
def test_pack_word_ids(benchmark, word_ids, form):
    given = word_ids
    if form == "tensor":
        given = torch.tensor([[-1 if i is None else i for i in ids] for ids in word_ids])  # [B, T]
    assert ck.TokenSpans.from_word_ids(given).num_pairs == num_pairs(word_ids)
    benchmark.extra_info.update(form=form, B=B, T=T)
    benchmark.pedantic(ck.TokenSpans.from_word_ids, args=(given,), rounds=50, warmup_rounds=3)
