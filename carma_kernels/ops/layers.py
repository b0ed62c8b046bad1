"""What kernels need of the hidden states: the addresses of the layers, and how a device computes with their dtype."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from carma_kernels.kernels import launch, tiles

INTERPRETED = not isinstance(tiles.dot, triton.JITFunction)
"""Triton's interpreter runs the kernels: `TRITON_INTERPRET=1` was set when Triton was imported."""

_DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


@dataclass(frozen=True)
class LayerTable:
    """L layers `[B, T, D]` of one dtype, or places for their gradients, as kernels take them."""

    layers: tuple[Tensor | None, ...]
    """`[B, T, D]` each, contiguous; None for a layer that gets no gradient. Keeps the addresses valid."""

    @cached_property
    def addresses(self) -> Tensor:
        """`[L]` int64 on the layers' device, 0 for None."""
        return _copied_to([0 if layer is None else layer.data_ptr() for layer in self.layers], self.present.device)

    @property
    def present(self) -> Tensor:
        """A layer that is there."""
        return next(layer for layer in self.layers if layer is not None)

    @property
    def shape(self) -> tuple[int, int, int]:
        """`(B, T, D)`."""
        B, T, D = self.present.shape
        return B, T, D

    @cached_property
    def alignment(self) -> int:
        """Of every layer, in bytes: 16, or what a single element needs."""
        element = self.present.element_size()
        return 16 if all(layer is None or layer.data_ptr() % 16 == 0 for layer in self.layers) else element

    def __len__(self) -> int:
        """`L`."""
        return len(self.layers)


@dataclass(frozen=True)
class ScaledSimilarity:
    """`s_ij = h_i.h_j r_i r_j / tau` as kernels take it."""

    cosine: bool
    inverse_temperature: Tensor
    """`1/tau`, 0-d fp32 on the device"""
    match_negatives: float | None
    bounded: bool = False
    """a cosine at a tau, given as a number, so large that `exp(s - 1/tau)` of no score underflows"""


@dataclass(frozen=True)
class Stencil:
    """The stability loss's part of the gradients."""

    weights: Tensor
    """`[L, 3]` fp32, upstream-weighted: `k_{l-1}`, `k_l`, `-(k_{l-1} r_{l-1} + k_l r_l)`; zeros outside its layers"""
    mask: Tensor | None
    """`[B*T]` uint8, the rows that take part; None for all"""


def check_dtype(hidden: Tensor) -> None:
    """Refuse what the kernels do not compute with."""
    if hidden.dtype not in _DTYPES:
        raise TypeError(
            f"hidden_states must be fp16, bf16 or fp32 for the triton backend, got {hidden.dtype}. "
            "Convert them, or use backend='torch'."
        )


def readable(layers: Sequence[Tensor]) -> LayerTable:
    """The layers as kernels read them: those that are not contiguous are copied, one by one."""
    return LayerTable(tuple(layer.contiguous() for layer in layers))


def layer_views(hidden: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The layers `[B, T, D]` each, of `[L, B, T, D]` alone or of L times `[B, T, D]`."""
    return hidden[0].unbind(0) if hidden[0].dim() == 4 else tuple(hidden)


def empty_gradients(hidden: Sequence[Tensor], needs_grad: Sequence[bool]) -> list[Tensor]:
    """Room for the gradients of those of `hidden` that need one, contiguous."""
    return [
        torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        for tensor, needed in zip(hidden, needs_grad, strict=True)
        if needed
    ]


def destinations(
    hidden: Sequence[Tensor], gradients: Sequence[Tensor], needs_grad: Sequence[bool]
) -> LayerTable | None:
    """Where each layer's gradient goes, in what `empty_gradients` made; None if none needs one."""
    if not gradients:
        return None
    if hidden[0].dim() == 4:
        return LayerTable(gradients[0].unbind(0))
    rest = iter(gradients)
    return LayerTable(tuple(next(rest) if needed else None for needed in needs_grad))


def constants(*tables: LayerTable) -> dict[str, Any]:
    """The compile-time constants that kernels over these layers share: `DTYPE`, `ALIGNMENT`, `INTERPRETED`."""
    return {
        "DTYPE": _DTYPES[tables[0].present.dtype],
        "ALIGNMENT": min(table.alignment for table in tables),
        "INTERPRETED": INTERPRETED,
    }


def dot_precision(dtype: torch.dtype) -> str:
    """`input_precision` of a dot: "ieee" for fp32 unless torch is told to use tf32; halves have no choice."""
    if dtype != torch.float32:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def inverse_temperature(temperature: Tensor | None, value: float, device: torch.device) -> Tensor:
    """`1/tau`, 0-d fp32 on the device; `value` is tau if `temperature` is None."""
    if temperature is None:
        return _constant(1.0 / value, device)
    return temperature.detach().to(torch.float32).reciprocal()


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Launch there: Triton launches on the current device, wherever the tensors are."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def target(device: torch.device) -> launch.Target:
    """The device, as the launch table knows it."""
    return launch.INTERPRETER if INTERPRETED else _target(device)


def hull(first: range, second: range) -> range:
    """The shortest range that holds both."""
    if not len(first) or not len(second):
        return first if len(first) else second
    return range(min(first.start, second.start), max(first.stop, second.stop))


def ceil_div(a: int, b: int) -> int:
    """How many pieces of b hold a."""
    return -(-a // b)


@lru_cache
def _constant(value: float, device: torch.device) -> Tensor:
    """Kept, so that a step does not spend a launch on it."""
    return torch.full((), value, dtype=torch.float32, device=device)


@lru_cache
def _target(device: torch.device) -> launch.Target:
    properties: Any = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return launch.TARGETS["gfx942"]
    capability = f"sm_{properties.major}{properties.minor}"
    return launch.Target(capability, properties.shared_memory_per_block_optin)


def _copied_to(values: list[int], device: torch.device) -> Tensor:
    table = torch.tensor(values, dtype=torch.int64)
    if device.type == "cpu":
        return table
    return table.pin_memory().to(device, non_blocking=True)
