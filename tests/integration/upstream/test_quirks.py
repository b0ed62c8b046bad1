"""Each peculiarity of the published losses, as it is without a switch."""

from __future__ import annotations

import inspect
import math
import random
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from carma_kernels.integrations.upstream import MILoss, StabilityLoss
from tests.integration.upstream import published
from tests.integration.upstream.published import Word, as_cache, as_spans

FP64 = torch.float64


def states(L: int = 2, B: int = 2, T: int = 12, D: int = 4, dtype: torch.dtype = FP64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(B, T, D, generator=generator, dtype=FP64).to(dtype).requires_grad_() for _ in range(L)]


def mi(layers: Sequence[Tensor], words: Sequence[Sequence[Word]], loss: MILoss | None = None, seed: int = 0) -> Tensor:
    random.seed(seed)
    return (loss or MILoss()).calculate_mi_loss(as_cache(layers), as_spans(words))


def test_constructors():
    """Names, order and defaults, by position; the switches by keyword only."""
    published_arguments = {
        MILoss: [
            ("start_layer", 0),
            ("end_layer", 11),
            ("temperature", 0.1),
            ("n_negatives", 5),
            ("similarity_metric", "cosine"),
            ("max_length", 58),
            ("model_type", "GPT"),
        ],
        StabilityLoss: [("start_layer", 0), ("end_layer", 11), ("model_type", "GPT")],
    }
    for loss, expected in published_arguments.items():
        parameters = [p for p in inspect.signature(loss).parameters.values() if p.kind != p.KEYWORD_ONLY]
        assert [(p.name, p.default) for p in parameters] == expected
        kept = loss(*range(1, 1 + len(expected)))
        assert [getattr(kept, name) for name, _ in expected] == list(range(1, 1 + len(expected)))
    assert isinstance(MILoss(), nn.Module)
    assert not MILoss().state_dict()  # checkpoints of either load into the other


# --- the cache


@pytest.mark.parametrize(
    ("model_type", "prefix"),
    [
        ("GPT", "transformer.h."),
        ("Llama", "model.layers."),
        ("Gemma", "model.layers."),
        ("Qwen", "model.layers."),
        ("anything", "model.layers."),
    ],
)
def test_keys(model_type: str, prefix: str):
    """Sorted by number, not by name; other modules are left alone, and what a block puts out beside its states."""
    layers = states(L=11)
    words = [[(0, 3), (4, 5)]]
    random.seed(0)
    expected = published.mi_loss(layers, words)
    numbered = list(enumerate(layers))
    random.Random(0).shuffle(numbered)
    cache = {"lm_head": None, "transformer.wte": None, "model.norm": None}
    cache |= {f"{prefix}{number}.mlp": (h, None) if number % 2 else h for number, h in numbered}
    random.seed(0)
    torch.testing.assert_close(MILoss(model_type=model_type).calculate_mi_loss(cache, as_spans(words)), expected)
    value = StabilityLoss(end_layer=10, model_type=model_type).calculate_loss(cache)
    torch.testing.assert_close(value, published.stability_loss(layers))


@pytest.mark.parametrize(
    ("start", "end", "chosen"), [(0, 1, [0, 1]), (1, 3, [1, 2, 3]), (2, 99, [2, 3]), (-2, 99, [2, 3])]
)
def test_mi_end_layer_is_included_and_cut(start: int, end: int, chosen: list[int]):
    layers = states(L=4)
    words = [[(0, 3), (4, 5)]]
    random.seed(0)
    expected = published.mi_loss([layers[number] for number in chosen], words)
    torch.testing.assert_close(mi(layers, words, MILoss(start, end)), expected)


def test_stability_end_layer_is_not_cut():
    layers = states(L=4)
    torch.testing.assert_close(
        StabilityLoss(1, 3).calculate_loss(as_cache(layers)), published.stability_loss(layers[1:])
    )
    with pytest.raises(IndexError, match=r"end_layer=4 are not among the 4 layers"):
        StabilityLoss(0, 4).calculate_loss(as_cache(layers))


def test_stability_of_no_step_is_a_number():
    loss = StabilityLoss(2, 2).calculate_loss(as_cache(states(L=4)))
    assert type(loss) is float
    assert loss == 0.0


