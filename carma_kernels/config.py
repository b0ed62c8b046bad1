"""The options of the CARMA loss, with the paper's values as defaults."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from carma_kernels import _validate


@dataclass(frozen=True)
class CarmaConfig:
    """Options of `carma_loss`; the defaults are those of the CARMA paper (arXiv 2502.11066) and its README.

    Attributes:
        mi_weight: gamma, the weight of the MI loss.
        stability_weight: eta, the weight of the stability loss.
        carma_weight: lambda, for `total_loss`; `carma_loss` itself does not use it.
        temperature: tau of the MI loss, a number > 0 or a 0-d tensor, which gets its gradient.
        metric: "cosine" or "dot".
        negatives: "sequence" or "batch"; not consulted when the pairs come with their negatives.
        match_negatives: k, to have the exact loss estimate the one with k sampled negatives; None for the exact loss.
        mi_layers: `(start, end)`, both included, of the layers in the MI loss; None for all.
        stability_layers: the same for the stability loss.
        eps: added to the stability loss's denominator.

    Raises:
        TypeError, ValueError: an option out of range. What depends on the hidden states and the spans (a tensor
            `temperature`, layer ranges, `match_negatives`) is checked when the loss is computed.
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

    def __post_init__(self) -> None:
        """Check what can be checked without the hidden states."""
        for name in ("mi_weight", "stability_weight"):
            _validate.non_negative_number(getattr(self, name), name)
        _validate.weight(self.carma_weight, "carma_weight")
        if not isinstance(self.temperature, Tensor):
            _validate.positive_number(self.temperature, "temperature")
        _validate.option(self.metric, _validate.METRICS, "metric")
        _validate.negatives(self.negatives, None)
        _validate.positive_number(self.eps, "eps")


def checked(config: Any) -> CarmaConfig:
    """The config, or a `TypeError` that says what to pass."""
    if not isinstance(config, CarmaConfig):
        raise TypeError(f"config must be a CarmaConfig, got {type(config).__name__}. Use CarmaConfig(mi_weight=...).")
    return config
