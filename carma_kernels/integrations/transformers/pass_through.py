"""CARMA's gradient added to the task's while the backward passes by, so that there never is one buffer for each layer.

The plain call's backward makes the gradients of all layers at once, when the activations of the whole model are still
there. Here an identity follows each block. The loss is computed apart from the model's graph, and joined to it by a
node that takes the hidden states and gives them no gradient, but which autograd therefore runs before every identity:
it notes which gradient arrived for the loss. The identities, last block first, then make their layers' gradients, a
few layers at a time, add the incoming ones, and hand the sums on; hidden states that no layer is waiting for any more
are let go of.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks

from carma_kernels import CarmaConfig, CarmaOutput, PairIndex, TokenSpans, carma_loss
from carma_kernels._operators import only_layers

_AT_ONCE = 4
"""Layers whose gradients are made by one call. A call costs host time, a gradient memory, of which a language model has
just given back many times as much: its logits' gradient."""


class PassThrough:
    """The identities of one forward, and the losses of what went through them."""

    def __init__(self, captured: list[Tensor | None]) -> None:
        """Take the tap's references to the hidden states, which the backward lets go of."""
        self._captured = captured
        self._losses: list[_Loss] = []
        self.released = False  # a backward has let go of some

    def identity(self, slot: int, states: Tensor) -> Tensor:
        """`states` `[B, T, D]` of the block with this number, for the next block to take."""
        # weak: the identity is reachable from the captured states, and they from here
        through: Tensor = _Identity.apply(weakref.ref(self), slot, states)
        return through

    def carma_loss(
        self, states: Sequence[Tensor], prefix: int, pairs: TokenSpans | PairIndex, config: CarmaConfig, **options: Any
    ) -> CarmaOutput | None:
        """`carma_kernels.carma_loss` of `states` without their first `prefix` tokens; None where that has to be called.

        That is with a learned temperature, whose gradient needs every layer at once; with negatives from other
        processes, whose gradients are exchanged in a backward that every process runs at the same point; and for states
        that did not pass an identity each, as those of blocks that ran under no_grad.
        """
        learned = isinstance(config.temperature, Tensor) and config.temperature.requires_grad
        passed = all(isinstance(layer.grad_fn, _Identity._backward_cls) for layer in states if layer.requires_grad)
        different = len({layer.data_ptr() for layer in states}) == len(states)
        exchanged = options.get("group") is not None and config.negatives == "batch"
        if learned or exchanged or not passed or not different or not torch.is_grad_enabled():
            return None
        loss = _Loss(states, prefix)
        output = loss.compute(pairs, config, options)
        self._losses.append(loss)
        connected = _Join.apply(self, loss, *states)
        return output._replace(loss=connected[0], mi=connected[1], stability=connected[2])

    def add_gradients(self, slot: int, incoming: Tensor | None) -> Tensor | None:
        """Those of the losses for one layer, added to the one from above, `[B, T, D]`."""
        for loss in self._losses:
            incoming = loss.add_gradient(slot, incoming)
        if not _graph_is_kept():
            self._captured[slot] = None
            self.released = True
        return incoming


