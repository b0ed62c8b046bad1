"""`CarmaWindow` in a loop of DDP's own: steps add up, ranks are averaged, and the gradient is the window's."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import carma_kernels as ck
import csrc_ref
from carma_kernels.integrations.transformers import CarmaWindow, HiddenStateTap
from tests.distributed.problems import Blocks, Given, assert_same, batch_of, gradients, joined
from tests.distributed.ranks import Rank, Ranks

SCENES = ("alike", "B and T differ", "a rank without words")
LAYERS = {"mi_layers": (1, 3), "stability_layers": (0, 2)}


def window(rank: int, steps: int) -> list[Given]:
    """The ranks' batches differ in B, T and the number of pairs."""
    return [batch_of(scene, rank) for scene in SCENES[:steps]]


def accumulated(rank: Rank, steps: int) -> dict[str, Tensor]:
    model = DistributedDataParallel(Blocks(learns_temperature=False), process_group=rank.group)
    tap, batches = HiddenStateTap(model), window(rank.rank, steps)
    shares = CarmaWindow.of([{"spans": batch.spans} for batch in batches], group=rank.group)
    for step, batch in enumerate(batches):
        with model.no_sync() if step < steps - 1 else nullcontext():
            model(batch.x)
            shares.carma_loss(tap, batch.spans, ck.CarmaConfig(**LAYERS), mask=batch.valid).loss.backward()
    return gradients(model)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("steps", [1, 3])
def test_window(ranks: Ranks, steps: int, size: int) -> None:
    """MI as of one large batch, stability the mean over the batches of all ranks."""
    model, config = Blocks(learns_temperature=False), csrc_ref.CarmaConfig(**LAYERS)
    batches = [batch for rank in range(size) for batch in window(rank, steps)]
    whole = joined(batches)
    loss = config.mi_weight * csrc_ref.mi_loss(model(whole.x)[0], whole.spans, layers=config.mi_layers)
    for batch in batches:
        stability = csrc_ref.stability_loss(model(batch.x)[0], layers=config.stability_layers, mask=batch.valid)
        loss = loss + config.stability_weight * stability / len(batches)
    loss.backward()
    for gradient in ranks.run(size, accumulated, steps):
        assert_same(gradient, gradients(model))


def refused(rank: Rank, accelerator: str | None) -> str:
    group = rank.group if accelerator else None
    with pytest.raises(ValueError, match=r"\.") as raised:
        CarmaWindow.of([{"spans": batch_of("alike", rank.rank).spans}], accelerator, group=group)
    return str(raised.value)


def test_which_ranks_has_to_be_said(ranks: Ranks) -> None:
    """Or the gradient would be a mean of means, and nothing would say so."""
    for neither, both in zip(ranks.run(2, refused, None), ranks.run(2, refused, "an Accelerator"), strict=True):
        assert "torch.distributed runs 4 processes" in neither
        assert "group=dist.group.WORLD" in neither
        assert "accelerator and group both" in both
