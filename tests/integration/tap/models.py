"""Tiny models with random weights, one of each family, and a batch for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel

import carma_kernels as ck
from tests.cases import padded, read

VOCABULARY, LAYERS, WIDTH = 40, 3, 16
DRAWING = tuple(padded(row, "right") for row in ("aabb.ccc.dd", ".aa.bbb.___", "aabbbccc.dd"))
WORDS, VALID = read(DRAWING)
SPANS = ck.TokenSpans.from_lists(WORDS, seq_len=VALID.shape[1], attention_mask=VALID)

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LLAMA = {"intermediate_size": 32, "num_key_value_heads": 2}
_GEMMA = {**_LLAMA, "head_dim": 8}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("transformer.h", {}),
    "llama": ("model.layers", _LLAMA),
    "gemma": ("model.layers", _GEMMA),
    "gemma2": ("model.layers", _GEMMA),
    "gemma3_text": ("model.layers", _GEMMA),
    "qwen2": ("model.layers", _LLAMA),
    "qwen3": ("model.layers", _GEMMA),
    "mistral": ("model.layers", _LLAMA),
    "phi": ("model.layers", _LLAMA),
    "opt": ("model.decoder.layers", {"ffn_dim": 32, "word_embed_proj_dim": WIDTH}),
    "gpt_neox": ("gpt_neox.layers", {"intermediate_size": 32}),
    "bert": ("bert.encoder.layer", {"intermediate_size": 32}),
}
"""Where each keeps its blocks, and what its config needs beyond the common."""


def build(family: str = "llama", **options: Any) -> PreTrainedModel:
    """The same weights every time; in training mode, without dropout."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **_COMMON, **FAMILIES[family][1], **options)
    for name in vars(config):
        if "drop" in name and isinstance(getattr(config, name), float):
            setattr(config, name, 0.0)
    model = (AutoModelForMaskedLM if family == "bert" else AutoModelForCausalLM).from_config(config)
    return model.train()


def blocks_of(model: nn.Module, family: str = "llama") -> nn.ModuleList:
    found = model.get_submodule(FAMILIES[family][0])
    assert isinstance(found, nn.ModuleList)
    return found


def batch() -> dict[str, Tensor]:
    tokens = torch.randint(3, VOCABULARY, VALID.shape, generator=torch.Generator().manual_seed(1))
    return {
        "input_ids": tokens.where(VALID, 0),
        "attention_mask": VALID.long(),
        "labels": tokens.where(VALID, -100),
    }


def hand_placed(blocks: nn.ModuleList) -> list[Any]:
    """What hooks on the blocks see, in order of their calls."""
    seen: list[Any] = []
    for block in blocks:
        block.register_forward_hook(lambda _block, _inputs, output: seen.append(output))
    return seen


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Of the parameters that have one."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest difference, against the largest number of the tensor."""
    assert one.keys() == other.keys()
    assert one
    return max(((one[name] - other[name]).abs().max() / other[name].abs().max()).item() for name in one)
