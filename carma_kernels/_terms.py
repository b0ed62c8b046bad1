"""What a backend is asked to compute: the two losses as plain data, checked and with every default filled in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from carma_kernels.pairs import PairIndex
from carma_kernels.spans import ContrastTable

HiddenStates = Tensor | Sequence[Tensor]
"""`[L, B, T, D]`, or L times `[B, T, D]`"""

Gradients = Callable[[Sequence[Tensor], tuple[Tensor | None, ...], list[bool]], list[Tensor]]
"""Of the hidden states given, those of the layers that are wanted, in order; in between are the gradients that arrive
for each of `Terms`, None for one that does not matter. Layers that are not next to a wanted one are not read."""


class Terms(NamedTuple):
    """What a backend returns; fp32, fp64 for fp64 hidden states. All are connected to every layer of hidden states."""

    mi_per_layer: Tensor
    """`[L_mi]`: each layer's sum over its pairs, divided by `MITerm.divisor`; empty without that term"""
    stability_per_layer: Tensor
    """`[steps]`: the stability loss of each layer with the next; empty without that term"""
    mi: Tensor
    """0-d, the mean of the first"""
    stability: Tensor
    """0-d, the sum of the second"""
    loss: Tensor
    """0-d, both with their weights"""


@dataclass(frozen=True)
class Similarity:
    """`s_ij = h_i.h_j r_i r_j / tau`: r is 1 for the dot product; for the cosine `1/|h|`, or 0 up to `ZERO_NORM`."""

    cosine: bool
    temperature: float | Tensor


@dataclass(frozen=True)
class MITerm:
    """The MI loss over some layers."""

    layers: range
    pairs: ContrastTable | PairIndex
    similarity: Similarity
    match_negatives: float | None
    divisor: float | Tensor = 1.0  # of each layer's sum over pairs
    weight: float = 1.0  # of the mean over layers, in the total


@dataclass(frozen=True)
class StabilityTerm:
    """The stability loss over some layers."""

    layers: range
    mask: Tensor | None  # [B, T] bool
    eps: float
    is_padded: bool = True  # the mask may leave tokens out, as far as the host knows
    weight: float = 1.0  # of the sum over layers, in the total


ZERO_NORM = 1e-8
"""A vector is taken to have no length, hence similarity 0 and gradient 0, up to this norm."""


class TermsBackend(Protocol):
    """What computes the losses."""

    def carma_terms(
        self, hidden: HiddenStates, mi: MITerm | None, stability: StabilityTerm | None, group: str | None = None
    ) -> Terms:
        """Both losses, of the joined batch of a `group`."""


class Backend(TermsBackend, Protocol):
    """What each backend's module offers."""

    def carma_terms_and_gradients(
        self, hidden: Sequence[Tensor], mi: MITerm | None, stability: StabilityTerm | None, group: str | None = None
    ) -> tuple[Terms, Gradients]:
        """The same, connected to nothing, and what makes the gradients of some of the layers."""

    def pairwise_similarity(
        self, hidden: HiddenStates, layers: range, similarity: Similarity, mask: Tensor | None, out_dtype: torch.dtype
    ) -> Tensor:
        """The matrix `[L, B, T, T]`."""
