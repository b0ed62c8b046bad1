"""FSDP2 and ZeRO: sharded parameters and optimizers see the gradient of the joined batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

import carma_kernels as ck
import csrc_ref
from carma_kernels.integrations.transformers import HiddenStateTap
from tests.distributed.problems import (
    LOSSES,
    Blocks,
    Given,
    assert_same,
    batch_of,
    gradients,
    joined,
    learns_temperature,
    weighted,
)
from tests.distributed.ranks import Rank, Ranks

SHARDED_SCENES = ["B and T differ", "one rank has all words", "a rank without sequences"]
STEPS, RATE = 3, 0.05


def sharded(model: Blocks, rank: Rank) -> Blocks:
    mesh = DeviceMesh.from_group(rank.group, "cpu")
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def fsdp_gradients(rank: Rank, name: str, scene: str) -> tuple[Tensor, dict[str, Tensor]]:
    batch = batch_of(scene, rank.rank)
    model = sharded(Blocks(learns_temperature(name)), rank)
    loss = LOSSES[name](ck, *model(batch.x), batch, group=rank.group)
    weighted(loss).backward()
    return loss.detach(), gradients(model)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("scene", SHARDED_SCENES)
@pytest.mark.parametrize("name", ["mi", "stability of valid tokens, some layers", "carma", "carma of the batch"])
def test_fsdp(ranks: Ranks, name: str, scene: str, size: int) -> None:
    batch = joined([batch_of(scene, rank) for rank in range(size)])
    model = Blocks(learns_temperature(name))
    loss = LOSSES[name](csrc_ref, *model(batch.x), batch)
    weighted(loss).backward()
    for value, gradient in ranks.run(size, fsdp_gradients, name, scene):
        torch.testing.assert_close(value, loss.detach(), rtol=1e-9, atol=1e-12)
        assert_same(gradient, gradients(model))


class LanguageModel(nn.Module):
    """Blocks, and a head on the last of them, for a task's loss beside CARMA's."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = Blocks(learns_temperature=False)
        self.head = nn.Linear(6, 3, bias=False, dtype=torch.float64)
        with torch.no_grad():
            self.head.weight.copy_(torch.linspace(-1, 1, 18).view(3, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x)[0][-1])


def task_and_carma(
    model: LanguageModel, tap: HiddenStateTap, batch: Given, config: ck.CarmaConfig, **options: Any
) -> Tensor:
    logits = model(batch.x)  # [B, T, 3]
    carma = tap.carma_loss(batch.spans, config, mask=batch.valid, **options).loss
    return ck.total_loss(logits.square().mean(), carma, config.carma_weight)


def tapped_gradients(rank: Rank, config: ck.CarmaConfig, pass_through: bool) -> dict[str, Tensor]:
    """Every block and the head are sharded, each on its own."""
    model = LanguageModel()
    tap = HiddenStateTap(model, blocks=list(model.blocks.layers), pass_through=pass_through)
    mesh = DeviceMesh.from_group(rank.group, "cpu")
    for module in (*model.blocks.layers, model.head, model):
        fully_shard(module, mesh=mesh)
    task_and_carma(model, tap, batch_of("alike", rank.rank), config, group=rank.group).backward()
    return gradients(model)


@pytest.mark.parametrize("pass_through", [True, False])
@pytest.mark.parametrize("negatives", ["sequence", "batch"])
def test_a_tap_on_sharded_blocks(ranks: Ranks, negatives: str, pass_through: bool) -> None:
    """B and T alike, so that the mean over ranks of the task's means is the mean over the joined batch."""
    config = ck.CarmaConfig(negatives=negatives, mi_layers=(1, 3), stability_layers=(0, 2))
    model = LanguageModel()
    tap = HiddenStateTap(model, blocks=list(model.blocks.layers), pass_through=False)
    task_and_carma(model, tap, joined([batch_of("alike", rank) for rank in range(2)]), config).backward()
    for gradient in ranks.run(2, tapped_gradients, config, pass_through):
        assert_same(gradient, gradients(model))


def zero_steps(rank: Rank, scene: str) -> dict[str, Tensor]:
    """As DeepSpeed's first stage: each rank keeps the optimizer's state of a part of the parameters."""
    model = DistributedDataParallel(Blocks(learns_temperature=True), process_group=rank.group)
    optimizer = ZeroRedundancyOptimizer(
        model.parameters(), torch.optim.Adam, process_group=rank.group, lr=RATE, overlap_with_ddp=False
    )
    batch = batch_of(scene, rank.rank)
    for _ in range(STEPS):
        optimizer.zero_grad()
        LOSSES["carma"](ck, *model(batch.x), batch, group=rank.group)[0].backward()
        optimizer.step()
    return {name: parameter.detach() for name, parameter in model.module.named_parameters()}


@pytest.mark.parametrize("size", [2, 4])
def test_zero(ranks: Ranks, size: int) -> None:
    scene = "B and T differ"
    batch = joined([batch_of(scene, rank) for rank in range(size)])
    model = Blocks(learns_temperature=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for _ in range(STEPS):
        optimizer.zero_grad()
        LOSSES["carma"](csrc_ref, *model(batch.x), batch)[0].backward()
        optimizer.step()
    after = {name: parameter.detach() for name, parameter in model.named_parameters()}
    assert all((after[name] - before[name]).abs().max() > RATE for name in after)
    for parameters in ranks.run(size, zero_steps, scene):
        assert_same(parameters, after, tolerance=1e-7)  # Adam divides by what may be small
