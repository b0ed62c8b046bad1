"""With `group=`, W ranks under DDP compute what one process computes of the joined batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import carma_kernels as ck
import csrc_ref
from tests.cases import BACKENDS, FP64, Backend
from tests.distributed.problems import (
    LOSSES,
    SCENES,
    Blocks,
    assert_same,
    batch_of,
    gradients,
    joined,
    learns_temperature,
    weighted,
)
from tests.distributed.ranks import SIZES, Rank, Ranks

EXACT = [backend for backend in BACKENDS if FP64 in backend.tolerance and backend.device == "cpu"]

Result = tuple[Tensor, dict[str, Tensor]]


def of_one_rank(rank: Rank, name: str, scene: str, backend: str) -> Result:
    batch = batch_of(scene, rank.rank)
    model = DistributedDataParallel(Blocks(learns_temperature(name)), process_group=rank.group)
    loss = LOSSES[name](ck, *model(batch.x), batch, group=rank.group, backend=backend)
    weighted(loss).backward()
    return loss.detach(), gradients(model)


def of_one_process(name: str, scene: str, size: int) -> Result:
    batch = joined([batch_of(scene, rank) for rank in range(size)])
    model = Blocks(learns_temperature(name))
    loss = LOSSES[name](csrc_ref, *model(batch.x), batch)
    weighted(loss).backward()
    return loss.detach(), gradients(model)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scene", SCENES)
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("backend", EXACT, ids=str)
def test_values_and_gradients(ranks: Ranks, backend: Backend, name: str, scene: str, size: int) -> None:
    value, gradient = of_one_process(name, scene, size)
    for its_value, its_gradient in ranks.run(size, of_one_rank, name, scene, backend.name):
        torch.testing.assert_close(its_value, value, rtol=1e-9, atol=1e-12)
        assert_same(its_gradient, gradient)


def test_the_scenes_tell_ranks_apart() -> None:
    """Were `group=` to do nothing, or a rank's part to be left out, the tests above would see it."""
    for name in LOSSES:
        value, _ = of_one_process(name, "B and T differ", 2)
        alone, _ = of_one_process(name, "B and T differ", 1)
        if "one layer" not in name:
            assert not torch.allclose(value, alone, rtol=1e-3)
