"""Which layers take part, and a zero that autograd can go back through."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def select_layers(hidden_states: Tensor | Sequence[Tensor], layers: tuple[int, int] | None) -> list[Tensor]:
    """The layers `start..end`, both included as in the paper, `[B, T, D]` each, in fp64 if given so and else in fp32.

    Raises:
        ValueError: the range is not within the layers given.
    """
    L = len(hidden_states)
    start, end = (0, L - 1) if layers is None else layers
    if not 0 <= start <= end < L:
        raise ValueError(f"layers must be (start, end) with 0 <= start <= end < L = {L}, got {(start, end)}.")
    chosen = [hidden_states[layer] for layer in range(start, end + 1)]
    return [h.to(torch.promote_types(h.dtype, torch.float32)) for h in chosen]


def connected_zero(*inputs: Tensor | float) -> Tensor:
    """A 0 whose backward gives each tensor a gradient of real zeros, whatever NaN or inf it holds: an empty sum."""
    return torch.stack([x.reshape(-1)[:0].sum() for x in inputs if isinstance(x, Tensor)]).sum()


def check_option(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise a ValueError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}.")
