"""No figure without a correct result: every measured case is first held against fp64.

A part of the workload, two layers of two sequences, is compared with `csrc_ref`, whose loops would take minutes for a
whole one. The whole workload is compared with the eager Gram implementation of the same semantics in fp64, which passes
the first check itself.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

import csrc_ref
from bench import published, vectorised
from bench.providers import Loss, Provider
from bench.workloads import Case, Spans, Workload

NUM_NEGATIVES = 5
"""K of the published loss."""

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Of a result by the hidden states' dtype, relative: to the loss, and to the largest element of the gradient.

The halves' is that of similarities rounded to the dtype and divided by tau, as plain PyTorch has them: enough to see a
wrong formula. The package's own, stricter rule is held by its tests.
"""


class Result(NamedTuple):
    """What a loss computes."""

    loss: Tensor  # 0-d
    gradients: tuple[Tensor, ...] | None  # L times [B, T, D]; None for a forward alone


def run(loss: Loss, hidden_states: Sequence[Tensor], *, backward: bool) -> Result:
    """The loss, and with `backward` its gradients; sampled negatives depend on the state of `random`."""
    value = loss(hidden_states)
    return Result(value.detach(), torch.autograd.grad(value, hidden_states) if backward else None)


def check_part(provider: Provider, workload: Workload, device: torch.device, dtype: torch.dtype) -> None:
    """Hold a provider against the oracle on a part of the workload.

    Raises:
        AssertionError: they differ by more than the tolerance.
    """
    part = replace(workload, L=min(workload.L, 2), B=min(workload.B, 2), T=min(workload.T, 256))
    case = part.build(device=device, dtype=dtype, values=dtype)
    random.seed(0)
    result = run(provider.prepare(case), case.hidden_states, backward=True)
    random.seed(0)
    exact = part.build(dtype=torch.float64, values=dtype)
    expected = run(oracle(exact, provider.semantics), exact.hidden_states, backward=True)
    assert_close(result, expected, TOLERANCE[dtype])


def check_whole(
    result: Result, provider: Provider, workload: Workload, device: torch.device, dtype: torch.dtype
) -> None:
    """Hold a result that was computed after `random.seed(0)` against fp64 on the whole workload.

    Raises:
        AssertionError: they differ by more than the tolerance.
    """
    assert_close(result, _whole_in_fp64(provider.semantics, workload, device, dtype), TOLERANCE[dtype])


def assert_close(result: Result, expected: Result, tolerance: float) -> None:
    """Loss and gradients within a relative tolerance."""
    error = (result.loss.to(expected.loss) - expected.loss).abs() / expected.loss.abs()
    assert error <= tolerance, f"loss {result.loss}, expected {expected.loss}: off by {error:.1e}"
    if result.gradients is None:
        return
    assert expected.gradients is not None
    for layer, (got, want) in enumerate(zip(result.gradients, expected.gradients, strict=True)):
        error = (got.to(want) - want).abs().max() / want.abs().max()
        assert error <= tolerance, f"gradient of layer {layer} off by {error:.1e}"


@lru_cache(maxsize=1)  # fp64 gradients of all layers
def _whole_in_fp64(semantics: str, workload: Workload, device: torch.device, dtype: torch.dtype) -> Result:
    case = workload.build(device=device, dtype=torch.float64, values=dtype)
    random.seed(0)
    if semantics == "published":
        return run(lambda h: vectorised.sampled_carma_loss(h, case.spans), case.hidden_states, backward=True)
    return exact_by_layer(case)


def exact_by_layer(case: Case) -> Result:
    """`vectorised.exact_carma_loss`, a layer's Gram matrix at a time: all of them in fp64 would not fit into memory."""
    index = vectorised.index_anchors(case)
    stability = published.STABILITY_WEIGHT * vectorised.stability_loss(case.hidden_states)
    gradients = list(torch.autograd.grad(stability, case.hidden_states))
    loss = stability.detach()
    for layer, h in enumerate(case.hidden_states):
        mi = published.MI_WEIGHT / len(gradients) * vectorised.exact_mi_loss([h], index)
        gradients[layer] += torch.autograd.grad(mi, h)[0]
        loss += mi.detach()
    return Result(loss, tuple(gradients))


class ExplicitPairs(NamedTuple):
    """Pairs as `csrc_ref` takes them."""

    anchor: Tensor  # [P] flat token index b*T + t
    positive: Tensor  # [P]
    negatives: Tensor  # [L, P, K]


@dataclass(frozen=True)
class WordLists:
    """Words as `csrc_ref` takes them."""

    spans: Spans
    attention_mask: Tensor  # [B, T] bool

    def to_lists(self) -> Spans:
        return self.spans


def oracle(case: Case, semantics: str) -> Loss:
    """`csrc_ref` on the pairs of these semantics; published ones are drawn from `random` when it is called."""

    def loss(hidden_states: Sequence[Tensor]) -> Tensor:
        pairs = draw_pairs(case) if semantics == "published" else WordLists(case.spans, case.attention_mask)
        return csrc_ref.carma_loss(hidden_states, pairs, mask="all").loss

    return loss


def draw_pairs(case: Case) -> ExplicitPairs:
    """The pairs and draws of the published loss, as its authors' code makes them.

    Pairs of every sample's words but its last, on every sequence; for each layer, sequence and pair, K positions among
    those outside the word, `floor(u * n)` for `u` from `random.random()`.
    """
    B, T = case.attention_mask.shape
    words = [word for sample in case.spans for word in sample[:-1]]
    pairs = [
        (b, i, j, [t for t in range(T) if t not in range(start, end)])
        for b in range(B)
        for start, end in words
        for i in range(start, end)
        for j in range(i + 1, end)
    ]

    def draw(b: int, outside: list[int]) -> list[int]:
        return [b * T + outside[int(random.random() * len(outside))] for _ in range(NUM_NEGATIVES)]

    negatives = [[draw(b, outside) for b, _, _, outside in pairs] for _ in case.hidden_states]
    return ExplicitPairs(
        torch.tensor([b * T + i for b, i, _, _ in pairs]),
        torch.tensor([b * T + j for b, _, j, _ in pairs]),
        torch.tensor(negatives),
    )
