"""An explicit list of pairs with the negatives of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

NO_TOKEN = -1


@dataclass(frozen=True, eq=False)
class PairIndex:
    """Explicit pairs with the negatives of each: sampled ones, hard ones, anything.

    A token is named by its flat index `b*T + t`. The negatives of a pair are exactly the tokens listed, repetition
    included; a slot of -1 holds none, and a pair with no negative costs 0 and still counts.

    Raises:
        TypeError: indices that are no integer tensors, or a mask that is no tensor of booleans or integers.
        ValueError: shapes or devices that do not belong together, or (checked for CPU tensors only, since no check
            reads device memory) an index outside `[0, B*T)`.
    """

    anchor: Tensor
    """`[P]` int32"""
    positive: Tensor
    """`[P]` int32"""
    negatives: Tensor
    """`[P, K]`, or `[L, P, K]` with a draw for each layer; int32"""
    shape: tuple[int, int]
    """`(B, T)` of the hidden states that the indices point into"""
    attention_mask: Tensor | None = None
    """`[B, T]` bool, the valid tokens, which are all that the stability term of `carma_loss` is a mean over; integers
    are converted. `None`: every token is valid"""

    def __post_init__(self) -> None:
        """Check what can be checked without reading device memory."""
        for name in ("anchor", "positive", "negatives"):
            tensor = getattr(self, name)
            if not isinstance(tensor, Tensor) or tensor.dtype not in (torch.int32, torch.int64):
                got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
                raise TypeError(f"{name} must be an int32 or int64 tensor of flat token indices b*T+t, got {got}.")
        if len(self.shape) != 2 or not all(isinstance(size, int) and size >= 0 for size in self.shape):
            raise ValueError(f"shape must be (B, T) of the hidden states, two ints, got {self.shape!r}.")
        object.__setattr__(self, "shape", tuple(self.shape))
        P = self.anchor.numel()
        if self.anchor.shape != (P,) or self.positive.shape != (P,):
            raise ValueError(
                "anchor and positive must both be [P], one entry a pair, got "
                f"{list(self.anchor.shape)} and {list(self.positive.shape)}."
            )
        if self.negatives.dim() not in (2, 3) or self.negatives.shape[-2] != P:
            raise ValueError(
                f"negatives must be [P, K] or [L, P, K] with P = {P} as in anchor, got {list(self.negatives.shape)}."
            )
        self._check_mask()
        if len({self.anchor.device, self.positive.device, self.negatives.device}) > 1:
            raise ValueError(
                f"anchor, positive and negatives must be on one device, got {self.anchor.device}, "
                f"{self.positive.device} and {self.negatives.device}."
            )
        if self.anchor.device.type == "cpu":
            self._check_range()
        for name in ("anchor", "positive", "negatives"):
            object.__setattr__(self, name, getattr(self, name).int())
        if self.attention_mask is not None:
            object.__setattr__(self, "attention_mask", self.attention_mask.bool())

    def _check_mask(self) -> None:
        mask = self.attention_mask
        if mask is None:
            return
        if not isinstance(mask, Tensor) or mask.is_floating_point() or mask.is_complex():
            got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(
                f"attention_mask must be a bool or integer tensor [B, T], 0 for padding, got {got}. Pass the batch's "
                "own, spans.attention_mask, or None where no token is padding."
            )
        if mask.shape != self.shape:
            raise ValueError(
                f"attention_mask has shape {list(mask.shape)}, the hidden states {list(self.shape)}; both must be "
                "[B, T] of the same padded batch."
            )
        if mask.device != self.anchor.device:
            raise ValueError(
                f"attention_mask is on {mask.device}, anchor on {self.anchor.device}; they must be on one device. "
                f"Pass attention_mask.to({str(self.anchor.device)!r})."
            )

    def _check_range(self) -> None:
        B, T = self.shape
        for name, lowest in (("anchor", 0), ("positive", 0), ("negatives", NO_TOKEN)):
            tensor: Tensor = getattr(self, name)
            if tensor.numel() and not (lowest <= int(tensor.min()) and int(tensor.max()) < B * T):
                raise ValueError(
                    f"{name} must hold flat token indices in [{lowest}, {B * T}) for {B} x {T} tokens, got values from "
                    f"{int(tensor.min())} to {int(tensor.max())}. The index of token t of sequence b is b * {T} + t."
                )

    @property
    def num_pairs(self) -> int:
        """`P`."""
        return self.anchor.shape[0]

    @property
    def device(self) -> torch.device:
        """Where the indices lie."""
        return self.anchor.device

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> PairIndex:
        """The same pairs on `device`."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PairIndex:
        """The same pairs in page-locked host memory."""
        return self._map(Tensor.pin_memory)

    def __reduce__(self) -> tuple[type[PairIndex], tuple[Any, ...]]:
        """Checked again where it is loaded."""
        return PairIndex, (self.anchor, self.positive, self.negatives, self.shape, self.attention_mask)

    def _map(self, move: Callable[[Tensor], Tensor]) -> PairIndex:
        mask = self.attention_mask
        return PairIndex(
            move(self.anchor),
            move(self.positive),
            move(self.negatives),
            self.shape,
            None if mask is None else move(mask),
        )


torch.serialization.add_safe_globals([PairIndex])
