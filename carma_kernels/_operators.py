"""What the operators of all backends are asked, and what arrives for their results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from carma_kernels._terms import HiddenStates, MITerm, Similarity, StabilityTerm
from carma_kernels.pairs import PairIndex
from carma_kernels.spans import ContrastTable


class CarmaArguments(NamedTuple):
    """Of the operators behind `carma_terms`, in the order of `CARMA_SCHEMA`."""

    hidden: list[Tensor]  # [L, B, T, D] alone, or L times [B, T, D]
    pairs: list[Tensor]  # of a ContrastTable, what the backend reads; of a PairIndex, all three; or none
    num_pairs: int
    covers_batch: bool  # as in a ContrastTable
    mask: Tensor | None  # [B, T] of the stability term
    temperature: Tensor | None  # 0-d
    temperature_value: float  # if temperature is None
    cosine: bool
    match_negatives: float | None
    divisor: Tensor | None  # 0-d, of each layer's sum over pairs
    divisor_value: float  # if divisor is None
    eps: float
    weights: list[float]  # of the MI term and of the stability term in the total
    ranges: list[int]  # start and stop of the MI layers, then of the stability layers
    group: str | None  # name of the process group whose joined batch the losses are of

    @property
    def layers(self) -> tuple[Tensor, ...]:
        """`[B, T, D]` each."""
        return layer_views(self.hidden)

    @property
    def mi_layers(self) -> range:
        """Those of the MI term; empty without."""
        return range(*self.ranges[:2])


CARMA_SCHEMA = (
    "Tensor[] hidden, Tensor[] pairs, SymInt num_pairs, bool covers_batch, Tensor? mask, Tensor? temperature, "
    "float temperature_value, bool cosine, float? match_negatives, Tensor? divisor, Scalar divisor_value, float eps, "
    "float[] weights, int[] ranges, str? group"
)


def carma_arguments(
    hidden: HiddenStates,
    mi: MITerm | None,
    stability: StabilityTerm | None,
    group: str | None,
    tables: Callable[[ContrastTable], list[Tensor]],
) -> CarmaArguments:
    """What `carma_terms` was asked; `tables` picks what the backend reads of a contrast table."""
    pairs, num_pairs, covers_batch = _pairs(mi, tables)
    temperature, value = _number(mi.similarity.temperature if mi is not None else 1.0)
    divisor, divisor_value = _number(mi.divisor if mi is not None else 1.0)
    mi_layers = mi.layers if mi is not None else range(0)
    stability_layers = stability.layers if stability is not None else range(0)
    return CarmaArguments(
        hidden=[hidden] if isinstance(hidden, Tensor) else list(hidden),
        pairs=pairs,
        num_pairs=num_pairs,
        covers_batch=covers_batch,
        mask=stability.mask if stability is not None else None,
        temperature=temperature,
        temperature_value=value,
        cosine=mi is None or mi.similarity.cosine,
        match_negatives=mi.match_negatives if mi is not None else None,
        divisor=divisor,
        divisor_value=divisor_value,
        eps=stability.eps if stability is not None else 0.0,
        weights=[mi.weight if mi is not None else 1.0, stability.weight if stability is not None else 1.0],
        ranges=[mi_layers.start, mi_layers.stop, stability_layers.start, stability_layers.stop],
        group=group,
    )


def _pairs(mi: MITerm | None, tables: Callable[[ContrastTable], list[Tensor]]) -> tuple[list[Tensor], int, bool]:
    if mi is None:
        return [], 0, False
    if isinstance(mi.pairs, PairIndex):
        return [mi.pairs.anchor, mi.pairs.positive, mi.pairs.negatives], mi.pairs.num_pairs, False
    assert mi.pairs.ranks is not None
    return tables(mi.pairs), mi.pairs.ranks.num_pairs, mi.pairs.covers_batch


def totals(asked: CarmaArguments, means: Tensor, changes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The MI loss, the stability loss and the total, 0-d, of what they are of each layer; connected to nothing."""
    mi = means.sum() / max(1, len(means))
    stability = changes.sum()
    mi_weight, stability_weight = asked.weights
    return mi, stability, torch.add(mi * mi_weight, stability, alpha=stability_weight)


