"""pairwise_similarity against csrc_ref: every entry, and the gradients of every layer and of the temperature."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import carma_kernels
import csrc_ref
from tests.cases import BF16, FP16, FP32, FP64, SIMILARITY_CASES, Backend, Case, make_batch, on_backends
from tests.compare import assert_close_to_oracle, differentiate


@pytest.mark.parametrize(("backend", "case"), on_backends(SIMILARITY_CASES))
def test_values_and_gradients(backend: Backend, case: Case) -> None:
    batch = make_batch(case, poison=case.masked)
    asked: dict[str, Any] = {"metric": case.metric, "layers": case.layers}

    def ours(hidden: Tensor | list[Tensor], temperature: Tensor | float) -> tuple[Tensor]:
        return (
            carma_kernels.pairwise_similarity(
                hidden,
                temperature=temperature,
                mask=batch.valid.to(backend.device) if case.masked else None,
                backend=backend.name,
                **asked,
            ),
        )

    def reference(hidden: Tensor | list[Tensor], temperature: Tensor | float) -> tuple[Tensor]:
        mask = batch.valid if case.masked else None
        return (csrc_ref.pairwise_similarity(hidden, temperature=temperature, mask=mask, out_dtype=FP64, **asked),)

    oracle = differentiate(reference, batch.hidden, case, exact=True)
    actual = differentiate(ours, batch.hidden, case, device=backend.device)
    assert_close_to_oracle(actual, oracle, backend.tolerance[case.dtype])


@pytest.mark.parametrize("out_dtype", [None, FP16, BF16, FP32])
@pytest.mark.parametrize("dtype", [FP16, BF16, FP32])
def test_out_dtype(backend: Backend, dtype: torch.dtype, out_dtype: torch.dtype | None) -> None:
    """The matrix is rounded once, to the dtype that was asked for."""
    case = Case(dtype=dtype, masked=True)
    batch = make_batch(case, poison=True)
    mask = batch.valid.to(backend.device)
    hidden = batch.hidden.to(backend.device, dtype)
    single = carma_kernels.pairwise_similarity(hidden, mask=mask, backend=backend.name)
    result = carma_kernels.pairwise_similarity(hidden, mask=mask, out_dtype=out_dtype, backend=backend.name)
    assert result.dtype == (out_dtype or FP32)
    assert torch.equal(result, single.to(result.dtype))


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf])
def test_what_arrives_for_masked_entries_is_not_read(backend: Backend, garbage: float) -> None:
    batch = make_batch(Case(masked=True), poison=True)
    hidden = batch.hidden.to(backend.device, FP32).requires_grad_()
    temperature = torch.tensor(1.0, device=backend.device, requires_grad=True)
    mask = batch.valid.to(backend.device)
    similarity = carma_kernels.pairwise_similarity(hidden, temperature=temperature, mask=mask, backend=backend.name)
    taking_part = mask[:, :, None] & mask[:, None]  # [B, T, T]
    gradients = []
    for masked in (0.0, garbage):
        upstream = torch.where(taking_part, 0.5, masked).expand_as(similarity)
        gradients.append(torch.autograd.grad(similarity, (hidden, temperature), upstream, retain_graph=True))
    for clean, garbled in zip(*gradients, strict=True):
        assert clean.isfinite().all()
        assert torch.equal(clean, garbled)
