"""Every check of an input, in one style: the argument, what it got, what is allowed, the way out.

No check reads device memory: shapes, dtypes, devices and Python numbers are all that is looked at.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import forward_ad

from carma_kernels.pairs import PairIndex
from carma_kernels.spans import TokenSpans

METRICS = ("cosine", "dot")
NEGATIVES = ("sequence", "batch")
REDUCTIONS = ("mean", "sum", "none")
FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def hidden_states(value: Any) -> tuple[Tensor, ...]:
    """The layers `[B, T, D]` each, checked."""
    if isinstance(value, Tensor):
        _plain_tensor(value, "hidden_states")
        if value.dim() != 4:
            way_out = (
                "For one layer pass [hidden_states] or hidden_states[None]."
                if value.dim() == 3
                else "Pass a list of [B, T, D] tensors if the layers are not stacked."
            )
            raise ValueError(f"hidden_states must be [L, B, T, D] when stacked, got {_shape(value)}. {way_out}")
        layers = value.unbind(0)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        layers = tuple(value)
    elif isinstance(value, Mapping):
        raise TypeError(
            "hidden_states must be a tensor [L, B, T, D] or a list of L tensors [B, T, D], got a dict. Pass the layers "
            "in order, for example list(hidden_states.values())."
        )
    else:
        raise TypeError(
            "hidden_states must be a tensor [L, B, T, D] or a list of L tensors [B, T, D], got "
            f"{type(value).__name__}. Pass list(hidden_states) if it yields the layers."
        )
    if not layers:
        raise ValueError("hidden_states must hold at least one layer, got none.")
    for index, layer in enumerate(layers):
        _layer(layer, index, layers[0])
    return layers


def _layer(layer: Any, index: int, first: Tensor) -> None:
    name = f"hidden_states[{index}]"
    if not isinstance(layer, Tensor):
        hint = " Pass output[0]: a block of many models returns a tuple." if isinstance(layer, tuple) else ""
        raise TypeError(f"{name} must be a tensor [B, T, D], got {type(layer).__name__}.{hint}")
    _plain_tensor(layer, name)
    if layer.dim() != 3:
        raise ValueError(f"{name} must be [B, T, D], got {_shape(layer)}.")
    if layer.shape[-1] == 0:
        raise ValueError(f"{name} is {_shape(layer)}; the width D must be at least 1.")
    if layer.dtype not in FLOAT_DTYPES:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOAT_DTYPES)
        raise TypeError(f"{name} must be one of {allowed}, got {layer.dtype}. Convert it with .float().")
    if layer.shape != first.shape:
        raise ValueError(
            f"{name} is {_shape(layer)}, hidden_states[0] {_shape(first)}; all layers must have one shape [B, T, D]. "
            "Pass the block outputs only, without embeddings or logits of another width."
        )
    if layer.dtype != first.dtype:
        raise TypeError(
            f"{name} is {layer.dtype}, hidden_states[0] {first.dtype}; all layers must have one dtype. "
            "Convert them with .to(dtype) where they are captured."
        )
    if layer.device != first.device:
        raise ValueError(
            f"{name} is on {layer.device}, hidden_states[0] on {first.device}; all layers must be on one device. "
            f"Move them with .to({str(first.device)!r}), or call the loss once for the layers of each device."
        )


def _plain_tensor(tensor: Tensor, name: str) -> None:
    dtensor = sys.modules.get("torch.distributed.tensor")
    if dtensor is not None and isinstance(tensor, dtensor.DTensor):
        raise TypeError(
            f"{name} is a DTensor, which the losses do not shard. Pass the local part with .to_local(), if it holds "
            "whole tokens, or the whole tensor with .full_tensor()."
        )
    _no_tangent(tensor, name)
    if tensor.layout != torch.strided or tensor.is_nested:
        kind = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
        raise TypeError(f"{name} must be a dense tensor, got a {kind} one. Convert it, with .to_dense() or by padding.")


def _no_tangent(tensor: Tensor, name: str) -> None:
    """Operators without a rule for them would drop a tangent, and its derivative would be 0."""
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None:
        raise NotImplementedError(
            f"{name} carries a tangent, and forward-mode differentiation (torch.func.jvp, jacfwd, "
            "torch.autograd.forward_ad) has no way through: the derivative is written by hand, for the backward alone. "
            "Use that, or compute the CARMA terms with csrc_ref, which autograd differentiates in both modes."
        )


def layer_range(layers: Any, num_layers: int, name: str = "layers") -> range:
    """`(start, end)`, both included, as a range."""
    if layers is None:
        return range(num_layers)
    if (
        not isinstance(layers, Sequence)
        or len(layers) != 2
        or not all(isinstance(bound, int) and not isinstance(bound, bool) for bound in layers)
    ):
        raise TypeError(f"{name} must be None or (start, end), two ints, both included, got {layers!r}.")
    start, end = layers
    if not 0 <= start <= end < num_layers:
        raise ValueError(
            f"{name} is ({start}, {end}); with {num_layers} layers given, (start, end) must satisfy "
            f"0 <= start <= end <= {num_layers - 1}. Both ends are included and count from the first layer given."
        )
    return range(start, end + 1)


def option(value: Any, allowed: tuple[str, ...], name: str) -> str:
    """One of a few words."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}.")
    return str(value)


