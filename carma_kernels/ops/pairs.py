"""The MI term of listed pairs: one launch forward; backward one sort, and one launch for all layers."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from carma_kernels import _runtime
from carma_kernels.kernels import launch
from carma_kernels.kernels.pairs import _pairs_backward_kernel, _pairs_forward_kernel
from carma_kernels.ops.layers import LayerTable, ScaledSimilarity, Upstream, ceil_div, constants, target
from carma_kernels.ops.stability import StabilityGradient


class Listed(NamedTuple):
    """The tensors of a PairIndex: it has looked at their numbers, which an operator must not do."""

    anchor: Tensor  # [P] int32
    positive: Tensor  # [P] int32
    negatives: Tensor  # [P, K] or [L, P, K] int32, -1 for no token


def listed_state_shapes(pairs: Listed, num_layers: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What the backward needs of the forward, fp32: the scores `[L, P, 1+K]`, and z and the sum of W s, `[L, P, 2]`."""
    P, K = pairs.negatives.shape[-2:]
    return (num_layers, P, 1 + K), (num_layers, P, 2)


def listed_forward(
    hidden: LayerTable,
    layers: range,
    pairs: Listed,
    similarity: ScaledSimilarity,
    inverse_norms: Tensor | None,
    state: tuple[Tensor, Tensor],
) -> Tensor:
    """The cost of every pair in every layer, `[len(layers), P]`.

    Args:
        hidden: all layers.
        layers: those of the MI term.
        pairs: at least one.
        similarity: of two tokens.
        inverse_norms: `[len(layers), B*T]`; None for the dot product.
        state: tensors of the shapes that `listed_state_shapes` says, overwritten.
    """
    B, T, D = hidden.shape
    P, K = pairs.negatives.shape[-2:]
    score, summary = state
    cost = score.new_empty(len(layers), P)
    block_k = min(16, triton.next_power_of_2(1 + K))
    configuration = _configuration("pairs_forward", hidden, D)
    _runtime.launch(
        _pairs_forward_kernel,
        (P, len(layers)),
        hidden.addresses,
        pairs.anchor.contiguous(),
        pairs.positive.contiguous(),
        pairs.negatives.contiguous(),
        inverse_norms,
        similarity.inverse_temperature,
        cost,
        score,
        summary,
        layers.start,
        B * T,
        D,
        K,
        P * K if pairs.negatives.dim() == 3 else 0,
        COSINE=similarity.cosine,
        BLOCK_K=block_k,
        **constants(hidden),
        **configuration,
    )
    return cost


def listed_backward(
    hidden: LayerTable,
    layers: range,
    pairs: Listed,
    similarity: ScaledSimilarity,
    inverse_norms: Tensor | None,
    state: tuple[Tensor, Tensor],
    grad_sums: Upstream,
    stability: StabilityGradient,
    out: LayerTable | None,
    needs_work: bool,
) -> Tensor | None:
    """Write the gradient of the layers of the MI term, with the stability loss's part.

    Args:
        hidden, layers, pairs, similarity, inverse_norms, state: as in `listed_forward`.
        grad_sums: what arrives for each layer's sum over the pairs.
        stability: of the stability loss; without any step if there is none.
        out: where the gradients go, all layers; None to write none.
        needs_work: whether to return `sum W s` of each layer `[len(layers)]`, from which the temperature's follows.
    """
    score, summary = state
    if out is not None and any(layer is not None for layer in out.layers[layers.start : layers.stop]):
        B, T, D = hidden.shape
        index = _EdgeIndex.of(pairs, B * T)
        configuration = _configuration("pairs_backward", hidden, D)
        _runtime.launch(
            _pairs_backward_kernel,
            (ceil_div(D, configuration["BLOCK_D"]) * len(layers) * B * T,),
            hidden.addresses,
            out.addresses,
            index.start,
            index.edge,
            index.other,
            score,
            summary,
            inverse_norms,
            similarity.inverse_temperature,
            *grad_sums.arguments,
            *stability.arguments,
            layers.start,
            len(layers),
            B * T,
            D,
            score.shape[2],
            score.shape[1] * score.shape[2],
            index.start.shape[1] if len(index.start) > 1 else 0,
            COSINE=similarity.cosine,
            HAS_STENCIL=stability.num_steps > 0,
            HAS_MASK=stability.num_steps > 0 and stability.mask is not None,
            **constants(hidden, out),
            **configuration,
        )
    return summary[:, :, 1].sum(1) if needs_work else None


class _EdgeIndex(NamedTuple):
    """For every token the edges that touch it: a slot's edge joins the pair's anchor and the slot's token."""

    start: Tensor  # [1 or L, N+1] int64, into the other two
    edge: Tensor  # pair * (1+K) + slot, int32
    other: Tensor  # token at the other end, int32

    @classmethod
    def of(cls, pairs: Listed, num_tokens: int) -> _EdgeIndex:
        """One stable sort, of every edge seen from both its ends. No size depends on what the slots hold."""
        negatives = pairs.negatives if pairs.negatives.dim() == 3 else pairs.negatives[None]
        L, P, K = negatives.shape
        token = torch.cat([pairs.positive[None, :, None].expand(L, P, 1), negatives], dim=2)  # [L, P, 1+K]
        anchor = pairs.anchor[None, :, None].expand_as(token)
        layer = torch.arange(L, dtype=torch.int32, device=token.device)[:, None, None]
        no_one = L * num_tokens  # who the edges of empty slots belong to: behind everyone
        both = torch.stack([anchor, token])  # [2, L, P, 1+K]
        owner = torch.where(token >= 0, both + layer * num_tokens, no_one).view(-1)
        owner, order = owner.sort(stable=True)
        tokens = torch.arange(num_tokens + 1, dtype=torch.int32, device=token.device)
        start = torch.searchsorted(owner, layer[:, 0] * num_tokens + tokens)  # [L, N+1]
        other = both.flip(0).reshape(-1)[order]
        return cls(start, (order % (P * (1 + K))).int(), other)


def _configuration(kernel: str, hidden: LayerTable, size: int) -> dict[str, Any]:
    layer = hidden.present
    configuration = launch.choose(kernel, target(layer.device), size, layer.element_size())
    if configuration is None:
        raise AssertionError(f"no launch configuration for {kernel}")
    return configuration.options
