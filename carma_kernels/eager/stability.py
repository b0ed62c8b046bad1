"""The stability loss of consecutive layers, and its gradient as a three-point stencil.

`r_l = change_l / (energy_l + energy_{l+1} + eps)`, with `energy_l = mean(h_l^2)`, `change_l = mean((h_{l+1} - h_l)^2)`.
With `k_l = 2 / (N (energy_l + energy_{l+1} + eps))`, N the number of elements in the means,

    d r_l / d h_l     = -k_l (h_{l+1} - h_l) - k_l r_l h_l
    d r_l / d h_{l+1} =  k_l (h_{l+1} - h_l) - k_l r_l h_{l+1}

so a layer's gradient needs the layer and its differences to both neighbours. The differences are formed first and
weighted then: with the weights folded into coefficients of `h_{l-1}, h_l, h_{l+1}`, close layers would cancel.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from carma_kernels.eager.layers import Steps, at, common, places


def sums_of_squares(norm: Tensor, invalid: Tensor | None) -> Tensor:
    """Sum of squares over the valid rows of each layer `[l]`, from the norms of the rows `[l, N]`."""
    squares = norm.square()
    return (squares if invalid is None else squares.masked_fill_(invalid, 0.0)).sum(1)


def stability(
    energy: Tensor,
    change: Tensor,
    valid: Tensor | None,
    size: int,
    width: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """`r_l` and `k_l`, `[L-1]` each, from the sums over each layer and step.

    Args:
        energy, change: sums of squares, `[L]` and `[L-1]`.
        valid: `[N]` rows in the sums, None for all.
        size, width: elements of a layer, and of a row.
        eps: added to the denominator.
    """
    count: Tensor | int = max(size, 1) if valid is None else (valid.sum() * width).clamp_min(1)
    total = (energy[:-1] + energy[1:]).add_(count * eps)  # [L-1]
    return change / total, 2 / total


class Stencil:
    """The gradient of each of the L layers of the stability loss."""

    def __init__(self, layers: range, loss: Tensor, scale: Tensor, grad: Tensor) -> None:
        """Take the layers, and of their steps `r_l`, `k_l` and the upstream gradient, `[L-1]` each."""
        self._layers = layers
        self._step = (scale * grad)[:, None, None]  # [L-1, 1, 1], k_l
        pull = self._step * loss[:, None, None]
        self._own = pull.new_zeros(len(layers), 1, 1)  # -(k_{l-1} r_{l-1} + k_l r_l)
        self._own[1:].sub_(pull)
        self._own[:-1].sub_(pull)

    def own(self, layers: range) -> Tensor:
        """`[l, 1, 1]`: what of each of some layers itself is in its gradient."""
        return at(self._own, places(layers, self._layers))

    def write(self, layers: range, rows: Tensor, changes: Iterable[Steps], invalid: Tensor | None, out: Tensor) -> None:
        """Write the gradients of some layers to `out` `[l, N, D]`.

        Args:
            layers: which.
            rows: these layers, `[l, N, D]`.
            changes: all that lead from one of them or to one.
            invalid: `[N, 1]` rows that get a zero, whatever they hold.
            out: overwritten.
        """
        torch.mul(rows, self.own(layers), out=out)
        self.add_changes(layers, changes, out)
        if invalid is not None:
            out.masked_fill_(invalid, 0.0)

    def add_changes(self, layers: range, changes: Iterable[Steps], out: Tensor) -> None:
        """Of the gradients of some layers, to `out` `[l, N, D]`, what is not the layer `own`."""
        for some, change in changes:
            weight = at(self._step, places(some, self._layers))  # [m, 1, 1]
            for ahead, sign in ((1, 1), (0, -1)):  # the layers that the steps lead to, and those that they start from
                reached = common(layers, range(some.start + ahead, some.stop + ahead))
                if reached:
                    there = places(range(reached.start - ahead, reached.stop - ahead), some)
                    at(out, places(reached, layers)).addcmul_(at(change, there), at(weight, there), value=sign)
