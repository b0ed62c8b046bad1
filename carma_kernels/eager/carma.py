"""Both losses in one walk over the layers, forward and backward, with one write of each layer's gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from carma_kernels._terms import MITerm, StabilityTerm
from carma_kernels.eager.layers import LayerRows, compute_dtype, inverse, layer_views, norms, own_precision
from carma_kernels.eager.mi import ContrastiveMI
from carma_kernels.eager.pairs import ListedMI
from carma_kernels.eager.stability import StabilityState, stability, stencil, stencil_weights, sum_of_squares
from carma_kernels.spans import PairIndex


def carma_terms(
    hidden: Tensor | Sequence[Tensor], mi: MITerm | None, stability: StabilityTerm | None
) -> tuple[Tensor, Tensor]:
    """Both losses, unreduced, of hidden states `[L, B, T, D]` or L times `[B, T, D]`.

    Returns:
        The MI loss of each of `mi.layers`, summed over the pairs, `[len(mi.layers)]`, and the stability loss of each
        layer of `stability.layers` with the next, `[len(stability.layers) - 1]`; fp32 (fp64 for fp64 inputs). Empty for
        a term that is None. Both are connected to every layer and, where it is a tensor, to the temperature.
    """
    stacked = isinstance(hidden, Tensor)
    tensors = (hidden,) if isinstance(hidden, Tensor) else tuple(hidden)
    temperature = mi.similarity.temperature if mi is not None else 1.0
    sums, terms = _CarmaTerms.apply(_Problem(mi, stability, stacked), temperature, *tensors)
    return sums, terms


@dataclass(frozen=True)
class _Problem:
    mi: MITerm | None
    stability: StabilityTerm | None
    stacked: bool

    def layers(self, hidden: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The layers `[B, T, D]` each, as views."""
        return layer_views(hidden, self.stacked)

    def mi_layers(self) -> range:
        """Layers with an MI term that has a pair."""
        if self.mi is None:
            return range(0)
        pairs = self.mi.pairs
        any_anchor = (pairs.anchor if isinstance(pairs, PairIndex) else pairs.anchor_slot).numel()
        return self.mi.layers if any_anchor else range(0)

    def stability_layers(self) -> range:
        """Layers with a neighbour in the stability term."""
        return self.stability.layers if self.stability is not None and len(self.stability.layers) > 1 else range(0)

    def mask(self) -> Tensor | None:
        """The stability term's valid rows `[B*T]`."""
        mask = None if self.stability is None else self.stability.mask
        return None if mask is None else mask.reshape(-1)

    def mi_kernel(self) -> ContrastiveMI | ListedMI | None:
        """The MI term's arithmetic; made anew for each pass, so that its masks do not live in between."""
        if not self.mi_layers():
            return None
        mi = cast(MITerm, self.mi)
        if isinstance(mi.pairs, PairIndex):
            return ListedMI(mi.pairs, mi.similarity)
        return ContrastiveMI(mi.pairs, mi.similarity, mi.match_negatives)


