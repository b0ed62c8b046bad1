"""Reading hidden states some layers at a time, and adding to some of their rows.

How many is a matter of the device. On a CPU a few MB, which stay in its caches. On another device an operation is to be
worth its launch, of some 5 us, and the workspace is to stay within 128 MB of fp32. That holds the layers five times: a
copy of them and their neighbours, their gradients, the same of the rows that are compared, and the anchors. So some 7
million numbers are taken together, which an H200 reads and writes in 15 us: more would gain little. A layer of more
numbers is taken alone.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from carma_kernels import _runtime
from carma_kernels._terms import ZERO_NORM


def own_precision(device: torch.device) -> AbstractContextManager[None]:
    """Keep an ambient autocast out: the result depends on the inputs alone."""
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Everything is computed in fp32, or in fp64 for fp64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def multiplies_halves(device: torch.device) -> bool:
    """Whether there is a product of halves in fp32: NVIDIA's tensor cores have one, which torch 2.8 calls first."""
    if device.type != "cuda" or "dtype" not in torch.ops.aten.bmm.overloads():
        return False
    gpu = _runtime.target(device)
    return gpu is not None and gpu.capability is not None


def launches_cost(device: torch.device) -> bool:
    """Whether an operation has to be launched; not on a CPU."""
    return device.type != "cpu"


class Receivers:
    """The layers that need a gradient, and its place in what `empty_gradients` made."""

    def __init__(self, hidden: Sequence[Tensor], gradients: Sequence[Tensor], needs_grad: Sequence[bool]) -> None:
        """Take the hidden states `[L, B, T, D]` alone or L times `[B, T, D]`, and the gradients of some of them."""
        self._like = hidden[0]
        self._stacked = gradients[0] if gradients and hidden[0].dim() == 4 else None
        if self._stacked is not None:
            self._of_layer = dict(enumerate(self._stacked.unbind(0)))
        else:
            needed = [layer for layer, is_needed in enumerate(needs_grad) if is_needed and gradients]
            self._of_layer = dict(zip(needed, gradients, strict=True))

    def __contains__(self, layer: int) -> bool:
        """Whether it needs a gradient."""
        return layer in self._of_layer

    def room(self, layers: range) -> Tensor:
        """Where the gradients of some layers are to be summed up, `[l, N, D]` in the compute dtype, not initialised."""
        place = self._place(layers)
        dtype = compute_dtype(self._like.dtype)
        if place is not None and place.dtype == dtype:
            return place
        B, T, D = self._like.shape[-3:]
        return torch.empty((len(layers), B * T, D), dtype=dtype, device=self._like.device)

    def receive(self, layers: range, room: Tensor) -> None:
        """Take what was summed up there, as far as it is needed."""
        place = self._place(layers)
        if place is None:
            sums = room.view(len(layers), *self._like.shape[-3:]).unbind(0)
            needed = [layer for layer in layers if layer in self]
            if needed:
                to = [self._of_layer[layer] for layer in needed]
                torch._foreach_copy_(to, [sums[layer - layers.start] for layer in needed])
        elif place.dtype != room.dtype:
            place.copy_(room)

    def _place(self, layers: range) -> Tensor | None:
        """The gradients themselves as rows `[l, N, D]`, of one layer or where they lie stacked."""
        if self._stacked is not None:
            return self._stacked[layers.start : layers.stop].flatten(1, 2)
        if len(layers) == 1 and layers.start in self:
            return self._of_layer[layers.start][None].flatten(1, 2)
        return None


class Steps(NamedTuple):
    """Some consecutive steps from a layer to the next."""

    steps: range  # step l leads from layer l to layer l + 1
    change: Tensor  # [len(steps), N, D], h_{l+1} - h_l in the compute dtype


