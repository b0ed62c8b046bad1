"""In every family of models the tap holds what each block returns: the tensor itself."""

from __future__ import annotations

from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AlbertConfig, AlbertForMaskedLM, PreTrainedTokenizerFast

from carma_kernels.integrations.transformers import HiddenStateTap
from carma_kernels.integrations.transformers.blocks import find_blocks, given_blocks
from tests.integration.tap.models import (
    ENCODER_DECODERS,
    FAMILIES,
    LAYERS,
    VALID,
    WIDTH,
    WITH_VISION,
    batch,
    blocks_of,
    build,
    build_encoder_decoder,
    build_with_vision,
    hand_placed,
)


@pytest.mark.parametrize("family", FAMILIES)
def test_block_outputs(family: str) -> None:
    model = build(family)
    seen = hand_placed(blocks_of(model, family))
    tap = HiddenStateTap(model)
    model(**batch())
    assert len(seen) == LAYERS
    for states, output in zip(tap.hidden_states, seen, strict=True):
        raw = output[0] if isinstance(output, tuple) else output
        assert raw.shape == (*VALID.shape, WIDTH)
        assert raw.dtype == states.dtype
        assert raw.data_ptr() == states.data_ptr()
        assert torch.equal(raw, states)


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt"])
def test_neither_embeddings_nor_the_final_norm(family: str) -> None:
    """What `output_hidden_states` puts first and last."""
    model = build(family)
    tap = HiddenStateTap(model)
    theirs = model(**batch(), output_hidden_states=True).hidden_states
    ours = tap.hidden_states
    assert len(theirs) == len(ours) + 1
    for mine, their in zip(ours[:-1], theirs[1:-1], strict=True):
        assert torch.equal(mine, their)
    assert not torch.equal(ours[-1], theirs[-1])


def test_tuples() -> None:
    """As blocks returned before transformers 5, and as others still do."""

    class Block(nn.Linear):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, str]:  # type: ignore[override]
            return super().forward(x), "cache"

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Block(4, 4) for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x, _ = block(x)
            return x

    model = Model()
    tap = HiddenStateTap(model)
    out = model(torch.randn(1, 2, 4))
    assert tap.hidden_states[-1] is out


def test_transformer_lens() -> None:
    from transformer_lens import TransformerBridge

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=_tokenizer(), eos_token="</s>", pad_token="</s>")
    bridge = TransformerBridge.boot_transformers("gpt2", hf_model=build("gpt2"), device="cpu", tokenizer=tokenizer)
    seen = hand_placed(bridge.blocks)
    cached: dict[int, torch.Tensor] = {}
    tap = HiddenStateTap(bridge)
    tokens = batch()["input_ids"]
    hooks = [
        (f"blocks.{layer}.hook_out", lambda states, hook: cached.__setitem__(hook.layer(), states))
        for layer in range(LAYERS)
    ]
    bridge.run_with_hooks(tokens, fwd_hooks=hooks)
    assert len(seen) == len(cached) == LAYERS
    for layer, states in enumerate(tap.hidden_states):
        assert torch.equal(states, cached[layer])


def _tokenizer():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    return Tokenizer(WordLevel({"<s>": 0, "</s>": 1, "a": 2}, unk_token="a"))


def test_layers() -> None:
    model = build()
    tap = HiddenStateTap(model, layers=(1, 2))
    seen = hand_placed(blocks_of(model))
    model(**batch())
    assert [id(states) for states in tap.hidden_states] == [id(output) for output in seen[1:]]


def test_given_blocks() -> None:
    model = build()
    blocks = list(blocks_of(model))
    tap = HiddenStateTap(model, blocks=blocks[:2])
    seen = hand_placed(blocks_of(model))
    model(**batch())
    assert [id(states) for states in tap.hidden_states] == [id(output) for output in seen[:2]]


@pytest.mark.parametrize("vision_depth", [LAYERS, LAYERS - 1])
@pytest.mark.parametrize("family", WITH_VISION)
def test_of_a_model_that_sees_the_language_models_blocks(family: str, vision_depth: int) -> None:
    """However many blocks read the image."""
    model = build_with_vision(family, vision_depth)
    assert find_blocks(model).modules == list(model.model.language_model.layers)


