"""Which backend runs a call, and why."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import traceback
import warnings
from functools import cache
from types import ModuleType
from typing import Any

import torch

from carma_kernels import _runtime, eager

TRITON_BY_DEFAULT = False
"""Whether a GPU's calls go to Triton unless they say otherwise. The kernels pass Triton's interpreter and compile for
four GPU targets, but have yet to run on a GPU: until they have, they run for those who ask for them."""

BACKENDS = ("torch", "triton")
VARIABLE = "CARMA_KERNELS_BACKEND"
_OLDEST_TRITON = (3, 6)
_OLDEST_NVIDIA = (8, 0)  # compute capability
_TRITON_PACKAGES = ("triton", "triton-rocm", "pytorch-triton-rocm")

_obstacles: dict[torch.device, str | None] = {}
"""Why Triton cannot be used on a device, None if it can, of the devices tried"""
_warned: set[str] = set()


def choose(backend: str | None, device: torch.device | str) -> tuple[str, str]:
    """The backend for tensors on `device`, and the reason in a few words.

    Args:
        backend: "torch", "triton", or None to be chosen: by the environment variable `CARMA_KERNELS_BACKEND` if it is
            set, or else "torch". The Triton kernels pass Triton's interpreter but have yet to run on a GPU; once they
            have, they will be chosen for CUDA and ROCm tensors wherever Triton can be used.
        device: of the hidden states.

    Raises:
        ValueError: an unknown backend, or "triton" for a device that Triton does not run on.
        RuntimeError: "triton" without Triton, or with one that is too old.
    """
    asked, by = _asked(backend)
    device = torch.device(device)
    if asked is None:
        return _pick(device)
    if asked not in BACKENDS:
        raise ValueError(f"{by} must be 'torch' or 'triton' (or left out), got {asked!r}.")
    if asked == "triton":
        _check_triton(by, device)
    return asked, f"{by} asks for it"


def implementation(backend: str | None, device: torch.device) -> Any:
    """The module that computes, or something that offers the same functions.

    Where Triton would be picked but cannot be used, it is the torch backend, and a warning, once, says why.
    """
    chosen = _decide(backend, device)
    if chosen == "torch":
        return eager
    from carma_kernels import ops  # imports Triton

    return ops if chosen == "triton" else _TritonWherePossible(ops, device)


def _decide(backend: str | None, device: torch.device) -> str:
    """ "torch", "triton", or "triton where possible"."""
    chosen, reason = choose(backend, device)
    if _asked(backend)[0] is not None:
        return chosen
    if chosen == "triton":
        return "triton where possible"
    if _obstacles.get(device) is not None:
        _warn(reason)
    return "torch"


# torch.compile shall not look inside; what torch.compiler.assume_constant_result does, without its imports
_decide._dynamo_marked_constant = True  # type: ignore[attr-defined]


class _TritonWherePossible:
    """The Triton backend for who has not asked for it: what it cannot do, the torch backend does."""

    def __init__(self, ops: ModuleType, device: torch.device) -> None:
        """Take `carma_kernels.ops`, for hidden states on this device."""
        self._ops = ops
        self._device = device

    def carma_terms(self, hidden: Any, *arguments: Any) -> Any:
        """As `carma_kernels.eager.carma_terms`."""
        return self._call("carma_terms", hidden, *arguments)

    def pairwise_similarity(self, hidden: Any, *arguments: Any) -> Any:
        """As `carma_kernels.eager.pairwise_similarity`."""
        return self._call("pairwise_similarity", hidden, *arguments)

    def _call(self, function: str, hidden: Any, *arguments: Any) -> Any:
        if not self._ops.takes(hidden[0]):
            return getattr(eager, function)(hidden, *arguments)
        if torch.compiler.is_compiling():  # launches nothing yet
            return getattr(self._ops, function)(hidden, *arguments)
        try:
            return getattr(self._ops, function)(hidden, *arguments)
        except Exception as error:
            if not _is_tritons(error):
                raise
            _obstacles[self._device] = _in_short(error)
        _warn(_pick(self._device)[1])
        return getattr(eager, function)(hidden, *arguments)


def _asked(backend: str | None) -> tuple[str | None, str]:
    """The backend that somebody names, and where."""
    if backend is not None:
        return backend, "backend="
    return os.environ.get(VARIABLE) or None, VARIABLE


def _pick(device: torch.device) -> tuple[str, str]:
    target = _runtime.target(device)
    if target is None or (target is _runtime.INTERPRETER and device.type == "cpu"):
        return "torch", f"it runs on every device, {device.type} included"
    if not TRITON_BY_DEFAULT:
        return "torch", "the Triton kernels have yet to run on a cuda device: ask for them with backend='triton'"
    if target is _runtime.INTERPRETER:
        return "torch", f"{_runtime.INTERPRET}=1, under which Triton is for debugging on {device}: ask for it"
    if (obstacle := triton_obstacle(device)) is not None:
        return "torch", f"Triton cannot be used on {device}: {obstacle}"
    return "triton", f"Triton runs on {device}"


def triton_obstacle(device: torch.device) -> str | None:
    """Why Triton cannot be used on a GPU, None if it can. A kernel is launched there to see, the first time."""
    if device not in _obstacles:
        _obstacles[device] = _find_obstacle(device)
    return _obstacles[device]


def _find_obstacle(device: torch.device) -> str | None:
    if (obstacle := _missing_triton()) is not None:
        return obstacle
    target = _runtime.target(device)
    if target is not None and target.capability is not None and target.capability < _OLDEST_NVIDIA:
        return f"its compute capability is {_dotted(target.capability)}, and {_dotted(_OLDEST_NVIDIA)} is needed"
    try:
        from carma_kernels import ops  # imports Triton

        ops.probe(device)
    except Exception as error:
        if not (isinstance(error, ImportError) or _is_tritons(error)):
            raise
        return _in_short(error)
    return None


def _missing_triton() -> str | None:
    """What is wrong with the installed Triton, as far as can be seen without importing it."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    version = _installed_triton()
    if version is not None and tuple(map(int, re.findall(r"\d+", version)[:2])) < _OLDEST_TRITON:
        return f"Triton {version} is installed, and {_dotted(_OLDEST_TRITON)} or later is needed"
    return None


@cache
def _installed_triton() -> str | None:
    for package in _TRITON_PACKAGES:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _check_triton(by: str, device: torch.device) -> None:
    if (missing := _missing_triton()) is not None:
        raise RuntimeError(
            f"{by} asks for the triton backend, but {missing}: pip install triton --upgrade (on Linux), or use "
            "'torch', which runs on every device."
        )
    if _runtime.target(device) is None:
        raise ValueError(
            f"{by} asks for the triton backend for tensors on {device}; it runs on CUDA and ROCm devices. Move the "
            "hidden states there, or use 'torch', which runs on every device. To debug the kernels on a CPU, set "
            f"{_runtime.INTERPRET}=1 before Python starts."
        )


def _is_tritons(error: Exception) -> bool:
    """Whether Triton failed to compile or to launch, and not the user, or the device's memory."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "out of memory" in str(error):
        return False
    modules = (frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(module.partition(".")[0] == "triton" for module in modules)


def _in_short(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}{'...' * (len(text) > 200)}".removesuffix(": ")


def _warn(reason: str) -> None:
    if reason in _warned:
        return
    _warned.add(reason)
    warnings.warn(
        f"{reason}. The torch backend runs instead, slower; {VARIABLE}=torch chooses it without this warning.",
        RuntimeWarning,
        stacklevel=5,
    )


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
