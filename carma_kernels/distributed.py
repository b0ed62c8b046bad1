"""Losses over the joined batch of a process group, whose W ranks each hold a part of it.

DDP, FSDP and ZeRO take the mean over ranks of each gradient. So with `group=` every rank gets the loss of the joined
batch, and for its own hidden states W times their gradient in it: the mean over ranks is the gradient of the joined
batch. Each rank issues the same collectives in the same order, whatever spans it has.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from carma_kernels.pairs import PairIndex
from carma_kernels.spans import NO_WORD, TokenSpans

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Pairs = TokenSpans | PairIndex | int


def global_num_pairs(
    pairs: Pairs | Iterable[Pairs], group: ProcessGroup | None = None, device: torch.device | str | None = None
) -> Tensor:
    """The number of pairs of several batches, on all ranks: `num_pairs=` for a window of gradient accumulation.

    Args:
        pairs: of this rank: a batch's `TokenSpans` or `PairIndex`, or its number of pairs, or several of them.
        group: whose ranks' numbers are added up; every rank of it has to call. None for this process alone.
        device: of the hidden states; None for that of the spans, or the CPU. It is not waited for.

    Returns:
        0-d int64.
    """
    batches = [pairs] if isinstance(pairs, Pairs) else list(pairs)
    if device is None:
        device = next((batch.device for batch in batches if not isinstance(batch, int)), None)
    local = sum(batch if isinstance(batch, int) else batch.num_pairs for batch in batches)
    count = torch.full((), local, dtype=torch.int64, device=device)
    if group is not None:
        dist.all_reduce(count, group=group)
    return count


def scale_gradient(loss: Tensor, factor: int) -> Tensor:
    """The same numbers, with a gradient that is `factor` times as large."""
    scaled: Tensor = _ScaleGradient.apply(loss, factor)
    return scaled


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, factor: int) -> Tensor:
        ctx.factor = factor
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.factor, None


def join_terms(
    group_name: str, sums: Tensor, losses: Tensor, scale: Tensor, layer: Tensor, mask: Tensor | None
) -> None:
    """From a rank's terms to those of the joined batch, in place, with one all-reduce. For the operators.

    A step's stability loss is `r = C / E` and its scale `k = 2 / E`, with C the sum of squares of the change and
    `E = N (energy_l + energy_{l+1} + eps)`. C and E of the joined batch are the sums over ranks of `2 r/k` and `2/k`.
    The gradient is made of r and k alone, so with the joined ones it is that of the joined loss.

    Args:
        group_name: of the process group.
        sums: `[L_mi]`, of the MI loss.
        losses, scale: `[steps]`, r and k of the stability loss.
        layer: `[B, T, D]`, any layer.
        mask: `[B, T]` or None: which tokens are in the stability loss.
    """
    in_loss = layer.numel() > 0 if mask is None else mask.any()  # without, E is eps alone, and not of this batch
    half_size = in_loss * scale.reciprocal()  # [steps] E/2
    terms = torch.cat([sums, half_size * losses, half_size])
    if not terms.numel():
        return
    dist.all_reduce(terms, group=_process_group(group_name))
    joined_sums, half_change, half_size = terms.split([len(sums), len(losses), len(losses)])
    sums.copy_(joined_sums)
    scale.copy_(torch.where(half_size == 0, 0.0, half_size.reciprocal()))
    losses.copy_(half_change * scale)


def gather_batch(layers: Sequence[Tensor], spans: TokenSpans, group: ProcessGroup) -> tuple[list[Tensor], TokenSpans]:
    """The joined batch, in which the words of the other ranks are single tokens: negatives, and no pairs.

    A gradient of the gathered layers is added up over ranks and goes to the rank that a token came from. Memory is that
    of the layers, W times; the ranks' masks are exchanged by the hosts.

    Args:
        layers: L times `[B, T, D]`. B and T may differ from rank to rank.
        spans: of the B sequences.
        group: with W ranks.

    Returns:
        L times `[W*B', T', D]`, and their spans, with B' and T' the largest of all ranks. The padding that this takes
        is 0 and no valid token.

    Raises:
        ValueError: the ranks differ in number, width or dtype of the layers.
    """
    # what hosts exchange cannot be traced
    gather = torch.compiler.disable(_gather_batch) if torch.compiler.is_compiling() else _gather_batch
    return gather(layers, spans, group)


def _gather_batch(layers: Sequence[Tensor], spans: TokenSpans, group: ProcessGroup) -> tuple[list[Tensor], TokenSpans]:
    rank, W = group.rank(), group.size()
    word = spans._host_view("word").numpy()  # [B, T]
    kind = (len(layers), layers[0].shape[-1], layers[0].dtype)
    parts: list[Any] = [None] * W
    dist.all_gather_object(parts, (kind, word != NO_WORD), group=group)
    for other, (its_kind, _) in enumerate(parts):
        if its_kind != kind:
            raise ValueError(
                f"hidden_states must be alike on all ranks of group: here {kind[0]} layers of width {kind[1]} in "
                f"{kind[2]}, on rank {other} {its_kind[0]} of width {its_kind[1]} in {its_kind[2]}. Give every rank "
                "the same model and layers."
            )
    B, T = (max(mask.shape[axis] for _, mask in parts) for axis in (0, 1))
    valid = np.zeros((W, B, T), bool)
    for at, (_, mask) in enumerate(parts):
        valid[at, : mask.shape[0], : mask.shape[1]] = mask
    words = np.full((W, B, T), NO_WORD, np.int32)
    words[rank, : word.shape[0], : word.shape[1]] = word
    joined = TokenSpans.from_word_ids(words.reshape(W * B, T), valid.reshape(W * B, T))
    gathered = [_Gather.apply(layer, B, T, group) for layer in layers]
    return gathered, joined.to(layers[0].device, non_blocking=True)


class _Gather(torch.autograd.Function):
    """`[B, T, D]` of each rank to `[W*B', T', D]`, zeros where a rank has fewer sequences or tokens."""

    @staticmethod
    def forward(ctx: Any, layer: Tensor, B: int, T: int, group: ProcessGroup) -> Tensor:
        ctx.group = group
        ctx.shape = layer.shape
        D = layer.shape[2]
        padded = layer.new_zeros((B, T, D))
        padded[: layer.shape[0], : layer.shape[1]] = layer
        gathered = layer.new_empty((group.size() * B, T, D))
        _all_gather(gathered, padded, group=group)
        return gathered

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        total = grads[0].contiguous()  # [W*B', T', D]
        part = total.new_empty((total.shape[0] // ctx.group.size(), *total.shape[1:]))
        _reduce_scatter(part, total, group=ctx.group)
        B, T, _ = ctx.shape
        return part[:B, :T], None, None, None


def _all_gather(out: Tensor, part: Tensor, group: ProcessGroup) -> None:
    # torch 2.13 has the first name and warns of the second, which earlier ones have
    (getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor)(out, part, group=group)


def _reduce_scatter(out: Tensor, parts: Tensor, group: ProcessGroup) -> None:
    (getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor)(out, parts, group=group)


def _process_group(name: str) -> ProcessGroup:
    from torch._C._distributed_c10d import _resolve_process_group  # what functional collectives find it with

    return _resolve_process_group(name)  # type: ignore[arg-type]  # a NewType of str, as of torch 2.12 or so