class SimilarityArguments(NamedTuple):
    """Of the operators behind `pairwise_similarity`, in the order of `SIMILARITY_SCHEMA`."""

    hidden: list[Tensor]  # [L, B, T, D] alone, or L times [B, T, D]
    mask: Tensor | None  # [B, T]
    temperature: Tensor | None  # 0-d
    temperature_value: float  # if temperature is None
    cosine: bool
    range: list[int]  # start and stop of the layers compared
    out_dtype: torch.dtype


SIMILARITY_SCHEMA = (
    "Tensor[] hidden, Tensor? mask, Tensor? temperature, float temperature_value, bool cosine, int[] range, "
    "ScalarType out_dtype"
)


def similarity_arguments(
    hidden: HiddenStates, layers: range, similarity: Similarity, mask: Tensor | None, out_dtype: torch.dtype
) -> SimilarityArguments:
    """What `carma_kernels.pairwise_similarity` was asked."""
    return SimilarityArguments(
        [hidden] if isinstance(hidden, Tensor) else list(hidden),
        mask,
        *_number(similarity.temperature),
        similarity.cosine,
        [layers.start, layers.stop],
        out_dtype,
    )


def _number(value: Tensor | float) -> tuple[Tensor | None, float]:
    return (value, 1.0) if isinstance(value, Tensor) else (None, value)


class CarmaUpstream(NamedTuple):
    """The gradients that arrive for `Terms`; None for one that nobody has used."""

    mi_per_layer: Tensor | None
    stability_per_layer: Tensor | None
    mi: Tensor | None
    stability: Tensor | None
    loss: Tensor | None

    def of_sums(self, asked: CarmaArguments) -> tuple[Tensor, float] | None:
        """What arrives for each MI layer's sum over its pairs, as a gradient `[L_mi]` or 0-d, and a factor of it."""
        arrived = _joined(self.mi_per_layer, self.mi, self.loss, asked.weights[0], 1 / max(1, len(asked.mi_layers)))
        if arrived is None:
            return None
        gradient, factor = arrived
        if asked.divisor is None:
            return gradient, factor / asked.divisor_value
        return gradient / asked.divisor.to(gradient.dtype), factor

    def of_changes(self, asked: CarmaArguments) -> tuple[Tensor, float] | None:
        """The same for the stability loss of each step from one layer to the next."""
        return _joined(self.stability_per_layer, self.stability, self.loss, asked.weights[1], 1.0)


def _joined(
    per_layer: Tensor | None, term: Tensor | None, loss: Tensor | None, weight: float, share: float
) -> tuple[Tensor, float] | None:
    """Of a layer's number, by way of the term `share * sum`, and of the total `weight * term`.

    The usual case, a gradient of the total alone, takes no operation; one of 0 for the others gives the same bits.
    """
    gradient, factor = loss, weight * share
    if term is not None:
        used = loss is not None and weight != 0
        gradient, factor = (loss + term / weight, factor) if used else (term, share)  # type: ignore[operator]
    if per_layer is not None:
        gradient, factor = (per_layer if gradient is None else gradient * factor + per_layer), 1.0
    return None if gradient is None else (gradient, factor)


def layer_views(hidden: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The layers `[B, T, D]` each, of `[L, B, T, D]` alone or of L times `[B, T, D]`."""
    return hidden[0].unbind(0) if hidden[0].dim() == 4 else tuple(hidden)


def empty_gradients(hidden: Sequence[Tensor], needs_grad: Sequence[bool]) -> list[Tensor]:
    """Room for the gradients of those of `hidden` that need one, contiguous."""
    return [
        torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        for tensor, needed in zip(hidden, needs_grad, strict=True)
        if needed
    ]
