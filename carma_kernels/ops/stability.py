"""Host side of the stability loss, and of the norms and sums that it makes for the MI loss on the way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from carma_kernels import _runtime
from carma_kernels._terms import Terms
from carma_kernels.kernels import launch, stability
from carma_kernels.ops.layers import LayerTable, Upstream, ceil_div, constants, hull, target

_FINALIZE = {"LAYERS": 16, "BLOCK": 256, "num_warps": 16}  # no spill with any Triton


@dataclass(frozen=True)
class StabilityPartials:
    """Sums over parts of each layer, for `finalize`."""

    sums: Tensor
    """`[2 * len(walked) + 1, parts]` fp32: energies, changes, rows that take part"""
    walked: range
    """the layers they are of"""


@dataclass(frozen=True)
class StabilityGradient:
    """What the stability loss's gradient is made of: its losses, their scale, `[steps]`, and what arrives for them."""

    layers: range
    mask: Tensor | None
    """`[B*T]` uint8"""
    losses: Tensor
    scale: Tensor
    upstream: Upstream

    @property
    def num_steps(self) -> int:
        """From each layer to the next."""
        return self.losses.shape[0]

    @property
    def arguments(self) -> tuple[Tensor | float | None, ...]:
        """As the kernels take it."""
        return self.losses, self.scale, *self.upstream.arguments, self.layers.start, self.num_steps, self.mask


def stability_forward(
    hidden: LayerTable, layers: range, mask: Tensor | None, norms_layers: range, inverse_norms: Tensor
) -> StabilityPartials:
    """Read the layers once: sums of squares of the layers and of their changes, and the norms of their rows.

    Args:
        hidden: L layers of N rows.
        layers: those of the stability loss; empty without.
        mask: `[N]` uint8, the rows in the sums; None for all.
        norms_layers: those whose norms are wanted; empty for none.
        inverse_norms: `[len(norms_layers), N]` fp32, overwritten with `1/|h|`.
    """
    B, T, D = hidden.shape
    device = hidden.present.device
    walked = hull(layers, norms_layers)
    if not len(walked):
        return StabilityPartials(torch.empty((1, 0), dtype=torch.float32, device=device), walked)
    configuration = _rows_configuration("stability_forward", hidden)
    programs = ceil_div(B * T, configuration.constants["BLOCK_ROWS"])
    sums = torch.empty((2 * len(walked) + 1, programs), dtype=torch.float32, device=device)
    _runtime.launch(
        stability._stability_forward_kernel,
        (programs,),
        hidden.addresses,
        mask,
        inverse_norms,
        sums,
        walked.start,
        walked.stop,
        norms_layers.start,
        norms_layers.stop,
        B * T,
        D,
        SUMS=len(layers) > 0,
        HAS_MASK=mask is not None,
        **constants(hidden),
        **configuration.options,
    )
    return StabilityPartials(sums, walked)


def finalize(
    mi_partials: Tensor,
    divisor: Tensor,
    partials: StabilityPartials,
    layers: range,
    width: int,
    eps: float,
    weights: Sequence[float],
    terms: Terms,
    scale: Tensor,
) -> None:
    """Add up, in one launch.

    Args:
        mi_partials: of the MI loss, `[L_mi, parts]`.
        divisor: 0-d fp32, of the sums over these parts.
        partials: of the stability loss, if it has steps.
        layers: the stability loss's.
        width: D.
        eps: of the stability loss.
        weights: of both losses in the total.
        terms: overwritten.
        scale: k_l of the stability loss, `[steps]`, overwritten.
    """
    _runtime.launch(
        stability._finalize_kernel,
        (1,),
        mi_partials,
        divisor,
        mi_partials.shape[0],
        mi_partials.shape[1],
        partials.sums,
        scale.shape[0],
        partials.sums.shape[1],
        len(partials.walked),
        layers.start - partials.walked.start,
        width,
        eps,
        *weights,
        terms.mi_per_layer,
        terms.stability_per_layer,
        scale,
        terms.mi,
        terms.stability,
        terms.loss,
        **_FINALIZE,
    )


def stability_backward(hidden: LayerTable, gradient: StabilityGradient, out: LayerTable, skipped: range) -> None:
    """Write the gradient of every layer but the skipped ones; zeros for those outside the loss.

    Args:
        hidden: L layers of N rows.
        gradient: what it is made of; without any step, zeros.
        out: L layers, None among them where no gradient is wanted.
        skipped: layers that are not written.
    """
    B, T, D = hidden.shape
    configuration = _rows_configuration("stability_backward", hidden)
    rows, columns = configuration.constants["BLOCK_ROWS"], configuration.constants["BLOCK_D"]
    _runtime.launch(
        stability._stability_backward_kernel,
        (ceil_div(B * T, rows), ceil_div(D, columns)),
        hidden.addresses,
        out.addresses,
        gradient.mask,
        gradient.losses,
        gradient.scale,
        *gradient.upstream.arguments,
        gradient.layers.start,
        gradient.num_steps,
        skipped.start,
        skipped.stop,
        len(hidden),
        B * T,
        D,
        HAS_MASK=gradient.mask is not None,
        **constants(hidden, out),
        **configuration.options,
    )


def _rows_configuration(kernel: str, hidden: LayerTable) -> launch.Configuration:
    D = hidden.shape[2]
    configuration = launch.choose(kernel, target(hidden.present.device), D, hidden.present.element_size())
    if configuration is None:
        raise ValueError(f"hidden_states have width {D}; the triton backend takes up to 16384. Use backend='torch'.")
    return configuration
