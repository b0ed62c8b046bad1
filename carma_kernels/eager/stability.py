"""The stability loss of consecutive layers, and its gradient as a three-point stencil.

`r_l = change_l / (energy_l + energy_{l+1} + eps)`, with `energy_l = mean(h_l^2)`, `change_l = mean((h_{l+1} - h_l)^2)`.
With `k_l = 2 / (N (energy_l + energy_{l+1} + eps))`, N the number of elements in the means,

    d r_l / d h_l     = -k_l (h_{l+1} - h_l) - k_l r_l h_l
    d r_l / d h_{l+1} =  k_l (h_{l+1} - h_l) - k_l r_l h_{l+1}

so a layer's gradient needs the layer and its differences to both neighbours. The differences are formed first and
weighted then: with the weights folded into coefficients of `h_{l-1}, h_l, h_{l+1}`, close layers would cancel.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class StabilityState(NamedTuple):
    """What the backward needs of the forward, for layers 0 .. L-1."""

    loss: Tensor  # [L-1] r_l
    scale: Tensor  # [L-1] k_l


def sum_of_squares(norm: Tensor, mask: Tensor | None) -> Tensor:
    """Sum of squares over the valid rows, from the norms of the rows `[N]`."""
    squares = norm.square()
    return (squares if mask is None else torch.where(mask, squares, 0.0)).sum()


def stability(
    energies: list[Tensor], changes: list[Tensor], mask: Tensor | None, size: int, width: int, eps: float
) -> StabilityState:
    """The losses from the sums over each layer; `size` elements a layer, `width` of them a token."""
    energy = torch.stack(energies)  # [L]
    count: Tensor | int = max(size, 1) if mask is None else (mask.sum() * width).clamp_min(1)
    denominator = (energy[:-1] + energy[1:]) / count + eps  # [L-1]
    loss = torch.stack(changes) / count / denominator if changes else energy.new_zeros(0)
    return StabilityState(loss, 2 / (count * denominator))


def stencil(
    rows: Tensor,
    before: Tensor | None,
    after: Tensor | None,
    weight: Tensor,
    shrink: Tensor,
    mask: Tensor | None,
    out: Tensor,
) -> None:
    """Write one layer's gradient to `out` `[N, D]`.

    Args:
        rows: the layer `h_l` `[N, D]`.
        before, after: its differences `h_l - h_{l-1}` and `h_{l+1} - h_l`, None at the ends.
        weight: `[2]`, `k_{l-1}` and `k_l`, times the upstream gradients.
        shrink: 0-d, `k_{l-1} r_{l-1} + k_l r_l`, times the upstream gradients.
        mask: `[N]` valid rows; the others, whatever they hold, get a zero.
    """
    torch.mul(rows, -shrink, out=out)
    if before is not None:
        out.addcmul_(before, weight[0])
    if after is not None:
        out.addcmul_(after, weight[1], value=-1)
    if mask is not None:
        out.masked_fill_(~mask[:, None], 0.0)


def stencil_weights(state: StabilityState, grad: Tensor) -> tuple[Tensor, Tensor]:
    """The `weight` `[L, 2]` and `shrink` `[L]` of every layer, from the upstream gradient `[L-1]`."""
    none = grad.new_zeros(1)
    scale = torch.cat([none, state.scale * grad, none])  # [L+1] k_{l-1} and k_l of layer l are entries l and l+1
    pull = torch.cat([none, state.scale * grad * state.loss, none])
    return torch.stack([scale[:-1], scale[1:]], dim=1), pull[:-1] + pull[1:]
