"""What is compared: a name, whose semantics it has, and how it gets its loss for a case.

Adding an implementation is adding an entry.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Literal

import torch
from torch import Tensor

import carma_kernels as ck
from bench import published, vectorised
from bench.workloads import Case, Workload, token_spans
from carma_kernels.integrations.upstream import MILoss, StabilityLoss

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
        finishes: whether it gets through a workload in minutes, and without filling the memory.
        compiles: the first call takes seconds: it is timed apart.
        grows: one of the curves of what a cost grows with.
        package: what it imports besides the project's own packages; it is left out where that is not installed.
        gpu_only: it runs on a GPU alone.
    """

    name: str
    semantics: Literal["published", "exact"]
    prepare: Callable[[Case], Loss]
    finishes: Callable[[Workload], bool] = lambda _: True
    compiles: bool = False
    grows: bool = False
    package: str | None = None
    gpu_only: bool = False

    @property
    def is_installed(self) -> bool:
        """Whether its package can be imported."""
        return self.package is None or importlib.util.find_spec(self.package) is not None

    def runs(self, workload: Workload, device: torch.device) -> bool:
        """Whether it is measured on a workload on a device."""
        if self.name.startswith("triton") and device.type == "cpu":  # a rehearsal
            return workload.name == "tiny" and os.environ.get("TRITON_INTERPRET") == "1"
        if not self.is_installed or (self.gpu_only and device.type == "cpu"):
            return False
        if workload.name == "tiny" and self.compiles:  # nothing to see, at seconds each
            return False
        if workload.name == "growth" and not self.grows:
            return False
        return self.finishes(workload)

    def __str__(self) -> str:
        return re.sub(r"\W+", "-", self.name)


def _published(case: Case) -> Loss:
    return lambda hidden_states: published.carma_loss(hidden_states, case.spans)


def _sampled(case: Case) -> Loss:
    return lambda hidden_states: vectorised.sampled_carma_loss(hidden_states, case.spans)


def _drop_in(case: Case) -> Loss:
    words = [[SimpleNamespace(start_idx=start, end_idx=end) for start, end in sample] for sample in case.spans]
    mi, stability = MILoss(end_layer=None), StabilityLoss(end_layer=None)

    def loss(hidden_states: Sequence[Tensor]) -> Tensor:
        cache = {f"transformer.h.{layer}": (h,) for layer, h in enumerate(hidden_states)}
        of_mi, of_stability = mi.calculate_mi_loss(cache, words), stability.calculate_loss(cache)
        return published.MI_WEIGHT * of_mi + published.STABILITY_WEIGHT * of_stability

    return loss


def _exact(case: Case) -> Loss:
    index = vectorised.index_anchors(case)
    return lambda hidden_states: vectorised.exact_carma_loss(hidden_states, index)


def compiled_peer(mode: str | None = None, backend: str = "inductor") -> Callable[[Case], Loss]:
    """By torch.compile, each shape for itself: a dynamic one would cost the compiled code its speed."""

    def prepare(case: Case) -> Loss:
        index = vectorised.index_anchors(case)
        compiled = torch.compile(vectorised.exact_carma_loss, dynamic=False, mode=mode, backend=backend)

        def loss(hidden_states: Sequence[Tensor]) -> Tensor:
            if mode == "reduce-overhead":  # its graphs write where the step before has left its results
                torch.compiler.cudagraph_mark_step_begin()
            return compiled(hidden_states, index)

        return loss

    return prepare


def _compiled(case: Case) -> Loss:
    torch.compiler.reset()  # it gives up after a few shapes
    return compiled_peer()(case)


def _metric_learning(case: Case) -> Loss:
    return vectorised.metric_learning_carma_loss(case)


def _inf_cl(case: Case) -> Loss:
    return vectorised.inf_cl_carma_loss(case)


def _carma_loss(backend: str) -> Callable[[Case], Loss]:
    def prepare(case: Case) -> Loss:
        spans = token_spans(case)
        # over all tokens, padding included, as the others
        return lambda hidden_states: ck.carma_loss(hidden_states, spans, mask="all", backend=backend).loss

    return prepare


def _separate_losses(backend: str) -> Callable[[Case], Loss]:
    config = ck.CarmaConfig()

    def prepare(case: Case) -> Loss:
        spans = token_spans(case)

        def loss(hidden_states: Sequence[Tensor]) -> Tensor:
            mi = ck.mi_loss(hidden_states, spans, backend=backend)
            stability = ck.stability_loss(hidden_states, backend=backend)
            return config.mi_weight * mi + config.stability_weight * stability

        return loss

    return prepare


def _evaluations(workload: Workload) -> int:
    """Pairs that the published loss evaluates: every sample's on every sequence, in each layer."""
    pairs = sum(n * (n - 1) // 2 for words in workload.spans() for start, end in words[:-1] if (n := end - start) > 1)
    return workload.L * workload.B * pairs


def _published_finishes(workload: Workload) -> bool:
    """About a millisecond an evaluation: a minute for the paper's batch, some seconds elsewhere."""
    return _evaluations(workload) <= (60_000 if workload.name == "paper" else 5_000)


def _gram_fits(workload: Workload) -> bool:
    """A few [B, T, T] matrices a layer, kept for the backward."""
    return 4 * 4 * workload.L * workload.B * workload.T**2 <= 8e9


def _is_one_long_sequence(workload: Workload) -> bool:
    """It knows no sequences, and loses digits where an anchor's own word is most of what it sums."""
    return workload.B == 1 and workload.T >= 1024


def _every_pair_with_every_negative_fits(workload: Workload) -> bool:
    """It makes a matrix of all pairs by all anchors' negatives in each layer, and keeps some five of them."""
    spans = workload.spans()
    pairs = sum(n * (n - 1) // 2 for words in spans for start, end in words if (n := end - start) > 1)
    negatives = sum((end - start - 1) * workload.T for words in spans for start, end in words)
    return 5 * 4 * workload.L * pairs * negatives <= 8e9


EAGER = "eager Gram, exact"
COMPILED = "torch.compile of it"
OURS = ("torch: carma_loss", "triton: carma_loss")
HEADLINE = (BASELINE, EAGER, COMPILED, "integrations.upstream", *OURS)
"""What a summary shows."""

PROVIDERS = (
    Provider(BASELINE, "published", _published, _published_finishes, grows=True),
    Provider("eager Gram, sampled", "published", _sampled, lambda w: _evaluations(w) <= 500_000 and _gram_fits(w)),
    Provider(EAGER, "exact", _exact, _gram_fits, grows=True),
    Provider(COMPILED, "exact", _compiled, _gram_fits, compiles=True),
    Provider(
        "metric-learning NT-Xent",
        "exact",
        _metric_learning,
        _every_pair_with_every_negative_fits,
        package="pytorch_metric_learning",
    ),
    Provider("inf-cl", "exact", _inf_cl, _is_one_long_sequence, package="inf_cl", gpu_only=True),
    Provider("integrations.upstream", "published", _drop_in, lambda w: _evaluations(w) <= 500_000 and _gram_fits(w)),
    Provider("torch: carma_loss", "exact", _carma_loss("torch"), grows=True),
    Provider("torch: mi_loss + stability_loss", "exact", _separate_losses("torch")),
    Provider("triton: carma_loss", "exact", _carma_loss("triton"), grows=True),
    Provider("triton: mi_loss + stability_loss", "exact", _separate_losses("triton")),
)

PEERS = tuple(
    provider.name for provider in PROVIDERS if not provider.name.startswith(("torch:", "triton:", "integrations."))
)
"""Those that are not this package's."""
