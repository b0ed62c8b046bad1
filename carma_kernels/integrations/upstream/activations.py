"""The layers in the published code's cache: a dict from a block's name to what the block put out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

Cache = Mapping[str, Any]
"""A block's name, as `transformer.h.3`, to its output: `[B, T, D]`, or a tuple whose item 0 that is."""


def layer_names(cache: Cache, model_type: str) -> list[str]:
    """The cache's blocks in the order of their numbers, the third field of `transformer.h.3` or `model.layers.3`."""
    prefix = _prefix(model_type)
    return sorted((name for name in cache if name.startswith(prefix)), key=_number)


def no_layers(cache: Cache, model_type: str) -> ValueError:
    """What to raise for a cache without blocks."""
    some = ", ".join(repr(name) for name in list(cache)[:3]) or "nothing"
    return ValueError(
        f"cache must hold blocks named '{_prefix(model_type)}<number>' for model_type={model_type!r}, it holds {some}. "
        "Wrapped models (DDP, PEFT, torch.compile) put a prefix before their modules' names: register the hooks on the "
        "model inside, or take the prefix off the keys. model_type='GPT' is for transformer.h, anything else for "
        "model.layers."
    )


def activation(cache: Cache, name: str) -> Tensor:
    """One block's hidden states `[B, T, D]`."""
    value = cache[name]
    if isinstance(value, tuple):
        value = value[0]
    if not isinstance(value, Tensor) or value.dim() != 3:
        got = f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"cache[{name!r}] must be a tensor [B, T, D], or a tuple that starts with one, got {got}.")
    return value


def _prefix(model_type: str) -> str:
    return "transformer.h." if model_type == "GPT" else "model.layers."


def _number(name: str) -> int:
    number = name.split(".")[2]
    if not number.isdecimal():
        raise ValueError(f"cache holds {name!r}, whose third field should be a block's number. Drop it from the cache.")
    return int(number)
