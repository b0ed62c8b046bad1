"""Both losses, forward and backward, in a few launches for all layers, with one write of each layer's gradient.

Short groups of tokens take one kernel each way for both losses (`short`). Otherwise one read of the hidden states makes
the stability loss's sums and the norms for the MI loss, whose backward then adds the stability loss's stencil to what
it writes; layers outside the MI loss are written by the stability loss's own backward. The last kernel of the forward
makes the total; its gradient goes to the kernels of the backward as it arrives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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
from carma_kernels._ranks import RankTable
from carma_kernels._terms import Gradients, MITerm, StabilityTerm, Terms
from carma_kernels.distributed import join_terms
from carma_kernels.ops.layers import (
    LayerTable,
    OnDevice,
    ScaledSimilarity,
    Upstream,
    check_dtype,
    destinations,
    inverse_temperature,
    on_device,
    readable,
)
from carma_kernels.ops.mi import contrast_backward, contrast_forward, contrast_state_shapes
from carma_kernels.ops.mi_dense import dense_backward, dense_forward, dense_state_shapes, takes_dense
from carma_kernels.ops.pairs import Listed, listed_backward, listed_forward, listed_state_shapes
from carma_kernels.ops.short import ShortMI
from carma_kernels.ops.stability import (
    StabilityGradient,
    StabilityPartials,
    finalize,
    stability_backward,
    stability_forward,
)
from carma_kernels.spans import ContrastTable

_BOUNDED = 35.0
"""Up to this 1/tau, `exp(s - 1/tau)` of a cosine stays a normal fp32 number, squared too."""


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
    arguments = carma_arguments(hidden, mi, stability, group, _tables)
    check_dtype(arguments.hidden[0])
    return _Problem(*arguments)


def _tables(table: ContrastTable) -> list[Tensor]:
    assert table.word is not None
    assert table.ranks is not None
    return [table.word, *table.ranks[:-1]]  # less the number of pairs


class _Problem(CarmaArguments):
    """What the operators were asked."""

    __slots__ = ()

    @property
    def stability_layers(self) -> range:
        """Empty without a step from one layer to the next."""
        layers = range(*self.ranges[2:])
        return layers if len(layers) > 1 else range(0)

    @property
    def mask_bytes(self) -> Tensor | None:
        """The stability term's valid rows `[B*T]` uint8."""
        return None if self.mask is None else self.mask.contiguous().view(-1).view(torch.uint8)

    def mi_term(self, scale: Tensor) -> ShortMI | _LongMI | None:
        """What computes the MI term with `1/tau`, 0-d fp32; None if it has no pair."""
        if not self.num_pairs:
            return None
        similarity = ScaledSimilarity(
            self.cosine,
            scale,
            self.match_negatives,
            bounded=self.cosine and self.temperature is None and self.temperature_value * _BOUNDED >= 1,
        )
        if len(self.pairs) == 3:
            return _LongMI(Listed(*self.pairs), self.mi_layers, similarity)
        word, token, rank_word, count, first_pair, num_negatives = self.pairs
        ranks = RankTable(token, rank_word, count, first_pair, num_negatives, self.num_pairs)
        S = ranks.token.shape[0]
        if ShortMI.takes(word.numel() // S, self.hidden[0]):
            return ShortMI(word.reshape(S, -1), self.mi_layers, similarity, needs_work=self.temperature is not None)
        return _LongMI(ranks, self.mi_layers, similarity, word if takes_dense(word.numel() // S) else None)


@dataclass(frozen=True)
class _LongMI:
    """The MI loss of listed pairs, or of groups too long for `ShortMI`."""

    pairs: Listed | RankTable
    layers: range
    similarity: ScaledSimilarity
    text: Tensor | None = None
    """`[B, T]`, the word of each token, for `mi_dense`; None for `mi`"""

    @property
    def state_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        if isinstance(self.pairs, Listed):
            return listed_state_shapes(self.pairs, len(self.layers))
        if self.text is not None:
            return dense_state_shapes(self.pairs, self.text, len(self.layers))
        return contrast_state_shapes(self.pairs, len(self.layers))

    def forward(self, hidden: LayerTable, saved: _Saved) -> Tensor:
        """The partial sums of each layer, `[L_mi, parts]`."""
        norms = saved.inverse_norms if self.similarity.cosine else None
        if isinstance(self.pairs, Listed):
            return listed_forward(hidden, self.layers, self.pairs, self.similarity, norms, saved.state)
        if self.text is not None:
            return dense_forward(hidden, self.layers, self.pairs, self.text, self.similarity, norms, saved.state)
        return contrast_forward(hidden, self.layers, self.pairs, self.similarity, norms, saved.state)

    def backward(
        self,
        hidden: LayerTable,
        saved: _Saved,
        grad_sums: Upstream,
        stability: StabilityGradient,
        out: LayerTable | None,
        needs_work: bool,
    ) -> Tensor | None:
        """Write every layer of `out`; return `sum_ij W_ij s_ij` of each layer `[L_mi]` if it is needed."""
        norms = saved.inverse_norms if self.similarity.cosine else None
        given = (self.similarity, norms, saved.state, grad_sums, stability, out, needs_work)
        if isinstance(self.pairs, Listed):
            work = listed_backward(hidden, self.layers, self.pairs, *given)
        elif self.text is not None:
            work = dense_backward(hidden, self.layers, self.pairs, self.text, *given)
        else:
            work = contrast_backward(hidden, self.layers, self.pairs, *given)
        if out is not None and len(self.layers) < len(hidden):
            stability_backward(hidden, stability, out, skipped=self.layers)
        return work


class _Saved(NamedTuple):
    """What the forward leaves for the backward: a few numbers a token and layer."""

    scale: Tensor  # [steps] of the stability term
    inverse_norms: Tensor  # [L_mi, B*T] for the cosine, or empty
    z: Tensor  # the MI term's, of its `state_shapes`
    work: Tensor

    @property
    def state(self) -> tuple[Tensor, Tensor]:
        return self.z, self.work


def _forward(problem: _Problem) -> tuple[Tensor, ...]:
    """`Terms`, and what is saved."""
    with on_device(problem.hidden[0].device):
        # divided by once the sums are those of the joined batch, if there is one
        divisor_value = problem.divisor_value if problem.group is None else 1.0
        (scale, divisor), hidden, _ = OnDevice.of(
            (1.0 / problem.temperature_value, divisor_value), readable(problem.layers)
        )
        if problem.group is None and problem.divisor is not None:
            divisor = problem.divisor.detach().to(torch.float32)
        term = problem.mi_term(inverse_temperature(problem.temperature, scale))
        terms, saved = _empty_results(problem, term)
        mi_partials, partials = _partial_sums(problem, term, hidden, saved)
        layers, D = problem.stability_layers, hidden.shape[2]
        finalize(mi_partials, divisor, partials, layers, D, problem.eps, problem.weights, terms, saved.scale)
        if problem.group is not None:
            terms = _joined(problem, problem.group, terms, saved.scale)
    return *terms, *saved


def _joined(problem: _Problem, group: str, terms: Terms, scale: Tensor) -> Terms:
    """The terms of the group's joined batch, from the sums of this rank's."""
    sums, losses = terms.mi_per_layer, terms.stability_per_layer
    join_terms(group, sums, losses, scale, problem.layers[0], problem.mask)
    means = sums / (problem.divisor_value if problem.divisor is None else problem.divisor)
    return Terms(means, losses, *totals(problem, means, losses))


def _partial_sums(
    problem: _Problem, term: ShortMI | _LongMI | None, hidden: LayerTable, saved: _Saved
) -> tuple[Tensor, StabilityPartials]:
    """Of the MI loss, `[L_mi, parts]`, and of the stability loss."""
    layers, mask = problem.stability_layers, problem.mask_bytes
    if isinstance(term, ShortMI):
        return term.forward(hidden, saved.inverse_norms, saved.state, layers, mask)
    norms_layers = term.layers if term is not None and problem.cosine else range(0)
    partials = stability_forward(hidden, layers, mask, norms_layers, saved.inverse_norms)
    if term is None:
        return saved.scale.new_empty((len(problem.mi_layers), 0)), partials
    return term.forward(hidden, saved), partials


def _empty(problem: _Problem) -> tuple[Tensor, ...]:
    no_number = problem.hidden[0].new_empty((), dtype=torch.float32)
    terms, saved = _empty_results(problem, problem.mi_term(no_number))
    return *terms, *saved


def _empty_results(problem: _Problem, term: ShortMI | _LongMI | None) -> tuple[Terms, _Saved]:
    layer = problem.layers[0]
    B, T, _ = layer.shape
    norms = (len(problem.mi_layers), B * T) if term is not None and problem.cosine else (0, B * T)
    state_shapes: tuple[tuple[int, ...], ...] = ((0,), (0,)) if term is None else term.state_shapes
    steps = max(0, len(problem.stability_layers) - 1)

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=layer.device)

    terms = Terms(empty(len(problem.mi_layers)), empty(steps), empty(), empty(), empty())
    return terms, _Saved(empty(steps), empty(*norms), *(empty(*shape) for shape in state_shapes))


def _backward(
    problem: _Problem,
    upstream: tuple[Tensor | None, ...],
    kept: list[Tensor],
    needs_grad: list[bool],
    needs_work: bool,
) -> tuple[list[Tensor], Tensor]:
    """The gradients of the hidden states that need one, and `-tau` times that of the temperature."""
    losses, *saved = kept
    with on_device(losses.device):
        return _gradients(problem, CarmaUpstream(*upstream), losses, _Saved(*saved), needs_grad, needs_work)


def _empty_backward(problem: _Problem, needs_grad: list[bool]) -> tuple[list[Tensor], Tensor]:
    return empty_gradients(problem.hidden, needs_grad), problem.hidden[0].new_zeros((), dtype=torch.float32)


def _gradients(
    problem: _Problem,
    arrived: CarmaUpstream,
    losses: Tensor,
    saved: _Saved,
    needs_grad: list[bool],
    needs_work: bool,
) -> tuple[list[Tensor], Tensor]:
    of_sums, of_changes = arrived.of_sums(problem), arrived.of_changes(problem)
    gradients = empty_gradients(problem.hidden, needs_grad)
    (scale,), hidden, out = OnDevice.of(
        (1.0 / problem.temperature_value,),
        readable(problem.layers),
        destinations(problem.hidden, gradients, needs_grad),
    )
    has_stability = of_changes is not None and len(losses) > 0
    stability = StabilityGradient(
        problem.stability_layers if has_stability else range(0),
        problem.mask_bytes,
        losses if has_stability else losses[:0],
        saved.scale,
        Upstream(losses) if of_changes is None else Upstream(*of_changes),
    )
    term = None if of_sums is None else problem.mi_term(inverse_temperature(problem.temperature, scale))
    work: Tensor | None = None
    if term is None or of_sums is None:
        if out is not None:
            stability_backward(hidden, stability, out, skipped=range(0))
    elif isinstance(term, ShortMI):
        if out is not None:
            term.backward(hidden, saved.inverse_norms, saved.z, Upstream(*of_sums), stability, out)
        work = saved.work.sum(1) if needs_work else None
    else:
        work = term.backward(hidden, saved, Upstream(*of_sums), stability, out, needs_work)
    if work is None or of_sums is None:
        return gradients, losses.new_zeros(()) if needs_work else losses.new_empty(())
    gradient, factor = of_sums
    return gradients, (gradient * factor * work).sum()


_operation = carma_operation(
    "triton_carma_terms",
    _Problem,
    len(_Saved._fields),
    forward=_forward,
    empty=_empty,
    backward=_backward,
    empty_backward=_empty_backward,
)
