"""The CARMA loss: `L_CARMA = gamma * L_MI + eta * L_Stability`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor

from csrc_ref.layers import check_option
from csrc_ref.mi import Pairs, Spans, count_pairs, mi_loss
from csrc_ref.stability import stability_loss


@dataclass(frozen=True)
class CarmaConfig:
    """Options of `carma_loss`.

    Attributes:
        mi_weight: gamma.
        stability_weight: eta.
        carma_weight: lambda of `(1 - lambda) L_task + lambda L_CARMA`; `carma_loss` does not use it.
        temperature: tau of the MI loss.
        metric: of the MI loss.
        negatives: of the MI loss.
        match_negatives: of the MI loss.
        mi_layers: `layers` of the MI loss.
        stability_layers: `layers` of the stability loss.
        eps: of the stability loss.
    """

    mi_weight: float = 0.5
    stability_weight: float = 0.2
    carma_weight: float = 0.3
    temperature: float | Tensor = 0.1
    metric: str = "cosine"
    negatives: str = "sequence"
    match_negatives: float | None = None
    mi_layers: tuple[int, int] | None = None
    stability_layers: tuple[int, int] | None = None
    eps: float = 1e-8


class CarmaOutput(NamedTuple):
    """What `carma_loss` returns; the first three can be differentiated, the per-layer values are detached."""

    loss: Tensor
    """0-d, `gamma * mi + eta * stability`"""
    mi: Tensor
    """0-d"""
    stability: Tensor
    """0-d"""
    mi_per_layer: Tensor
    """`[L]` of the MI loss's layers"""
    stability_per_layer: Tensor
    """`[L-1]` of the stability loss's layers"""
    num_pairs: int
    """the pairs at hand"""


def carma_loss(
    hidden_states: Tensor | Sequence[Tensor],
    spans_or_pairs: Spans | Pairs,
    config: CarmaConfig = CarmaConfig(),
    *,
    mask: Tensor | Literal["all"] | None = None,
    num_pairs: float | Tensor | None = None,
) -> CarmaOutput:
    """`gamma * L_MI + eta * L_Stability`.

    Args:
        hidden_states: `[L, B, T, D]`, or L tensors `[B, T, D]`.
        spans_or_pairs: as in `mi_loss`.
        config: weights and the options of both losses.
        mask: of the stability loss: None for the valid tokens that the words (or pairs) come with; "all" for every
            token, padding included; or as in `stability_loss`. The MI loss goes by the words.
        num_pairs: as in `mi_loss`.
    """
    mi_per_layer = mi_loss(
        hidden_states,
        spans_or_pairs,
        negatives=config.negatives,
        temperature=config.temperature,
        metric=config.metric,
        layers=config.mi_layers,
        match_negatives=config.match_negatives,
        reduction="none",
        num_pairs=num_pairs,
    )  # [L]
    if mask is None:
        mask = getattr(spans_or_pairs, "attention_mask", None)  # pairs may come without, of a batch without padding
    elif isinstance(mask, str):
        check_option("mask", mask, ("all",))
        mask = None
    stability_per_layer = stability_loss(
        hidden_states, layers=config.stability_layers, mask=mask, eps=config.eps, reduction="none"
    )  # [L-1]
    mi = mi_per_layer.mean()
    stability = stability_per_layer.sum()
    return CarmaOutput(
        loss=config.mi_weight * mi + config.stability_weight * stability,
        mi=mi,
        stability=stability,
        mi_per_layer=mi_per_layer.detach(),
        stability_per_layer=stability_per_layer.detach(),
        num_pairs=count_pairs(spans_or_pairs),
    )
