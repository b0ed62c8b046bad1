"""Every loss at the sizes of real models, in every dtype, against the torch backend in fp64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import carma_kernels as ck
from tests.cases import BF16, FP16, FP32, Backend, Case
from tests.compare import Result, assert_as_accurate_as_eager, assert_close_to_oracle, differentiate
from tests.gpu.losses import LOSSES, batch
from tests.ops import eager

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("users_defaults")]

# L, B, T, D: both paths, their tiles' borders, widths of the paper's models
SHAPES = [
    (2, 16, 58, 768),
    (3, 4, 16, 640),
    (2, 4, 17, 2048),
    (3, 4, 64, 1024),
    (2, 4, 65, 768),
    (2, 3, 128, 2048),
    (3, 3, 129, 768),
    (2, 2, 200, 1600),
    (2, 2, 1024, 1024),
    (1, 1, 3000, 4096),
    (2, 2, 33, 33),
]


def judge(backend: Backend, loss: str, shape: tuple[int, ...], case: Case, tolerance: float) -> None:
    """Hold a loss against the torch backend's, which gets the same numbers in fp64."""
    hidden, spans = batch(shape)
    hidden = hidden.to(case.dtype).double()
    there = spans.to(backend.device)

    def run(name: str, **exact: bool) -> Result:
        return differentiate(
            lambda h, tau: (LOSSES[loss](h, there, tau, name),), hidden, case, device=backend.device, **exact
        )

    assert_close_to_oracle(run(backend.name), run("torch", exact=True), tolerance)


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("loss", LOSSES)
def test_against_the_torch_backend(backend: Backend, loss: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    judge(backend, loss, shape, Case(dtype=dtype, stacked=shape[0] != 3), backend.tolerance[dtype])


@pytest.mark.parametrize("loss", ["mi", "mi, batch", "carma"])
@pytest.mark.parametrize("shape", [(1, 1, 3000, 4096), (2, 2, 128, 4096)], ids=str)
def test_sharp_in_fp32(backend: Backend, loss: str, shape: tuple[int, ...]) -> None:
    """At tau 0.01 a score is 100, of which fp32 keeps 4e-6: sums of 4096 products put the gradient off by 1.2e-5."""
    judge(backend, loss, shape, Case(dtype=FP32, temperature=0.01), tolerance=4e-5)


@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
@pytest.mark.parametrize("temperature", [0.1, 0.01])
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[1] * shape[2] <= 1024], ids=str)
def test_as_accurate_as_eager(backend: Backend, shape: tuple[int, ...], temperature: float, dtype: torch.dtype) -> None:
    """Sharp positives among them: the tokens of a word are alike."""
    hidden, spans = batch(shape)
    hidden[:, :, 1:] += 2 * hidden[:, :, :-1]
    hidden = hidden.to(dtype).double()
    there = spans.to(backend.device)
    case = Case(dtype=dtype, temperature=temperature)

    def ours(name: str) -> Callable[..., tuple[Tensor, ...]]:
        return lambda h, tau: (ck.mi_loss(h, there, temperature=tau, backend=name),)

    def theirs(h: Any, tau: Any) -> tuple[Tensor, ...]:
        return (eager.mi_loss(h, spans, temperature=tau, negatives="sequence", metric="cosine"),)

    assert_as_accurate_as_eager(
        differentiate(ours(backend.name), hidden, case, device=backend.device),
        differentiate(theirs, hidden, case),
        differentiate(ours("torch"), hidden, case, device=backend.device, exact=True),
    )
