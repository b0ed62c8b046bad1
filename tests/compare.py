"""Outputs and every gradient of a loss, and the two rules by which they are judged."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from tests.cases import FP32, FP64, Case


class Result(NamedTuple):
    outputs: tuple[Tensor, ...]
    hidden: Tensor  # [L, B, T, D] gradient of the hidden states
    temperature: Tensor | None  # its gradient; None for a number
    temperature_unit: float  # the gradient is a sum of terms of both signs; this is their size


Loss = Callable[[Tensor | list[Tensor], Tensor | float], tuple[Tensor, ...]]


def differentiate(loss: Loss, hidden: Tensor, case: Case, *, exact: bool = False, device: str = "cpu") -> Result:
    """Run a loss forward, and backward from upstream gradients that differ everywhere.

    Args:
        loss: takes hidden states and temperature.
        hidden: `[L, B, T, D]` fp64.
        case: says in which dtype and form the loss gets them.
        exact: give it the same numbers in fp64.
        device: where it gets them.
    """
    dtype = FP64 if exact else case.dtype
    leaf = hidden.to(case.dtype).to(device, dtype).requires_grad_()
    layers = [layer.detach().requires_grad_() for layer in leaf]
    tau = torch.tensor(case.temperature, dtype=FP64 if case.dtype == FP64 else FP32)  # the same number for all
    temperature = case.temperature if case.number else tau.to(device, FP64 if exact else tau.dtype).requires_grad_()
    outputs = loss(leaf if case.stacked else layers, temperature)

    inputs = [leaf] if case.stacked else layers
    wanted = [*inputs, temperature] if isinstance(temperature, Tensor) else inputs
    differentiable = [output for output in outputs if output.requires_grad]
    upstream = upstream_gradients(differentiable)
    gradients = torch.autograd.grad(differentiable, wanted, upstream, allow_unused=True, materialize_grads=True)
    by_layer = gradients[: len(inputs)]
    terms = sum((up * output).abs().sum().item() for up, output in zip(upstream, differentiable, strict=True))
    return Result(
        tuple(output.detach().cpu() for output in outputs),
        (by_layer[0] if case.stacked else torch.stack(by_layer)).cpu(),
        gradients[-1].cpu() if isinstance(temperature, Tensor) else None,
        terms / case.temperature,
    )


def upstream_gradients(outputs: Iterable[Tensor]) -> list[Tensor]:
    """The same random numbers for outputs of the same shapes, of values that every dtype holds."""
    generator = torch.Generator().manual_seed(7)
    return [
        torch.randint(-8, 9, output.shape, generator=generator).add(0.5).div(4).to(output.device, output.dtype)
        for output in outputs
    ]


def assert_close_to_oracle(actual: Result, oracle: Result, tolerance: float) -> None:
    """Every number is the oracle's, up to the tolerance of the computation and one rounding to the tensor's dtype.

    Args:
        actual: of hidden states in some dtype.
        oracle: of the same in fp64.
        tolerance: relative to the largest number of the oracle's tensor.
    """
    for name, ours, exact in _side_by_side(actual, oracle):
        error = (ours.double() - exact).abs()
        unit = max(_largest(exact), oracle.temperature_unit if name == "temperature" else 0.0)
        allowed = tolerance * unit + _rounding(exact, ours.dtype)
        excess = (error - allowed).nan_to_num(torch.inf)
        assert (excess <= 0).all(), f"{name}: off by {_largest(error):.3g} of {unit:.3g}"


def assert_as_accurate_as_eager(actual: Result, eager: Result, oracle: Result) -> None:
    """No number is further from the oracle's than eager autograd's worst in the same dtype, plus one rounding.

    Nor is the root mean square of the errors larger, so that eager's worst is no licence for all the others.
    """
    for (name, ours, exact), (_, theirs, _) in zip(
        _side_by_side(actual, oracle), _side_by_side(eager, oracle), strict=True
    ):
        rounding = _rounding(exact, ours.dtype)
        error = (ours.double() - exact).abs()
        allowed = (theirs.double() - exact).abs().nan_to_num(torch.inf)  # where eager has no answer any will do
        assert ours.isfinite().all(), name
        worst, eagers = f"{name}: {_largest(error):.3g}", f"eager {_largest(allowed):.3g}"
        assert (error - rounding <= _largest(allowed)).all(), f"{worst}, {eagers} at worst"
        assert _rms(error) <= _rms(allowed) + _rms(rounding), f"{worst}, {eagers} at worst, but more on the whole"


def _side_by_side(actual: Result, oracle: Result) -> list[tuple[str, Tensor, Tensor]]:
    """Name, ours and the oracle's; a gradient layer by layer, each of which has its own largest number."""
    assert len(actual.outputs) == len(oracle.outputs)
    pairs = [(f"output {n}", *two) for n, two in enumerate(zip(actual.outputs, oracle.outputs, strict=True))]
    pairs += [(f"layer {n}", *two) for n, two in enumerate(zip(actual.hidden, oracle.hidden, strict=True))]
    assert (actual.temperature is None) == (oracle.temperature is None)
    if actual.temperature is not None and oracle.temperature is not None:
        pairs.append(("temperature", actual.temperature, oracle.temperature))
    for name, ours, exact in pairs:
        assert ours.shape == exact.shape, name
        assert exact.isfinite().all(), f"the oracle's {name}"
    return [(name, ours, exact.double()) for name, ours, exact in pairs]


def _largest(numbers: Tensor) -> float:
    return numbers.abs().max().item() if numbers.numel() else 0.0


def _rounding(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """Half a unit in the last place of each number."""
    info = torch.finfo(dtype)
    return (exact.abs() * info.eps).clamp_min(info.smallest_normal * info.eps) / 2


def _rms(error: Tensor) -> float:
    return error.square().mean().sqrt().item() if error.numel() else 0.0
