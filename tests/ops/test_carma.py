"""carma_loss against csrc_ref, and against the two losses that it adds up."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import carma_kernels
import csrc_ref
from tests.cases import BF16, FP16, FP32, FP64, Backend, Case, in_dtypes, list_pairs, make_batch, on_backends
from tests.compare import assert_close_to_oracle, differentiate, upstream_gradients

# how the two ranges of layers can lie: all; one within the other; overlapping; apart, with a layer in neither; a
# single layer, which has no step
RANGES = [(None, None), ((1, 1), (0, 3)), ((0, 2), (1, 4)), ((4, 4), (0, 2)), ((0, 4), (2, 2))]
CASES = [
    *in_dtypes(
        [
            Case(L=5, masked=True),
            Case(L=5, stacked=False),
            Case(L=5, D=64, stacked=False),  # several layers at once
            Case(L=5, negatives="batch", metric="dot", temperature=2.0, match_negatives=5, num_pairs="int"),
            Case(L=5, negatives="listed", num_pairs="tensor", masked=True),
            Case(L=5, negatives="listed by layer", stacked=False),
            Case(L=5, drawing="dense", number=True),
            Case(L=5, drawing="wordless", masked=True),
        ],
        FP64,
        FP32,
    ),
    Case(L=5, dtype=FP16, masked=True),
    Case(L=5, dtype=BF16, masked=True),
    Case(L=5, dtype=BF16, stacked=False, masked=True, pad="left"),
    Case(L=5, D=64, dtype=BF16, masked=True),
]


def config_options(case: Case, **ranges: tuple[int, int] | None) -> dict[str, Any]:
    return {
        "mi_weight": 0.7,
        "stability_weight": 0.3,
        "metric": case.metric,
        "negatives": case.negatives if case.negatives == "batch" else "sequence",
        "match_negatives": case.match_negatives,
        "eps": 1e-3,
        **ranges,
    }


@pytest.mark.parametrize(("mi_layers", "stability_layers"), RANGES)
@pytest.mark.parametrize(("backend", "case"), on_backends(CASES))
def test_values_and_gradients(
    backend: Backend, case: Case, mi_layers: tuple[int, int] | None, stability_layers: tuple[int, int] | None
) -> None:
    """All three losses at once, with three upstream gradients."""
    batch = make_batch(case, poison=case.masked)
    spans: Any = batch.spans
    if case.negatives.startswith("listed"):
        by_layer = replace(case, layers=mi_layers).num_layers if case.negatives == "listed by layer" else None
        spans = list_pairs(batch, by_layer)
    asked = config_options(case, mi_layers=mi_layers, stability_layers=stability_layers)
    count = {None: None, "int": 77, "tensor": torch.tensor(77)}[case.num_pairs]
    # the valid tokens are those that the spans know; pairs that are listed know none
    valid = batch.valid if spans is not batch.spans else None
    mask = valid if case.masked else "all"

    def ours(hidden: Tensor | list[Tensor], temperature: Tensor | float) -> tuple[Tensor, ...]:
        config = carma_kernels.CarmaConfig(temperature=temperature, **asked)
        out = carma_kernels.carma_loss(
            hidden,
            spans.to(backend.device),
            config,
            mask=mask.to(backend.device) if isinstance(mask, Tensor) else mask,
            num_pairs=count.to(backend.device) if isinstance(count, Tensor) else count,
            backend=backend.name,
        )
        assert out.num_pairs == spans.num_pairs
        assert not out.mi_per_layer.requires_grad
        assert not out.stability_per_layer.requires_grad
        return out[:5]

    def reference(hidden: Tensor | list[Tensor], temperature: Tensor | float) -> tuple[Tensor, ...]:
        config = csrc_ref.CarmaConfig(temperature=temperature, **asked)
        return csrc_ref.carma_loss(hidden, spans, config, mask=mask, num_pairs=count)[:5]

    oracle = differentiate(reference, batch.hidden, case, exact=True)
    actual = differentiate(ours, batch.hidden, case, device=backend.device)
    assert_close_to_oracle(actual, oracle, backend.tolerance[case.dtype])


@pytest.mark.parametrize(("mi_layers", "stability_layers"), RANGES)
def test_it_is_the_sum_of_the_separate_losses(
    backend: Backend, mi_layers: tuple[int, int] | None, stability_layers: tuple[int, int] | None
) -> None:
    case = Case(L=5, masked=True, dtype=FP32)
    batch = make_batch(case, poison=True)
    spans, mask = batch.spans.to(backend.device), batch.valid.to(backend.device)
    hidden = batch.hidden.to(backend.device, FP32).requires_grad_()
    config = carma_kernels.CarmaConfig(mi_layers=mi_layers, stability_layers=stability_layers)
    out = carma_kernels.carma_loss(hidden, spans, config, mask=mask, backend=backend.name)
    mi = carma_kernels.mi_loss(hidden, spans, layers=mi_layers, backend=backend.name)
    stability = carma_kernels.stability_loss(hidden, layers=stability_layers, mask=mask, backend=backend.name)
    for together, apart in (
        (out.mi, mi),
        (out.stability, stability),
        (out.loss, 0.5 * mi + 0.2 * stability),
        (out.mi_per_layer.mean(), mi),
        (out.stability_per_layer.sum(), stability),
    ):
        torch.testing.assert_close(together, apart, rtol=1e-6, atol=0)
    upstream = upstream_gradients([out.loss])
    (together,) = torch.autograd.grad(out.loss, hidden, upstream)
    (apart,) = torch.autograd.grad(0.5 * mi + 0.2 * stability, hidden, upstream)
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-6 * apart.abs().max().item())
