"""`carma_loss` for a caller who asks for the gradients of its hidden states himself, of a few layers at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from carma_kernels import _backend
from carma_kernels._terms import Backend, Gradients, HiddenStates, MITerm, StabilityTerm, Terms
from carma_kernels.config import CarmaConfig
from carma_kernels.functional import CarmaOutput, carma_loss_by
from carma_kernels.pairs import PairIndex
from carma_kernels.spans import TokenSpans

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

TermGradients = tuple[Tensor | None, ...]
"""Of each of `Terms`; None for one that no gradient arrived for"""


class LossByLayer:
    """A loss that is connected to nothing. It holds no hidden states: whoever asks for a gradient brings them."""

    output: CarmaOutput

    def __init__(
        self,
        states: Sequence[Tensor],
        spans_or_pairs: TokenSpans | PairIndex,
        config: CarmaConfig,
        *,
        mask: Tensor | Literal["all"] | None = None,
        num_pairs: float | Tensor | None = None,
        group: ProcessGroup | None = None,
        backend: str | None = None,
    ) -> None:
        """Compute it: the arguments are those of `carma_loss`, of L times `[B, T, D]` and no learned temperature."""
        terms = _Terms(_backend.implementation(backend, states[0].device))
        self.output = carma_loss_by(lambda _device: terms, states, spans_or_pairs, config, mask, num_pairs, group)
        self._gradients = terms.gradients
        self._ranks = 1 if group is None else group.size()
        first = min(0 if bounds is None else bounds[0] for bounds in (config.mi_layers, config.stability_layers))
        self.layers = range(first, first + terms.num_layers)
        """in use: those from the first to the last that a term is over"""

    def of_terms(self, upstream: Sequence[Tensor | None]) -> TermGradients:
        """The gradients of the terms, from those that arrived for the output's `loss`, `mi` and `stability`."""
        arrived = (grad if grad is None or self._ranks == 1 else grad * self._ranks for grad in upstream)
        loss, mi, stability = arrived
        return None, None, mi, stability, loss

    def of_layers(self, states: Sequence[Tensor], terms: TermGradients, layers: Sequence[int]) -> dict[int, Tensor]:
        """The gradients `[B, T, D]` of some layers in use, of all `states`; those next to none of them are not read."""
        wanted = [layer in layers for layer in self.layers]
        found = self._gradients(states[self.layers.start : self.layers.stop], terms, wanted)
        return dict(zip([layer for layer in self.layers if layer in layers], found, strict=True))


class _Terms:
    """A backend whose terms are connected to nothing."""

    gradients: Gradients
    num_layers: int

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def carma_terms(
        self, hidden: HiddenStates, mi: MITerm | None, stability: StabilityTerm | None, group: str | None = None
    ) -> Terms:
        terms, self.gradients = self._backend.carma_terms_and_gradients(list(hidden), mi, stability, group)
        self.num_layers = len(hidden)
        return Terms(*terms)
