"""Which backend runs a call, and why."""

from __future__ import annotations

import importlib.util
import os

import torch

BACKENDS = ("torch", "triton")
VARIABLE = "CARMA_KERNELS_BACKEND"
INTERPRET = "TRITON_INTERPRET"
"""Triton's own switch: 1 when Triton is imported, and its kernels run on CPU tensors, slowly, in Python"""


def choose(backend: str | None, device: torch.device | str) -> tuple[str, str]:
    """The backend for tensors on `device`, and the reason in a few words.

    Args:
        backend: "torch", "triton", or None to be chosen: the environment variable `CARMA_KERNELS_BACKEND` if it is
            set, "torch" otherwise. The Triton kernels pass Triton's interpreter but have yet to run on a GPU; once they
            have, they will be chosen for CUDA and ROCm tensors.

    Raises:
        ValueError: an unknown backend, or "triton" for a device that Triton does not run on.
        RuntimeError: "triton" without Triton.
    """
    asked, by = (backend, "backend=") if backend is not None else (os.environ.get(VARIABLE) or None, VARIABLE)
    device = torch.device(device)
    if asked is None:
        if device.type == "cuda":
            return "torch", "the Triton kernels have yet to run on a cuda device: ask for them with backend='triton'"
        return "torch", f"it runs on every device, {device.type} included"
    if asked not in BACKENDS:
        raise ValueError(f"{by} must be 'torch' or 'triton' (or left out), got {asked!r}.")
    if asked == "triton":
        _check_triton(by, device)
    return asked, f"{by} asks for it"


def _check_triton(by: str, device: torch.device) -> None:
    if importlib.util.find_spec("triton") is None:
        raise RuntimeError(
            f"{by} asks for the triton backend, but Triton is not installed: pip install triton (on Linux), or use "
            "'torch', which runs on every device."
        )
    if device.type != "cuda" and os.environ.get(INTERPRET) != "1":
        raise ValueError(
            f"{by} asks for the triton backend for tensors on {device}; it runs on CUDA and ROCm devices. Move the "
            "hidden states there, or use 'torch', which runs on every device. To debug the kernels on a CPU, set "
            f"{INTERPRET}=1 before Python starts."
        )
