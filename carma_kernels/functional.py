"""The losses as functions: the formula in the docstring; check, pick the backend, call it.

Letters: `L` layers, `B` batch, `T` tokens, `D` width, `A` anchors, `P` pairs, `K` negatives a pair, `tau` temperature.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from carma_kernels import _backend, _validate, distributed
from carma_kernels._terms import HiddenStates, MITerm, Similarity, StabilityTerm, Terms, TermsBackend
from carma_kernels.config import CarmaConfig, checked
from carma_kernels.pairs import PairIndex
from carma_kernels.spans import ContrastTable, TokenSpans

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class CarmaOutput(NamedTuple):
    """What `carma_loss` returns; the losses are fp32 (fp64 for fp64 inputs) and 0-d unless said otherwise."""

    loss: Tensor
    """`mi_weight * mi + stability_weight * stability`, connected to the graph"""
    mi: Tensor
    """the MI loss, connected to the graph"""
    stability: Tensor
    """the stability loss, connected to the graph"""
    mi_per_layer: Tensor
    """`[L]` over `config.mi_layers`, detached"""
    stability_per_layer: Tensor
    """`[L-1]` over `config.stability_layers`, detached"""
    num_pairs: int
    """`P`, the pairs of this batch"""


def pairwise_similarity(
    hidden_states: HiddenStates,
    *,
    metric: str = "cosine",
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    layers: tuple[int, int] | None = None,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """Similarity of every token to every other of its sequence, in every layer.

        cosine:  s_ij = h_i.h_j / (|h_i| |h_j| tau), 0 where a vector has no length (|h| <= 1e-8)
        dot:     s_ij = h_i.h_j / tau

    Args:
        hidden_states: `[L, B, T, D]` or L times `[B, T, D]`; fp16, bf16, fp32 or fp64; not stacked, not written to.
        metric: "cosine" or "dot".
        temperature: tau, a number > 0, or a 0-d tensor, which gets its gradient; NaN comes of one that is not > 0.
        mask: `[B, T]`, non-zero for valid tokens; rows and columns of the others are 0 and have no gradient.
        layers: `(start, end)`, both included; None for all.
        out_dtype: of the result; if None fp32, or fp64 for fp64 hidden states.
        backend: see `carma_kernels.choose_backend`.

    Returns:
        `[L, B, T, T]`, which is the price of asking for the matrix: the losses never hold it.

    Raises:
        TypeError, ValueError: an input that does not fit; the message says which, and the way out.
    """
    hidden, first, (chosen,) = _layers(hidden_states, layers=layers)
    similarity = _similarity(metric, temperature, first)
    valid = _validate.mask(mask, first)
    dtype = _validate.out_dtype(out_dtype, first.dtype)
    return _backend.implementation(backend, first.device).pairwise_similarity(hidden, chosen, similarity, valid, dtype)


def mi_loss(
    hidden_states: HiddenStates,
    spans_or_pairs: TokenSpans | PairIndex,
    *,
    negatives: str = "sequence",
    temperature: float | Tensor = 0.1,
    metric: str = "cosine",
    layers: tuple[int, int] | None = None,
    match_negatives: float | None = None,
    reduction: str = "mean",
    num_pairs: float | Tensor | None = None,
    group: ProcessGroup | None = None,
    backend: str | None = None,
) -> Tensor:
    """InfoNCE that keeps the tokens of a word together, against other tokens, in every layer.

        z_i  = log sum over negatives n of i of exp(s_in)            [+ log(k / number of negatives)]
        cost of the pair (i, j) = softplus(z_i - s_ij) = -log( e^{s_ij} / (e^{s_ij} + sum_n e^{s_in}) )
        L_MI = mean over layers of the mean over pairs

    with `s` the `pairwise_similarity`, and a pair `(i, j)` for any two tokens `i < j` of a word. A pair without
    negatives costs 0 and counts; without pairs the loss is a 0 whose backward gives every layer a zero gradient.
    Source: CARMA, arXiv 2502.11066; `docs/mi_loss.md` works an example.

    Args:
        hidden_states: `[L, B, T, D]` or L times `[B, T, D]`, block outputs; fp16, bf16, fp32 or fp64.
        spans_or_pairs: `TokenSpans`, or a `PairIndex`, whose pairs bring their own negatives (`[P, K]`, or `[L, P, K]`
            with L the number of layers in the loss).
        negatives: with `TokenSpans`, "sequence" for all valid tokens of the anchor's sequence outside its word (the
            paper's), "batch" for all of the batch. With a `PairIndex` leave it as it is.
        temperature: tau, a number > 0, or a 0-d tensor, which gets its gradient; NaN comes of one that is not > 0.
        metric: "cosine" or "dot".
        layers: `(start, end)`, both included; None for all.
        match_negatives: k > 0, to add `log(k / number of negatives)` to `z_i`: the exact loss then estimates, without
            noise, the one with k random negatives, as published with k = 5. With `TokenSpans` only.
        reduction: "mean"; "none" for the means over pairs of each layer, `[L]`; "sum" over layers and pairs.
        num_pairs: replaces the number of pairs in the mean (a number or 0-d tensor), so that losses of parts of a batch
            (gradient accumulation, data parallelism) add up to the loss of the whole: pass the pairs of the whole.
            NaN comes of a tensor that is negative.
        group: a process group, to have the loss of the joined batch of its ranks on each of them, with gradients whose
            mean over ranks is that of the joined batch: `docs/distributed.md`. With negatives="batch" the tokens of
            the other ranks are negatives too. None for this process alone.
        backend: see `carma_kernels.choose_backend`.

    Returns:
        0-d, or `[L]`; fp32 (fp64 for fp64 inputs).

    Raises:
        TypeError, ValueError: an input that does not fit; the message says which, and the way out.
    """
    _validate.group(group)
    hidden, first, (chosen,) = _layers(hidden_states, layers=layers)
    _validate.option(reduction, _validate.REDUCTIONS, "reduction")
    similarity = _similarity(metric, temperature, first)
    negatives = _validate.negatives(negatives, spans_or_pairs)
    match = _validate.match_negatives(match_negatives, spans_or_pairs)
    pairs = _validate.pairs(spans_or_pairs, first, len(chosen))
    count = _divisor(num_pairs, pairs.num_pairs, reduction, first.device, group)
    if group is not None and negatives == "batch":
        hidden, chosen, pairs = _joined_batch(hidden, chosen, pairs, group)
    term = MITerm(chosen, _table(pairs, negatives), similarity, match, 1.0 if reduction == "sum" else count)
    found = _terms(_backend.implementation(backend, first.device), hidden, term, None, group)
    if reduction == "mean":
        return found.mi
    return found.mi_per_layer.sum() if reduction == "sum" else found.mi_per_layer


def stability_loss(
    hidden_states: HiddenStates,
    *,
    layers: tuple[int, int] | None = None,
    mask: Tensor | None = None,
    eps: float = 1e-8,
    reduction: str = "sum",
    group: ProcessGroup | None = None,
    backend: str | None = None,
) -> Tensor:
    """Relative change from each layer to the next.

        L_stability = sum_l mean((h_{l+1} - h_l)^2) / (mean(h_l^2) + mean(h_{l+1}^2) + eps)

    with means over B, T and D; a single layer has no change: a 0 whose backward gives a zero gradient.
    Source: CARMA, arXiv 2502.11066; `docs/stability_loss.md`.

    Args:
        hidden_states: `[L, B, T, D]` or L times `[B, T, D]`, block outputs; fp16, bf16, fp32 or fp64.
        layers: `(start, end)`, both included; None for all.
        mask: `[B, T]`, non-zero for the tokens in the means; None for all, padding included, as published.
        eps: a number > 0.
        reduction: "sum" over the L-1 steps, as published; "mean"; "none" for `[L-1]`.
        group: as in `mi_loss`: the means are those of the joined batch.
        backend: see `carma_kernels.choose_backend`.

    Returns:
        0-d, or `[L-1]`; fp32 (fp64 for fp64 inputs).

    Raises:
        TypeError, ValueError: an input that does not fit; the message says which, and the way out.
    """
    _validate.group(group)
    hidden, first, (chosen,) = _layers(hidden_states, layers=layers)
    _validate.option(reduction, _validate.REDUCTIONS, "reduction")
    term = StabilityTerm(chosen, _validate.mask(mask, first), _validate.positive_number(eps, "eps"))
    found = _terms(_backend.implementation(backend, first.device), hidden, None, term, group)
    if reduction == "none":
        return found.stability_per_layer
    return found.stability if reduction == "sum" else found.stability / max(1, len(chosen) - 1)


def carma_loss(
    hidden_states: HiddenStates,
    spans_or_pairs: TokenSpans | PairIndex,
    config: CarmaConfig = CarmaConfig(),  # noqa: B008 (frozen)
    *,
    mask: Tensor | Literal["all"] | None = None,
    num_pairs: float | Tensor | None = None,
    group: ProcessGroup | None = None,
    backend: str | None = None,
) -> CarmaOutput:
    """Both losses in one pass over the hidden states: `gamma * L_MI + eta * L_stability`.

    Args:
        hidden_states: `[L, B, T, D]` or L times `[B, T, D]`, block outputs; fp16, bf16, fp32 or fp64.
        spans_or_pairs: as in `mi_loss`.
        config: weights and options; the defaults are the paper's.
        mask: of the stability loss: None for the valid tokens that the spans (or pairs) know, so that padding changes
            nothing; "all" for every token, padding included, as published; or `[B, T]`, as there.
        num_pairs: for the MI loss, as there.
        group: as in `mi_loss`, for both losses.
        backend: see `carma_kernels.choose_backend`.

    Returns:
        A `CarmaOutput`; `total_loss(task_loss, output.loss, config.carma_weight)` adds it to the task's loss.

    Raises:
        TypeError, ValueError: an input that does not fit; the message says which, and the way out.
    """
    return carma_loss_by(
        partial(_backend.implementation, backend), hidden_states, spans_or_pairs, config, mask, num_pairs, group
    )


def carma_loss_by(
    choose: Callable[[torch.device], TermsBackend],
    hidden_states: HiddenStates,
    spans_or_pairs: TokenSpans | PairIndex,
    config: CarmaConfig,
    mask: Tensor | Literal["all"] | None,
    num_pairs: float | Tensor | None,
    group: ProcessGroup | None,
) -> CarmaOutput:
    """`carma_loss`, by the backend chosen for the hidden states' device."""
    config = checked(config)
    _validate.group(group)
    hidden, first, (mi_layers, stability_layers) = _layers(
        hidden_states, mi_layers=config.mi_layers, stability_layers=config.stability_layers
    )
    similarity = _similarity(config.metric, config.temperature, first)
    negatives = _validate.negatives(config.negatives, spans_or_pairs)
    match = _validate.match_negatives(config.match_negatives, spans_or_pairs)
    pairs = _validate.pairs(spans_or_pairs, first, len(mi_layers))
    valid = _validate.stability_mask(mask, pairs, first)
    is_padded = mask is not None or not isinstance(pairs, TokenSpans) or pairs.is_padded
    stability_term = StabilityTerm(stability_layers, valid, config.eps, is_padded, config.stability_weight)
    count = _divisor(num_pairs, pairs.num_pairs, "mean", first.device, group)
    backend = choose(first.device)
    if group is not None and negatives == "batch":  # two passes, since the losses are over different batches
        joined, layers, pairs = _joined_batch(hidden, mi_layers, pairs, group)
        mi_term = MITerm(layers, _table(pairs, negatives), similarity, match, count, config.mi_weight)
        of_joined = _terms(backend, joined, mi_term, None, group)
        found = _terms(backend, hidden, None, stability_term, group)
        found = found._replace(mi_per_layer=of_joined.mi_per_layer, mi=of_joined.mi, loss=of_joined.loss + found.loss)
    else:
        mi_term = MITerm(mi_layers, _table(pairs, negatives), similarity, match, count, config.mi_weight)
        found = _terms(backend, hidden, mi_term, stability_term, group)
    return CarmaOutput(
        found.loss,
        found.mi,
        found.stability,
        found.mi_per_layer.detach(),
        found.stability_per_layer.detach(),
        spans_or_pairs.num_pairs,
    )