class _CarmaTerms(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, problem: _Problem, temperature: Tensor | float, *hidden: Tensor) -> tuple[Tensor, Tensor]:
        layers = problem.layers(hidden)
        dtype = compute_dtype(layers[0].dtype)
        with own_precision(layers[0].device):
            rows = LayerRows(layers)
            mask = problem.mask()
            mi_layers, stability_layers = problem.mi_layers(), problem.stability_layers()
            mi_kernel = problem.mi_kernel()
            scale = inverse(temperature, dtype)
            sums: list[Tensor] = []
            norm: dict[int, Tensor] = {}
            states: list[tuple[Tensor, ...]] = []
            energies: list[Tensor] = []
            changes: list[Tensor] = []
            for layer in sorted({*mi_layers, *stability_layers}):
                norm[layer] = norms(rows[layer])  # [N]
                if layer in stability_layers:
                    energies.append(sum_of_squares(norm[layer], mask))
                    if layer > stability_layers.start:
                        changes.append(sum_of_squares(norms(rows.step(layer - 1)), mask))
                if mi_kernel is not None and layer in mi_layers:
                    loss, state = mi_kernel.forward(rows[layer], norm[layer], scale, layer - mi_layers.start)
                    sums.append(loss)
                    states.append(state)
            B, T, D = layers[0].shape
            num_mi = len(problem.mi.layers) if problem.mi is not None else 0
            mi_sums = torch.stack(sums) if sums else layers[0].new_zeros(num_mi, dtype=dtype)
            if problem.stability is not None and stability_layers:
                stable = stability(energies, changes, mask, B * T * D, D, problem.stability.eps)
            else:
                stable = StabilityState(*(layers[0].new_zeros(0, dtype=dtype),) * 2)

        ctx.problem = problem
        ctx.num_hidden = len(hidden)
        ctx.temperature = None if isinstance(temperature, Tensor) else temperature
        saved_temperature = [temperature] if isinstance(temperature, Tensor) else []
        saved_norms = [norm[layer] for layer in mi_layers]
        saved_states = [tensor for state in states for tensor in state]
        ctx.save_for_backward(*hidden, *stable, *saved_temperature, *saved_norms, *saved_states)
        return mi_sums, stable.loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_sums: Tensor, grad_stability: Tensor) -> tuple[Tensor | None, ...]:
        problem: _Problem = ctx.problem
        saved = list(ctx.saved_tensors)
        hidden = tuple(saved[: ctx.num_hidden])
        stable = StabilityState(*saved[ctx.num_hidden : ctx.num_hidden + 2])
        del saved[: ctx.num_hidden + 2]
        temperature: Tensor | float = saved.pop(0) if ctx.temperature is None else ctx.temperature
        mi_layers, stability_layers = problem.mi_layers(), problem.stability_layers()
        norm, saved_states = saved[: len(mi_layers)], saved[len(mi_layers) :]
        per_layer = len(saved_states) // max(1, len(mi_layers))
        states = [tuple(saved_states[per_layer * at : per_layer * (at + 1)]) for at in range(len(mi_layers))]

        layers = problem.layers(hidden)
        dtype = compute_dtype(layers[0].dtype)
        needs_temperature: bool = ctx.needs_input_grad[1]
        needs_grad: list[bool] = list(ctx.needs_input_grad[2:])
        gradients: list[Tensor | None] = [
            torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device) if needed else None
            for tensor, needed in zip(hidden, needs_grad, strict=True)
        ]
        if problem.stacked:
            needs_grad *= len(layers)
        layer_gradients = gradients if gradients[0] is None or not problem.stacked else gradients[0].unbind(0)

        with own_precision(layers[0].device):
            rows = LayerRows(layers)
            mask = problem.mask()
            mi_kernel = problem.mi_kernel()
            scale = inverse(temperature, dtype)
            weights, shrinks = stencil_weights(stable, grad_stability)
            work = grad_sums.new_zeros(())  # sum of W s over layers
            before: Tensor | None = None
            for layer in range(len(layers)):
                after: Tensor | None = None
                in_stability = layer in stability_layers
                in_mi = mi_kernel is not None and layer in mi_layers
                if in_stability and layer + 1 in stability_layers and any(needs_grad[layer : layer + 2]):
                    after = rows.step(layer)
                if needs_grad[layer] or (in_mi and needs_temperature):
                    gradient = layer_gradients[layer] if needs_grad[layer] else None
                    out = _row_buffer(gradient, layers[layer], dtype)  # [N, D]
                    if in_stability:
                        at = layer - stability_layers.start
                        stencil(rows[layer], before, after, weights[at], shrinks[at], mask, out)
                    else:
                        out.zero_()
                    if mi_kernel is not None and in_mi:
                        at = layer - mi_layers.start
                        work += mi_kernel.backward(rows[layer], norm[at], scale, at, states[at], grad_sums[at], out)
                    if gradient is not None and gradient.dtype != dtype:
                        gradient.view(out.shape).copy_(out)
                before = after
        grad_temperature = None
        if needs_temperature:  # d s / d tau = -s / tau
            grad_temperature = (-work * scale).to(cast(Tensor, temperature).dtype)
        return None, grad_temperature, *gradients


def _row_buffer(gradient: Tensor | None, layer: Tensor, dtype: torch.dtype) -> Tensor:
    """Where a layer's gradient is summed up: the gradient itself if it has the compute dtype, or else a buffer."""
    shape = (layer.shape[0] * layer.shape[1], layer.shape[2])
    if gradient is not None and gradient.dtype == dtype:
        return gradient.view(shape)
    return torch.empty(shape, dtype=dtype, device=layer.device)
