"""What a backend is asked to compute: the two losses as plain data, checked and with every default filled in."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from carma_kernels.pairs import PairIndex
from carma_kernels.spans import ContrastTable


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


@dataclass(frozen=True)
class StabilityTerm:
    """The stability loss over some layers."""

    layers: range
    mask: Tensor | None  # [B, T] bool
    eps: float


ZERO_NORM = 1e-8
"""A vector is taken to have no length, hence similarity 0 and gradient 0, up to this norm."""