def total_loss(task_loss: Tensor, carma_loss: Tensor, weight: float) -> Tensor:
    """`(1 - lambda) * task_loss + lambda * carma_loss`.

    Args:
        task_loss: 0-d.
        carma_loss: 0-d, the `loss` of a `CarmaOutput`.
        weight: lambda, in [0, 1]; the paper's is 0.3.

    Raises:
        TypeError, ValueError: an output instead of its loss, a loss that is not 0-d, or a weight out of range.
    """
    for name, loss in (("task_loss", task_loss), ("carma_loss", carma_loss)):
        if not isinstance(loss, Tensor):
            raise TypeError(f"{name} must be a 0-d tensor, got {type(loss).__name__}. Pass the output's .loss.")
        if loss.dim() != 0:
            raise ValueError(f"{name} must be a 0-d tensor, got {list(loss.shape)}. Reduce it first, with .mean() say.")
    share = _validate.weight(weight, "weight")
    return (1 - share) * task_loss + share * carma_loss


def _layers(hidden_states: Any, **ranges: tuple[int, int] | None) -> tuple[HiddenStates, Tensor, tuple[range, ...]]:
    """The hidden states in use, their first layer, and the chosen ranges counted among them.

    Layers of a list that no range holds are left out, and get no gradient.
    """
    layers = _validate.hidden_states(hidden_states)
    chosen = tuple(_validate.layer_range(bounds, len(layers), name) for name, bounds in ranges.items())
    if isinstance(hidden_states, Tensor):
        return hidden_states, layers[0], chosen
    start = min(layers.start for layers in chosen)
    stop = max(layers.stop for layers in chosen)
    return layers[start:stop], layers[0], tuple(range(r.start - start, r.stop - start) for r in chosen)


