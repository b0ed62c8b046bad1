"""Batches of drawn words, padded on either side."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from carma_kernels import TokenSpans
from tests.cases import padded, read
from tests.integration.tap.models import VOCABULARY

DRAWINGS = {
    "words": ("aabb.ccc.dd", ".aa.bbb.___", "a.b.c.d.e.f"),  # the last sequence has no word of two tokens
    "one": ("aaabbb.",),
    "whole": ("aaaaaa", "ab.___", "______"),  # a word that fills its sequence, and a sequence of padding
    "full": ("aab.cc", "aabbcc", "......"),  # no padding at all: models run without a mask
}


class Batch(NamedTuple):
    tokens: Tensor  # [B, T]
    valid: Tensor  # [B, T] bool
    words: list[list[tuple[int, int]]]
    spans: TokenSpans

    @property
    def inputs(self) -> dict[str, Tensor]:
        return {"input_ids": self.tokens, "attention_mask": self.valid.long()}


def batch(drawing: str = "words", side: str = "right") -> Batch:
    words, valid = read(tuple(padded(row, side) for row in DRAWINGS[drawing]))
    tokens = torch.randint(3, VOCABULARY, valid.shape, generator=torch.Generator().manual_seed(1)).where(valid, 0)
    return Batch(tokens, valid, words, TokenSpans.from_lists(words, seq_len=valid.shape[1], attention_mask=valid))
