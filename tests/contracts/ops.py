"""Every loss as one call of the same form, so that a contract is written once and holds for all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

import carma_kernels as ck
from tests.cases import Backend, Case, list_pairs, make_batch
from tests.compare import upstream_gradients

HiddenStates = Tensor | Sequence[Tensor]


class Inputs(NamedTuple):
    """What the losses need beside the hidden states, on the backend's device."""

    spans: ck.TokenSpans
    pairs: ck.PairIndex
    mask: Tensor  # [B, T] bool
    options: dict[str, Any]  # backend=


@dataclass(frozen=True)
class Op:
    name: str
    call: Callable[[HiddenStates, Inputs, Tensor | float], tuple[Tensor, ...]]
    has_temperature: bool = True
    reads_padding: bool = False

    def __str__(self) -> str:
        return self.name


def _mi(negatives: str) -> Callable[[HiddenStates, Inputs, Tensor | float], tuple[Tensor, ...]]:
    def call(hidden: HiddenStates, given: Inputs, tau: Tensor | float) -> tuple[Tensor, ...]:
        if negatives == "listed":
            return (ck.mi_loss(hidden, given.pairs, temperature=tau, reduction="none", **given.options),)
        asked = {"negatives": negatives, "match_negatives": 5}
        return (ck.mi_loss(hidden, given.spans, temperature=tau, reduction="none", **asked, **given.options),)

    return call


def _stability(masked: bool) -> Callable[[HiddenStates, Inputs, Tensor | float], tuple[Tensor, ...]]:
    def call(hidden: HiddenStates, given: Inputs, _: Tensor | float) -> tuple[Tensor, ...]:
        mask = given.mask if masked else None
        return (ck.stability_loss(hidden, mask=mask, reduction="none", **given.options),)

    return call


def _similarity(hidden: HiddenStates, given: Inputs, tau: Tensor | float) -> tuple[Tensor, ...]:
    return (ck.pairwise_similarity(hidden, temperature=tau, mask=given.mask, **given.options),)


def _carma(hidden: HiddenStates, given: Inputs, tau: Tensor | float) -> tuple[Tensor, ...]:
    out = ck.carma_loss(hidden, given.spans, ck.CarmaConfig(temperature=tau), **given.options)
    return out.loss, out.mi, out.stability


OPS = [
    Op("mi of sequences", _mi("sequence")),
    Op("mi of batches", _mi("batch")),
    Op("mi of listed pairs", _mi("listed")),
    Op("stability", _stability(masked=False), has_temperature=False, reads_padding=True),
    Op("stability of valid tokens", _stability(masked=True), has_temperature=False),
    Op("similarity", _similarity),
    Op("carma", _carma),
]


@dataclass(frozen=True)
class Problem:
    """An op, its inputs, and the hidden states as stacked leaf or as list of leaves."""

    op: Op
    given: Inputs
    hidden: HiddenStates
    temperature: Tensor

    @property
    def leaves(self) -> list[Tensor]:
        """The hidden states and the temperature, as far as they have a gradient."""
        hidden = [self.hidden] if isinstance(self.hidden, Tensor) else list(self.hidden)
        leaves = [*hidden, self.temperature] if self.op.has_temperature else hidden
        return [leaf for leaf in leaves if leaf.requires_grad]

    def forward(self) -> tuple[Tensor, ...]:
        return self.op.call(self.hidden, self.given, self.temperature)

    def gradients(self, outputs: tuple[Tensor, ...] | None = None, **options: Any) -> tuple[Tensor, ...]:
        """Of every leaf, from upstream gradients that differ everywhere."""
        outputs = self.forward() if outputs is None else outputs
        return torch.autograd.grad(outputs, self.leaves, upstream_gradients(outputs), **options)

    def with_hidden(self, hidden: HiddenStates) -> Problem:
        return replace(self, hidden=hidden)


def make_problem(
    op: Op,
    backend: Backend,
    case: Case = Case(L=3),  # noqa: B008 (frozen)
    *,
    dtype: torch.dtype | None = None,
) -> Problem:
    """The case's batch with finite numbers everywhere.

    Args:
        op: the loss.
        backend: where it runs.
        case: the batch; its dtype counts for nothing.
        dtype: of the hidden states; None for the backend's sharpest.
    """
    dtype = dtype or backend.sharpest
    batch = make_batch(replace(case, dtype=dtype))
    hidden = batch.hidden.to(backend.device, dtype)
    tau = torch.tensor(case.temperature, dtype=torch.promote_types(dtype, torch.float32), device=backend.device)
    given = Inputs(
        batch.spans.to(backend.device),
        list_pairs(batch).to(backend.device),
        batch.valid.to(backend.device),
        {"backend": backend.name},
    )
    leaves: HiddenStates = hidden.requires_grad_() if case.stacked else [h.clone().requires_grad_() for h in hidden]
    return Problem(op, given, leaves, tau.requires_grad_())


def same_bits(x: Tensor, y: Tensor) -> bool:
    """Equal to the last bit, in shape and in dtype, whatever NaN they hold."""
    return x.dtype == y.dtype and x.shape == y.shape and bool((bits(x) == bits(y)).all())


def bits(x: Tensor) -> Tensor:
    """A copy of the bytes."""
    return x.detach().clone(memory_format=torch.contiguous_format).view(torch.uint8) if x.dim() else bits(x[None])
