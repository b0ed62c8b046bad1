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


def sums_of_squares(norm: Tensor, valid: Tensor | None) -> Tensor:
    """Sum of squares over the valid rows of each layer `[l]`, from the norms of the rows `[l, N]`."""
    squares = norm.square()
    return (squares if valid is None else torch.where(valid, squares, 0.0)).sum(1)


def stability(
    energy: Tensor,
    change: Tensor,
    valid: Tensor | None,
    size: int,
    width: int,
    eps: float,
    out: tuple[Tensor, Tensor],
) -> None:
    """Write `r_l` and `k_l`, `[L-1]` each, from the sums over each layer and step.

    Args:
        energy, change: sums of squares, `[L]` and `[L-1]`.
        valid: `[N]` rows in the sums, None for all.
        size, width: elements of a layer, and of a row.
        eps: added to the denominator.
        out: where `r_l` and `k_l` go.
    """
    count: Tensor | int = max(size, 1) if valid is None else (valid.sum() * width).clamp_min(1)
    denominator = (energy[:-1] + energy[1:]) / count + eps  # [L-1]
    loss, scale = out
    loss.copy_(change / count / denominator)
    scale.copy_(2 / (count * denominator))


class StencilWeights(NamedTuple):
    """What a layer's gradient is made with: upstream-weighted, 0-d each."""

    before: Tensor  # k_{l-1}
    after: Tensor  # k_l
    own: Tensor  # -(k_{l-1} r_{l-1} + k_l r_l)


def stencil_weights(loss: Tensor, scale: Tensor, grad: Tensor) -> list[StencilWeights]:
    """The weights of each of the L layers, from `r_l`, `k_l` and the upstream gradient, `[L-1]` each."""
    weight = torch.nn.functional.pad(scale * grad, (1, 1))  # [L+1] of the steps before and after each layer
    pull = torch.nn.functional.pad(scale * grad * loss, (1, 1))
    own = -(pull[:-1] + pull[1:])
    return [StencilWeights(weight[at], weight[at + 1], own[at]) for at in range(len(own))]


def stencil(
    rows: Tensor,
    before: Tensor | None,
    after: Tensor | None,
    weights: StencilWeights,
    valid: Tensor | None,
    out: Tensor,
) -> None:
    """Write one layer's gradient to `out` `[N, D]`.

    Args:
        rows: the layer `h_l` `[N, D]`.
        before, after: its steps `h_l - h_{l-1}` and `h_{l+1} - h_l`, None at the ends.
        weights: of this layer.
        valid: `[N]`; the other rows, whatever they hold, get a zero.
        out: overwritten.
    """
    torch.mul(rows, weights.own, out=out)
    if before is not None:
        out.addcmul_(before, weights.before)
    if after is not None:
        out.addcmul_(after, weights.after, value=-1)
    if valid is not None:
        out.masked_fill_(~valid[:, None], 0.0)
