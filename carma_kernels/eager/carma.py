"""Both losses in one walk over the layers, forward and backward, with one write of each layer's gradient.

Registered as operators, so that `torch.compile` takes them as they are, with the same bits, and selective activation
checkpointing sees them by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from carma_kernels._operators import forbid_double_backward
from carma_kernels._terms import MITerm, Similarity, StabilityTerm
from carma_kernels.eager.layers import (
    LayerRows,
    compute_dtype,
    empty_gradients,
    inverse,
    layer_views,
    norms,
    own_precision,
    receiving_layers,
)
from carma_kernels.eager.mi import AnchorState, ContrastiveMI
from carma_kernels.eager.pairs import ListedMI
from carma_kernels.eager.stability import stability, stencil, stencil_weights, sum_of_squares
from carma_kernels.pairs import PairIndex
from carma_kernels.spans import ContrastTable


def carma_terms(
    hidden: Tensor | Sequence[Tensor], mi: MITerm | None, stability: StabilityTerm | None
) -> tuple[Tensor, Tensor]:
    """Both losses, unreduced, of hidden states `[L, B, T, D]` or L times `[B, T, D]`.

    Returns:
        The MI loss of each of `mi.layers`, summed over the pairs, `[len(mi.layers)]`, and the stability loss of each
        layer of `stability.layers` with the next, `[len(stability.layers) - 1]`; fp32 (fp64 for fp64 inputs). Empty for
        a term that is None. Both are connected to every layer and, where it is a tensor, to the temperature.
    """
    pairs = mi.pairs if mi is not None else None
    similarity = mi.similarity if mi is not None else Similarity(cosine=True, temperature=1.0)
    learned = similarity.temperature if isinstance(similarity.temperature, Tensor) else None
    mi_layers = mi.layers if mi is not None else range(0)
    stability_layers = stability.layers if stability is not None else range(0)
    problem = _Problem(
        hidden=[hidden] if isinstance(hidden, Tensor) else list(hidden),
        pairs=_pair_tensors(pairs),
        mask=stability.mask if stability is not None else None,
        temperature=learned,
        temperature_value=1.0 if isinstance(similarity.temperature, Tensor) else similarity.temperature,
        cosine=similarity.cosine,
        covers_batch=isinstance(pairs, ContrastTable) and pairs.covers_batch,
        match_negatives=mi.match_negatives if mi is not None else None,
        eps=stability.eps if stability is not None else 0.0,
        ranges=[mi_layers.start, mi_layers.stop, stability_layers.start, stability_layers.stop],
    )
    sums, terms, *_ = _forward(*problem)
    return sums, terms


class _Problem(NamedTuple):
    """The operators' arguments, in the order of `_ARGUMENTS`."""

    hidden: list[Tensor]  # [L, B, T, D] alone, or L times [B, T, D]
    pairs: list[Tensor]  # the tensors of a ContrastTable, of a PairIndex, or none
    mask: Tensor | None  # [B, T] of the stability term
    temperature: Tensor | None  # 0-d
    temperature_value: float  # if temperature is None
    cosine: bool
    covers_batch: bool
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


_ARGUMENTS = (
    "Tensor[] hidden, Tensor[] pairs, Tensor? mask, Tensor? temperature, float temperature_value, bool cosine, "
    "bool covers_batch, float? match_negatives, float eps, int[] ranges"
)


class _Saved(NamedTuple):
    """What the forward leaves for the backward: a few numbers a token and layer."""

    norm: Tensor  # [L, N] of the MI layers
    log_negatives: Tensor  # [L, S, A]
    pull: Tensor  # [L, S, A]
    scale: Tensor  # [L-1] of the stability term

    def anchors(self, at: int) -> AnchorState:
        """Of one layer."""
        return AnchorState(self.log_negatives[at], self.pull[at])


def _pair_tensors(pairs: ContrastTable | PairIndex | None) -> list[Tensor]:
    if pairs is None:
        return []
    if isinstance(pairs, PairIndex):
        return [pairs.anchor, pairs.positive, pairs.negatives]
    return [pairs.key_token, pairs.key_word, pairs.anchor_slot, pairs.anchor_word]