def temperature(value: Any, device: torch.device) -> float | Tensor:
    """A number > 0, or a 0-d floating tensor beside the hidden states, NaN where that is not > 0."""
    if isinstance(value, Tensor):
        if value.dim() != 0 or value.dtype not in FLOAT_DTYPES:
            raise TypeError(
                f"temperature must be a number > 0 or a 0-d floating tensor, got {value.dtype} {_shape(value)}. "
                "Make a learnable one with torch.nn.Parameter(torch.tensor(0.1))."
            )
        _no_tangent(value, "temperature")
        if value.device != device:
            raise ValueError(
                f"temperature is on {value.device}, hidden_states on {device}. Move it with .to({str(device)!r})."
            )
        return torch.where(value > 0, value, math.nan)
    return positive_number(value, "temperature")


def _number(value: Any, name: str, allowed: str) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be {allowed}, got {type(value).__name__}.")
    return float(value)


def positive_number(value: Any, name: str) -> float:
    """A number > 0."""
    number = _number(value, name, "a number > 0")
    if not 0 < number < math.inf:
        raise ValueError(f"{name} must be a finite number > 0, got {value}.")
    return number


def non_negative_number(value: Any, name: str) -> float:
    """A number >= 0."""
    number = _number(value, name, "a number >= 0")
    if not 0 <= number < math.inf:
        raise ValueError(f"{name} must be a finite number >= 0, got {value}.")
    return number


def match_negatives(value: Any, spans_or_pairs: Any) -> float | None:
    """None, or a number of negatives > 0."""
    if value is None:
        return None
    if isinstance(spans_or_pairs, PairIndex):
        raise ValueError(
            f"match_negatives={value!r} is for TokenSpans, whose negatives are all tokens; a PairIndex brings the k it "
            "has. Leave match_negatives out."
        )
    return positive_number(value, "match_negatives")


def negatives(value: Any, spans_or_pairs: Any) -> str:
    """Which tokens are negatives, for spans; a list of pairs has its own."""
    if value == "sampled":
        raise ValueError(
            "negatives='sampled' needs the sample: pass spans.sample_pairs(k=5) in place of the spans and leave "
            "negatives out."
        )
    option(value, NEGATIVES, "negatives")
    if value == "batch" and isinstance(spans_or_pairs, PairIndex):
        raise ValueError(
            "negatives='batch' contradicts a PairIndex, whose pairs bring their own negatives. Leave negatives out, or "
            "pass the TokenSpans."
        )
    return str(value)


def weight(value: Any, name: str) -> float:
    """A number in [0, 1]."""
    number = _number(value, name, "a number in [0, 1]")
    if not 0 <= number <= 1:
        raise ValueError(f"{name} must be a number in [0, 1], got {value}.")
    return number


def mask(value: Any, first: Tensor) -> Tensor | None:
    """`[B, T]`, true or non-zero for valid tokens, as bool."""
    if value is None:
        return None
    B, T, _ = first.shape
    if not isinstance(value, Tensor):
        raise TypeError(
            f"mask must be a tensor [B, T], non-zero for valid tokens, got {type(value).__name__}. "
            "Pass the batch's attention_mask, or spans.attention_mask."
        )
    if value.shape != (B, T):
        raise ValueError(
            f"mask is {_shape(value)}, hidden_states have {B} sequences of {T} tokens; it must be [{B}, {T}], like the "
            "attention mask of the same batch."
        )
    if value.device != first.device:
        raise ValueError(
            f"mask is on {value.device}, hidden_states on {first.device}. Move it with .to({str(first.device)!r})."
        )
    if value.is_floating_point() or value.is_complex():
        raise TypeError(
            f"mask must be boolean, or integers that are non-zero for valid tokens, got {value.dtype}, which may be an "
            "additive mask (0 for valid tokens, -inf for the others). Pass mask == 0 for that, or mask.bool()."
        )
    return value if value.dtype == torch.bool else value != 0


