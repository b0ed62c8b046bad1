"""The gradient of the hidden states themselves, of which a rank gets W times its part of the joined batch's."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import carma_kernels as ck
import csrc_ref
from tests.cases import BACKENDS, BF16, FP32, FP64, Backend
from tests.distributed.problems import D, Given, batch_of, joined
from tests.distributed.ranks import Rank, Ranks

SCENE, SIZE, L = "B and T differ", 2, 4
CONFIG = ck.CarmaConfig(negatives="batch", mi_layers=(1, 3), stability_layers=(0, 2))
FROZEN = 2
ON_CPU = [backend for backend in BACKENDS if backend.device == "cpu"]


def leaves(rank: int, dtype: torch.dtype, poison: bool) -> list[Tensor]:
    """L times `[B, T, D]`, of values that the dtype holds; NaN in the padding, if poisoned."""
    batch = batch_of(SCENE, rank)
    hidden = torch.randn(L, *batch.valid.shape, D, generator=torch.Generator().manual_seed(rank)).to(dtype)
    if poison:
        hidden[:, ~batch.valid] = torch.nan
    return [layer.requires_grad_(at != FROZEN) for at, layer in enumerate(hidden.unbind())]


def carma_of_leaves(
    rank: Rank, dtype: torch.dtype, config: ck.CarmaConfig, backend: str
) -> tuple[Tensor, list[Tensor | None]]:
    states, batch = leaves(rank.rank, dtype, poison=True), batch_of(SCENE, rank.rank)
    options = {"mask": batch.valid, "group": rank.group, "backend": backend}
    loss = ck.carma_loss(states, batch.spans, config, **options).loss
    loss.backward(retain_graph=True)
    first = [layer.grad.clone() for layer in states if layer.grad is not None]
    loss.backward()  # adds the same once more
    again = [layer.grad for layer in states if layer.grad is not None]
    assert all(torch.equal(both, 2 * one) for one, both in zip(first, again, strict=True))
    with torch.no_grad():
        alone = ck.carma_loss(states, batch.spans, config, **options).loss
    assert torch.equal(alone, loss)
    return loss.detach(), [None if layer.grad is None else layer.grad / 2 for layer in states]


@pytest.mark.parametrize("negatives", ["sequence", "batch"])
@pytest.mark.parametrize(
    ("backend", "dtype"), [(backend, dtype) for backend in ON_CPU for dtype in backend.tolerance], ids=str
)
def test_dtypes(ranks: Ranks, backend: Backend, dtype: torch.dtype, negatives: str) -> None:
    """Every dtype is sent as it is; padding is not read, and a layer that needs no gradient gets none."""
    config = replace(CONFIG, negatives=negatives)
    batch = joined([batch_of(SCENE, rank) for rank in range(SIZE)])
    parts = [leaves(rank, dtype, poison=False) for rank in range(SIZE)]
    states = [whole(layers).double().detach().requires_grad_() for layers in zip(*parts, strict=True)]
    reference = csrc_ref.CarmaConfig(negatives=negatives, mi_layers=(1, 3), stability_layers=(0, 2))
    expected = csrc_ref.carma_loss(states, batch.spans, reference, mask=batch.valid).loss
    expected.backward()

    # a gradient that is sent to another rank is rounded, and the sum of both once more
    rounded = backend.tolerance[dtype] + 2 * torch.finfo(dtype).eps
    start = 0
    for rank, (loss, gradients) in enumerate(ranks.run(SIZE, carma_of_leaves, dtype, config, backend.name)):
        assert loss.dtype == (FP64 if dtype == FP64 else FP32)
        torch.testing.assert_close(loss.double(), expected.detach(), rtol=min(1e-5, backend.tolerance[dtype]), atol=0)
        B, T = batch_of(SCENE, rank).spans.shape
        for at, (gradient, layer) in enumerate(zip(gradients, states, strict=True)):
            assert (gradient is None) == (at == FROZEN)
            if gradient is not None:
                assert gradient.dtype == dtype
                assert layer.grad is not None
                unit = SIZE * float(layer.grad.abs().max())
                theirs = SIZE * layer.grad[start : start + B, :T]
                torch.testing.assert_close(gradient.double(), theirs, rtol=0, atol=rounded * unit)
        start += B


def whole(layers: tuple[Tensor, ...]) -> Tensor:
    """One layer of all ranks, joined."""
    T = max(layer.shape[1] for layer in layers)
    return torch.cat([torch.nn.functional.pad(layer, (0, 0, 0, T - layer.shape[1])) for layer in layers])


def modules_and_functions(rank: Rank) -> list[tuple[Tensor, Tensor]]:
    states, batch = leaves(rank.rank, FP64, poison=False), batch_of(SCENE, rank.rank)
    group, spans, mask = {"group": rank.group}, batch.spans, batch.valid
    return [
        (ck.MILoss(**group)(states, spans), ck.mi_loss(states, spans, **group)),
        (ck.StabilityLoss(**group)(states, mask), ck.stability_loss(states, mask=mask, **group)),
        (
            ck.CarmaLoss(CONFIG, **group)(states, spans, mask).loss,
            ck.carma_loss(states, spans, CONFIG, mask=mask, **group).loss,
        ),
        (ck.mi_loss(torch.stack(states), spans, **group), ck.mi_loss(states, spans, **group)),
    ]


def test_modules_and_stacked_states(ranks: Ranks) -> None:
    for pairs in zip(*ranks.run(SIZE, modules_and_functions), strict=True):
        assert all(torch.equal(ours, pairs[0][1]) for pair in pairs for ours in pair)


def compiled(rank: Rank, negatives: str) -> list[Any]:
    config, results = replace(CONFIG, negatives=negatives), []

    def loss_of(states: list[Tensor], batch: Given) -> Tensor:
        return ck.carma_loss(states, batch.spans, config, mask=batch.valid, group=rank.group).loss

    for function in (loss_of, torch.compile(loss_of, fullgraph=negatives == "sequence", backend="aot_eager")):
        states = leaves(rank.rank, FP64, poison=False)
        with warnings.catch_warnings():  # of torch's own, where it goes on after a graph break
            warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
            loss = function(states, batch_of(SCENE, rank.rank))
        loss.backward()
        results.append([loss.detach(), *(layer.grad for layer in states if layer.grad is not None)])
    return results


@pytest.mark.parametrize("negatives", ["sequence", "batch"])
def test_compiled(ranks: Ranks, negatives: str) -> None:
    """The same bits; with the other ranks' tokens not in one graph, since the hosts exchange masks."""
    for eager, traced in ranks.run(SIZE, compiled, negatives):
        assert all(torch.equal(x, y) for x, y in zip(eager, traced, strict=True))


def of_different_models(rank: Rank, what: str) -> str:
    batch = batch_of(SCENE, rank.rank)
    layers, width, dtype = L, D, FP32
    if rank.rank:
        layers, width, dtype = L - (what == "L"), D + (what == "D"), BF16 if what == "dtype" else FP32
    states = [torch.zeros(*batch.valid.shape, width, dtype=dtype) for _ in range(layers)]
    with pytest.raises(ValueError, match="must be alike on all ranks") as refused:
        ck.mi_loss(states, batch.spans, negatives="batch", group=rank.group)
    return str(refused.value)


@pytest.mark.parametrize(("what", "got"), [("L", "3 of width 6"), ("D", "4 of width 7"), ("dtype", "bfloat16")])
def test_different_models(ranks: Ranks, what: str, got: str) -> None:
    """Before anything of a shape that the others do not expect is sent."""
    here, there = ranks.run(SIZE, of_different_models, what)
    assert f"on rank 1 {got}" in here or f"in torch.{got}. Give" in here
    assert "on rank 0 4 of width 6 in torch.float32" in there
