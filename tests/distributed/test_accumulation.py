"""The gradient of a window of several backward passes, of which only the last one meets the other ranks."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import carma_kernels as ck
import csrc_ref
from carma_kernels.distributed import global_num_pairs
from tests.distributed.problems import SCENES, Blocks, Given, assert_same, batch_of, gradients, joined
from tests.distributed.ranks import Rank, Ranks

NAMES = list(SCENES)


def window(rank: int, steps: int) -> list[Given]:
    """A rank's batches, one of each scene: B, T and the number of pairs differ from step to step."""
    return [batch_of(scene, rank) for scene in NAMES[:steps]]


def accumulated(rank: Rank, steps: int, negatives: str) -> dict[str, Tensor]:
    model = DistributedDataParallel(Blocks(learns_temperature=True), process_group=rank.group)
    batches = window(rank.rank, steps)
    count = global_num_pairs([batch.spans for batch in batches], rank.group)
    for step, batch in enumerate(batches):
        with model.no_sync() if step < steps - 1 else nullcontext():
            states, tau = model(batch.x)
            ck.mi_loss(
                states, batch.spans, negatives=negatives, temperature=tau, num_pairs=count, group=rank.group
            ).backward()
    return gradients(model)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("steps", [1, 3, len(NAMES)])
def test_window(ranks: Ranks, steps: int, size: int) -> None:
    """The mean over all pairs of the window, on all ranks, however they are spread."""
    model = Blocks(learns_temperature=True)
    batch = joined([batch for rank in range(size) for batch in window(rank, steps)])
    states, tau = model(batch.x)
    csrc_ref.mi_loss(states, batch.spans, temperature=tau).backward()
    for gradient in ranks.run(size, accumulated, steps, "sequence"):
        assert_same(gradient, gradients(model))


def test_window_of_joined_batches(ranks: Ranks) -> None:
    """With `negatives="batch"` those of each step: accumulation adds pairs, not negatives."""
    size, steps = 2, 3
    model = Blocks(learns_temperature=True)
    by_step = [joined(list(batches)) for batches in zip(*(window(rank, steps) for rank in range(size)), strict=True)]
    count = sum(batch.spans.num_pairs for batch in by_step)
    for batch in by_step:
        states, tau = model(batch.x)
        csrc_ref.mi_loss(states, batch.spans, negatives="batch", temperature=tau, num_pairs=count).backward()
    for gradient in ranks.run(size, accumulated, steps, "batch"):
        assert_same(gradient, gradients(model))


def counted(rank: Rank, numbers: list[int]) -> list[tuple[int, torch.dtype, list[int]]]:
    batch, number = batch_of("alike", rank.rank), numbers[rank.rank]
    mine = batch.spans.num_pairs
    given = [number, [number, 1], batch.spans, [batch.spans, batch.pairs, mine], iter([batch.spans])]
    counts = [global_num_pairs(what, rank.group) for what in given] + [global_num_pairs(batch.spans)]
    return [(int(count), count.dtype, list(count.shape)) for count in counts]


def test_global_num_pairs(ranks: Ranks) -> None:
    many = 2**40 + 1  # more than a float could count
    mine = [batch_of("alike", rank).spans.num_pairs for rank in range(4)]
    assert len(set(mine)) > 1
    for rank, counts in enumerate(ranks.run(4, counted, [many, 0, 5, 7])):
        expected = [many + 12, many + 16, sum(mine), 3 * sum(mine), sum(mine), mine[rank]]
        assert counts == [(count, torch.int64, []) for count in expected]
