"""Host side of the MI loss over short groups, with the stability loss in the same launches."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from carma_kernels import _runtime
from carma_kernels.kernels import launch, short
from carma_kernels.ops.layers import (
    LayerTable,
    ScaledSimilarity,
    Upstream,
    ceil_div,
    constants,
    dot_precision,
    hull,
    mi_precision,
    target,
)
from carma_kernels.ops.stability import StabilityGradient, StabilityPartials

_RESIDENT = 2
"""Programs of the backward that a multiprocessor holds; while there are fewer, the columns are shared out."""
_MOST_PIECES = 4
_LONGEST_BF16X6 = 64
"""Tokens of a group: of more, the three parts of each weight would not fit in registers."""


@dataclass(frozen=True)
class ShortMI:
    """The MI loss of a contrast table whose groups are short."""

    word: Tensor
    """`[S, N]` int32: the word of each token of each group, -1 for padding"""
    layers: range
    similarity: ScaledSimilarity
    needs_work: bool
    """whether the temperature may need a gradient"""

    @staticmethod
    def takes(group_size: int, hidden: Tensor) -> bool:
        """Whether groups of so many tokens are short, for hidden states like these."""
        # with one number: in a traced graph, each comparison of the size is a condition to compile another graph by
        return group_size <= min(
            launch.longest(kernel, target(hidden.device), hidden.element_size())
            for kernel in ("short_forward", "short_backward")
        )

    @property
    def state_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What the backward needs of the forward, of every token: `z` and its negatives' factor; `sum_j W s`."""
        shape = self.word.shape
        return (len(self.layers), 2, *shape), (len(self.layers), shape.numel() if self.needs_work else 0)

    def forward(
        self,
        hidden: LayerTable,
        inverse_norms: Tensor,
        state: tuple[Tensor, Tensor],
        stability_layers: range,
        mask: Tensor | None,
    ) -> tuple[Tensor, StabilityPartials]:
        """The partial sums of both losses, `[L_mi, parts]` for the MI loss.

        Args:
            hidden: L layers.
            inverse_norms: `[L_mi, S, N]` for the cosine, overwritten.
            state: `state_shapes`, overwritten.
            stability_layers: those of the stability loss; empty without.
            mask: `[B*T]` uint8 of the stability loss.
        """
        S, N = self.word.shape
        D = hidden.shape[2]
        configuration = self._configuration("short_forward", hidden)
        BLOCK_T = configuration.constants["BLOCK_T"]
        blocks = S * (BLOCK_T // configuration.constants["BLOCK_M"])
        walked = hull(self.layers, stability_layers)
        mi_partials = self.word.new_empty((len(self.layers), S * BLOCK_T), dtype=torch.float32)
        partials = self.word.new_empty((2 * len(walked) + 1, S * BLOCK_T), dtype=torch.float32)
        match = self.similarity.match_negatives
        _runtime.launch(
            short._short_forward_kernel,
            (len(walked) * blocks,),
            hidden.addresses,
            self.word,
            mask,
            self.similarity.inverse_temperature,
            inverse_norms,
            *state,
            mi_partials,
            partials,
            0.0 if match is None else math.log(match),
            S,
            N,
            D,
            len(walked),
            walked.start,
            self.layers.start,
            len(self.layers),
            stability_layers.start,
            max(0, len(stability_layers) - 1),
            MATCH=match is not None,
            WORK=self.needs_work,
            STABILITY=len(stability_layers) > 1,
            HAS_MASK=mask is not None,
            **self._constants(hidden),
            **configuration.options,
        )
        return mi_partials, StabilityPartials(partials, walked)

    def backward(
        self,
        hidden: LayerTable,
        inverse_norms: Tensor,
        z: Tensor,
        grad_sums: Upstream,
        stability: StabilityGradient,
        out: LayerTable,
    ) -> None:
        """Write the gradients of both losses into every layer of `out`.

        Args:
            hidden: L layers.
            inverse_norms, z: as the forward left them, the latter first in its state.
            grad_sums: what arrives for the layers of the MI loss.
            stability: of the stability loss; without any step if there is none.
            out: L layers, None among them where no gradient is wanted.
        """
        S, N = self.word.shape
        D = hidden.shape[2]
        configuration = self._configuration("short_backward", hidden)
        blocks = S * (configuration.constants["BLOCK_T"] // configuration.constants["BLOCK_M"])
        # as many as are resident together, not one more: the last piece would wait for a whole program to end
        room = _RESIDENT * target(hidden.present.device).multiprocessors // (blocks * len(hidden))
        pieces = max(1, min(room, _MOST_PIECES, ceil_div(D, configuration.constants["BLOCK_D"])))
        _runtime.launch(
            short._short_backward_kernel,
            (len(hidden) * pieces * blocks,),
            hidden.addresses,
            out.addresses,
            self.word,
            stability.mask,
            self.similarity.inverse_temperature,
            inverse_norms,
            z,
            *grad_sums.arguments,
            stability.losses,
            stability.scale,
            *stability.upstream.arguments,
            S,
            N,
            D,
            len(hidden),
            pieces,
            self.layers.start,
            len(self.layers),
            stability.layers.start,
            stability.num_steps,
            STABILITY=stability.num_steps > 0,
            HAS_MASK=stability.mask is not None,
            **self._constants(hidden, out),
            **configuration.options,
        )

    def _configuration(self, kernel: str, hidden: LayerTable) -> launch.Configuration:
        layer = hidden.present
        configuration = launch.choose(kernel, target(layer.device), self.word.shape[1], layer.element_size())
        assert configuration is not None, "groups this long are not short: see `takes`"
        return configuration

    def _constants(self, *tables: LayerTable) -> dict[str, object]:
        cosine, layer = self.similarity.cosine, tables[0].present
        few = self.word.shape[1] <= _LONGEST_BF16X6
        precision = mi_precision(layer, cosine) if few else dot_precision(layer.dtype)
        return {"COSINE": cosine, "PRECISION": precision, **constants(*tables)}