@pytest.mark.parametrize("depths", [(4, 4), (4, 2), (2, 4)])
@pytest.mark.parametrize("family", ENCODER_DECODERS)
def test_an_encoder_and_a_decoder_are_told_apart_by_their_path(family: str, depths: tuple[int, int]) -> None:
    """A config says the length of one of them."""
    model = build_encoder_decoder(family, *depths)
    encoder, decoder, _ = ENCODER_DECODERS[family]
    with pytest.raises(ValueError, match=f"several lists.*blocks='{encoder}' or blocks='{decoder}'"):
        HiddenStateTap(model)
    for path, depth in zip((encoder, decoder), depths, strict=True):
        found = given_blocks(model, path)
        assert found.modules == list(model.get_submodule(path))
        assert len(found.modules) == depth
        assert found.owner is model.get_submodule(path.rpartition(".")[0])


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")  # which peft reads
def test_a_path_leaves_out_wrappers() -> None:
    """As a trainer puts them around the model that its user named a path of."""
    model = build()
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    assert given_blocks(wrapped, "model.layers").modules == list(blocks_of(model))
    assert given_blocks(nn.Sequential(model), "model.layers").modules == list(blocks_of(model))


def _albert(**options: int) -> AlbertForMaskedLM:
    sizes = {"vocab_size": 40, "embedding_size": 8, "hidden_size": WIDTH, "num_attention_heads": 2}
    return AlbertForMaskedLM(AlbertConfig(**sizes, intermediate_size=32, **options))


@pytest.mark.parametrize("blocks", [None, "albert.encoder.albert_layer_groups"])
def test_blocks_that_run_again_and_again_are_not_supported(blocks: str | None) -> None:
    with pytest.raises(
        ValueError, match=r"AlbertForMaskedLM is not supported: its 3 layers are 1 block.*no one output"
    ):
        HiddenStateTap(_albert(num_hidden_layers=3), blocks=blocks)
    assert len(find_blocks(_albert(num_hidden_layers=3, num_hidden_groups=3)).modules) == 3, "each runs once"


def _with_config(depth: int, **children: nn.Module) -> nn.Module:
    model = nn.Module()
    model.config = SimpleNamespace(num_hidden_layers=depth)
    for name, child in children.items():
        model.add_module(name, child)
    return model


def _list(length: int) -> nn.ModuleList:
    return nn.ModuleList(nn.Linear(2, 2) for _ in range(length))


def test_the_config_picks_the_list() -> None:
    """Lists of another length are other things: experts, heads. Lists within blocks are parts of them."""
    blocks = nn.ModuleList(nn.Sequential(OrderedDict(experts=_list(3))) for _ in range(3))
    model = _with_config(3, heads=_list(2), body=nn.Sequential(OrderedDict(blocks=blocks)))
    found = find_blocks(nn.Sequential(OrderedDict(wrapper=model)))
    assert found.modules == list(blocks)
    assert found.owner is model.body


def test_the_nearest_config_counts() -> None:
    """A model of text and pictures has one for each."""
    text, vision = _with_config(3, layers=_list(3)), _with_config(2, layers=_list(3))
    both = nn.Sequential(OrderedDict(vision=vision, text=text))
    both.config = SimpleNamespace(num_hidden_layers=3)
    assert find_blocks(both).modules == list(text.layers)


@pytest.mark.parametrize(
    ("model", "options", "error", "message"),
    [
        ("llama", {}, TypeError, "model must be a torch.nn.Module, got str"),
        (nn.Linear(2, 2), {}, ValueError, "no torch.nn.ModuleList at all.*blocks="),
        (_with_config(4, layers=_list(3)), {}, ValueError, r"num_hidden_layers.*it has layers \(3\).*blocks="),
        (_with_config(3, a=_list(3), b=_list(3)), {}, ValueError, r"several lists.*a \(3\), b \(3\).*blocks="),
        (_with_config(3, a=_list(3)), {"layers": (1, 3)}, ValueError, "layers is .1, 3."),
        (_with_config(3, a=_list(3)), {"blocks": _list(3)}, ValueError, "blocks must be parts of model"),
        (_with_config(3, a=_list(3)), {"blocks": []}, ValueError, "blocks must be one module or more"),
        (_with_config(3, a=_list(3)), {"blocks": ["a"]}, TypeError, "blocks must be a ModuleList or a list"),
        (
            _with_config(3, a=_list(3)),
            {"blocks": "b.c"},
            ValueError,
            r"blocks='b.c' is nothing in .* lists are a \(3\)",
        ),
        (_with_config(3, a=_list(3)), {"blocks": "a.0"}, ValueError, "blocks='a.0' is a Linear, no list of blocks"),
        (
            nn.Sequential(_with_config(1, a=_list(3)), _with_config(1, a=_list(3))),
            {"blocks": "a"},
            ValueError,
            r"blocks='a' is the end of several paths in Sequential: \['0.a', '1.a'\]",
        ),
    ],
)
def test_errors_say_the_way_out(model, options, error, message) -> None:
    with pytest.raises(error, match=message):
        HiddenStateTap(model, **options)
