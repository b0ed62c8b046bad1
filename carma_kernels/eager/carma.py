"""Both losses in one walk over the layers, forward and backward, with one write of each layer's gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from carma_kernels._autograd import Operation
from carma_kernels._operators import (
    CARMA_SCHEMA,
    CarmaArguments,
    CarmaUpstream,
    carma_arguments,
    empty_gradients,
    totals,
)
from carma_kernels._terms import Gradients, MITerm, StabilityTerm, Terms
from carma_kernels.distributed import join_terms
from carma_kernels.eager.layers import (
    LayerRows,
    compute_dtype,
    inverse,
    layers_at_once,
    norms,
    own_precision,
    receiving_layers,
    runs,
)
from carma_kernels.eager.mi import AnchorState, ContrastiveMI
from carma_kernels.eager.pairs import ListedMI
from carma_kernels.eager.stability import stability, stencil, stencil_weights, sums_of_squares
from carma_kernels.spans import ContrastTable


def carma_terms(
    hidden: Tensor | Sequence[Tensor], mi: MITerm | None, stability: StabilityTerm | None, group: str | None = None
) -> Terms:
    """Both losses of hidden states `[L, B, T, D]` or L times `[B, T, D]`; of the joined batch of a `group`.

    Connected to every layer and, where it is a tensor, to the temperature.
    """
    return Terms(*_operation(_asked(hidden, mi, stability, group)))


def carma_terms_and_gradients(
    hidden: Sequence[Tensor], mi: MITerm | None, stability: StabilityTerm | None, group: str | None = None
) -> tuple[Terms, Gradients]:
    """The same of L times `[B, T, D]`, connected to nothing, and what makes the gradients of some of the layers."""
    terms, gradients = _operation.apart(_asked(hidden, mi, stability, group))
    return Terms(*terms), gradients


def _asked(
    hidden: Tensor | Sequence[Tensor], mi: MITerm | None, stability: StabilityTerm | None, group: str | None
) -> _Problem:
    if stability is not None and not stability.is_padded:
        stability = replace(stability, mask=None)  # which costs operations
    return _Problem(*carma_arguments(hidden, mi, stability, group, _tables))


def _tables(table: ContrastTable) -> list[Tensor]:
    return [table.key_token, table.key_word, table.anchor_slot, table.anchor_word]


class _Problem(CarmaArguments):
    """What the operators were asked."""

    __slots__ = ()

    @property
    def stability_layers(self) -> range:
        return range(*self.ranges[2:])

    @property
    def valid_rows(self) -> Tensor | None:
        """The stability term's valid rows `[N]`."""
        return None if self.mask is None else self.mask.reshape(-1)

    @property
    def inverse_temperature(self) -> Tensor | float:
        temperature = self.temperature_value if self.temperature is None else self.temperature
        return inverse(temperature, compute_dtype(self.hidden[0].dtype))

    def mi_arithmetic(self) -> ContrastiveMI | ListedMI | None:
        """What computes the MI term; None if it has no pair."""
        if not self.pairs or not self.pairs[-1].numel():
            return None
        if len(self.pairs) == 3:
            anchor, positive, negatives = self.pairs
            return ListedMI(anchor, positive, negatives, self.cosine)
        key_token, key_word, anchor_slot, anchor_word = self.pairs
        table = ContrastTable(key_token, key_word, anchor_slot, anchor_word, self.covers_batch)
        return ContrastiveMI(table, self.cosine, self.match_negatives)


class _Saved(NamedTuple):
    """What the forward leaves for the backward: a few numbers a token and layer."""

    norm: Tensor  # [L, N] of the MI layers
    log_negatives: Tensor  # [L, S, A]
    pull: Tensor  # [L, S, A]
    scale: Tensor  # [L-1] of the stability term

    def anchors(self, some: slice) -> AnchorState:
        """Of some of the MI layers."""
        return AnchorState(self.log_negatives[some], self.pull[some])


