"""Both losses, forward and backward, in a few launches for all layers, with one write of each layer's gradient.

Short groups of tokens take one kernel each way for both losses (`short`). Otherwise one read of the hidden states makes
the stability loss's sums and the norms for the MI loss, whose backward then adds the stability loss's stencil to what
it writes; layers outside the MI loss are written by the stability loss's own backward.

Registered as operators, so that `torch.compile` takes them as they are, with the same bits, and selective activation
checkpointing sees them by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from carma_kernels._operators import forbid_double_backward
from carma_kernels._ranks import RankTable
from carma_kernels._terms import MITerm, Similarity, StabilityTerm
from carma_kernels.ops.layers import (
    LayerTable,
    ScaledSimilarity,
    check_dtype,
    destinations,
    empty_gradients,
    inverse_temperature,
    layer_views,
    on_device,
    readable,
)
from carma_kernels.ops.mi import contrast_backward, contrast_forward, contrast_state_shapes
from carma_kernels.ops.pairs import listed_backward, listed_forward, listed_state_shapes
from carma_kernels.ops.short import ShortMI
from carma_kernels.ops.stability import (
    StabilityGradient,
    StabilityPartials,
    finalize,
    stability_backward,
    stability_forward,
)
from carma_kernels.pairs import PairIndex

_BOUNDED = 35.0
"""Up to this 1/tau, `exp(s - 1/tau)` of a cosine stays a normal fp32 number, squared too."""


def carma_terms(
    hidden: Tensor | Sequence[Tensor], mi: MITerm | None, stability: StabilityTerm | None
) -> tuple[Tensor, Tensor]:
    """Both losses, unreduced, of hidden states `[L, B, T, D]` or L times `[B, T, D]`.

    Returns:
        The MI loss of each of `mi.layers`, summed over the pairs, `[len(mi.layers)]`, and the stability loss of each
        layer of `stability.layers` with the next, `[len(stability.layers) - 1]`; fp32. Empty for a term that is None.
        Both are connected to every layer and, where it is a tensor, to the temperature.
    """
    similarity = mi.similarity if mi is not None else Similarity(cosine=True, temperature=1.0)
    learned = similarity.temperature if isinstance(similarity.temperature, Tensor) else None
    mi_layers = mi.layers if mi is not None else range(0)
    stability_layers = stability.layers if stability is not None else range(0)
    pairs, num_pairs = _pair_tensors(mi)
    problem = _Problem(
        hidden=[hidden] if isinstance(hidden, Tensor) else list(hidden),
        pairs=pairs,
        mask=stability.mask if stability is not None else None,
        temperature=learned,
        temperature_value=1.0 if isinstance(similarity.temperature, Tensor) else similarity.temperature,
        cosine=similarity.cosine,
        num_pairs=num_pairs,
        match_negatives=mi.match_negatives if mi is not None else None,
        eps=stability.eps if stability is not None else 0.0,
        ranges=[mi_layers.start, mi_layers.stop, stability_layers.start, stability_layers.stop],
    )
    check_dtype(problem.hidden[0])
    sums, losses, *_ = _forward(*problem)
    return sums, losses


def _pair_tensors(mi: MITerm | None) -> tuple[list[Tensor], int]:
    """The tensors of a term's pairs as `_Problem.pairs` holds them, and the number of pairs."""
    if mi is None:
        return [], 0
    if isinstance(mi.pairs, PairIndex):
        return [mi.pairs.anchor, mi.pairs.positive, mi.pairs.negatives], mi.pairs.num_pairs
    assert mi.pairs.word is not None
    assert mi.pairs.ranks is not None
    *tables, num_pairs = mi.pairs.ranks
    return [mi.pairs.word, *tables], num_pairs


