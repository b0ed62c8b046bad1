"""Reading hidden states layer by layer, and adding to some of their rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from carma_kernels._terms import ZERO_NORM


@contextmanager
def own_precision(device: torch.device) -> Iterator[None]:
    """Keep an ambient autocast out: the result depends on the inputs alone."""
    if torch.amp.is_autocast_available(device.type):
        with torch.autocast(device.type, enabled=False):
            yield
    else:
        yield


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Everything is computed in fp32, or in fp64 for fp64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def receiving_layers(
    hidden: Sequence[Tensor], gradients: Sequence[Tensor], needs_grad: Sequence[bool]
) -> dict[int, Tensor]:
    """The layers that need a gradient, each with its room `[B, T, D]` in what `empty_gradients` made."""
    if not gradients:
        return {}
    if hidden[0].dim() == 4:
        return dict(enumerate(gradients[0].unbind(0)))
    return dict(zip([layer for layer, needed in enumerate(needs_grad) if needed], gradients, strict=True))


class LayerRows:
    """The layers of stacked or listed hidden states as rows `[B*T, D]` in the compute dtype.

    A contiguous fp32 layer is a view. Any other is copied when it is read; the last few read are kept, so that a walk
    over the layers that looks one ahead copies each once.
    """

    def __init__(self, hidden: Sequence[Tensor] | Tensor, at_once: int) -> None:
        """Take `[L, B, T, D]` or L times `[B, T, D]`, of which so many are used together; nothing is read yet."""
        self._hidden = hidden
        self._at_once = at_once
        self._recent: dict[int, Tensor] = {}
        self._differences: list[Tensor] = []
        self._differing: list[int | None] = [None, None]

    def __getitem__(self, layer: int) -> Tensor:
        """The rows of one layer."""
        if layer not in self._recent:
            hidden = self._hidden[layer]  # [B, T, D]
            while len(self._recent) > self._at_once:
                self._recent.pop(min(self._recent))
            self._recent[layer] = hidden.to(compute_dtype(hidden.dtype)).flatten(0, 1)
        return self._recent[layer]

    def step(self, layer: int) -> Tensor:
        """`h_{l+1} - h_l` `[N, D]`; good until the step after the next is asked for."""
        turn = layer % 2
        if self._differing[turn] != layer:
            rows, next_rows = self[layer], self[layer + 1]
            self._differences = self._differences or [torch.empty_like(rows), torch.empty_like(rows)]
            torch.sub(next_rows, rows, out=self._differences[turn])
            self._differing[turn] = layer
        return self._differences[turn]


_AT_ONCE = 1 << 19
"""Numbers in layers that are worked on together: a few MB, beyond which starting operations costs little."""


def layers_at_once(layer: Tensor, at_most: int) -> int:
    """How many layers like this one `[B, T, D]` to work on together; fewer where each must be held in fp32 as well."""
    numbers = _AT_ONCE if layer.dtype == compute_dtype(layer.dtype) else _AT_ONCE // 4
    return max(1, min(at_most, numbers // max(1, layer.numel())))


def runs(layers: Iterable[int], at_once: int) -> Iterator[range]:
    """Ascending layers in runs of neighbours."""
    run = range(0)
    for layer in layers:
        if run and (layer != run.stop or len(run) == at_once):
            yield run
            run = range(0)
        run = range(run.start if run else layer, layer + 1)
    if run:
        yield run


def norms(rows: Tensor) -> Tensor:
    """`|h|` of each row: `[N, D]` to `[N]`."""
    return torch.linalg.vector_norm(rows, dim=1)  # type: ignore[no-any-return]


def inverse_norms(norm: Tensor) -> Tensor:
    """`1/|h|`, and 0 for a vector of no length, which so has similarity 0 and gradient 0."""
    return torch.where(norm > ZERO_NORM, norm.reciprocal(), 0.0)


def inverse(temperature: Tensor | float, dtype: torch.dtype) -> Tensor | float:
    """`1/tau` in the compute dtype."""
    return temperature.to(dtype).reciprocal() if isinstance(temperature, Tensor) else 1.0 / temperature


def add_rows(out: Tensor, index: Tensor, rows: Tensor) -> None:
    """`out[index[n]] += rows[n]` in a fixed order: `out` `[N, D]`, `index` `[n]`, `rows` `[n, D]`."""
    if out.device.type == "cpu":
        out.index_add_(0, index, rows)
    else:  # sorts the indices, where index_add_ on a GPU would add in whatever order the atomics come
        out.index_put_((index,), rows, accumulate=True)
