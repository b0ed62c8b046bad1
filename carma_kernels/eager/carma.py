"""Both losses in one walk over the layers, forward and backward, with one write of each layer's gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from carma_kernels._autograd import carma_operation
from carma_kernels._operators import (
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
    Receivers,
    common,
    compute_dtype,
    inverse,
    inverse_norms,
    layers_at_once,
    norms,
    own_precision,
    places,
    runs,
)
from carma_kernels.eager.mi import AnchorState, ContrastiveMI
from carma_kernels.eager.pairs import ListedMI
from carma_kernels.eager.stability import Stencil, stability, sums_of_squares
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
    return [
        table.key_token,
        table.key_word,
        table.anchor_slot,
        table.anchor_word,
        table.num_positives,
        table.distance,
    ]


_ANCHORS = 3  # among them, anchor_word [S, A]


class _Problem(CarmaArguments):
    """What the operators were asked."""

    __slots__ = ()

    @property
    def stability_layers(self) -> range:
        """Those of the stability term; empty without."""
        return range(*self.ranges[2:])

    @property
    def steps(self) -> range:
        """Those of the stability term."""
        return _steps(self.stability_layers)

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
        if not self.num_pairs:
            return None
        if len(self.pairs) == 3:
            anchor, positive, negatives = self.pairs
            return ListedMI(anchor, positive, negatives, self.cosine)
        key_token, key_word, anchor_slot, anchor_word, num_positives, distance = self.pairs
        table = ContrastTable(key_token, key_word, anchor_slot, anchor_word, num_positives, distance, self.covers_batch)
        return ContrastiveMI(table, self.cosine, self.match_negatives)


class _Saved(NamedTuple):
    """What the forward leaves for the backward: a few numbers a token and layer."""

    inverse_norm: Tensor  # [L, N] of the MI layers
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
        rows = LayerRows(problem.hidden)
        scale = problem.inverse_temperature
        lengths: list[Tensor] = []  # [l, N] of the stability term's layers
        changes: list[Tensor] = []  # [l, N] of their steps
        for run in runs(sorted({*mi_layers, *stability_layers}), _at_once(problem, arithmetic)):
            here, steps = rows.read(run, common(range(run.start - 1, run.stop - 1), problem.steps))
            norm = norms(here)  # [l, N]
            if problem.steps:
                lengths.append(norm[places(common(run, stability_layers), run)])
            changes += [norms(change) for _, change in steps]
            del steps
            with_mi = common(run, mi_layers)
            if arithmetic is not None and with_mi:
                of_run, of_mi = places(with_mi, run), places(with_mi, mi_layers)
                inverse_norm = inverse_norms(norm[of_run], out=saved.inverse_norm[of_mi])
                sums[of_mi] = arithmetic.forward(here[of_run], inverse_norm, scale, of_mi.start, saved.anchors(of_mi))
        if changes:
            B, T, D = problem.layers[0].shape
            invalid = None if valid is None else ~valid
            energy, change = (sums_of_squares(torch.cat(norm), invalid) for norm in (lengths, changes))
            stability(energy, change, valid, B * T * D, D, problem.eps, out=(losses, saved.scale))
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
    anchors = problem.pairs[_ANCHORS].shape if len(problem.pairs) > 3 else (0, 0)
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
    receivers = Receivers(problem.hidden, gradients, needs_grad)
    arithmetic = problem.mi_arithmetic() if grad_sums is not None else None
    mi_layers = problem.mi_layers if arithmetic is not None else range(0)
    stability_layers = problem.stability_layers if grad_losses is not None and len(losses) else range(0)
    valid = problem.valid_rows
    works: list[Tensor] = []  # sums of W s
    with own_precision(layers[0].device):
        rows = LayerRows(problem.hidden)
        scale = problem.inverse_temperature
        stencil = Stencil(stability_layers, losses, saved.scale, grad_losses) if grad_losses is not None else None
        invalid = None if valid is None or stencil is None else ~valid[:, None]
        needed = [layer for layer in range(len(layers)) if layer in receivers or (layer in mi_layers and needs_work)]
        for run in runs(needed, _at_once(problem, arithmetic)):
            here, steps = rows.read(run, common(range(run.start - 1, run.stop), _steps(stability_layers)))
            room = receivers.room(run)
            changing = common(run, stability_layers)
            if len(changing) < len(run):
                room.zero_()
            if stencil is not None and changing:
                of_run = places(changing, run)
                stencil.write(changing, here[of_run], steps, invalid, room[of_run])
            del steps
            with_mi = common(run, mi_layers)
            if arithmetic is not None and grad_sums is not None and with_mi:
                of_run, of_mi = places(with_mi, run), places(with_mi, mi_layers)
                work = arithmetic.backward(
                    here[of_run],
                    saved.inverse_norm[of_mi],
                    scale,
                    of_mi.start,
                    saved.anchors(of_mi),
                    grad_sums[of_mi],
                    room[of_run],
                    needs_work,
                )
                if work is not None:
                    works.append(work)
            receivers.receive(run, room)
            del here, room  # before the next ones are made
    none = layers[0].new_zeros((), dtype=compute_dtype(layers[0].dtype))
    return gradients, sum(works, none)


def _empty_backward(problem: _Problem, needs_grad: list[bool]) -> tuple[list[Tensor], Tensor]:
    first = problem.hidden[0]
    return empty_gradients(problem.hidden, needs_grad), first.new_zeros((), dtype=compute_dtype(first.dtype))


_operation = carma_operation(
    "torch_carma_terms",
    _Problem,
    len(_Saved._fields),
    forward=_forward,
    empty=_empty,
    backward=_backward,
    empty_backward=_empty_backward,
)


def _of_each(arrived: tuple[Tensor, float] | None, num_layers: int) -> Tensor | None:
    """The gradient that arrives for each layer."""
    if arrived is None:
        return None
    gradient, factor = arrived
    return (gradient * factor).expand(num_layers)


def _at_once(problem: _Problem, arithmetic: ContrastiveMI | ListedMI | None) -> int:
    """How many layers to take together."""
    first = problem.layers[0]
    return layers_at_once(first, arithmetic.layers_at_once(first) if arithmetic is not None else len(problem.layers))


def _steps(layers: range) -> range:
    """From each of the layers to the next: each step by the layer where it starts."""
    return range(layers.start, max(layers.start, layers.stop - 1))
