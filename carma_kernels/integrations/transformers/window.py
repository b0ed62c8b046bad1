"""Gradient accumulation: what the losses of the batches between two optimizer steps divide by."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from carma_kernels.config import CarmaConfig
from carma_kernels.distributed import global_num_pairs
from carma_kernels.functional import CarmaOutput
from carma_kernels.integrations.transformers.tap import HiddenStateTap
from carma_kernels.pairs import PairIndex
from carma_kernels.spans import TokenSpans

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class CarmaWindow:
    """The batches that a step of the optimizer is made of, on this rank and on the others.

    The gradients of `carma_loss`, added up over the window's batches and averaged over the ranks (as DDP, FSDP and
    DeepSpeed do), are those of

        L_MI         summed over all pairs of the window, on all ranks, divided by their number: as of one large batch
        L_Stability  the mean over the window's batches and the ranks: a ratio of means is not the sum of its parts, so
                     this, not the ratio over the large batch, is what accumulation can have

    whatever the number of batches, also where the last window of an epoch has fewer.
    """

    num_pairs: float | Tensor
    """of the window: the mean over the ranks, on the device, or with a single rank its number"""
    num_batches: int
    """of the window on this rank, those without spans included; the ranks have as many"""

    @classmethod
    def of(
        cls,
        batches: Iterable[Mapping[str, Any]],
        accelerator: Any = None,
        key: str = "spans",
        *,
        group: ProcessGroup | None = None,
        device: torch.device | str | None = None,
    ) -> CarmaWindow:
        """Count a window's batches, which must be at hand before the first backward; one reduction over the ranks.

        Args:
            batches: with their `TokenSpans` (or `PairIndex`) under `key`.
            accelerator: an `accelerate.Accelerator`, whose processes are the ranks.
            key: as the collator's.
            group: without Accelerate, the ranks over which gradients are averaged, `dist.group.WORLD` say.
            device: with `group`, that of the hidden states; None for that of the spans.

        Raises:
            ValueError: both `accelerator` and `group`; or neither, where torch.distributed runs several processes.
        """
        spans = [batch.get(key) for batch in batches]
        pairs = [getattr(of_batch, "num_pairs", 0) for of_batch in spans]
        if accelerator is not None and group is not None:
            raise ValueError("accelerator and group both say which ranks there are. Give one of them.")
        processes = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        if accelerator is None and group is None and processes > 1:
            raise ValueError(
                f"torch.distributed runs {processes} processes, and a window without accelerator= or group= would be "
                "that of this one. Give the accelerator, or group=dist.group.WORLD and device=. For a process that "
                "trains a model of its own: CarmaWindow(num_pairs, num_batches)."
            )
        if group is not None:
            total, W = (
                global_num_pairs([of_batch for of_batch in spans if of_batch is not None], group, device),
                group.size(),
            )
        elif accelerator is not None and accelerator.num_processes > 1:
            local = torch.tensor(sum(pairs), device=accelerator.device)
            total, W = accelerator.reduce(local, reduction="sum"), accelerator.num_processes
        else:
            return cls(max(sum(pairs), 1), len(pairs))
        return cls(total.clamp_min(1) / W, len(pairs))

    def carma_loss(
        self,
        tap: HiddenStateTap,
        spans: TokenSpans | PairIndex,
        config: CarmaConfig = CarmaConfig(),  # noqa: B008 (frozen)
        *,
        mask: Tensor | Literal["all"] | None = None,
        backend: str | None = None,
    ) -> CarmaOutput:
        """This batch's part: `carma_loss` of the tapped hidden states, its `loss` divided by what the window holds.

        Args:
            tap: of the model, after its forward.
            spans: of the batch.
            config: the options.
            mask: of the stability loss, as in `carma_kernels.carma_loss`.
            backend: see `carma_kernels.choose_backend`.

        Returns:
            `mi` and `mi_per_layer` are divided like `loss`; `stability` and `stability_per_layer` are the batch's own.
        """
        share = replace(config, stability_weight=config.stability_weight / self.num_batches)
        return tap.carma_loss(spans, share, mask=mask, num_pairs=self.num_pairs, backend=backend)
