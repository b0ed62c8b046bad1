"""Every loss at the sizes of real models, in every dtype, against the torch backend in fp64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import carma_kernels as ck
from carma_kernels import CarmaConfig, TokenSpans
from tests.cases import BF16, FP16, FP32, Backend, Case
from tests.compare import assert_as_accurate_as_eager, assert_close_to_oracle, differentiate
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
Call = Callable[[Any, Any, Any, str], Tensor]
LOSSES: dict[str, Call] = {
    "mi": lambda h, spans, tau, backend: ck.mi_loss(h, spans, temperature=tau, backend=backend),
    "mi, dot": lambda h, spans, tau, backend: ck.mi_loss(h, spans, metric="dot", temperature=tau * 80, backend=backend),
    "mi, batch": lambda h, spans, tau, backend: ck.mi_loss(
        h, spans, negatives="batch", match_negatives=5, temperature=tau, backend=backend
    ),
    "mi, listed": lambda h, spans, tau, backend: ck.mi_loss(h, listed(spans), temperature=tau, backend=backend),
    "stability": lambda h, spans, _, backend: ck.stability_loss(h, mask=spans.attention_mask, backend=backend),
    "carma": lambda h, spans, tau, backend: (
        ck.carma_loss(h, spans, CarmaConfig(temperature=tau), mask=spans.attention_mask, backend=backend).loss
    ),
    "similarity": lambda h, spans, tau, backend: ck.pairwise_similarity(
        h, temperature=tau, mask=spans.attention_mask, backend=backend, out_dtype=torch.promote_types(h[0].dtype, FP32)
    ),
}


def listed(spans: TokenSpans) -> ck.PairIndex:
    return spans.sample_pairs(5, torch.Generator(spans.device).manual_seed(0))


def batch(shape: tuple[int, ...]) -> tuple[Tensor, TokenSpans]:
    """Tokens with something in common, as hidden states have; words of two to five tokens and padding."""
    L, B, T, D = shape
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(L, B, T, D, generator=generator, dtype=torch.float64)
    hidden += torch.randn(D, generator=generator, dtype=torch.float64)
    valid = torch.arange(T) < torch.linspace(max(T // 2, 8), T, B).long()[:, None]
    spans = [[(at, at + 2 + at % 4) for at in range(0, int(row.sum()) - 5, 7)] for row in valid]
    return hidden, TokenSpans.from_lists(spans, seq_len=T, attention_mask=valid)


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("loss", LOSSES)
def test_against_the_torch_backend(backend: Backend, loss: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    hidden, spans = batch(shape)
    hidden = hidden.to(dtype).double()
    there = spans.to(backend.device)
    case = Case(dtype=dtype, stacked=shape[0] != 3)

    def run(name: str, **exact: bool) -> Any:
        return differentiate(
            lambda h, tau: (LOSSES[loss](h, there, tau, name),), hidden, case, device=backend.device, **exact
        )

    assert_close_to_oracle(run(backend.name), run("torch", exact=True), backend.tolerance[dtype])


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