def _forward(problem: _Problem) -> tuple[Tensor, ...]:
    """`Terms`, and what is saved."""
    sums, losses, saved = _empty_results(problem)
    mi_layers, stability_layers = problem.mi_layers, problem.stability_layers
    valid = problem.valid_rows
    arithmetic = problem.mi_arithmetic()
    with own_precision(sums.device):
        rows, at_once = _rows(problem, arithmetic)
        scale = problem.inverse_temperature
        energies: list[Tensor] = []
        changes: list[Tensor] = []
        for run in runs(sorted({*mi_layers, *stability_layers}), at_once):
            norm = torch.stack([norms(rows[layer]) for layer in run])  # [l, N]
            with_stability = _common(run, stability_layers)
            if with_stability:
                energies.append(sums_of_squares(norm[_slice(with_stability, run)], valid))
            steps = [norms(rows.step(layer - 1)) for layer in with_stability if layer > stability_layers.start]
            if steps:
                changes.append(sums_of_squares(torch.stack(steps), valid))
            with_mi = _common(run, mi_layers)
            if arithmetic is not None and with_mi:
                some = _slice(with_mi, mi_layers)
                saved.norm[some] = norm[_slice(with_mi, run)]
                sums[some] = arithmetic.forward(
                    [rows[layer] for layer in with_mi], saved.norm[some], scale, some.start, saved.anchors(some)
                )
        if changes:
            B, T, D = problem.layers[0].shape
            stability(
                torch.cat(energies), torch.cat(changes), valid, B * T * D, D, problem.eps, out=(losses, saved.scale)
            )
        if problem.group is not None:
            join_terms(problem.group, sums, losses, saved.scale, problem.layers[0], problem.mask)
        means = sums / (problem.divisor_value if problem.divisor is None else problem.divisor)
        return means, losses, *totals(problem, means, losses), *saved


def _empty(problem: _Problem) -> tuple[Tensor, ...]:
    sums, losses, saved = _empty_results(problem)
    mi, stability, loss = (sums.new_empty(()) for _ in range(3))
    return sums, losses, mi, stability, loss, *saved


def _empty_results(problem: _Problem) -> tuple[Tensor, Tensor, _Saved]:
    layer = problem.layers[0]
    num_mi, num_steps = len(problem.mi_layers), max(0, len(problem.stability_layers) - 1)
    anchors = problem.pairs[-1].shape if len(problem.pairs) == 4 else (0, 0)
    dtype = compute_dtype(layer.dtype)
    return (
        layer.new_zeros(num_mi, dtype=dtype),
        layer.new_zeros(num_steps, dtype=dtype),
        _Saved(
            layer.new_zeros((num_mi, layer.shape[0] * layer.shape[1]), dtype=dtype),
            layer.new_zeros((num_mi, *anchors), dtype=dtype),
            layer.new_zeros((num_mi, *anchors), dtype=dtype),
            layer.new_zeros(num_steps, dtype=dtype),
        ),
    )