@torch.library.custom_op(
    "carma_kernels::torch_carma_terms",
    mutates_args=(),
    schema=f"({_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    problem = _Problem(*arguments)
    sums, losses, saved = _empty_results(problem)
    mi_layers, stability_layers = problem.mi_layers, problem.stability_layers
    valid = problem.valid_rows
    arithmetic = problem.mi_arithmetic()
    with own_precision(sums.device):
        rows = LayerRows(problem.layers)
        scale = problem.inverse_temperature
        energies: list[Tensor] = []
        changes: list[Tensor] = []
        for layer in sorted({*mi_layers, *stability_layers}):
            norm = norms(rows[layer])  # [N]
            if layer in stability_layers:
                energies.append(sum_of_squares(norm, valid))
            if layer > stability_layers.start and layer in stability_layers:
                changes.append(sum_of_squares(norms(rows.step(layer - 1)), valid))
            if arithmetic is not None and layer in mi_layers:
                at = layer - mi_layers.start
                saved.norm[at] = norm
                sums[at] = arithmetic.forward(rows[layer], norm, scale, at, saved.anchors(at))
        if changes:
            B, T, D = problem.layers[0].shape
            stability(energies, changes, valid, B * T * D, D, problem.eps, out=(losses, saved.scale))
    return sums, losses, *saved


@_forward.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    sums, losses, saved = _empty_results(_Problem(*arguments))
    return sums, losses, *saved


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


@torch.library.custom_op(
    "carma_kernels::torch_carma_terms_backward",
    mutates_args=(),
    schema=(
        f"(Tensor? grad_sums, Tensor? grad_losses, Tensor losses, Tensor[] saved, bool[] needs_grad, {_ARGUMENTS}) "
        "-> (Tensor[], Tensor)"
    ),
)
def _backward(
    grad_sums: Tensor | None,
    grad_losses: Tensor | None,
    losses: Tensor,
    saved_tensors: list[Tensor],
    needs_grad: list[bool],
    *arguments: Any,
) -> tuple[list[Tensor], Tensor]:
    """The gradients of the hidden states that need one, and `-tau` times that of the temperature."""
    problem = _Problem(*arguments)
    saved = _Saved(*saved_tensors)
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
        rows = LayerRows(layers)
        scale = problem.inverse_temperature
        weights = stencil_weights(losses, saved.scale, grad_losses) if grad_losses is not None else []
        before: Tensor | None = None
        for layer in range(len(layers)):
            after: Tensor | None = None
            step = {layer, layer + 1}
            if step <= set(stability_layers) and step & receiver.keys():
                after = rows.step(layer)
            if layer in receiver or (layer in mi_layers and problem.temperature is not None):
                out = _row_buffer(receiver.get(layer), layers[layer], dtype)  # [N, D]
                if layer in stability_layers:
                    stencil(rows[layer], before, after, weights[layer - stability_layers.start], valid, out)
                else:
                    out.zero_()
                if arithmetic is not None and grad_sums is not None and layer in mi_layers:
                    at = layer - mi_layers.start
                    work += arithmetic.backward(
                        rows[layer], saved.norm[at], scale, at, saved.anchors(at), grad_sums[at], out
                    )
                if layer in receiver and receiver[layer].dtype != dtype:
                    receiver[layer].view(out.shape).copy_(out)
            before = after
    return gradients, work


@_backward.register_fake
def _(*upstream_and_arguments: Any) -> tuple[list[Tensor], Tensor]:
    needs_grad, *arguments = upstream_and_arguments[4:]
    problem = _Problem(*arguments)
    first = problem.hidden[0]
    return empty_gradients(problem.hidden, needs_grad), first.new_zeros((), dtype=compute_dtype(first.dtype))


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
    needs_hidden, needs_temperature = ctx.needs_input_grad[0], ctx.needs_input_grad[3]
    gradients, work = _backward(*grads[:2], losses, saved, list(needs_hidden), *problem)
    each = [gradients.pop(0) if needed else None for needed in needs_hidden]
    grad_temperature = None
    if temperature is not None and needs_temperature:  # d s / d tau = -s / tau
        grad_temperature = (-work / temperature).to(temperature.dtype)
    return each, [None] * len(pairs), None, grad_temperature, *[None] * (len(problem) - 4)


_forward.register_autograd(_differentiate, setup_context=_setup_context)
forbid_double_backward(_backward, "the CARMA losses")


def _row_buffer(gradient: Tensor | None, layer: Tensor, dtype: torch.dtype) -> Tensor:
    """Where a layer's gradient is summed up: the gradient itself if it has the compute dtype, or else a buffer."""
    shape = (layer.shape[0] * layer.shape[1], layer.shape[2])
    if gradient is not None and gradient.dtype == dtype:
        return gradient.view(shape)
    return torch.empty(shape, dtype=dtype, device=layer.device)
