"""What a trainer logs of the losses: summed on the device, batch by batch, and read once when it logs."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from carma_kernels.config import CarmaConfig


class LossSums:
    """Named sums of losses, each a number or a row of layers."""

    def __init__(self) -> None:
        """Nothing yet."""
        self._sums: dict[str, Tensor] = {}

    def add(self, **losses: Tensor) -> None:
        """Add to each sum; nothing is read."""
        for name, loss in losses.items():
            self._sums[name] = self._sums.get(name, 0) + loss.detach().float()

    def take(self, accelerator: Any, over_ranks: str) -> dict[str, list[float]]:
        """The "sum" or "mean" of the ranks' sums; starts anew. Every rank must call it; waits for the device once."""
        if not self._sums:
            return {}
        rows = [row.reshape(-1).to(accelerator.device) for row in self._sums.values()]
        values = iter(accelerator.reduce(torch.cat(rows), reduction=over_ranks).tolist())
        read = {name: [next(values) for _ in row] for name, row in zip(self._sums, rows, strict=True)}
        self._sums = {}
        return read


def named_losses(
    config: CarmaConfig,
    task: float,
    mi_per_layer: Sequence[float],
    stability_per_layer: Sequence[float],
    log_layers: bool = True,
) -> dict[str, float]:
    """The losses under the names they are logged by; layers, if asked for, count from 0, as in `config`."""
    totals = {"task_loss": task, "mi_loss": fmean(mi_per_layer), "stability_loss": sum(stability_per_layer)}
    if not log_layers:
        return totals
    first_mi = config.mi_layers[0] if config.mi_layers else 0
    first_stability = config.stability_layers[0] if config.stability_layers else 0
    return {
        **totals,
        **{f"mi_loss/layer_{layer}": loss for layer, loss in enumerate(mi_per_layer, first_mi)},
        **{
            f"stability_loss/layer_{layer}_to_{layer + 1}": loss
            for layer, loss in enumerate(stability_per_layer, first_stability)
        },
    }