class LayerRows:
    """The layers of hidden states `[L, B, T, D]`, or L times `[B, T, D]`, as rows `[l, N, D]`, `N = B*T`.

    In the compute dtype, but for halves that can be multiplied as they are. One contiguous layer of the right dtype, or
    some that lie stacked, are a view; others are copied when they are read. The last two single layers and the last
    step between them are kept, or what was read together, so that a walk over the layers makes each thing once.
    """

    def __init__(self, hidden: Sequence[Tensor]) -> None:
        """Take `[L, B, T, D]` alone or L times `[B, T, D]`; nothing is read yet."""
        first = hidden[0]
        self._hidden = first if first.dim() == 4 else list(hidden)
        self._compute_dtype = compute_dtype(first.dtype)
        self._dtype = first.dtype if multiplies_halves(first.device) else self._compute_dtype
        self._single: dict[int, Tensor] = {}
        self._change: tuple[int, Tensor] | None = None
        self._together: tuple[range, Tensor] | None = None

    def rows(self, layers: range, steps: range) -> Tensor:
        """Some layers `[l, N, D]`; `steps` says which of their `changes` will be asked for."""
        if len(layers) == 1:
            return self._single_layer(layers.start)
        return at(self._read_together(layers, steps), places(layers, _with_neighbours(layers, steps)))

    def changes(self, layers: range, steps: range) -> Iterator[Steps]:
        """The steps asked for, which start or end at one of the layers; each is good until the next is asked for."""
        if len(layers) == 1:
            for step in steps:
                yield Steps(range(step, step + 1), self._single_step(step))
        elif steps:
            read = _with_neighbours(layers, steps)
            reached = at(self._read_together(layers, steps), places(range(steps.start, steps.stop + 1), read))
            if reached.dtype == self._compute_dtype:
                yield Steps(steps, reached[1:] - reached[:-1])
            else:
                yield Steps(steps, reached[1:].to(self._compute_dtype).sub_(reached[:-1]))

    def _read_together(self, layers: range, steps: range) -> Tensor:
        read = _with_neighbours(layers, steps)
        if self._together is None or self._together[0] != read:
            self._together = None  # its memory, before more is asked for
            self._together = (read, self._rows(read).contiguous())
        return self._together[1]

    def _rows(self, layers: range) -> Tensor:
        some = self._hidden[layers.start : layers.stop]
        if not isinstance(some, Tensor):
            some = some[0][None] if len(some) == 1 else torch.stack(some)
        return some.to(self._dtype).flatten(1, 2)

    def _single_layer(self, layer: int) -> Tensor:
        if layer not in self._single:
            while len(self._single) > 1:
                self._single.pop(min(self._single))
            self._single[layer] = self._rows(range(layer, layer + 1))
        return self._single[layer]

    def _single_step(self, step: int) -> Tensor:
        if self._change is None or self._change[0] != step:
            before, after = self._single_layer(step), self._single_layer(step + 1)
            # in the memory of the last: new memory would be fetched anew, page by page
            change = self._change[1] if self._change else before.new_empty(before.shape, dtype=self._compute_dtype)
            if before.dtype == change.dtype:
                torch.sub(after, before, out=change)
            else:
                change.copy_(after).sub_(before)
            self._change = (step, change)
        return self._change[1]


def _with_neighbours(layers: range, steps: range) -> range:
    """The layers, and those that the steps start from or lead to."""
    return range(min(layers.start, steps.start), max(layers.stop, steps.stop + 1)) if steps else layers


_WORKSPACE = 1 << 25  # numbers in fp32, where operations are launched
_AT_ONCE_ON_CPU = 1 << 20
_SMALL_ON_CPU = 3 << 15  # a layer of more numbers is worth an operation of its own, which finds it in a near cache
_TILE_ON_CPU = 1 << 18  # below, operations take longer to be called than to be done


