"""Constituent-aware pooling of a Hugging Face model: from a start layer on, its blocks see a row a word."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from carma_kernels import TokenSpans
from carma_kernels.cap.pooling import POSITIONS, PROTOCOLS, Positions, Protocol, WordRows, pool, spread
from carma_kernels.integrations.transformers.blocks import find_blocks, given_blocks

_CACHES = {"past_key_values", "past_key_value", "layer_past"}


@contextmanager
def constituent_pooling(
    model: nn.Module,
    spans: TokenSpans,
    *,
    start_layer: int,
    protocol: Protocol = "mean",
    positions: Positions = "sequential",
    blocks: Sequence[nn.Module] | None = None,
) -> Iterator[None]:
    """Within the context, a forward pass of `model` pools the words of this batch from `start_layer` on.

        with constituent_pooling(model, spans, start_layer=3, protocol="mean"):
            logits = model(input_ids, attention_mask=attention_mask).logits  # [B, T, V]

    The input of block `start_layer` is pooled: for a word of the tokens `[s, e)` and protocol `mean`

        h_w = 1 / (e - s) * sum_{s <= t < e} h_t

    (`sum` without the division, `max` channel by channel). This and the later blocks work on the W words of a sequence,
    `[B, W, D]`, with attention mask, position ids and rotary embeddings to match. What the last block returns is spread
    over the tokens again, each token getting its word's row and padding zeros, so that every output keeps its shape and
    a prediction is read where it always is: at the last token. If no word has two tokens, nothing is touched and the
    outputs are bit-identical; after the context no hook is left. A compiled model runs eagerly within it.

    Constituent-aware pooling is from arXiv 2410.12924, its use for CARMA from arXiv 2502.11066.

    Args:
        model: a causal language model or an encoder whose blocks take `hidden_states`, `attention_mask` and, if it has
            rotary embeddings, `position_embeddings`, as those of GPT-2, Llama, Gemma, Qwen2 and their kin do.
        spans: the words of the batch that the forward pass will get. Valid tokens in no word stay as they are.
        start_layer: 0 to L-1.
        protocol: `"mean"`, `"max"` or `"sum"`.
        positions: where the words are for rotary embeddings and sliding windows. `"sequential"`: as a sequence of W
            tokens would be, so that neighbouring words are neighbours (published). `"first"`: a word keeps the position
            of its first token. Learned absolute positions are added before block 0 and pooled with the rest.
        blocks: the model's blocks, first to last, where they cannot be found in it.

    Raises:
        TypeError: `spans` are no TokenSpans.
        ValueError: an unknown option; blocks that cannot be found; in the forward pass, a batch of another shape.
        NotImplementedError: in the forward pass, a block with an argument that this does not know how to pool, or with
            a mask of FlexAttention.
    """
    if not isinstance(spans, TokenSpans):
        raise TypeError(f"spans must be a TokenSpans, got {type(spans).__name__}; see TokenSpans.from_encoding.")
    for name, value, allowed in (("protocol", protocol, PROTOCOLS), ("positions", positions, POSITIONS)):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}.")
    _, modules = find_blocks(model) if blocks is None else given_blocks(model, blocks)
    if not isinstance(start_layer, int) or isinstance(start_layer, bool) or not 0 <= start_layer < len(modules):
        raise ValueError(f"start_layer must be a block of the model, 0 to {len(modules) - 1}, got {start_layer!r}.")
    rows = WordRows.of(spans, positions)
    with ExitStack() as hooks:
        if rows is not None:
            if "torch._dynamo" in sys.modules:  # compiled code takes no notice of hooks
                hooks.enter_context(torch.compiler.set_stance("force_eager"))
            pooling = _Pooling(rows, protocol)
            for number, block in enumerate(modules[start_layer:], start=start_layer):
                enter = pooling.hook(block, pools=number == start_layer)
                hooks.enter_context(_removed(block.register_forward_pre_hook(enter, with_kwargs=True)))
            hooks.enter_context(_removed(modules[-1].register_forward_hook(pooling.leave)))
        yield


@contextmanager
def _removed(handle: torch.utils.hooks.RemovableHandle) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


_PreHook = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any]]]


class _Pooling:
    """The hooks of one batch."""

    def __init__(self, rows: WordRows, protocol: Protocol) -> None:
        self._rows = rows
        self._protocol = protocol

    def hook(self, block: nn.Module, *, pools: bool) -> _PreHook:
        """What `block` is called with, for words; `pools` for the first block."""
        names = [
            parameter.name
            for parameter in inspect.signature(block.forward).parameters.values()
            if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        ]

        def enter(
            block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            hidden = args[0] if args else kwargs["hidden_states"]  # [B, T, D], or [B, W, D] once pooled
            rows = self._rows = self._rows.to(hidden.device)
            if pools:
                self._check_shape(hidden)
                hidden = pool(hidden, rows, self._protocol)
            named = list(zip(names[1:], args[1:], strict=False))
            others = {name: value for name, value in kwargs.items() if name != "hidden_states"}
            translated = {
                name: _translate(block, name, value, hidden, rows) for name, value in [*named, *others.items()]
            }
            _mask_ragged_rows(block, translated, hidden, rows)
            return (hidden, *(translated.pop(name) for name, _ in named)), translated

        return enter

    def leave(self, _block: nn.Module, _args: object, output: Any) -> Any:
        """Words back to tokens, after the last block."""
        if isinstance(output, tuple):
            return (spread(output[0], self._rows), *output[1:])
        return spread(output, self._rows)

    def _check_shape(self, hidden: Tensor) -> None:
        if hidden.shape[:2] != self._rows.shape:
            B, T = self._rows.shape
            raise ValueError(
                f"the model runs on {hidden.shape[0]} sequences of {hidden.shape[1]} tokens, the spans are those of "
                f"{B} of {T}. Within constituent_pooling pass the very batch that the spans were built from, whole (no "
                "generation with a cache), to a model without prompt tuning."
            )


def _translate(block: nn.Module, name: str, value: Any, hidden: Tensor, rows: WordRows) -> Any:
    """The argument `name` of a block, for words instead of tokens."""
    if name in _CACHES:
        return None  # keys of a word are of no use to a later forward pass
    if name == "attention_mask":
        return None if value is None else _pool_mask(value, rows)
    if name == "position_ids" and value is not None:  # [B, T] or [1, T]
        return value.expand(len(hidden), -1).take_along_dim(rows.source, dim=1)
    if name == "position_embeddings" and value is not None:  # cos and sin, [B, T, rotary D] or [1, T, rotary D]
        index = rows.source[:, :, None]
        return tuple(table.expand(len(hidden), -1, -1).take_along_dim(index, dim=1) for table in value)
    if name == "cache_position" and value is not None:
        return value[: hidden.shape[1]]
    if isinstance(value, Tensor):
        raise NotImplementedError(
            f"{type(block).__name__} is called with the tensor {name}, {list(value.shape)}, and constituent_pooling "
            "does not know which of its dimensions are tokens. Models with rotary or absolute positions work; "
            "open an issue for this one."
        )
    return value


def _pool_mask(mask: object, rows: WordRows) -> Tensor:
    """A mask of tokens `[B, T]`, `[B, 1, 1, T]` or `[B, heads, T, T]`, boolean or additive, as one of words."""
    B, T = rows.shape
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4) or mask.shape[-1] != T:
        kind = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise NotImplementedError(
            f"attention_mask of a block is {kind}; constituent_pooling pools [B, T] and [B, heads, T, T]. "
            'Load the model with attn_implementation="sdpa" or "eager", and run it without a cache.'
        )
    if mask.dim() == 2:
        return rows.valid_row.to(mask.dtype)
    mask = mask.expand(B, -1, -1, -1).take_along_dim(rows.source[:, None, None, :], dim=3)  # [B, heads, T or 1, W]
    if mask.shape[2] == T:
        mask = mask.take_along_dim(rows.source[:, None, :, None], dim=2)  # [B, heads, W, W]
    padding = ~rows.valid_row[:, None, None, :]  # [B, 1, 1, W]
    return mask.masked_fill(padding, False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min)


def _mask_ragged_rows(block: nn.Module, arguments: dict[str, Any], hidden: Tensor, rows: WordRows) -> None:
    """An encoder that needed no mask for its tokens needs one for words; a decoder's words never see what follows."""
    looks_ahead = any(getattr(module, "is_causal", True) is False for module in block.modules())
    if looks_ahead and arguments.get("attention_mask") is None:
        padding = ~rows.valid_row[:, None, None, :]  # [B, 1, 1, W]
        mask = torch.zeros(padding.shape, dtype=hidden.dtype, device=hidden.device)
        arguments["attention_mask"] = mask.masked_fill(padding, torch.finfo(hidden.dtype).min)
