"""Both losses in one walk over the layers, forward and backward, with one write of each layer's gradient."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

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
    at,
    common,
    compute_dtype,
    inverse,
    inverse_norms,
    joined,
    launches_cost,
    layers_at_once,
    norms,
    own_precision,
    places,
    runs,
    tile_size,
)
from carma_kernels.eager.mi import Comparisons, ContrastiveMI, ContrastRun
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
    return list(Comparisons.of(table))


_LISTED = 3
"""Tensors of a PairIndex; there are more `Comparisons`."""


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
        if len(self.pairs) == _LISTED:
            anchor, positive, negatives = self.pairs
            return ListedMI(anchor, positive, negatives, self.cosine)
        return ContrastiveMI(Comparisons(*self.pairs), self.covers_batch, self.cosine, self.match_negatives)


class _Saved(NamedTuple):
    """What the forward leaves for the backward: a few numbers a token and layer, and similarities if they are few."""

    inverse_norm: Tensor  # [L, N] of the MI layers
    log_negatives: Tensor  # [L, S, A]
    scores: Tensor  # [l, S, A, V] of the first l of them, of none by default
    scale: Tensor  # [L-1] of the stability term

    def kept(self, some: slice) -> Tensor | None:
        """The similarities of some of the MI layers, which are kept of all of them or of none."""
        return at(self.scores, some) if some.stop <= len(self.scores) else None


_KEPT = 2
"""On a CPU, similarities are kept that take up to one part in so many of the memory of the MI term's layers."""


def _forward_for_backward(problem: _Problem) -> tuple[Tensor, ...]:
    """The same, with what spares an autograd backward a quarter of its products."""
    return _forward(problem, _num_kept(problem))


