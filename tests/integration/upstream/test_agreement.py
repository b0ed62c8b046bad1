"""On random batches: the published values and gradients, and `random` left where the published code leaves it."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from carma_kernels.integrations.upstream import MILoss, StabilityLoss
from tests.integration.upstream import published
from tests.integration.upstream.published import Word, as_cache, as_spans

FP64, FP32 = torch.float64, torch.float32
TOLERANCE = {FP64: 1e-12, FP32: 2e-5}  # measured on these batches: 1e-14 and 4e-6, relative to the largest element


@dataclass(frozen=True)
class Batch:
    layers: list[Tensor]  # leaves [B, T, D]
    words: list[list[Word]]
    options: dict[str, Any]  # of the MI loss


def random_batch(seed: int, dtype: torch.dtype) -> Batch:
    rng = random.Random(seed)
    L, B, T, D = rng.randint(1, 3), rng.randint(1, 3), rng.randint(8, 24), rng.choice([2, 3, 17])
    generator = torch.Generator().manual_seed(seed)
    layers = list(torch.randn(L, B, T, D, generator=generator, dtype=FP64) * rng.choice([0.01, 1.0, 10.0]))
    if seed % 3 == 0:  # vectors of no length, and shorter than the shortest that is divided by its own
        layers[0][0, :3] = 0
        layers[-1][-1, 3:5] *= 1e-9 / layers[-1][-1, 3:5].norm(dim=-1, keepdim=True)
    words = [random_words(T, rng) for _ in range(B)]
    words[0][:0] = [(0, 2)]  # overlaps what follows, and leaves no batch without a pair
    metric = rng.choice(["cosine", "dot_product"])
    options = {
        "metric": metric,
        "temperature": rng.choice([0.1, 1.0]) if metric == "cosine" else 50.0,
        "num_negatives": rng.choice([1, 2, 5]),
    }
    return Batch([h.to(dtype).requires_grad_() for h in layers], words, options)


def random_words(T: int, rng: random.Random) -> list[Word]:
    words, at = [], rng.randint(0, 2)
    while at < T - 4:
        size = rng.choice([1, 1, 2, 2, 3, 4])
        words.append((at, at + size))
        at += size + rng.choice([0, 0, 1])
    if rng.random() < 0.3:
        words[:0] = [words[-1], (-4, -2)]  # repeated, and counted from the end
    return [*words, (at, at + 1)]


def mi_and_gradients(loss: Tensor, layers: list[Tensor]) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, layers)]


def assert_close(got: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == other.dtype
        difference = (one - other).abs().max() / other.abs().max()
        assert difference <= tolerance


@pytest.mark.parametrize("dtype", [FP64, FP32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("seed", range(24))
def test_mi_loss(seed: int, dtype: torch.dtype):
    batch = random_batch(seed, dtype)
    random.seed(seed)
    expected = mi_and_gradients(published.mi_loss(batch.layers, batch.words, **batch.options), batch.layers)
    end_state = random.getstate()

    random.seed(seed)
    loss = MILoss(
        temperature=batch.options["temperature"],
        n_negatives=batch.options["num_negatives"],
        similarity_metric=batch.options["metric"],
    )
    value = loss.calculate_mi_loss(as_cache(batch.layers), as_spans(batch.words))
    assert_close(mi_and_gradients(value, batch.layers), expected, TOLERANCE[dtype])
    assert random.getstate() == end_state


@pytest.mark.parametrize("dtype", [FP64, FP32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("seed", range(8))
def test_stability_loss(seed: int, dtype: torch.dtype):
    layers = random_batch(seed, dtype).layers
    layers.append((layers[0].detach() + 0.1).requires_grad_())
    expected = mi_and_gradients(published.stability_loss(layers), layers)
    value = StabilityLoss(end_layer=None).calculate_loss(as_cache(layers))
    assert_close(mi_and_gradients(value, layers), expected, TOLERANCE[dtype])


def test_few_anchors_in_a_long_sequence():
    """The other way to the gradient, taken where fewer than half of the positions are an anchor."""
    layers = list(torch.randn(2, 2, 64, 5, dtype=FP64, generator=torch.Generator().manual_seed(0)))
    layers = [h.requires_grad_() for h in layers]
    words = [[(3, 6), (60, 62), (62, 63)], [(10, 12), (12, 13)]]
    for metric in ("cosine", "dot_product"):
        random.seed(1)
        expected = mi_and_gradients(published.mi_loss(layers, words, metric=metric, temperature=9.0), layers)
        random.seed(1)
        value = MILoss(similarity_metric=metric, temperature=9.0).calculate_mi_loss(as_cache(layers), as_spans(words))
        assert_close(mi_and_gradients(value, layers), expected, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_halves_stay_halves(dtype: torch.dtype):
    batch = random_batch(1, FP64)
    layers = [h.detach().to(dtype).requires_grad_() for h in batch.layers]
    random.seed(0)
    expected = published.mi_loss(layers, batch.words, temperature=1.0)
    random.seed(0)
    loss = MILoss(temperature=1.0).calculate_mi_loss(as_cache(layers), as_spans(batch.words))
    assert loss.dtype == dtype
    tolerance = 4 * torch.finfo(dtype).eps
    assert abs(loss.item() / expected.item() - 1) < tolerance
    for got, want in zip(torch.autograd.grad(loss, layers), torch.autograd.grad(expected, layers), strict=True):
        assert got.dtype == dtype
        assert (got - want).norm() / want.norm() < tolerance


def test_a_temperature_that_is_learnt():
    batch = random_batch(2, FP64)
    gradients = []
    for loss in (published.mi_loss, None):
        temperature = torch.tensor(0.3, dtype=FP64, requires_grad=True)
        random.seed(0)
        if loss:
            value = loss(batch.layers, batch.words, temperature=temperature)
        else:
            drop_in = MILoss(temperature=temperature)
            value = drop_in.calculate_mi_loss(as_cache(batch.layers), as_spans(batch.words))
        gradients += torch.autograd.grad(value, temperature)
    torch.testing.assert_close(*gradients)


def test_autocast_changes_nothing():
    batch = random_batch(2, FP32)
    cache, spans = as_cache(batch.layers), as_spans(batch.words)
    results = []
    for enabled in (False, True):
        random.seed(0)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            value = MILoss().calculate_mi_loss(cache, spans)
            results.append(mi_and_gradients(value, batch.layers))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