def test_stability_end_layer_none_is_the_last_of_the_first_call():
    loss = StabilityLoss(end_layer=None)
    layers = states(L=4)
    loss.calculate_loss(as_cache(layers[:3]))
    assert loss.end_layer == 2
    torch.testing.assert_close(loss.calculate_loss(as_cache(layers)), published.stability_loss(layers[:3]))


def test_stability_of_an_empty_cache_is_a_number():
    """What a wrapped model leaves, whose modules have a prefix before their names."""
    cache = as_cache(states(), prefix="module.transformer.h.")
    assert StabilityLoss(end_layer=None).calculate_loss(cache) == 0.0
    assert StabilityLoss(1, 1).calculate_loss({}) == 0.0


# --- which pairs


def test_every_pair_on_every_sequence():
    layers = states(B=3)
    loss = mi(layers, [[(0, 2), (2, 3)], [], []])
    for gradient in torch.autograd.grad(loss, layers):
        assert (gradient[:, :2].abs().amax(-1) > 0).all()


def test_one_list_of_words_serves_any_batch():
    layers = states(B=3)
    words = [[(0, 2), (2, 3)], [(4, 7), (7, 8)]]
    for some in (words, words[:1]):
        random.seed(0)
        expected = published.mi_loss(layers, some)
        torch.testing.assert_close(mi(layers, some), expected)


def test_the_last_span_is_left_out():
    layers = states()
    assert mi(layers, [[(0, 2), (5, 7)], [(3, 5)]]) == mi(layers, [[(0, 2), (11, 12)], []])


def test_overlapping_and_repeated_words_count_again():
    layers = states(B=1)
    once, twice = ([[(4, 6)] * n + [(0, 3), (0, 1)]] for n in (1, 2))
    assert mi(layers, once) != mi(layers, twice)
    random.seed(0)
    expected = published.mi_loss(layers, twice)
    torch.testing.assert_close(mi(layers, twice), expected)


def test_negative_bounds_count_from_the_end():
    """And such a word is among its own negatives."""
    layers = states(T=4)
    random.seed(0)
    expected = published.mi_loss(layers, [[(-3, -1), (0, 1)]])
    torch.testing.assert_close(mi(layers, [[(-3, -1), (0, 1)]]), expected)


def test_a_word_of_a_negative_length_is_none():
    layers = states()
    assert mi(layers, [[(5, 2), (0, 2), (3, 4)]]) == mi(layers, [[(0, 2), (3, 4)]])


# --- which negatives


def test_padding_is_drawn():
    """Every position outside the word comes up, whatever stands there."""
    layers = states(L=1, B=1)
    loss = mi(layers, [[(0, 2), (2, 3)]], MILoss(n_negatives=500))
    assert (torch.autograd.grad(loss, layers)[0].abs().amax(-1) > 0).all()


def test_drawn_anew_in_each_layer():
    h = states(L=1)[0]
    value = {L: mi([h] * L, [[(0, 3), (4, 5)]], MILoss(n_negatives=1)).item() for L in (1, 2)}
    assert value[1] != value[2]


def test_validation_moves_the_same_stream():
    layers = states()
    random.seed(0)
    with torch.no_grad():
        MILoss().calculate_mi_loss(as_cache(layers), as_spans([[(0, 2), (2, 3)]]))
    assert [random.random()] != [random.Random(0).random()]


# --- arithmetic


def test_norms_are_clamped_one_by_one():
    """1e-9 long: divided by 1e-8, so its similarity is a tenth of the cosine."""
    h = torch.zeros(1, 3, 2, dtype=FP64)
    h[0, 0, 0], h[0, 1, 0], h[0, 2, 1] = 1e-9, 5.0, 1.0
    h.requires_grad_()
    loss = mi([h], [[(0, 2), (2, 3)]], MILoss(temperature=1.0, n_negatives=1))
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-0.1)))
    [gradient] = torch.autograd.grad(loss, h)
    assert gradient[0, 0, 0] == pytest.approx(-0.9e8 / (1 + math.exp(0.1)))


