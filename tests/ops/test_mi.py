"""mi_loss against csrc_ref: values, and the gradients of every layer and of the temperature."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import carma_kernels
import csrc_ref
from carma_kernels import PairIndex, TokenSpans
from carma_kernels.eager.layers import runs
from tests.cases import MI_CASES, Backend, Batch, Case, list_pairs, make_batch, on_backends
from tests.compare import assert_close_to_oracle, differentiate


def options(case: Case, batch: Batch) -> tuple[TokenSpans | PairIndex, dict[str, Any]]:
    """What the case asks of mi_loss, less the hidden states and the temperature."""
    asked: dict[str, Any] = {"metric": case.metric, "layers": case.layers, "match_negatives": case.match_negatives}
    if case.reduction is not None:
        asked["reduction"] = case.reduction
    if case.num_pairs is not None:
        asked["num_pairs"] = 77 if case.num_pairs == "int" else torch.tensor(77)
    if case.negatives.startswith("listed"):
        return list_pairs(batch, case.num_layers if case.negatives == "listed by layer" else None), asked
    return batch.spans, asked | {"negatives": case.negatives}


def compare(backend: Backend, case: Case) -> None:
    """Hold a case against the oracle, with NaN and inf in its padding."""
    batch = make_batch(case, poison=True)
    spans, asked = options(case, batch)

    there = spans.to(backend.device)
    here = {name: x.to(backend.device) if isinstance(x, Tensor) else x for name, x in asked.items()}

    def ours(hidden: Tensor | list[Tensor], temperature: Tensor | float) -> tuple[Tensor]:
        return (carma_kernels.mi_loss(hidden, there, temperature=temperature, backend=backend.name, **here),)

    def reference(hidden: Tensor | list[Tensor], temperature: Tensor | float) -> tuple[Tensor]:
        return (csrc_ref.mi_loss(hidden, spans, temperature=temperature, **asked),)

    oracle = differentiate(reference, batch.hidden, case, exact=True)
    actual = differentiate(ours, batch.hidden, case, device=backend.device)
    assert_close_to_oracle(actual, oracle, backend.tolerance[case.dtype])


@pytest.mark.parametrize(("backend", "case"), on_backends(MI_CASES))
def test_values_and_gradients(backend: Backend, case: Case) -> None:
    compare(backend, case)


@pytest.mark.parametrize(
    ("layers", "at_once", "expected"),
    [
        ((), 3, []),
        ((0, 1, 2, 3, 4), 2, [range(2), range(2, 4), range(4, 5)]),
        ((1, 2, 5, 6, 7), 9, [range(1, 3), range(5, 8)]),
        ((0, 2), 1, [range(1), range(2, 3)]),
    ],
)
def test_runs_of_layers(layers: tuple[int, ...], at_once: int, expected: list[range]) -> None:
    assert list(runs(layers, at_once)) == expected


def test_runs_end_at_bounds() -> None:
    assert list(runs(range(7), 3, bounds={0, 2, 9})) == [range(2), range(2, 5), range(5, 7)]