class _Loss:
    """A loss with a graph of its own, whose backward is run a few layers at a time."""

    def __init__(self, states: Sequence[Tensor], prefix: int) -> None:
        self._prefix = prefix
        self._states: list[Tensor | None] = [layer.detach()[:, prefix:] for layer in states]  # [B, T, D] each
        self._waiting = {slot for slot, layer in enumerate(states) if layer.requires_grad}
        self._edges: dict[int, GradientEdge] = {}
        self._first = 0  # of the layers in use
        self.outputs: tuple[Tensor, Tensor, Tensor] | None = None  # loss, mi, stability
        self._upstream: tuple[Tensor | None, ...] = ()
        self._backward = -1  # the run of autograd in which `_upstream` arrived
        self._made: dict[int, Tensor | None] = {}  # gradients that their layers have not fetched yet
        self._slot = 0  # whose gradient is wanted

    def compute(self, pairs: TokenSpans | PairIndex, config: CarmaConfig, options: dict[str, Any]) -> CarmaOutput:
        """The output, connected to nothing but this loss."""
        states = [layer for layer in self._states if layer is not None]
        ranges = (config.mi_layers, config.stability_layers)
        self._first = min(0 if bounds is None else bounds[0] for bounds in ranges)
        # not leaves: the graph would keep those, and their memory
        anchor = torch.zeros((), device=states[0].device, requires_grad=True)
        sources = [
            _Source.apply(anchor, layer) if slot in self._waiting else layer for slot, layer in enumerate(states)
        ]
        self._edges = {slot: get_gradient_edge(sources[slot]) for slot in self._waiting}
        slots = {layer.data_ptr(): slot for slot, layer in enumerate(states)}
        versions = [layer._version for layer in states]

        def pack(tensor: Tensor) -> Tensor | int:
            return slots.get(tensor.data_ptr(), tensor)

        def unpack(packed: Tensor | int) -> Tensor:
            if isinstance(packed, Tensor):
                return packed
            # one that was let go of is not next to a layer whose gradient is being made, so it is not read
            slot = self._slot if self._states[packed] is None else packed
            layer = self._states[slot]
            assert layer is not None
            if layer._version != versions[slot]:
                raise RuntimeError(
                    f"the hidden states of layer {slot} were changed in place between the CARMA loss and its backward. "
                    "Clone them before they are written to."
                )
            return layer

        with saved_tensors_hooks(pack, unpack):
            output = carma_loss(sources, pairs, config, **options)
        self.outputs = output[:3]
        return output

    def add_gradient(self, slot: int, incoming: Tensor | None) -> Tensor | None:
        """This loss's gradient of one layer, added to the one from above."""
        if self.outputs is None or self._backward != torch._C._current_graph_task_id():
            return incoming
        if slot not in self._made:
            self._make(slot)
        gradient = self._made.pop(slot)
        if not _graph_is_kept():
            self._let_go(slot)
        return _sum(gradient, incoming, self._prefix)

    def arrive(self, upstream: tuple[Tensor | None, ...]) -> None:
        """The gradients of `outputs`, as a backward begins."""
        self._upstream, self._backward = upstream, torch._C._current_graph_task_id()
        self._made.clear()

    def _make(self, slot: int) -> None:
        """The gradient of this layer and of those before it, which come next."""
        assert self.outputs is not None
        self._slot = slot
        slots = [at for at in range(slot, -1, -1) if at in self._edges][:_AT_ONCE]
        arrived = [(out, grad) for out, grad in zip(self.outputs, self._upstream, strict=True) if grad is not None]
        with only_layers([at - self._first for at in slots]):
            gradients = torch.autograd.grad(
                [out for out, _ in arrived],
                [self._edges[at] for at in slots],
                [grad for _, grad in arrived],
                retain_graph=True,
                allow_unused=True,
            )
        self._made.update(zip(slots, gradients, strict=True))

    def _let_go(self, slot: int) -> None:
        """Of the hidden states that were last needed for this layer's gradient."""
        self._waiting.discard(slot)
        for done in (slot - 1, slot, slot + 1):
            if 0 <= done < len(self._states) and not {done - 1, done, done + 1} & self._waiting:
                self._states[done] = None
        if not self._waiting:
            self.outputs, self._edges = None, {}


def _sum(gradient: Tensor | None, incoming: Tensor | None, prefix: int) -> Tensor | None:
    """`gradient` `[B, T, D]`, which is written to, and `incoming` `[B, prefix + T, D]`, which others may hold too."""
    if gradient is None:
        return incoming
    if prefix:
        gradient = torch.nn.functional.pad(gradient, (0, 0, prefix, 0))
    return gradient if incoming is None else gradient.add_(incoming)


def _graph_is_kept() -> bool:
    """`backward(retain_graph=True)`."""
    kept: bool = torch._C._autograd._get_current_graph_task_keep_graph()
    return kept


class _Identity(torch.autograd.Function):
    """A block's output, unchanged; in the backward the losses' gradients join the one from above."""

    @staticmethod
    def forward(ctx: Any, passes: weakref.ref[PassThrough], slot: int, states: Tensor) -> Tensor:
        ctx.passes, ctx.slot = passes, slot
        ctx.set_materialize_grads(False)
        return states.detach()  # of a view autograd would forbid the in-place operations that it allows of `states`

    @staticmethod
    def backward(ctx: Any, incoming: Tensor | None) -> tuple[Any, ...]:
        passes = ctx.passes()
        return None, None, incoming if passes is None else passes.add_gradients(ctx.slot, incoming)


class _Join(torch.autograd.Function):
    """The values of a loss, connected to the hidden states, which get their gradients from the identities."""

    @staticmethod
    def forward(ctx: Any, passes: PassThrough, loss: _Loss, *_states: Tensor) -> tuple[Tensor, ...]:
        ctx.passes, ctx.loss = passes, loss  # also keeps them alive as long as the graph
        ctx.set_materialize_grads(False)
        assert loss.outputs is not None
        return tuple(output.detach() for output in loss.outputs)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Any, ...]:
        ctx.loss.arrive(upstream)
        return (None,) * len(ctx.needs_input_grad)


class _Source(torch.autograd.Function):
    """Hidden states as an input of a loss's own graph."""

    @staticmethod
    def forward(_ctx: Any, _anchor: Tensor, states: Tensor) -> Tensor:
        return states.detach()

    @staticmethod
    def backward(_ctx: Any, _gradient: Tensor) -> tuple[Any, ...]:
        raise AssertionError("the gradient is asked for at the edge, before it gets here")
