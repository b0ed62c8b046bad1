"""stability_loss against csrc_ref: values, and the gradient of every layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import carma_kernels
import csrc_ref
from tests.cases import FP64, STABILITY_CASES, Backend, Case, make_batch, on_backends
from tests.compare import assert_close_to_oracle, differentiate


def compare(backend: Backend, case: Case, hidden: Tensor, **asked: Any) -> Tensor:
    """Hold a call against the oracle's; return the gradient."""

    def ours(hidden: Tensor | list[Tensor], _: Tensor | float) -> tuple[Tensor]:
        here = {name: x.to(backend.device) if isinstance(x, Tensor) else x for name, x in asked.items()}
        return (carma_kernels.stability_loss(hidden, backend=backend.name, **here),)

    def reference(hidden: Tensor | list[Tensor], _: Tensor | float) -> tuple[Tensor]:
        return (csrc_ref.stability_loss(hidden, **asked),)

    actual = differentiate(ours, hidden, case, device=backend.device)
    oracle = differentiate(reference, hidden, case, exact=True)
    assert_close_to_oracle(actual, oracle, backend.tolerance[case.dtype])
    return actual.hidden


@pytest.mark.parametrize(("backend", "case"), on_backends(STABILITY_CASES))
def test_values_and_gradients(backend: Backend, case: Case) -> None:
    batch = make_batch(case, poison=case.masked)
    asked: dict[str, Any] = {"layers": case.layers}
    if case.reduction is not None:
        asked["reduction"] = case.reduction
    if case.masked:
        asked["mask"] = batch.valid
    compare(backend, case, batch.hidden, **asked)


@pytest.mark.parametrize("eps", [1e-3, 10.0])
def test_eps(backend: Backend, eps: float) -> None:
    case = Case(L=3, dtype=backend.sharpest)
    compare(backend, case, make_batch(case).hidden, eps=eps, reduction="none")


def test_nothing_but_zeros(backend: Backend) -> None:
    """Only eps stands between 0 / 0 and a number."""
    case = Case(L=3, dtype=backend.sharpest)
    gradient = compare(backend, case, torch.zeros_like(make_batch(case).hidden), reduction="none")
    assert (gradient == 0).all()


@pytest.mark.parametrize("kind", [torch.bool, torch.int64, torch.uint8])
def test_kinds_of_masks(backend: Backend, kind: torch.dtype) -> None:
    case = Case(L=3, masked=True, dtype=backend.sharpest)
    batch = make_batch(case, poison=True)
    compare(backend, case, batch.hidden, mask=batch.valid.to(kind) * 1)


@pytest.mark.parametrize("step", [1e-2, 1e-5, 0.0])
def test_layers_that_hardly_differ(backend: Backend, step: float) -> None:
    """As those of deep models: the gradient is that of the small difference, not a difference of large gradients."""
    case = Case(L=3, D=32, dtype=torch.float32)
    hidden = make_batch(case).hidden[:1].repeat(3, 1, 1, 1)
    hidden[1:] *= 1 + step * torch.randn(2, *hidden.shape[1:], generator=torch.Generator().manual_seed(0), dtype=FP64)
    gradient = compare(backend, case, hidden, reduction="none")
    assert (gradient != 0).any() == (step > 0)