def _similarity(metric: str, temperature: float | Tensor, first: Tensor) -> Similarity:
    cosine = _validate.option(metric, _validate.METRICS, "metric") == "cosine"
    return Similarity(cosine, _validate.temperature(temperature, first.device))


def _terms(
    backend: TermsBackend,
    hidden: HiddenStates,
    mi: MITerm | None,
    stability: StabilityTerm | None,
    group: ProcessGroup | None,
) -> Terms:
    """Of the group's joined batch, if there is a group."""
    if group is None:
        return Terms(*backend.carma_terms(hidden, mi, stability))
    found = backend.carma_terms(hidden, mi, stability, group.group_name)
    return Terms(*(distributed.scale_gradient(term, group.size()) for term in found))


def _divisor(
    num_pairs: float | Tensor | None, local: int, reduction: str, device: torch.device, group: ProcessGroup | None
) -> float | Tensor:
    """What the sums over pairs are divided by: the given number, else that of the joined batch."""
    if group is not None and num_pairs is None and reduction != "sum":
        num_pairs = distributed.global_num_pairs(local, group, device)
    return _validate.num_pairs(num_pairs, local, reduction, device)


def _joined_batch(
    hidden: HiddenStates, layers: range, pairs: TokenSpans | PairIndex, group: ProcessGroup
) -> tuple[list[Tensor], range, TokenSpans]:
    """The layers of all ranks, and their spans, in which the pairs are this rank's."""
    assert isinstance(pairs, TokenSpans)
    gathered, joined = distributed.gather_batch([hidden[layer] for layer in layers], pairs, group)
    return gathered, range(len(layers)), joined


def _table(pairs: TokenSpans | PairIndex, negatives: str) -> ContrastTable | PairIndex:
    return pairs if isinstance(pairs, PairIndex) else pairs.contrast_table(negatives)