def test_a_zero_vector_has_a_gradient():
    h = torch.zeros(1, 3, 2, dtype=FP64)
    h[0, 1, 0], h[0, 2, 1] = 5.0, 1.0
    h.requires_grad_()
    [gradient] = torch.autograd.grad(mi([h], [[(0, 2), (2, 3)]], MILoss(temperature=1.0, n_negatives=1)), h)
    assert gradient[0, 0].tolist() == pytest.approx([-0.5e8, 0.5e8])


@pytest.mark.parametrize(
    ("positive", "negative", "expected"),
    [(100.0, 0.0, math.nan), (100.0, 100.0, math.nan), (0.0, 100.0, math.inf), (50.0, 0.0, 0.0)],
)
def test_no_log_sum_exp(positive: float, negative: float, expected: float):
    """e^89 is inf in fp32."""
    h = torch.tensor([[[1.0, 0.0], [positive, 0.0], [negative, 0.0]]], requires_grad=True)
    loss = mi([h], [[(0, 2), (2, 3)]], MILoss(temperature=1.0, similarity_metric="dot_product"))
    assert loss.item() == pytest.approx(expected, nan_ok=True, abs=1e-6)
    [gradient] = torch.autograd.grad(loss, h)
    assert bool(gradient.isfinite().all()) == math.isfinite(expected)


def test_fp16_overflows_at_the_default_temperature():
    """Six times e^10 is more than fp16 holds."""
    h = torch.ones(1, 4, 2, dtype=torch.float16)
    assert mi([h], [[(0, 2), (2, 3)]]).item() == math.inf
    assert mi([h.bfloat16()], [[(0, 2), (2, 3)]]).item() == pytest.approx(math.log(6), rel=0.01)


def test_stability_overflows_in_fp16():
    layers = [torch.full((1, 2, 2), size, dtype=torch.float16) for size in (300.0, 1.0)]
    assert math.isnan(StabilityLoss(end_layer=None).calculate_loss(as_cache(layers)))
    in_bf16 = StabilityLoss(end_layer=None).calculate_loss(as_cache([h.bfloat16() for h in layers]))
    assert in_bf16.dtype == torch.bfloat16
    assert in_bf16.item() == pytest.approx(299**2 / (300**2 + 1), rel=0.02)


def test_stability_counts_padding():
    layers = states(L=2)
    whole = StabilityLoss(end_layer=None).calculate_loss(as_cache(layers))
    half = StabilityLoss(end_layer=None).calculate_loss(as_cache([h[:, :6] for h in layers]))
    assert whole != half


# --- what nobody has to fear


@pytest.mark.parametrize("metric", ["cosine", "dot_product"])
@pytest.mark.parametrize("T", [6, 40])
def test_tokens_that_no_pair_looks_at_stay_out(metric: str, T: int):
    """Whatever they hold: here, most of the tokens, of which two are drawn."""
    words = [[(0, 2), (2, 3)]]
    layers = [h.detach().requires_grad_() for h in states(L=1, B=2, T=T)]
    loss = MILoss(similarity_metric=metric, n_negatives=1)
    clean = torch.autograd.grad(mi(layers, words, loss), layers)[0]
    unused = clean.abs().amax(-1) == 0  # [B, T]
    assert unused.sum() >= 2 * (T - 3)
    foul = layers[0].detach().clone()
    foul[unused] = torch.nan
    foul.requires_grad_()
    value = mi([foul], words, loss)
    assert value.isfinite()
    assert torch.equal(torch.autograd.grad(value, foul)[0], clean)


def test_zero_vectors_that_no_pair_looks_at_stay_out_in_fp16():
    """Where fp16 has no cosine for them: 1e-8 is 0."""
    words = [[(0, 2), (2, 3)]]
    layers = states(L=1, B=1, T=40, dtype=torch.float16)
    loss = MILoss(temperature=1.0, n_negatives=1)
    unused = torch.autograd.grad(mi(layers, words, loss), layers)[0].abs().amax(-1) == 0  # [B, T]
    zeroed = layers[0].detach().masked_fill(unused[:, :, None], 0.0).requires_grad_()
    assert torch.autograd.grad(mi([zeroed], words, loss), zeroed)[0].isfinite().all()


def test_the_gradient_has_none():
    layers = states()
    [gradient] = torch.autograd.grad(mi(layers, [[(0, 2), (2, 3)]]), layers[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