def layers_at_once(layer: Tensor, at_most: int) -> int:
    """How many layers like this one `[B, T, D]` to read together, for one operation each."""
    size = max(1, layer.numel())
    if launches_cost(layer.device):
        return max(1, min(at_most, _launched_on() // size))
    return max(1, min(at_most, _AT_ONCE_ON_CPU // size)) if size <= _SMALL_ON_CPU else 1


def _launched_on() -> int:
    """Numbers that make an operation worth its launch."""
    return _WORKSPACE // 5


def tile_size(layer_size: int, device: torch.device) -> int:
    """Numbers at most in a tile of similarities, of one layer of so many numbers or of some."""
    if launches_cost(device):  # half of what is taken together, if that is more than a quarter of a layer
        return max(layer_size // 4, _launched_on() // 2)
    return max(layer_size, _TILE_ON_CPU)


def gathered_size(rows: Tensor) -> int:
    """Numbers at most in what is gathered from some layers `[l, N, D]`, a row perhaps many times: as many as theirs."""
    return max(rows.numel(), _launched_on() if launches_cost(rows.device) else _TILE_ON_CPU)


def runs(layers: Iterable[int], at_once: int, bounds: Collection[int] = ()) -> Iterator[range]:
    """Ascending layers in runs of neighbours, none of which goes on beyond a bound, where another begins."""
    run = range(0)
    for layer in layers:
        if run and (layer != run.stop or len(run) == at_once or layer in bounds):
            yield run
            run = range(0)
        run = range(run.start if run else layer, layer + 1)
    if run:
        yield run


def common(some: range, others: range) -> range:
    """Layers in both."""
    start = max(some.start, others.start)
    return range(start, max(start, min(some.stop, others.stop)))


def at(tensor: Tensor, place: slice) -> Tensor:
    """Some of its layers `[L, ...]`; itself for all of them, which spares a view."""
    return tensor if place.start == 0 and place.stop == tensor.shape[0] else tensor[place]


def joined(parts: list[Tensor]) -> Tensor:
    """Of some layers after others, one after the other; one part as it is."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def places(some: range, others: range) -> slice:
    """Where among the others some of them are."""
    return slice(some.start - others.start, some.stop - others.start)


def norms(rows: Tensor) -> Tensor:
    """`|h|` of each row: `[..., D]` to `[...]`, in the compute dtype."""
    return torch.linalg.vector_norm(rows, dim=-1, dtype=compute_dtype(rows.dtype))  # type: ignore[no-any-return]


def inverse_norms(norm: Tensor) -> Tensor:
    """`1/|h|`, and 0 for a vector of no length, which so has similarity 0 and gradient 0."""
    return torch.nn.functional.threshold(norm, ZERO_NORM, math.inf).reciprocal_()


def inverse(temperature: Tensor | float, dtype: torch.dtype) -> Tensor | float:
    """`1/tau` in the compute dtype."""
    return temperature.to(dtype).reciprocal() if isinstance(temperature, Tensor) else 1.0 / temperature


_ROWS = 12
_FEW_ROWS = 64
_SHORT = 128
"""MKL multiplies up to a dozen rows with the rows of a short matrix several times as fast as it does fifteen to fifty,
for which it rearranges that matrix first."""


def products(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """The products of rows `[n, p, D]` with rows `[n, q, D]` as `[n, p, q]` in the compute dtype.

    Those of halves are exact in fp32, which is what tensor cores add them up in.
    """
    dtype = compute_dtype(left.dtype)
    p, q = left.shape[1], right.shape[1]
    right = right.mT
    if left.dtype != dtype:
        multiplied = torch.bmm(left, right, out_dtype=dtype)
        return multiplied if out is None else out.copy_(multiplied)
    if launches_cost(left.device) or not (_ROWS < p <= _FEW_ROWS and q <= _SHORT):
        return torch.bmm(left, right, out=out)
    out = left.new_empty(len(left), p, q) if out is None else out
    num_pieces = -(-p // _ROWS)
    for some, to in zip(left.tensor_split(num_pieces, 1), out.tensor_split(num_pieces, 1), strict=True):
        torch.bmm(some, right, out=to)
    return out


def log_sum_exp_(x: Tensor, out: Tensor | None = None) -> Tensor:
    """Over the last dimension, `[..., n]` to `[...]`; x is used up. `torch.logsumexp` launches two operations more."""
    if not x.shape[-1]:
        return x.new_full(x.shape[:-1], -torch.inf)
    largest = torch.finfo(x.dtype).max
    top = x.amax(-1, keepdim=True).clamp_(-largest, largest)
    return torch.add(x.sub_(top).exp_().sum(-1).log_(), top.squeeze(-1), out=out)


def softplus(x: Tensor) -> Tensor:
    """`log(1 + exp(x))`, in fp64 to the last digit, too."""
    return torch.nn.functional.softplus(x, threshold=50.0)  # from where on it is x


def add_rows(out: Tensor, index: Tensor, rows: Tensor) -> None:
    """Add rows `[l, n, ...]` to those of `out` `[l, N, ...]` at `index` `[n]`, in which none comes twice.

    So where `index_add_` would use atomics, rows are read, added to, and written back.
    """
    if launches_cost(out.device):
        out.index_copy_(1, index, out.index_select(1, index).add_(rows))
    else:
        out.index_add_(1, index, rows)


def add_products(out: Tensor, index: Tensor, left: Tensor, right: Tensor) -> None:
    """Add `left @ right`, of `[n, p, q]` and `[n, q, D]`, to the rows of `out` `[l, N, D]` at `index`, as above."""
    if launches_cost(out.device):
        sums = out.index_select(1, index)
        sums.view(len(left), -1, sums.shape[-1]).baddbmm_(left, right)
        out.index_copy_(1, index, sums)
    else:
        out.index_add_(1, index, torch.bmm(left, right).view(len(out), -1, out.shape[-1]))


def add_repeated_rows(out: Tensor, index: Tensor, rows: Tensor) -> None:
    """`out[index[n]] += rows[n]` in a fixed order: `out` `[N, D]`, `index` `[n]`, `rows` `[n, D]`."""
    if launches_cost(out.device):  # sorts the indices
        out.index_put_((index,), rows, accumulate=True)
    else:
        out.index_add_(0, index, rows)