def stability_mask(value: Any, spans_or_pairs: TokenSpans | PairIndex, first: Tensor) -> Tensor | None:
    """The tokens that the stability term of `carma_loss` is over, `[B, T]` bool; None for all."""
    if isinstance(value, str):
        option(value, ("all",), "mask")
        return None
    return spans_or_pairs.attention_mask if value is None else mask(value, first)


def pairs(value: Any, first: Tensor, num_layers: int) -> TokenSpans | PairIndex:
    """Spans or pairs of the batch that the hidden states come from."""
    if not isinstance(value, TokenSpans | PairIndex):
        raise TypeError(
            f"spans_or_pairs must be TokenSpans or PairIndex, got {type(value).__name__}. Build spans with "
            "TokenSpans.from_encoding(batch), TokenSpans.from_word_ids(word_ids) or TokenSpans.from_lists(spans, "
            "seq_len=T)."
        )
    B, T, _ = first.shape
    if value.shape != (B, T):
        raise ValueError(
            f"spans_or_pairs were built for {value.shape[0]} sequences of {value.shape[1]} tokens, hidden_states have "
            f"{B} of {T}. Build them from the same padded batch."
        )
    if value.device != first.device:
        raise ValueError(
            f"spans_or_pairs are on {value.device}, hidden_states on {first.device}. Move them with "
            f".to({str(first.device)!r}, non_blocking=True)."
        )
    if isinstance(value, PairIndex) and value.negatives.dim() == 3 and value.negatives.shape[0] != num_layers:
        raise ValueError(
            f"spans_or_pairs hold negatives for {value.negatives.shape[0]} layers, the MI loss runs over {num_layers}. "
            f"Sample them with num_layers={num_layers}, or once for all layers with num_layers=None."
        )
    return value


def num_pairs(value: Any, local: int, reduction: str, device: torch.device) -> float | Tensor:
    """The divisor of the mean over pairs: the given one, else the local count; never 0.

    Args:
        value: None, a number >= 0, or a 0-d tensor, NaN where that is negative.
        local: the pairs of this batch.
        reduction: that of the call.
        device: of the hidden states.
    """
    if value is None:
        return max(local, 1)
    if reduction == "sum":
        raise ValueError("num_pairs divides a mean, reduction='sum' has none: drop num_pairs, or use reduction='mean'.")
    if isinstance(value, Tensor):
        if value.dim() != 0:
            raise ValueError(f"num_pairs must be a number or a 0-d tensor, got {_shape(value)}.")
        if value.device != device:
            raise ValueError(
                f"num_pairs is on {value.device}, hidden_states on {device}. Move it with .to({str(device)!r})."
            )
        count = torch.where(value == 0, 1, value)
        return torch.where(count > 0, count, math.nan)
    number = _number(value, "num_pairs", "a number or a 0-d tensor")
    if not 0 <= number < math.inf or (number == 0 and local):
        raise ValueError(
            f"num_pairs must be the number of pairs of the whole that this batch is a part of, got {value}; this batch "
            f"has {local}."
        )
    return number or 1.0


def group(value: Any) -> None:
    """None, or a process group that this process is in."""
    if value is None:
        return
    if not dist.is_available():
        raise TypeError(
            f"group must be None where torch was built without torch.distributed, got {type(value).__name__}."
        )
    if not isinstance(value, dist.ProcessGroup):
        way_out = (
            "This process is not in the group: call the loss with the group that it is in."
            if value is dist.GroupMember.NON_GROUP_MEMBER
            else "Pass torch.distributed.group.WORLD for all ranks, or device_mesh.get_group()."
        )
        raise TypeError(f"group must be None or a torch.distributed.ProcessGroup, got {value!r}. {way_out}")
    if not dist.is_initialized():
        raise ValueError(
            "group is a process group that has been destroyed. Call torch.distributed.init_process_group() again and "
            "pass torch.distributed.group.WORLD."
        )


def out_dtype(value: Any, hidden: torch.dtype) -> torch.dtype:
    """A floating dtype; if None fp32, or fp64 for hidden states in fp64."""
    if value is None:
        return torch.promote_types(hidden, torch.float32)
    if not isinstance(value, torch.dtype) or value not in FLOAT_DTYPES:
        raise TypeError(
            f"out_dtype must be None (fp32, or fp64 for fp64 hidden states) or a floating dtype, got {value!r}."
        )
    return value


def _shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))
