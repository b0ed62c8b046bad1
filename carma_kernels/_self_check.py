"""Whether the Triton kernels do on a device what the torch backend does there: a small problem, computed by both.

Values and gradients, several times over: what differs from one time to the next is a race between programs. It reads
the device's memory, and so waits for the device: it is made once, and is no part of the hot path.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from carma_kernels import eager
from carma_kernels._small_problem import SmallProblem, of_every_kind

_REPEATS = 5
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class _Allowed(NamedTuple):
    """Errors, relative: that of a tensor's worst number, which shows what is wrong in one place, and that of the whole
    tensor, in which roundings average out and what is a little wrong everywhere shows."""

    worst: float
    whole: float


_FP32 = 1e-4
"""Where scores are up to 10 in size, in every dtype: products of halves are exact, and are added up in fp32. A larger
score has a larger error, and so has all that follows from it."""
_TF32 = 5e-3
"""The same where torch is told to multiply in tf32, which the torch backend then does in every dtype"""
_HALVES = {torch.float16: _Allowed(4e-3, 2e-3), torch.bfloat16: _Allowed(3e-2, 8e-3)}
"""Of gradients, which are rounded, and so is some of what they are products of"""
_TEMPERATURE = "the gradient of the temperature"


def disagreement(make: Callable[[], SmallProblem], device: torch.device, ops: Any) -> str | None:
    """Where the Triton backend and the torch backend disagree on a device, in words; None if they agree.

    The torch backend gets the same numbers in fp32. Neither torch's generators nor the caller's modes are touched.

    Args:
        make: makes the problem to be computed by both.
        device: of the problem.
        ops: the Triton backend's module.

    Raises:
        Exception: what the torch backend raises; and of the Triton backend's, that memory has run out.
    """
    with _by_itself(device):
        problem = make()
        inputs = [tensor.detach().float().requires_grad_() for tensor in problem.inputs]
        upstream = _upstream(problem, inputs)
        expected = _evaluate(problem, eager, inputs, upstream)
        sizes = _sizes(problem, expected, upstream)
        try:
            found = _evaluate(problem, ops, problem.inputs, upstream)
            wrong = _difference(problem, found, expected, sizes) or _change(problem, ops, upstream, found)
        except Exception as error:
            if _is_out_of_memory(error):
                raise
            wrong = in_short(error)
        return wrong and f"{problem}: {wrong}"


def disagreement_of_any_kind(dtype: torch.dtype, device: torch.device, ops: Any) -> str | None:
    """The same of a problem for each kind of kernels, as far as the first that they disagree on."""
    for make in of_every_kind(dtype, device):
        if (found := disagreement(make, device, ops)) is not None:
            return found
    return None


def in_short(error: Exception) -> str:
    """An exception in a line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}{'...' * (len(text) > 200)}".removesuffix(": ")


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "out of memory" in str(error)


