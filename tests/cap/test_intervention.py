"""Whole models, pooled in a batch, against one sequence at a time in Python loops."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from carma_kernels import TokenSpans
from carma_kernels.cap import constituent_pooling
from carma_kernels.cap.pooling import PROTOCOLS
from tests.cap.batches import Batch, batch
from tests.cap.reference import all_words, pooled_logits
from tests.integration.tap.models import FAMILIES, LAYERS, blocks_of, build


def assert_as_reference(model: PreTrainedModel, family: str, data: Batch, **options) -> None:
    with torch.no_grad(), constituent_pooling(model, data.spans, **options):
        logits = model(**data.inputs).logits  # [B, T, V]
    assert logits.shape[:2] == data.tokens.shape
    for b, (tokens, valid, words) in enumerate(zip(data.tokens, data.valid, data.words, strict=True)):
        if not valid.any():
            continue
        expected = pooled_logits(model, family, tokens, valid, words, **options)
        for row, (start, end) in zip(expected, all_words(words, valid), strict=True):
            for t in range(start, end):
                torch.testing.assert_close(logits[b, t], row, rtol=1e-5, atol=1e-6)


def model_of(family: str, attention: str = "sdpa", **options) -> PreTrainedModel:
    attention = "eager" if family == "gemma2" else attention  # which has no other
    model = build(family, attn_implementation=attention, **options).eval()
    for parameter in model.parameters():  # what is pooled has to show in the logits
        if parameter.dim() > 1:
            parameter.data *= 5
    return model


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_families(family, side):
    model, data = model_of(family), batch(side=side)
    for start_layer, protocol in zip(range(LAYERS), PROTOCOLS, strict=True):
        assert_as_reference(model, family, data, start_layer=start_layer, protocol=protocol)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("drawing", ["one", "whole", "full"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_masks(family, drawing, attention):
    assert_as_reference(model_of(family, attention), family, batch(drawing), start_layer=1, protocol="mean")


@pytest.mark.parametrize("start_layer", range(LAYERS))
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_every_start_layer_and_protocol(protocol, start_layer):
    assert_as_reference(model_of("qwen2"), "qwen2", batch(), start_layer=start_layer, protocol=protocol)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma3_text"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_words_that_keep_their_first_position(family, side):
    model, data = model_of(family), batch(side=side)
    assert_as_reference(model, family, data, start_layer=1, protocol="mean", positions="first")


@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_a_sliding_window_counts_words(family):
    model = model_of(family, sliding_window=2)
    assert_as_reference(model, family, batch(side="left"), start_layer=1, protocol="mean")


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_without_a_word_to_pool_nothing_changes(family, side):
    model, data = model_of(family), batch(side=side)
    alone = [[(t, t + 1) for t in range(len(row)) if row[t]] for row in data.valid.tolist()]
    spans = TokenSpans.from_lists(alone, seq_len=data.valid.shape[1], attention_mask=data.valid)
    with torch.no_grad():
        plain = model(**data.inputs).logits
        for start_layer in range(LAYERS):
            with constituent_pooling(model, spans, start_layer=start_layer):
                assert torch.equal(model(**data.inputs).logits, plain)


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@torch.no_grad()
def test_no_trace_is_left():
    model, data = model_of("llama"), batch()
    plain, before = model(**data.inputs).logits, hooks(model)
    with constituent_pooling(model, data.spans, start_layer=1):
        assert hooks(model) > before
        assert not torch.equal(model(**data.inputs).logits, plain)
    with pytest.raises(KeyError), constituent_pooling(model, data.spans, start_layer=1):
        raise KeyError
    assert hooks(model) == before
    assert torch.equal(model(**data.inputs).logits, plain)


@torch.no_grad()
def test_the_later_blocks_are_shorter():
    model, data = model_of("gpt2"), batch()
    lengths = []
    for block in blocks_of(model, "gpt2"):
        block.attn.register_forward_hook(lambda _module, _inputs, output: lengths.append(output[0].shape[1]))
    with constituent_pooling(model, data.spans, start_layer=1):
        model(**data.inputs)
    T = data.tokens.shape[1]
    W = max(len(all_words(*row)) for row in zip(data.words, data.valid, strict=True))
    assert lengths == [T, W, W]


@torch.no_grad()
def test_padding_changes_nothing():
    """Neither how much of it there is, nor what it holds, nor what the other sequences are."""
    model = model_of("llama", "eager")
    data = batch()
    with constituent_pooling(model, data.spans, start_layer=1):
        together = model(**data.inputs).logits
    for b in range(len(data.tokens)):
        T = int(data.valid[b].sum())
        spans = TokenSpans.from_lists([data.words[b]], seq_len=T)
        with constituent_pooling(model, spans, start_layer=1):
            alone = model(data.tokens[b : b + 1, :T]).logits[0]
        torch.testing.assert_close(together[b, :T], alone, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_blocks_that_are_named():
    model, data = model_of("llama"), batch()
    with constituent_pooling(model, data.spans, start_layer=1):
        expected = model(**data.inputs).logits
    model.spare = nn.ModuleList(nn.Identity() for _ in range(LAYERS))  # could be the blocks as well
    with (
        pytest.raises(ValueError, match="several lists of blocks"),
        constituent_pooling(model, data.spans, start_layer=1),
    ):
        pass
    with constituent_pooling(model, data.spans, start_layer=1, blocks=blocks_of(model)):
        assert torch.equal(model(**data.inputs).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("in_place", [True, False])
def test_a_compiled_model(in_place):
    model, data = model_of("llama"), batch()
    with constituent_pooling(model, data.spans, start_layer=1):
        expected = model(**data.inputs).logits
    if in_place:
        model.compile(backend="eager")
    compiled = model if in_place else torch.compile(model, backend="eager")
    plain = compiled(**data.inputs).logits
    with constituent_pooling(compiled, data.spans, start_layer=1):
        assert torch.equal(compiled(**data.inputs).logits, expected)
    assert torch.equal(compiled(**data.inputs).logits, plain)


@torch.no_grad()
def test_no_keys_of_words_are_kept():
    model, data = model_of("llama"), batch()
    with constituent_pooling(model, data.spans, start_layer=1):
        cache = model(**data.inputs, use_cache=True).past_key_values
    assert [cache.get_seq_length(layer) for layer in range(LAYERS)] == [data.tokens.shape[1], 0, 0]


def test_gradients_pass_through():
    model, data = model_of("llama"), batch()
    with constituent_pooling(model, data.spans, start_layer=1):
        model(**data.inputs).logits[data.valid].square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes(dtype):
    model, data = model_of("qwen2").to(dtype), batch(side="left")
    with constituent_pooling(model, data.spans, start_layer=1, protocol="max"):
        logits = model(**data.inputs).logits
    assert logits.dtype == dtype
    assert logits.isfinite().all()


SPANS = batch().spans


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"spans": [[(0, 2)]]}, TypeError, "spans must be a TokenSpans, got list"),
        ({"protocol": "median"}, ValueError, "protocol must be one of mean, max, sum, got 'median'"),
        ({"positions": "last"}, ValueError, "positions must be one of sequential, first, got 'last'"),
        ({"start_layer": 3}, ValueError, "start_layer must be a block of the model, 0 to 2, got 3"),
        ({"start_layer": -1}, ValueError, "0 to 2, got -1"),
        ({"start_layer": True}, ValueError, "got True"),
        ({"model": nn.Linear(2, 2)}, ValueError, "ModuleList"),
    ],
)
def test_bad_arguments(change, error, message):
    options = {"model": model_of("llama"), "spans": SPANS, "start_layer": 1, **change}
    with pytest.raises(error, match=message), constituent_pooling(**options):
        pass


def test_another_batch():
    model, data = model_of("llama"), batch("full")
    with (
        constituent_pooling(model, SPANS, start_layer=1),
        pytest.raises(ValueError, match="3 sequences of 6 tokens, the spans are those of 3 of 11"),
    ):
        model(**data.inputs)


class Odd(nn.Module):
    """A block that is called with something more."""

    def __init__(self, block: nn.Module, **more: object) -> None:
        super().__init__()
        self.block = block
        self.register_forward_pre_hook(lambda _module, args, kwargs: (args, {**kwargs, **more}), with_kwargs=True)

    def forward(self, hidden_states, **options):
        return self.block(hidden_states, **options)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"odd": torch.zeros(3, 11)}, r"Odd is called with the tensor odd, \[3, 11\]"),
        ({"attention_mask": object()}, 'attention_mask of a block is object; .*attn_implementation="sdpa"'),
        ({"attention_mask": torch.zeros(3, 1, 11, 12)}, r"\[3, 1, 11, 12\]; .* without a cache"),
    ],
)
def test_what_cannot_be_pooled(more, message):
    model, data = model_of("llama"), batch()
    blocks = blocks_of(model)
    blocks[1] = Odd(blocks[1], **more)
    with constituent_pooling(model, data.spans, start_layer=1), pytest.raises(NotImplementedError, match=message):
        model(**data.inputs)


class Record(nn.Module):
    """A block that does nothing, and remembers what it was called with."""

    def forward(self, hidden_states, **options):
        self.options = options
        return hidden_states


@torch.no_grad()
def test_a_mask_of_flash_attention():
    """Which is [B, T] where others are [B, 1, T, T]."""
    model, data = model_of("llama"), batch(side="left")
    blocks = blocks_of(model)
    record = Record()
    blocks[1] = Odd(record, attention_mask=data.valid.long())
    with constituent_pooling(model, data.spans, start_layer=1):
        model(**data.inputs)
    words = [len(all_words(*row)) for row in zip(data.words, data.valid, strict=True)]
    mask = record.options["attention_mask"]
    assert mask.dtype == torch.long
    assert mask.tolist() == [[1] * number + [0] * (max(words) - number) for number in words]
