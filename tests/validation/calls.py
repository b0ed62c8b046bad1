"""The losses on good inputs, so that a test puts in the one that is bad."""

from __future__ import annotations

from typing import Any

import torch

import carma_kernels as ck
from carma_kernels import CarmaConfig, TokenSpans

L, B, T, D = 3, 2, 6, 4
HIDDEN = torch.randn(L, B, T, D, generator=torch.Generator().manual_seed(0))
SPANS = TokenSpans.from_lists([[(0, 2), (2, 5)], [(1, 3)]], seq_len=T)
PAIRS = SPANS.sample_pairs(2, torch.Generator().manual_seed(0))

FUNCTIONS = ("pairwise_similarity", "mi_loss", "stability_loss", "carma_loss")
WITH_PAIRS = ("mi_loss", "carma_loss")
WITH_MASK = ("pairwise_similarity", "stability_loss", "carma_loss")
WITH_TEMPERATURE = ("pairwise_similarity", "mi_loss", "carma_loss")

_OF_CONFIG = ("metric", "temperature", "negatives", "match_negatives", "mi_layers", "stability_layers", "eps")


def call(function: str, hidden: Any = HIDDEN, spans: Any = SPANS, **options: Any) -> object:
    """The function, with some arguments replaced; `carma_loss` takes part of its options in a config."""
    if function in ("pairwise_similarity", "stability_loss"):
        return getattr(ck, function)(hidden, **options)
    if function == "mi_loss":
        return ck.mi_loss(hidden, spans, **options)
    config = CarmaConfig(**{name: options.pop(name) for name in _OF_CONFIG if name in options})
    return ck.carma_loss(hidden, spans, config, **options)
