"""Which backend runs a call, and why."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from typing import Protocol, cast

import torch
from torch import Tensor

from carma_kernels._terms import MITerm, Similarity, StabilityTerm

BACKENDS = ("torch", "triton")
VARIABLE = "CARMA_KERNELS_BACKEND"


class Backend(Protocol):
    """What every backend offers: checked arguments in, unreduced losses out."""

    def carma_terms(
        self, hidden: Tensor | Sequence[Tensor], mi: MITerm | None, stability: StabilityTerm | None
    ) -> tuple[Tensor, Tensor]:
        """Sum over pairs of the MI loss for each layer, and the stability loss of each step."""

    def pairwise_similarity(
        self,
        hidden: Tensor | Sequence[Tensor],
        layers: range,
        similarity: Similarity,
        mask: Tensor | None,
        out_dtype: torch.dtype,
    ) -> Tensor:
        """`[L, B, T, T]`."""


def load(backend: str | None, device: torch.device) -> Backend:
    """The backend that `choose` names."""
    module = {"torch": "carma_kernels.eager"}[choose(backend, device)[0]]
    return cast(Backend, importlib.import_module(module))


def choose(backend: str | None, device: torch.device) -> tuple[str, str]:
    """The backend for tensors on `device`, and the reason in a few words.

    Args:
        backend: "torch", "triton", or None to be chosen: the environment variable `CARMA_KERNELS_BACKEND` if it is set,
            "torch" otherwise.

    Raises:
        ValueError: an unknown backend.
        NotImplementedError: "triton".
    """
    asked, by = (backend, "backend=") if backend is not None else (os.environ.get(VARIABLE) or None, VARIABLE)
    if asked is None:
        return "torch", f"the only backend built so far, for {device.type} tensors as for others"
    if asked not in BACKENDS:
        raise ValueError(f"{by} must be 'torch' or 'triton' (or left out), got {asked!r}.")
    if asked == "triton":
        raise NotImplementedError(
            f"{by} asks for the triton backend, which is not built yet. Leave it out or use 'torch', which runs on "
            "every device."
        )
    return asked, f"{by} asks for it"