@contextmanager
def _by_itself(device: torch.device) -> Iterator[None]:
    """With gradients, and without what the caller has set for tensors of his own."""
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())  # which the line above does, unsaid, in today's torch
        stack.enter_context(torch.autocast(device.type, enabled=False))
        # within activation checkpointing, to read a saved tensor would compute the caller's forward again
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is))
        if device.type == "cuda":
            stack.enter_context(torch.cuda.device(device))
            stack.callback(torch.cuda.set_sync_debug_mode, torch.cuda.get_sync_debug_mode())
            torch.cuda.set_sync_debug_mode("default")
        yield


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def _upstream(problem: SmallProblem, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The gradient that arrives for each result: with it, each makes the hidden states' gradients about 1 at most.

    So neither loss hides the other's errors, and no number is too small for fp16.
    """
    device = inputs[0].device
    generator = torch.Generator(device).manual_seed(1)
    outputs = problem.outputs(eager, inputs)
    upstream = []
    for output in outputs:
        weight = torch.rand(output.shape, dtype=torch.float32, device=device, generator=generator) + 0.5
        hidden = inputs[: len(problem.hidden)]
        gradients = torch.autograd.grad(output, hidden, weight.to(output.dtype), retain_graph=True)
        largest = torch.stack([gradient.abs().max() for gradient in gradients]).max()
        upstream.append((weight / torch.where(largest > 0, largest, 1.0)).to(output.dtype))
    return upstream


def _evaluate(
    problem: SmallProblem, backend: Any, inputs: Sequence[Tensor], upstream: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Values and gradients by name, each layer's apart."""
    outputs = problem.outputs(backend, inputs)
    gradients = torch.autograd.grad(outputs, inputs, upstream)
    of_layers = gradients[0].unbind(0) if len(problem.hidden) == 1 else gradients[: len(problem.hidden)]
    found = dict(zip(problem.results, (output.detach() for output in outputs), strict=True))
    found |= {f"the gradient of layer {at}": gradient for at, gradient in enumerate(of_layers)}
    if len(inputs) > len(problem.hidden):
        found[_TEMPERATURE] = gradients[-1]
    return found


def _sizes(
    problem: SmallProblem, expected: dict[str, Tensor], upstream: Sequence[Tensor]
) -> dict[str, tuple[float, float]]:
    """What errors are relative to: of each tensor its largest number and its norm.

    The terms of the temperature's gradient cancel, so that its own size says little: it is held against L / tau.
    """
    sizes = []
    for name, tensor in expected.items():
        numbers = tensor
        if name == _TEMPERATURE:
            total = (expected[problem.results[0]] * upstream[0]).sum()
            numbers = torch.stack([tensor, total / problem.inputs[-1].detach()])
        sizes += [numbers.abs().max(), numbers.float().norm()]
    known = torch.stack([size.float() for size in sizes]).tolist()
    return dict(zip(expected, zip(known[::2], known[1::2], strict=True), strict=True))


def _difference(
    problem: SmallProblem,
    found: dict[str, Tensor],
    expected: dict[str, Tensor],
    sizes: dict[str, tuple[float, float]],
) -> str | None:
    """The first result that is wrong, and by how much."""
    differences = [found[name].float() - tensor.float() for name, tensor in expected.items()]
    errors = torch.stack([error for each in differences for error in (each.abs().max(), each.norm())]).tolist()
    for name, *error in zip(expected, errors[::2], errors[1::2], strict=True):
        allowed = _allowed(problem, name, found[name].dtype)
        worst, whole = map(_relative, error, sizes[name])
        if not worst <= allowed.worst:
            return f"{name} differs by {worst:.1e} of its largest number, where {allowed.worst:.1e} is allowed"
        if not whole <= allowed.whole:
            return f"{name} differs by {whole:.1e} of its norm, where {allowed.whole:.1e} is allowed"
    return None


def _change(problem: SmallProblem, ops: Any, upstream: Sequence[Tensor], first: dict[str, Tensor]) -> str | None:
    """The first result that is not the same, to the bit, when it is computed again."""
    for _ in range(_REPEATS - 1):
        again = _evaluate(problem, ops, problem.inputs, upstream)
        changed = torch.stack([(_bits(again[name]) != _bits(tensor)).sum() for name, tensor in first.items()])
        for name, count in zip(first, changed.tolist(), strict=True):
            if count:
                return f"{name} is not the same when it is computed again, in {count} of {first[name].numel()} numbers"
    return None


def _relative(error: float, size: float) -> float:
    if size:
        return error / size
    return 0.0 if error == 0 else math.inf


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(_BITS[tensor.element_size()])


def _allowed(problem: SmallProblem, name: str, dtype: torch.dtype) -> _Allowed:
    """For a result of this dtype."""
    is_tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    arithmetic = (_TF32 if is_tf32 else _FP32) * max(1.0, problem.largest_score / 10)
    rounding = 2 * torch.finfo(dtype).eps
    worst, whole = _HALVES.get(problem.hidden[0].dtype, (0.0, 0.0))
    if name in problem.results:
        return _Allowed(arithmetic + rounding, arithmetic + rounding)
    if name == _TEMPERATURE:  # a sum over everything, in which roundings average out once more
        return _Allowed(arithmetic + rounding + whole / 10, arithmetic + rounding + whole / 10)
    return _Allowed(arithmetic + worst, arithmetic + whole)