def _backward(
    problem: _Problem,
    upstream: tuple[Tensor | None, ...],
    kept: list[Tensor],
    needs_grad: list[bool],
    needs_work: bool,
) -> tuple[list[Tensor], Tensor]:
    """The gradients of the hidden states that need one, and `-tau` times that of the temperature."""
    losses, *rest = kept
    saved = _Saved(*rest)
    arrived = CarmaUpstream(*upstream)
    grad_sums = _of_each(arrived.of_sums(problem), len(problem.mi_layers))
    grad_losses = _of_each(arrived.of_changes(problem), len(losses))
    layers = problem.layers
    gradients = empty_gradients(problem.hidden, needs_grad)
    receiver = receiving_layers(problem.hidden, gradients, needs_grad)
    arithmetic = problem.mi_arithmetic() if grad_sums is not None else None
    mi_layers = problem.mi_layers if arithmetic is not None else range(0)
    stability_layers = problem.stability_layers if grad_losses is not None and len(losses) else range(0)
    valid = problem.valid_rows
    dtype = compute_dtype(layers[0].dtype)
    work = layers[0].new_zeros((), dtype=dtype)  # sum of W s over layers
    with own_precision(work.device):
        rows, at_once = _rows(problem, arithmetic)
        scale = problem.inverse_temperature
        weights = stencil_weights(losses, saved.scale, grad_losses) if grad_losses is not None else []
        needed = [layer for layer in range(len(layers)) if layer in receiver or (layer in mi_layers and needs_work)]
        for run in runs(needed, at_once):
            out = [_row_buffer(receiver.get(layer), layers[layer], dtype) for layer in run]  # l times [N, D]
            for layer, of_layer in zip(run, out, strict=True):
                if layer in stability_layers and layer in receiver:
                    before = rows.step(layer - 1) if layer > stability_layers.start else None
                    after = rows.step(layer) if layer + 1 < stability_layers.stop else None
                    stencil(rows[layer], before, after, weights[layer - stability_layers.start], valid, of_layer)
                else:
                    of_layer.zero_()
            with_mi = _common(run, mi_layers)
            if arithmetic is not None and grad_sums is not None and with_mi:
                some = _slice(with_mi, mi_layers)
                work += arithmetic.backward(
                    [rows[layer] for layer in with_mi],
                    saved.norm[some],
                    scale,
                    some.start,
                    saved.anchors(some),
                    grad_sums[some],
                    out[_slice(with_mi, run)],
                )
            for layer, of_layer in zip(run, out, strict=True):
                if layer in receiver and receiver[layer].dtype != dtype:
                    receiver[layer].view(of_layer.shape).copy_(of_layer)
    return gradients, work


def _empty_backward(problem: _Problem, needs_grad: list[bool]) -> tuple[list[Tensor], Tensor]:
    first = problem.hidden[0]
    return empty_gradients(problem.hidden, needs_grad), first.new_zeros((), dtype=compute_dtype(first.dtype))


_operation = Operation(
    "torch_carma_terms",
    "the CARMA losses",
    CARMA_SCHEMA,
    _Problem,
    forward=_forward,
    empty=_empty,
    num_results=len(Terms._fields) + len(_Saved._fields),
    num_outputs=len(Terms._fields),
    kept=(1, *range(len(Terms._fields), len(Terms._fields) + len(_Saved._fields))),
    backward=_backward,
    empty_backward=_empty_backward,
)


def _of_each(arrived: tuple[Tensor, float] | None, num_layers: int) -> Tensor | None:
    """The gradient that arrives for each layer."""
    if arrived is None:
        return None
    gradient, factor = arrived
    return (gradient * factor).expand(num_layers)


def _rows(problem: _Problem, arithmetic: ContrastiveMI | ListedMI | None) -> tuple[LayerRows, int]:
    """The layers to read, and how many to take together."""
    first = problem.layers[0]
    at_once = layers_at_once(first, arithmetic.layers_at_once(first.numel()) if arithmetic is not None else 1)
    return LayerRows(problem.layers, at_once), at_once


def _common(some: range, others: range) -> range:
    """Layers in both."""
    return range(max(some.start, others.start), min(some.stop, others.stop))


def _slice(some: range, others: range) -> slice:
    """Where among the others some of them are."""
    return slice(some.start - others.start, some.stop - others.start)


def _row_buffer(gradient: Tensor | None, layer: Tensor, dtype: torch.dtype) -> Tensor:
    """Where a layer's gradient is summed up: the gradient itself if it has the compute dtype, or else a buffer."""
    shape = (layer.shape[0] * layer.shape[1], layer.shape[2])
    if gradient is not None and gradient.dtype == dtype:
        return gradient.view(shape)
    return torch.empty(shape, dtype=dtype, device=layer.device)
