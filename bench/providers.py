"""What is compared: a name, whose semantics it has, and how it gets its loss for a case.

Adding an implementation is adding an entry.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

import carma_kernels as ck
from bench import published, vectorised
from bench.workloads import Case

Loss = Callable[[Sequence[Tensor]], Tensor]
"""L hidden states `[B, T, D]` to `gamma * L_MI + eta * L_Stability`."""

BASELINE = "published loops"


@dataclass(frozen=True)
class Provider:
    """An implementation of both CARMA losses.

    Attributes:
        name: as it is printed.
        semantics: "published", five sampled negatives and every sample's pairs on every sequence; "exact", each
            sample's own pairs against all tokens outside their word.
        prepare: builds what a collator would build, outside the measured time.
    """

    name: str
    semantics: Literal["published", "exact"]
    prepare: Callable[[Case], Loss]

    def __str__(self) -> str:
        return re.sub(r"\W+", "-", self.name)


def _published(case: Case) -> Loss:
    return lambda hidden_states: published.carma_loss(hidden_states, case.spans)


def _sampled(case: Case) -> Loss:
    return lambda hidden_states: vectorised.sampled_carma_loss(hidden_states, case.spans)


def _exact(case: Case) -> Loss:
    index = vectorised.index_anchors(case)
    return lambda hidden_states: vectorised.exact_carma_loss(hidden_states, index)


def _carma_loss(backend: str) -> Callable[[Case], Loss]:
    def prepare(case: Case) -> Loss:
        spans = _token_spans(case)
        return lambda hidden_states: ck.carma_loss(hidden_states, spans, backend=backend).loss

    return prepare


def _separate_losses(backend: str) -> Callable[[Case], Loss]:
    config = ck.CarmaConfig()

    def prepare(case: Case) -> Loss:
        spans = _token_spans(case)

        def loss(hidden_states: Sequence[Tensor]) -> Tensor:
            mi = ck.mi_loss(hidden_states, spans, backend=backend)
            stability = ck.stability_loss(hidden_states, backend=backend)
            return config.mi_weight * mi + config.stability_weight * stability

        return loss

    return prepare


def _token_spans(case: Case) -> ck.TokenSpans:
    _, T = case.attention_mask.shape
    spans = ck.TokenSpans.from_lists(case.spans, seq_len=T, attention_mask=case.attention_mask.cpu())
    return spans.to(case.attention_mask.device)


PROVIDERS = (
    Provider(BASELINE, "published", _published),
    Provider("eager Gram, sampled", "published", _sampled),
    Provider("eager Gram, exact", "exact", _exact),
    Provider("torch: carma_loss", "exact", _carma_loss("torch")),
    Provider("torch: mi_loss + stability_loss", "exact", _separate_losses("torch")),
)
