"""Whether, and with which kernels, the Triton backend computes a call: for those who have not asked for it."""

from __future__ import annotations

import torch
from torch import Tensor

from carma_kernels._terms import MITerm
from carma_kernels.kernels import launch
from carma_kernels.ops.layers import DTYPES, target
from carma_kernels.pairs import PairIndex

_WIDEST = min(
    max(configuration.max_size for configuration in launch.TABLE[kernel])
    for kernel in ("stability_forward", "stability_backward", "pairs_backward")
)


def takes(layer: Tensor) -> bool:
    """Whether there are kernels for layers `[B, T, D]` of this dtype and width."""
    return layer.dtype in DTYPES and layer.shape[-1] <= _WIDEST


def kernels_for(layer: Tensor, mi: MITerm | None) -> str:
    """Which kernels compute the losses of layers `[B, T, D]` like this one, in words."""
    if mi is None:
        return "stability alone"
    if isinstance(mi.pairs, PairIndex):
        return "listed pairs" if mi.pairs.num_pairs else "stability alone"
    assert mi.pairs.ranks is not None
    if not mi.pairs.ranks.num_pairs:
        return "stability alone"
    B, T, _ = layer.shape
    group_size = B * T // mi.pairs.ranks.token.shape[0]
    return "short groups" if group_size <= _longest_short(layer.device, layer.element_size()) else "long groups"


_longest: dict[tuple[torch.device, int], float] = {}


def _longest_short(device: torch.device, element_bytes: int) -> float:
    """Tokens of a group that `ShortMI` takes."""
    if (device, element_bytes) not in _longest:
        kernels = ("short_forward", "short_backward")
        found = min(launch.longest(kernel, target(device), element_bytes) for kernel in kernels)
        _longest[device, element_bytes] = found
    return _longest[device, element_bytes]


# torch.compile shall take the number as it is; what torch.compiler.assume_constant_result does, without its imports
_longest_short._dynamo_marked_constant = True  # type: ignore[attr-defined]
