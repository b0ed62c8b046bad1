"""Tiny models with random weights, one of each family, and a batch for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
)

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
    config = AutoConfig.for_model(family, **_COMMON, **FAMILIES[family][1], **options)
    return _of(config, AutoModelForMaskedLM if family == "bert" else AutoModelForCausalLM)


_BART = {
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": 64,
    "forced_eos_token_id": None,
}
ENCODER_DECODERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bart": ("model.encoder.layers", "model.decoder.layers", _BART),
    "marian": ("model.encoder.layers", "model.decoder.layers", _BART),
    "pegasus": ("model.encoder.layers", "model.decoder.layers", _BART),
    "t5": ("encoder.block", "decoder.block", {"d_kv": 8, "d_ff": 32, "num_heads": 2}),
}
"""Where each keeps the blocks of its encoder and its decoder, and what its config needs beyond the common."""


def build_encoder_decoder(family: str, encoder: int, decoder: int, vocabulary: int = VOCABULARY) -> PreTrainedModel:
    """With so many blocks in each."""
    names = ("num_layers", "num_decoder_layers") if family == "t5" else ("encoder_layers", "decoder_layers")
    depths = dict(zip(names, (encoder, decoder), strict=True))
    tokens = {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}
    options = ENCODER_DECODERS[family][2] | depths | tokens
    return _of(AutoConfig.for_model(family, vocab_size=vocabulary, d_model=WIDTH, **options), AutoModelForSeq2SeqLM)


IMAGE_TOKEN, IMAGE_TOKENS = VOCABULARY - 1, 4
"""The token that stands for a part of an image, and how many parts one of 8 x 8 pixels has."""
_SECTIONS = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
_PIXELS = {"image_size": 8, "patch_size": 4, "num_attention_heads": 2, "intermediate_size": 32, "hidden_size": WIDTH}
WITH_VISION: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "qwen2_vl": (
        {**_LLAMA, **_SECTIONS},
        {"embed_dim": WIDTH, "hidden_size": WIDTH, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4},
        {"image_token_id": IMAGE_TOKEN},
    ),
    "llava": (
        {"model_type": "llama", **_LLAMA},
        {"model_type": "clip_vision_model", **_PIXELS},
        {"image_token_index": IMAGE_TOKEN, "vision_feature_layer": -1},
    ),
    "gemma3": (_GEMMA, _PIXELS, {"image_token_index": IMAGE_TOKEN, "mm_tokens_per_image": IMAGE_TOKENS}),
}
"""What the configs need beyond the common: the text's, the vision's, and the one of both."""


def build_with_vision(family: str, vision_depth: int, vocabulary: int = VOCABULARY) -> PreTrainedModel:
    """A language model of `LAYERS` blocks that reads images with a model of so many."""
    text, vision, both = WITH_VISION[family]
    depth = {"depth" if family == "qwen2_vl" else "num_hidden_layers": vision_depth}
    config = AutoConfig.for_model(
        family,
        text_config=_COMMON | {"max_position_embeddings": 64} | text | {"vocab_size": vocabulary},
        vision_config=vision | depth,
        **both,
    )
    return _of(config, AutoModelForImageTextToText)


def _of(config: Any, kind: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    for name in vars(config):
        if "drop" in name and isinstance(getattr(config, name), float):
            setattr(config, name, 0.0)
    model: PreTrainedModel = kind.from_config(config)
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
