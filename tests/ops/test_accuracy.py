"""In half precision: the error against fp64 is never larger than that of eager PyTorch, at any sharpness."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import carma_kernels
import csrc_ref
from carma_kernels import TokenSpans
from tests.cases import BACKENDS, BF16, FP16, FP64, Backend, Case, make_batch
from tests.compare import Loss, Result, assert_as_accurate_as_eager, assert_close_to_oracle, differentiate
from tests.ops import eager

HALVES = pytest.mark.parametrize(
    ("backend", "dtype"),
    [(backend, dtype) for backend in BACKENDS for dtype in (FP16, BF16) if dtype in backend.tolerance],
    ids=str,
)


def confident(p: float, temperature: float, *, layers: int = 2, width: int = 256) -> tuple[Tensor, TokenSpans]:
    """Unit vectors `[L, B, T, D]`: a word of two tokens, whose positive has probability `p` in its softmax, and others.

    The others' similarities with the anchor settle `z`; the positive's angle to the anchor is then chosen.
    """
    generator = torch.Generator().manual_seed(3)
    h = torch.randn(layers, 2, 14, width, generator=generator, dtype=FP64)
    h = h / h.norm(dim=-1, keepdim=True)
    anchor = h[:, :, :1]
    z = (h[:, :, 2:] @ anchor.mT / temperature).logsumexp(-2)  # [L, B, 1]
    cosine = temperature * (z + math.log(p / (1 - p)))
    assert (cosine.abs() < 1).all(), "no such vector"
    across = h[:, :, 1] - (h[:, :, 1] * anchor[:, :, 0]).sum(-1, keepdim=True) * anchor[:, :, 0]
    across = across / across.norm(dim=-1, keepdim=True)
    h[:, :, 1] = cosine * anchor[:, :, 0] + (1 - cosine.square()).sqrt() * across
    return h, TokenSpans.from_lists([[(0, 2)]] * 2, seq_len=14)


def judge(backend: Backend, case: Case, hidden: Tensor, ours: Loss, yardstick: Loss, reference: Loss) -> Result:
    """Hold a loss to the rule; return the oracle's result."""
    oracle = differentiate(reference, hidden, case, exact=True)
    same_loss = differentiate(yardstick, hidden, case, exact=True)
    assert_close_to_oracle(same_loss, oracle, 1e-9)
    actual = differentiate(ours, hidden, case, device=backend.device)
    assert_as_accurate_as_eager(actual, differentiate(yardstick, hidden, case), oracle)
    return oracle


def judge_mi(backend: Backend, case: Case, hidden: Tensor, spans: TokenSpans) -> Result:
    asked = {"metric": case.metric, "negatives": case.negatives}
    there = spans.to(backend.device)
    return judge(
        backend,
        case,
        hidden,
        lambda h, tau: (carma_kernels.mi_loss(h, there, temperature=tau, backend=backend.name, **asked),),
        lambda h, tau: (eager.mi_loss(h, spans, temperature=tau, **asked),),
        lambda h, tau: (csrc_ref.mi_loss(h, spans, temperature=tau, **asked),),
    )


@HALVES
@pytest.mark.parametrize("temperature", [0.1, 0.01])
@pytest.mark.parametrize("p", [0.5, 0.9, 0.99, 0.999])
def test_mi_of_confident_positives(backend: Backend, dtype: torch.dtype, p: float, temperature: float) -> None:
    """A softmax rounded to half precision before the 1 is taken off has lost the gradient of a positive at 0.999."""
    hidden, spans = confident(p, temperature)
    oracle = judge_mi(backend, Case(dtype=dtype, temperature=temperature), hidden, spans)
    assert oracle.outputs[0].item() == pytest.approx(-math.log(p), rel=0.2)  # also after rounding the vectors


@HALVES
@pytest.mark.parametrize(
    "case",
    [
        Case(D=64),
        Case(D=64, negatives="batch", temperature=0.01),
        Case(D=64, metric="dot", temperature=8.0),
        Case(D=64, drawing="dense", temperature=1.0),
        Case(D=64, scale=300.0),
        Case(D=64, metric="dot", scale=30.0),
    ],
    ids=str,
)
def test_mi(backend: Backend, dtype: torch.dtype, case: Case) -> None:
    batch = make_batch(replace(case, dtype=dtype))
    judge_mi(backend, replace(case, dtype=dtype), batch.hidden, batch.spans)


@HALVES
@pytest.mark.parametrize("step", [1.0, 0.01])
def test_stability(backend: Backend, dtype: torch.dtype, step: float) -> None:
    """Also of layers that differ by little more than their rounding."""
    case = Case(L=4, D=64, dtype=dtype)
    noise = make_batch(case).hidden
    judge(
        backend,
        case,
        noise[:1] + step * noise,
        lambda h, _: (carma_kernels.stability_loss(h, backend=backend.name),),
        lambda h, _: (eager.stability_loss(h),),
        lambda h, _: (csrc_ref.stability_loss(h),),
    )


@HALVES
@pytest.mark.parametrize(("metric", "temperature"), [("cosine", 0.01), ("dot", 8.0)])
def test_similarity(backend: Backend, dtype: torch.dtype, metric: str, temperature: float) -> None:
    case = Case(D=64, dtype=dtype, temperature=temperature)
    judge(
        backend,
        case,
        make_batch(case).hidden,
        lambda h, tau: (carma_kernels.pairwise_similarity(h, metric=metric, temperature=tau, backend=backend.name),),
        lambda h, tau: (eager.pairwise_similarity(h, metric=metric, temperature=tau),),
        lambda h, tau: (csrc_ref.pairwise_similarity(h, metric=metric, temperature=tau, out_dtype=FP64),),
    )
