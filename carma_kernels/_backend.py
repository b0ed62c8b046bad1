"""Which backend runs a call, and why."""

from __future__ import annotations

import inspect
import os
import threading
import warnings
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from carma_kernels import _runtime, _self_check, _triton_here, eager
from carma_kernels._small_problem import SmallProblem, like_similarity, like_terms
from carma_kernels._terms import Backend

BACKENDS = ("torch", "triton")
VARIABLE = "CARMA_KERNELS_BACKEND"
SELF_CHECK = "CARMA_KERNELS_SELF_CHECK"
_WHEN_CHECKED = "triton once it agrees"

_Key = tuple[torch.device, torch.dtype, str]

_obstacles: dict[torch.device, str | None] = {}
"""Why Triton cannot be used on a device, None as far as nothing is known, of the devices asked for"""
_admitted: set[_Key] = set()
"""Where, for which dtype and with which kernels Triton has agreed with the torch backend"""
_checking = threading.Lock()
_warned: set[str] = set()


def choose(backend: str | None, device: torch.device | str) -> tuple[str, str]:
    """The backend for tensors on `device`, and the reason in a few words. Launches nothing.

    Triton, where nobody says otherwise, has to agree with the torch backend first. The first call on a device, in a
    dtype and with the same kernels (for short or long groups of tokens, listed pairs, the stability loss alone, the
    similarity) computes a small problem like it with both, values and gradients, several times over. If they agree,
    Triton computes this call and those to come; if not, or if a kernel cannot be compiled or launched, a warning says
    what came out, and the torch backend computes every call on that device in this process. The environment variable
    `CARMA_KERNELS_SELF_CHECK=0` does without. No such check is made within `torch.compile`, the capture of a CUDA
    graph, a backward or a dispatch mode: there the torch backend computes a call that has come without it.

    Args:
        backend: "torch", "triton", or None to be chosen: by the environment variable `CARMA_KERNELS_BACKEND` if it is
            set, or else Triton for CUDA and ROCm tensors, where it can be used, and "torch" for any other. Who asks
            for "triton" gets it as it is, unchecked.
        device: of the hidden states.

    Raises:
        ValueError: an unknown backend, or "triton" for a device that Triton does not run on; an unknown value of
            `CARMA_KERNELS_SELF_CHECK`.
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


def implementation(backend: str | None, device: torch.device) -> Backend:
    """The module that computes, or something that offers the same functions.

    Where Triton would be picked but cannot be used, it is the torch backend, and a warning, once, says why.
    """
    chosen = _decide(backend, device)
    if chosen == "torch":
        return eager
    from carma_kernels import ops  # imports Triton

    return ops if chosen == "triton" else _TritonOnceItAgrees(ops, device)


def _decide(backend: str | None, device: torch.device) -> str:
    """ "torch", "triton", or `_WHEN_CHECKED`."""
    if _asked(backend)[0] is not None:
        return choose(backend, device)[0]
    if not _is_gpu(device):
        return "torch"
    if triton_obstacle(device) is None:
        return _WHEN_CHECKED
    _warn_of_obstacle(device)
    return "torch"


class _TritonOnceItAgrees:
    """The Triton backend for who has not asked for it: what it cannot do, or not rightly, the torch backend does."""

    def __init__(self, ops: ModuleType, device: torch.device) -> None:
        """Take `carma_kernels.ops`, for hidden states on this device."""
        self._ops = ops
        self._device = device

    def carma_terms(self, hidden: Any, mi: Any, stability: Any, group: str | None = None) -> Any:
        """As `carma_kernels.eager.carma_terms`."""
        return self._for_terms(hidden, mi, stability).carma_terms(hidden, mi, stability, group)

    def carma_terms_and_gradients(self, hidden: Any, mi: Any, stability: Any, group: str | None = None) -> Any:
        """As `carma_kernels.eager.carma_terms_and_gradients`."""
        return self._for_terms(hidden, mi, stability).carma_terms_and_gradients(hidden, mi, stability, group)

    def pairwise_similarity(self, hidden: Any, *arguments: Any) -> Any:
        """As `carma_kernels.eager.pairwise_similarity`."""
        takes = self._ops.takes(hidden[0])
        if takes and self._is_admitted(hidden[0], "similarity", like_similarity, hidden, *arguments):
            return self._ops.pairwise_similarity(hidden, *arguments)
        return eager.pairwise_similarity(hidden, *arguments)

    def _for_terms(self, hidden: Any, mi: Any, stability: Any) -> Any:
        takes = self._ops.takes(hidden[0])
        kernels = self._ops.kernels_for(hidden[0], mi) if takes else ""
        if takes and self._is_admitted(hidden[0], kernels, like_terms, hidden, mi, stability):
            return self._ops
        return eager

    def _is_admitted(self, layer: Tensor, kernels: str, like: Callable[..., SmallProblem], *call: Any) -> bool:
        """Whether Triton computes a call, which may have to be found out."""
        if torch.compiler.is_compiling():
            return _is_admitted_already(self._device, layer.dtype, kernels)
        key = self._device, layer.dtype, kernels
        return key in _admitted or _is_unchecked() or _admit(key, self._ops, like, layer, call)


def _is_admitted_already(device: torch.device, dtype: torch.dtype, kernels: str) -> bool:
    """For what is being compiled."""
    key = device, dtype, kernels
    if key in _admitted or _is_unchecked():
        return True
    _warn_unchecked(key, "while torch.compile or torch.export traces")
    return False


# torch.compile shall not look inside; what torch.compiler.assume_constant_result does, without its imports
_decide._dynamo_marked_constant = True  # type: ignore[attr-defined]
_is_admitted_already._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _admit(key: _Key, ops: ModuleType, like: Callable[..., SmallProblem], layer: Tensor, call: tuple[Any, ...]) -> bool:
    """Compare the backends, if nobody has; whether they agree."""
    device, _, kernels = key
    hindrance = _hindrance(layer)
    if hindrance is not None:
        _warn_unchecked(key, hindrance)
        return False
    with _checking:
        if key not in _admitted and triton_obstacle(device) is None:
            disagreement = _self_check.disagreement(partial(like, kernels, *call), device, ops)
            if disagreement is None:
                _admitted.add(key)
            else:
                _obstacles[device] = (
                    f"its self-check failed, {disagreement}. Please report this with what `python -m carma_kernels "
                    "doctor` and `python -m carma_kernels verify` print"
                )
    if triton_obstacle(device) is None:
        return True
    _warn_of_obstacle(device)
    return False


def _hindrance(layer: Tensor) -> str | None:
    """When it is that nothing can be checked now, None if it can."""
    if torch.backends.cuda.is_built() and torch.cuda.is_current_stream_capturing():
        return "while a CUDA graph is captured"
    if torch._C._current_graph_task_id() != -1:
        return "in a backward"
    if torch._C._len_torch_dispatch_stack() or torch._C._functorch.maybe_current_level() is not None or is_fake(layer):
        return "under a dispatch mode or a transform of torch.func"
    return None


def _is_unchecked() -> bool:
    """Whether Triton is to be used without a self-check."""
    value = os.environ.get(SELF_CHECK, "")
    if value not in ("", "0", "1"):
        raise ValueError(f"{SELF_CHECK} must be 1 (or left out), or 0 to use Triton unchecked, got {value!r}.")
    return value == "0"


def _asked(backend: str | None) -> tuple[str | None, str]:
    """The backend that somebody names, and where."""
    if backend is not None:
        return backend, "backend="
    return os.environ.get(VARIABLE) or None, VARIABLE


def _is_gpu(device: torch.device) -> bool:
    """Whether kernels run there as they are compiled."""
    target = _runtime.target(device)
    return target is not None and target is not _runtime.INTERPRETER


def _pick(device: torch.device) -> tuple[str, str]:
    device = _with_index(device)
    if not _is_gpu(device):
        if device.type == "cuda" and _runtime.target(device) is _runtime.INTERPRETER:
            return "torch", f"{_runtime.INTERPRET}=1, under which Triton is for debugging on {device}: ask for it"
        return "torch", f"it runs on every device, {device.type} included"
    if (obstacle := triton_obstacle(device)) is not None:
        return "torch", _cannot_be_used(device, obstacle)
    if _is_unchecked():
        return "triton", f"Triton runs on {device}, unchecked: {SELF_CHECK}=0"
    here = sorted((kernels, str(dtype)) for at, dtype, kernels in tuple(_admitted) if at == device)
    agreed = [f"{kernels} in {dtype.removeprefix('torch.')}" for kernels, dtype in here]
    if agreed:
        return "triton", f"Triton runs on {device}, and agreed with the torch backend: {', '.join(agreed)}"
    return "triton", f"Triton runs on {device}, and is compared with the torch backend at the first call"


def _with_index(device: torch.device) -> torch.device:
    """As tensors name theirs: "cuda" is the current one."""
    if device == torch.device("cuda") and torch.cuda.is_initialized():
        return torch.device("cuda", torch.cuda.current_device())
    return device


def triton_obstacle(device: torch.device) -> str | None:
    """Why Triton cannot be used on a GPU, None as far as is known. Launches nothing."""
    if device not in _obstacles:
        _obstacles[device] = _triton_here.obstacle(device)
    return _obstacles[device]


def _check_triton(by: str, device: torch.device) -> None:
    if (missing := _triton_here.missing()) is not None:
        raise RuntimeError(
            f"{by} asks for the triton backend, but {missing}: pip install triton --upgrade (on Linux), or use "
            "'torch', which runs on every device."
        )
    target = _runtime.target(device)
    if target is None:
        raise ValueError(
            f"{by} asks for the triton backend for tensors on {device}; it runs on CUDA and ROCm devices. Move the "
            "hidden states there, or use 'torch', which runs on every device. To debug the kernels on a CPU, set "
            f"{_runtime.INTERPRET}=1 before Python starts."
        )
    if target is _runtime.INTERPRETER and (obstacle := _triton_here.interpreter_obstacle()) is not None:
        raise RuntimeError(f"{by} asks for the triton backend under {_runtime.INTERPRET}=1, but {obstacle}.")


def _cannot_be_used(device: torch.device, obstacle: str) -> str:
    return f"Triton cannot be used on {device}: {obstacle}"


def _warn_of_obstacle(device: torch.device) -> None:
    """Why the torch backend computes what Triton would."""
    reason = _cannot_be_used(device, str(triton_obstacle(device)))
    _warn(
        reason, f"{reason}. The torch backend runs instead, slower; {VARIABLE}=torch chooses it without this warning."
    )


def _warn_unchecked(key: _Key, hindrance: str) -> None:
    """Why the torch backend computes what Triton may not compute yet."""
    device, dtype, kernels = key
    _warn(
        hindrance,
        f"Triton has not been compared with the torch backend on {device} in {dtype} for {kernels} yet, which cannot "
        f"be done {hindrance}: the torch backend computes what was asked for there, slower. Call the loss once before "
        f"that, outside of it; or do without the comparison, with backend='triton' or {SELF_CHECK}=0.",
    )


def _warn(reason: str, message: str) -> None:
    """Once for each reason, as from the line that called the package."""
    if reason in _warned:
        return
    _warned.add(reason)
    level, frame = 1, inspect.currentframe()
    while frame is not None and frame.f_globals.get("__name__", "").startswith(("carma_kernels.", "torch.")):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, RuntimeWarning, stacklevel=level)
