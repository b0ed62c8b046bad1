"""Which backend runs a call, and why."""

from __future__ import annotations

import os

import torch

BACKENDS = ("torch", "triton")
VARIABLE = "CARMA_KERNELS_BACKEND"


def choose(backend: str | None, device: torch.device | str) -> tuple[str, str]:
    """The backend for tensors on `device`, and the reason in a few words.

    Args:
        backend: "torch", "triton", or None to be chosen: the environment variable `CARMA_KERNELS_BACKEND` if it is set,
            "torch" otherwise.

    Raises:
        ValueError: an unknown backend.
        NotImplementedError: "triton".
    """
    asked, by = (backend, "backend=") if backend is not None else (os.environ.get(VARIABLE) or None, VARIABLE)
    device = torch.device(device)
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
