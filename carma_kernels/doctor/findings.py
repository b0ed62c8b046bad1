"""What there is to find, also where something is broken."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import shutil
from collections.abc import Iterator
from typing import Any

import torch

from carma_kernels import __version__, choose_backend
from carma_kernels._backend import VARIABLE, triton_obstacle
from carma_kernels._runtime import INTERPRET
from carma_kernels._self_check import disagreement_of_any_kind
from carma_kernels._triton_here import interpreter_obstacle
from carma_kernels.measure import environment

OPTIONAL = {
    "demo": ("transformers", "tokenizers", "rich", "matplotlib"),
    "integrations": ("transformers", "accelerate"),
    "bench": ("pytest", "pytest-benchmark", "pytorch-metric-learning", "inf-cl"),
}
"""What each extra of the package adds, as in pyproject.toml"""
CHECKED = (torch.float32, torch.float16, torch.bfloat16)
AGREES = "agrees with the torch backend"


def examine() -> dict[str, Any]:
    """Everything `doctor` reports, ready for JSON; nothing that is broken here makes it raise.

    Returns:
        `version`; `environment` as from `measure.environment`; `variable`, the value of `CARMA_KERNELS_BACKEND`;
        `backends`, for each device the `backend` picked and the `reason`; `triton`, for each GPU why the Triton backend
        cannot be used there, None if it can; `self_check`, for each GPU where it can and each dtype that it agrees with
        the torch backend, or else what differs or fails; `optional`, for each extra the version of each package, None
        if it is missing; `notes` and `problems`, in words.
    """
    problems: list[str] = []
    backends: dict[str, dict[str, str | None]] = {}
    try:
        machine = environment()
    except Exception as error:
        machine = {}
        problems.append(f"the versions and devices cannot be listed: {one_line(error)}")
    for device in devices():
        try:
            backend, reason = choose_backend(None, device)
            backends[str(device)] = {"backend": backend, "reason": reason}
        except Exception as error:
            backends[str(device)] = {"backend": None, "reason": one_line(error)}
            problems.append(f"no backend for {device}: {one_line(error)}")
    gpus = [device for device in devices() if device.type == "cuda"]
    obstacles = {str(device): _triton(device) for device in gpus}
    self_check = {str(device): _self_check(device) for device in gpus if obstacles[str(device)] is None}
    problems += [
        f"the Triton backend on {device} in {dtype}: {result}"
        for device, results in self_check.items()
        for dtype, result in results.items()
        if result != AGREES
    ]
    return {
        "version": __version__,
        "environment": machine,
        "variable": os.environ.get(VARIABLE),
        "backends": backends,
        "triton": obstacles,
        "self_check": self_check,
        "optional": {extra: {name: _version(name) for name in names} for extra, names in OPTIONAL.items()},
        "notes": list(_notes(machine)),
        "problems": problems,
    }


def devices() -> list[torch.device]:
    """The devices that torch can use here."""
    found = [torch.device("cpu")]
    found += [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        found.append(torch.device("mps"))
    return found


def _triton(device: torch.device) -> str | None:
    if os.environ.get(INTERPRET) == "1":
        return f"{INTERPRET}=1, under which nothing is compiled for it"
    try:
        return triton_obstacle(device)
    except Exception as error:
        return one_line(error)


def _self_check(device: torch.device) -> dict[str, str]:
    """What comes of it, for each dtype."""
    ops = importlib.import_module("carma_kernels.ops")  # imports Triton
    results = {}
    for dtype in CHECKED:
        try:
            result = disagreement_of_any_kind(dtype, device, ops)
        except Exception as error:
            result = f"{type(error).__name__}: {one_line(error)}"
        results[str(dtype).removeprefix("torch.")] = result or AGREES
    return results


def _notes(machine: dict[str, Any]) -> Iterator[str]:
    if torch.version.cuda is None and torch.version.hip is None and shutil.which("nvidia-smi"):
        yield (
            f"this machine has an NVIDIA driver, but torch {torch.__version__} is built without CUDA: the GPU cannot "
            "be used. https://pytorch.org/get-started names the build to install."
        )
    if machine and machine["triton"] is None:
        yield "Triton is not installed. It comes with torch's CUDA and ROCm builds; the torch backend does without it."
    if (obstacle := interpreter_obstacle()) is not None:
        yield f"{obstacle}. It matters to {INTERPRET}=1 alone, not to a GPU, which the kernels are compiled for."
    if machine and machine["carma_kernels"] not in (None, __version__):
        yield (
            f"version {machine['carma_kernels']} is installed, {__version__} is what runs: "
            "pip install --force-reinstall carma-kernels, or start Python in another folder."
        )


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def one_line(error: Exception) -> str:
    """What an exception says, for a line of a report."""
    return " ".join(str(error).split()) or type(error).__name__
