"""What keeps Triton from running here, as far as it can be seen without a launch."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import re
from functools import cache

import torch

from carma_kernels import _runtime
from carma_kernels._self_check import in_short

_OLDEST_TRITON = (3, 6)
_OLDEST_NVIDIA = (8, 0)  # compute capability
_PACKAGES = ("triton", "triton-rocm", "pytorch-triton-rocm")


def obstacle(device: torch.device) -> str | None:
    """Why Triton cannot be used on a GPU, None if nothing is known against it. Imports Triton."""
    if (found := missing()) is not None:
        return found
    target = _runtime.target(device)
    if target is not None and target.capability is not None and target.capability < _OLDEST_NVIDIA:
        return f"its compute capability is {_dotted(target.capability)}, and {_dotted(_OLDEST_NVIDIA)} is needed"
    try:
        importlib.import_module("carma_kernels.ops")
    except Exception as error:
        return in_short(error)
    return None


def missing() -> str | None:
    """What is wrong with the installed Triton, as far as can be seen without importing it."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    version = _triton()
    if version is not None and _first_two(version) < _OLDEST_TRITON:
        return f"Triton {version} is installed, and {_dotted(_OLDEST_TRITON)} or later is needed"
    return None


def interpreter_obstacle() -> str | None:
    """Why Triton's interpreter does not run with the numpy that is installed, None if it does."""
    triton, numpy = _triton(), _version("numpy")
    if triton is None or numpy is None or _first_two(triton) >= (3, 7) or _first_two(numpy) < (2, 4):
        return None
    return f"the interpreter of Triton {triton} does not run with numpy {numpy}: use triton >= 3.7 or numpy < 2.4"


def _triton() -> str | None:
    return next((version for package in _PACKAGES if (version := _version(package)) is not None), None)


@cache
def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _first_two(version: str) -> tuple[int, ...]:
    """Numbers of a version."""
    return tuple(map(int, re.findall(r"\d+", version)[:2]))


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
