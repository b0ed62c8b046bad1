"""What kernels need of the hidden states: the addresses of the layers, and how a device computes with their dtype."""

from __future__ import annotations

import struct
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from carma_kernels import _runtime
from carma_kernels.ops.host_tables import copied_to

DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
"""What the kernels compute with"""


@dataclass(frozen=True)
class LayerTable:
    """L layers `[B, T, D]` of one dtype, or places for their gradients, as kernels take them."""

    layers: tuple[Tensor | None, ...]
    """`[B, T, D]` each, contiguous; None for a layer that gets no gradient. Keeps the addresses valid."""
    on_device: Tensor | None = None
    """`[L]` int64, the addresses where kernels read them, if they are there already"""

    @cached_property
    def _on_host(self) -> list[int]:
        return [0 if layer is None else layer.data_ptr() for layer in self.layers]

    @cached_property
    def addresses(self) -> Tensor:
        """`[L]` int64 on the layers' device, 0 for None."""
        return copied_to(self._on_host, self.present.device) if self.on_device is None else self.on_device

    @cached_property
    def present(self) -> Tensor:
        """A layer that is there."""
        return next(layer for layer in self.layers if layer is not None)

    @cached_property
    def shape(self) -> tuple[int, int, int]:
        """`(B, T, D)`."""
        B, T, D = self.present.shape
        return B, T, D

    @cached_property
    def alignment(self) -> int:
        """Of every row, in bytes: 16, or what a single element needs.

        Triton sees of a width whether 16 divides it, and otherwise loads element by element, wherever the layers lie.
        """
        aligned = self.shape[2] % 16 == 0 and not any(address % 16 for address in self._on_host)
        return 16 if aligned else self.present.element_size()

    def __len__(self) -> int:
        """`L`."""
        return len(self.layers)


class OnDevice(NamedTuple):
    """What kernels read beside the layers themselves, which went to the device in one copy."""

    numbers: tuple[Tensor, ...]
    """0-d fp32 each, as they were given"""
    hidden: LayerTable
    out: LayerTable | None

    @classmethod
    def of(cls, numbers: Sequence[float], hidden: LayerTable, out: LayerTable | None = None) -> OnDevice:
        """Of some numbers, the hidden states, and the places of their gradients."""
        bits = [_fp32_bits(number) for number in numbers]
        table = copied_to([*bits, *hidden._on_host, *(out._on_host if out else [])], hidden.present.device)
        first, last = len(bits), len(bits) + len(hidden)
        return cls(
            table.view(torch.float32)[: 2 * first : 2].unbind(0),
            replace(hidden, on_device=table[first:last]),
            replace(out, on_device=table[last:]) if out else None,
        )


@dataclass(frozen=True)
class Upstream:
    """The gradient that arrives for each of some layers, `factor * grad[l]`; a 0-d `grad` is that of every layer."""

    grad: Tensor
    """0-d, or `[l]` with any stride"""
    factor: float = 1.0

    @property
    def arguments(self) -> tuple[Tensor, int, float]:
        """As the kernels take it: where it lies, its stride, and the factor."""
        return self.grad, self.grad.stride(0) if self.grad.dim() else 0, self.factor


@dataclass(frozen=True)
class ScaledSimilarity:
    """`s_ij = h_i.h_j r_i r_j / tau` as kernels take it."""

    cosine: bool
    inverse_temperature: Tensor
    """`1/tau`, 0-d fp32 on the device"""
    match_negatives: float | None
    bounded: bool = False
    """a cosine at a tau, given as a number, so large that `exp(s - 1/tau)` of no score underflows"""


def check_dtype(hidden: Tensor) -> None:
    """Refuse what the kernels do not compute with."""
    if hidden.dtype not in DTYPES:
        raise TypeError(
            f"hidden_states must be fp16, bf16 or fp32 for the triton backend, got {hidden.dtype}. "
            "Convert them, or use backend='torch'."
        )


def readable(layers: Sequence[Tensor]) -> LayerTable:
    """The layers as kernels read them, row after row: one that lies otherwise is refused, since a copy has its price.

    Raises:
        ValueError: a layer is not contiguous.
    """
    for index, layer in enumerate(layers):
        if not layer.is_contiguous():
            raise ValueError(
                f"hidden_states[{index}] is a view {list(layer.shape)} with strides {list(layer.stride())}; the triton "
                "backend reads contiguous layers. Pass layer.contiguous(), a copy whose gradient flows back to it, or "
                "use backend='torch', which copies such layers one at a time."
            )
    return LayerTable(tuple(layers))


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
        "DTYPE": DTYPES[tables[0].present.dtype],
        "ALIGNMENT": min(table.alignment for table in tables),
        "INTERPRETED": target(tables[0].present.device) is _runtime.INTERPRETER,
    }


def dot_precision(dtype: torch.dtype) -> str:
    """`input_precision` of a dot: "ieee" for fp32 unless torch is told to use tf32; halves have no choice."""
    if dtype != torch.float32:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def mi_precision(layer: Tensor, cosine: bool) -> str:
    """`dot_precision` of the MI loss, where NVIDIA's devices multiply fp32 on tensor cores, too.

    In "bf16x6" a number is the sum of three of bfloat16, which have all its digits, and of the nine products of two
    numbers the six that count are added up. Not for dot products as scores: `h_i . h_j` and `h_j . h_i` may differ in
    the last digit, which decides what the exponential of a score of a million is; a cosine is 1/tau at most.
    AMD's matrix units take fp32 as it is.
    """
    precision = dot_precision(layer.dtype)
    if precision == "ieee" and layer.dtype == torch.float32 and cosine and target(layer.device).capability is not None:
        return "bf16x6"
    return precision


def inverse_temperature(temperature: Tensor | None, value: Tensor) -> Tensor:
    """`1/tau`, 0-d fp32 on the device; `value` if tau is a number."""
    return value if temperature is None else temperature.detach().to(torch.float32).reciprocal()


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Launch there: Triton launches on the current device, wherever the tensors are."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def target(device: torch.device) -> _runtime.Target:
    """What runs kernels on tensors of this device, which the call was let through for."""
    found = _runtime.target(device)
    assert found is not None, f"nothing runs kernels on {device}: see `choose_backend`"
    return found


def hull(first: range, second: range) -> range:
    """The shortest range that holds both."""
    if not len(first) or not len(second):
        return first if len(first) else second
    return range(min(first.start, second.start), max(first.stop, second.stop))


def ceil_div(a: int, b: int) -> int:
    """How many pieces of b hold a."""
    return -(-a // b)


_LARGEST = torch.finfo(torch.float32).max


def _fp32_bits(number: float) -> int:
    """As an int64 begins with them in memory."""
    return int.from_bytes(struct.pack("=f", min(number, _LARGEST)), sys.byteorder)