class _Problem(NamedTuple):
    """The operators' arguments, in the order of `_ARGUMENTS`."""

    hidden: list[Tensor]  # [L, B, T, D] alone, or L times [B, T, D]
    pairs: list[Tensor]  # word [B, T] and the tensors of a RankTable; or those of a PairIndex; or none
    mask: Tensor | None  # [B, T] of the stability term
    temperature: Tensor | None  # 0-d
    temperature_value: float  # if temperature is None
    cosine: bool
    num_pairs: int
    match_negatives: float | None
    eps: float
    ranges: list[int]  # start and stop of the MI layers, then of the stability layers

    @property
    def layers(self) -> tuple[Tensor, ...]:
        """`[B, T, D]` each."""
        return layer_views(self.hidden)

    @property
    def mi_layers(self) -> range:
        return range(*self.ranges[:2])

    @property
    def stability_layers(self) -> range:
        """Empty without a step from one layer to the next."""
        layers = range(*self.ranges[2:])
        return layers if len(layers) > 1 else range(0)

    @property
    def mask_bytes(self) -> Tensor | None:
        """The stability term's valid rows `[B*T]` uint8."""
        return None if self.mask is None else self.mask.contiguous().view(-1).view(torch.uint8)

    def mi_term(self) -> ShortMI | _LongMI | None:
        """What computes the MI term; None if it has no pair."""
        if not self.num_pairs:
            return None
        similarity = ScaledSimilarity(
            self.cosine,
            inverse_temperature(self.temperature, self.temperature_value, self.hidden[0].device),
            self.match_negatives,
            bounded=self.cosine and self.temperature is None and self.temperature_value * _BOUNDED >= 1,
        )
        if len(self.pairs) == 3:
            anchor, positive, negatives = self.pairs
            B, T, _ = self.layers[0].shape
            return _LongMI(PairIndex(anchor, positive, negatives, (B, T)), self.mi_layers, similarity)
        word, token, rank_word, count, first_pair, num_negatives = self.pairs
        ranks = RankTable(token, rank_word, count, first_pair, num_negatives, self.num_pairs)
        S = ranks.token.shape[0]
        if ShortMI.takes(word.numel() // S, self.hidden[0]):
            return ShortMI(word.reshape(S, -1), self.mi_layers, similarity, needs_work=self.temperature is not None)
        return _LongMI(ranks, self.mi_layers, similarity)


_ARGUMENTS = (
    "Tensor[] hidden, Tensor[] pairs, Tensor? mask, Tensor? temperature, float temperature_value, bool cosine, "
    "int num_pairs, float? match_negatives, float eps, int[] ranges"
)


@dataclass(frozen=True)
class _LongMI:
    """The MI loss of listed pairs, or of groups too long for `ShortMI`."""

    pairs: PairIndex | RankTable
    layers: range
    similarity: ScaledSimilarity

    @property
    def state_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        if isinstance(self.pairs, PairIndex):
            return listed_state_shapes(self.pairs, len(self.layers))
        return contrast_state_shapes(self.pairs, len(self.layers))

    def forward(self, hidden: LayerTable, saved: _Saved) -> Tensor:
        """The partial sums of each layer, `[L_mi, parts]`."""
        norms = saved.inverse_norms if self.similarity.cosine else None
        if isinstance(self.pairs, PairIndex):
            return listed_forward(hidden, self.layers, self.pairs, self.similarity, norms, saved.state)
        return contrast_forward(hidden, self.layers, self.pairs, self.similarity, norms, saved.state)

    def backward(
        self,
        hidden: LayerTable,
        saved: _Saved,
        grad_sums: Tensor,
        stability: StabilityGradient,
        out: LayerTable | None,
        needs_work: bool,
    ) -> Tensor | None:
        """Write every layer of `out`; return `sum_ij W_ij s_ij` of each layer `[L_mi]` if it is needed."""
        norms = saved.inverse_norms if self.similarity.cosine else None
        stencil = stability.stencil(len(hidden)) if stability.num_steps and out is not None else None
        given = (self.similarity, norms, saved.state, grad_sums, stencil, out, needs_work)
        if isinstance(self.pairs, PairIndex):
            work = listed_backward(hidden, self.layers, self.pairs, *given)
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


@torch.library.custom_op(
    "carma_kernels::triton_carma_terms",
    mutates_args=(),
    schema=f"({_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    problem = _Problem(*arguments)
    with on_device(problem.hidden[0].device):
        term = problem.mi_term()
        sums, losses, saved = _empty_results(problem, term)
        hidden = readable(problem.layers)
        mi_partials, partials = _partial_sums(problem, term, hidden, saved)
        D = hidden.shape[2]
        finalize(mi_partials, sums, partials, problem.stability_layers, (losses, saved.scale), D, problem.eps)
    return sums, losses, *saved


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


@_forward.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    problem = _Problem(*arguments)
    sums, losses, saved = _empty_results(problem, problem.mi_term())
    return sums, losses, *saved


def _empty_results(problem: _Problem, term: ShortMI | _LongMI | None) -> tuple[Tensor, Tensor, _Saved]:
    layer = problem.layers[0]
    B, T, _ = layer.shape
    norms = (len(problem.mi_layers), B * T) if term is not None and problem.cosine else (0, B * T)
    state_shapes = ((0,), (0,)) if term is None else term.state_shapes
    steps = max(0, len(problem.stability_layers) - 1)
    results = (
        layer.new_empty(shape, dtype=torch.float32)
        for shape in ((len(problem.mi_layers),), (steps,), (steps,), norms, *state_shapes)
    )
    sums, losses, *saved = results
    return sums, losses, _Saved(*saved)


@torch.library.custom_op(
    "carma_kernels::triton_carma_terms_backward",
    mutates_args=(),
    schema=(
        f"(Tensor? grad_sums, Tensor? grad_losses, Tensor losses, Tensor[] saved, bool[] needs_grad, bool needs_work, "
        f"{_ARGUMENTS}) -> (Tensor[], Tensor)"
    ),
)
def _backward(
    grad_sums: Tensor | None,
    grad_losses: Tensor | None,
    losses: Tensor,
    saved_tensors: list[Tensor],
    needs_grad: list[bool],
    needs_work: bool,
    *arguments: Any,
) -> tuple[list[Tensor], Tensor]:
    """The gradients of the hidden states that need one, and `-tau` times that of the temperature."""
    problem = _Problem(*arguments)
    with on_device(problem.hidden[0].device):
        return _gradients(problem, (grad_sums, grad_losses), losses, _Saved(*saved_tensors), needs_grad, needs_work)


@_backward.register_fake
def _(*upstream_and_arguments: Any) -> tuple[list[Tensor], Tensor]:
    needs_grad, _, *arguments = upstream_and_arguments[4:]
    problem = _Problem(*arguments)
    return empty_gradients(problem.hidden, needs_grad), problem.hidden[0].new_zeros((), dtype=torch.float32)


def _gradients(
    problem: _Problem,
    grads: tuple[Tensor | None, Tensor | None],
    losses: Tensor,
    saved: _Saved,
    needs_grad: list[bool],
    needs_work: bool,
) -> tuple[list[Tensor], Tensor]:
    grad_sums, grad_losses = grads
    hidden = readable(problem.layers)
    gradients = empty_gradients(problem.hidden, needs_grad)
    out = destinations(problem.hidden, gradients, needs_grad)
    has_stability = grad_losses is not None and len(losses) > 0
    stability = StabilityGradient(
        problem.stability_layers if has_stability else range(0),
        problem.mask_bytes,
        losses if has_stability else losses[:0],
        saved.scale,
        grad_losses if grad_losses is not None else losses[:0],
    )
    term = problem.mi_term() if grad_sums is not None else None
    work: Tensor | None = None
    if term is None or grad_sums is None:
        if out is not None:
            stability_backward(hidden, stability, out, skipped=range(0))
    elif isinstance(term, ShortMI):
        grad_sums = grad_sums.contiguous()
        if out is not None:
            term.backward(hidden, saved.inverse_norms, saved.z, grad_sums, stability, out)
        work = saved.work.sum(1) if needs_work else None
    else:
        grad_sums = grad_sums.contiguous()
        work = term.backward(hidden, saved, grad_sums, stability, out, needs_work)
    if work is None or grad_sums is None:
        return gradients, losses.new_zeros(())
    return gradients, (grad_sums * work).sum()


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    problem = _Problem(*inputs)
    ctx.problem = problem._replace(hidden=[], pairs=[], mask=None, temperature=None)
    optional = [tensor for tensor in (problem.mask, problem.temperature) if tensor is not None]
    ctx.sizes = (len(problem.hidden), len(problem.pairs))
    ctx.has = (problem.mask is not None, problem.temperature is not None)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*problem.hidden, *problem.pairs, *optional, *output[1:])


def _differentiate(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    tensors = iter(ctx.saved_tensors)
    hidden, pairs = ([next(tensors) for _ in range(size)] for size in ctx.sizes)
    mask, temperature = (next(tensors) if present else None for present in ctx.has)
    losses, *saved = tensors
    problem = ctx.problem._replace(hidden=hidden, pairs=pairs, mask=mask, temperature=temperature)
    needs_hidden, needs_temperature = list(ctx.needs_input_grad[0]), bool(ctx.needs_input_grad[3])
    gradients, work = _backward(*grads[:2], losses, saved, needs_hidden, needs_temperature, *problem)
    each = [gradients.pop(0) if needed else None for needed in needs_hidden]
    grad_temperature = None
    if temperature is not None and needs_temperature:  # d s / d tau = -s / tau
        grad_temperature = (-work / temperature).to(temperature.dtype)
    return each, [None] * len(pairs), None, grad_temperature, *[None] * (len(problem) - 4)


_forward.register_autograd(_differentiate, setup_context=_setup_context)
forbid_double_backward(_backward, "the CARMA losses")