def _num_kept(problem: _Problem) -> int:
    """Of how many layers the similarities are kept."""
    layer = problem.layers[0]
    if launches_cost(layer.device) or len(problem.pairs) <= _LISTED or not all(h.requires_grad for h in problem.hidden):
        return 0
    S, V, A = Comparisons(*problem.pairs).sizes
    size = max(1, S * V * A)
    if size > tile_size(layer.numel(), layer.device):
        return 0
    room = len(problem.mi_layers) * layer.nbytes // (_KEPT * compute_dtype(layer.dtype).itemsize)
    return min(len(problem.mi_layers), room // size)


def _forward(problem: _Problem, num_kept: int = 0) -> tuple[Tensor, ...]:
    """`Terms`, and what is saved; the similarities of so many of the MI layers."""
    sums, losses, saved = _empty_results(problem)
    if num_kept:
        saved = saved._replace(scores=saved.scores.new_empty(num_kept, *saved.scores.shape[1:]))
    mi_layers, stability_layers = problem.mi_layers, problem.stability_layers
    valid = problem.valid_rows
    arithmetic = problem.mi_arithmetic()
    found: list[tuple[Tensor, Tensor, Tensor]] = []  # by run: inverse norms, z and sums
    lengths: list[Tensor] = []  # [l, N] of the stability term's layers
    changes: list[Tensor] = []  # [l, N] of their steps
    with own_precision(sums.device):
        read = LayerRows(problem.hidden)
        scale = problem.inverse_temperature
        used = sorted({*mi_layers, *stability_layers})
        for run, parts in _walk(problem, arithmetic, used, len(saved.scores)):
            mi = None
            if arithmetic is not None and run.start in mi_layers:
                of_mi = places(run, mi_layers)
                mi = arithmetic.run(problem.layers[0], of_mi, scale, saved.kept(of_mi))
            norm: list[Tensor] = []
            for part in parts:
                steps = common(range(part.start - 1, part.stop - 1), problem.steps)
                here = read.rows(part, steps)
                norm.append(norms(here))
                changes += [norms(change) for _, change in read.changes(part, steps)]
                if mi is not None:
                    mi.add(places(part, run), here)
                del here
            lengths_of_run = joined(norm)
            if problem.steps and run.start in stability_layers:
                lengths.append(lengths_of_run)
            if mi is not None:
                inverse_norm = inverse_norms(lengths_of_run)
                found.append((inverse_norm, *mi.forward(inverse_norm)))
        if found:
            inverse_norm, log_negatives, sums = (joined(list(of_runs)) for of_runs in zip(*found, strict=True))
            saved = saved._replace(inverse_norm=inverse_norm, log_negatives=log_negatives)
        else:
            for nothing in (sums, saved.inverse_norm, saved.log_negatives):
                nothing.zero_()
        if changes:
            B, T, D = problem.layers[0].shape
            invalid = None if valid is None else ~valid
            energy, change = (sums_of_squares(joined(norm), invalid) for norm in (lengths, changes))
            losses, scale_of_steps = stability(energy, change, valid, B * T * D, D, problem.eps)
            saved = saved._replace(scale=scale_of_steps)
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
    S, V, A = Comparisons(*problem.pairs).sizes if len(problem.pairs) > _LISTED else (0, 0, 0)
    dtype = compute_dtype(layer.dtype)
    return (
        layer.new_empty(num_mi, dtype=dtype),
        layer.new_empty(num_steps, dtype=dtype),
        _Saved(
            layer.new_empty((num_mi, layer.shape[0] * layer.shape[1]), dtype=dtype),
            layer.new_empty((num_mi, S, A), dtype=dtype),
            layer.new_empty((0, S, A, V), dtype=dtype),
            layer.new_empty(num_steps, dtype=dtype),
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
        read = LayerRows(problem.hidden)
        scale = problem.inverse_temperature
        stencil = Stencil(stability_layers, losses, saved.scale, grad_losses) if grad_losses is not None else None
        invalid = None if valid is None or stencil is None else ~valid[:, None]
        needed = [layer for layer in range(len(layers)) if layer in receivers or (layer in mi_layers and needs_work)]
        for run, parts in _walk(problem, arithmetic, needed, len(saved.scores)):
            of_stability = stencil if run.start in stability_layers else None
            steps = {part: common(range(part.start - 1, part.stop), _steps(stability_layers)) for part in parts}
            mi = None
            if arithmetic is not None and grad_sums is not None and run.start in mi_layers:
                of_mi = places(run, mi_layers)
                kept_scores = saved.kept(of_mi)
                mi = arithmetic.run(layers[0], of_mi, scale, kept_scores)
                if kept_scores is None:
                    for part in parts:
                        mi.add(places(part, run), read.rows(part, steps[part]))
                fold = isinstance(mi, ContrastRun) and mi.covers and invalid is None
                own = of_stability.own(run) if of_stability is not None and fold else None
                saved_of_run = at(saved.inverse_norm, of_mi), at(saved.log_negatives, of_mi)
                mi.weigh(*saved_of_run, at(grad_sums, of_mi), needs_work, own)
            for part in parts:
                here, place, room = read.rows(part, steps[part]), places(part, run), receivers.room(part)
                if isinstance(mi, ContrastRun) and mi.covers and invalid is None:
                    mi.write_gradient(place, here, room)
                    if of_stability is not None:
                        of_stability.add_changes(part, read.changes(part, steps[part]), room)
                else:
                    if of_stability is None:
                        room.zero_()
                    else:
                        of_stability.write(part, here, read.changes(part, steps[part]), invalid, room)
                    if mi is not None:
                        mi.add_gradient(place, here, room)
                receivers.receive(part, room)
                del here, room  # before the next ones are made
            if mi is not None and mi.work is not None:
                works.append(mi.work)
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
    forward_for_backward=_forward_for_backward,
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


def _walk(
    problem: _Problem, arithmetic: ContrastiveMI | ListedMI | None, layers: Sequence[int], num_kept: int
) -> Iterator[tuple[range, list[range]]]:
    """Runs of layers that are in the same terms, for one tile each; and the parts of a run to read at once."""
    first = problem.layers[0]
    in_tile = arithmetic.layers_at_once(first) if isinstance(arithmetic, ContrastiveMI) else len(problem.layers)
    at_once = layers_at_once(first, in_tile)
    if launches_cost(first.device) or not isinstance(arithmetic, ContrastiveMI):
        in_tile = at_once
    bounds = {*problem.ranges, problem.mi_layers.start + num_kept}
    for run in runs(layers, max(in_tile, at_once), bounds):
        yield run, list(runs(run, at_once))


def _steps(layers: range) -> range:
    """From each of the layers to the next: each step by the layer where it starts."""
    return range(layers.start, max(layers.start, layers.stop - 1))
