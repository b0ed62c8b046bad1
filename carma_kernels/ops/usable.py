"""Whether the Triton backend can compute something here, for those who have not asked for it."""

from __future__ import annotations

import torch
from torch import Tensor

from carma_kernels.kernels import launch
from carma_kernels.ops.layers import DTYPES, on_device
from carma_kernels.ops.stability import StabilityPartials, finalize


def probe(device: torch.device) -> None:
    """Compile the smallest kernel and launch it; raises what Triton raises if that cannot be done on the device."""
    one = torch.ones(1, device=device)
    with on_device(device):
        nothing = StabilityPartials(one.new_empty((1, 0)), range(0))
        finalize(one[:, None], torch.empty_like(one), nothing, range(0), (one[:0], one[:0]), width=1, eps=1.0)


def takes(layer: Tensor) -> bool:
    """Whether there are kernels for layers `[B, T, D]` of this dtype and width."""
    return layer.dtype in DTYPES and all(
        any(layer.shape[-1] <= configuration.max_size for configuration in launch.TABLE[kernel])
        for kernel in ("stability_forward", "stability_backward", "pairs_backward")
    )
