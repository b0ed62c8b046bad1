"""Data parallelism without `group=`: no rank waits for another, and the gradients are the mean of the ranks' own."""

from __future__ import annotations

import pytest
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import carma_kernels as ck
from tests.cases import BACKENDS, FP64, Backend
from tests.distributed.problems import (
    LOSSES,
    SCENES,
    Blocks,
    assert_same,
    batch_of,
    gradients,
    learns_temperature,
    weighted,
)
from tests.distributed.ranks import Rank, Ranks

SIZE = 2
PAIRS = sum(batch_of("a rank without words", rank).spans.num_pairs for rank in range(SIZE))

# DDP takes the mean over 2 ranks: half of the pairs of both, for each
OPTIONS = {"mi": {}, "mi of both": {"num_pairs": PAIRS / SIZE}, "mi of listed pairs": {}, "carma": {}}


def loss_of(name: str, model: DistributedDataParallel | Blocks, rank: int, scene: str, backend: str) -> Tensor:
    batch = batch_of(scene, rank)
    loss = LOSSES["mi" if name == "mi of both" else name]
    return weighted(loss(ck, *model(batch.x), batch, backend=backend, **OPTIONS[name]))


def of_one_rank(rank: Rank, name: str, scene: str, backend: str) -> dict[str, Tensor]:
    model = DistributedDataParallel(Blocks(learns_temperature(name)), process_group=rank.group)
    loss_of(name, model, rank.rank, scene, backend).backward()
    return gradients(model)


@pytest.mark.parametrize("scene", [scene for scene in SCENES if scene.startswith("a rank without")])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize(
    "backend", [backend for backend in BACKENDS if FP64 in backend.tolerance and backend.device == "cpu"], ids=str
)
def test_a_rank_without_words(ranks: Ranks, backend: Backend, name: str, scene: str) -> None:
    model = Blocks(learns_temperature(name))
    (sum(loss_of(name, model, rank, scene, backend.name) for rank in range(SIZE)) / SIZE).backward()
    expected = gradients(model)
    assert any((gradient != 0).any() for gradient in expected.values())
    for gradient in ranks.run(SIZE, of_one_rank, name, scene, backend.name):
        assert_same(gradient, expected)
