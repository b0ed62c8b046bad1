"""CARMA's gradient made layer by layer while the backward passes by, so that there never is one buffer for each layer.

The plain call's backward makes the gradients of all layers at once, when the activations of the whole model are still
there. Here a loss is computed apart from the model's graph, and each layer has a node of its own there, its *share*,
which takes the layer's hidden states as any loss would, and whose backward makes their gradient. An identity follows
each block and takes the share of the layer before, which it so holds back: autograd runs an identity before the nodes
it takes from, of these the newest first, and so comes to that share when it has gone back through the block. The last
layer's share is taken by the losses, whose gradients therefore arrive before any share is asked for.

So hidden states get the whole gradient, the losses' and what comes from above, wherever one looks. A few layers'
gradients are made at a time, and hidden states that no layer is waiting for any more are let go of.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from carma_kernels import CarmaConfig, CarmaOutput, PairIndex, TokenSpans
from carma_kernels._by_layer import LossByLayer, TermGradients

_AT_ONCE = 4
"""Layers whose gradients are made by one call. A call costs host time, a gradient memory, of which a language model has
just given back many times as much: its logits' gradient."""


class Capture(Protocol):
    """The tap's reference to what a block returned."""

    states: Tensor | None


class PassThrough:
    """The nodes of one forward, and the losses of what went through them."""

    def __init__(self, captures: Sequence[Capture]) -> None:
        """Take the tap's references to the hidden states, which the backward lets go of."""
        self._captures = captures
        self._losses: list[_Loss] = []
        self._held_back: Tensor | None = None  # the newest share, which nobody has taken yet
        self.released = False  # a backward has let go of some

    def identity(self, slot: int, states: Tensor) -> Tensor:
        """`states` `[B, T, D]` of the block with this number, for the next block to take."""
        # weak: the nodes are reachable from the captured states, and they from here
        this = weakref.ref(self)
        through: Tensor = _Identity.apply(this, slot, states, self._held_back)
        self._held_back = _Share.apply(this, slot, through)
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
        loss = _Loss(states, prefix, pairs, config, options)
        self._losses.append(loss)
        connected = _Join.apply(self, loss, self._held_back)
        return loss.output._replace(loss=connected[0], mi=connected[1], stability=connected[2])

    def share(self, slot: int) -> Tensor | None:
        """The losses' gradient of one layer `[B, T, D]`; None if none has arrived."""
        shares = (loss.share(slot) for loss in self._losses)
        found = [share for share in shares if share is not None]
        return sum(found[1:], found[0]) if found else None

    def let_go(self, slot: int) -> None:
        """Of the captured states of a layer that the backward has come by."""
        if self._captures and not _graph_is_kept():
            self._captures[slot].states = None
            self.released = True

    def forget_captures(self) -> None:
        """The tap is about to capture another forward."""
        self._captures = ()


class _Loss:
    """A loss of the hidden states of all layers, whose gradients are made a few layers at a time."""

    def __init__(
        self,
        states: Sequence[Tensor],
        prefix: int,
        pairs: TokenSpans | PairIndex,
        config: CarmaConfig,
        options: dict[str, Any],
    ) -> None:
        own = [without_prefix(layer.detach(), prefix) for layer in states]  # [B, T, D] each
        self._by_layer: LossByLayer | None = LossByLayer(own, pairs, config, **options)
        self.output = self._by_layer.output
        self._prefix = prefix
        self._states: list[Tensor | None] = [*own]
        self._versions = [layer._version for layer in own]
        self._waiting = {slot for slot in self._by_layer.layers if states[slot].requires_grad}
        self._arrived: dict[int, TermGradients] = {}  # by the run of autograd that they arrived in
        self._made: dict[int, dict[int, Tensor]] = {}  # gradients by that run, until their layers fetch them

    def arrive(self, upstream: Sequence[Tensor | None]) -> None:
        """The gradients of the outputs, as a backward begins."""
        if self._by_layer is None:
            raise RuntimeError(
                "Trying to go backward through a CARMA loss a second time, when the first has let go of the hidden "
                "states. Say retain_graph=True the first time."
            )
        run = torch._C._current_graph_task_id()
        self._arrived[run], self._made[run] = self._by_layer.of_terms(upstream), {}
        torch.autograd.Variable._execution_engine.queue_callback(lambda: self._forget(run))

    def _forget(self, run: int) -> None:
        self._arrived.pop(run, None)
        self._made.pop(run, None)

    def share(self, slot: int) -> Tensor | None:
        """This loss's gradient of one layer, in the backward in progress."""
        run = torch._C._current_graph_task_id()
        if run not in self._arrived or slot not in self._waiting:
            return None
        made = self._made[run]
        if slot not in made:
            made.update(self._make(slot, self._arrived[run]))
        share = made.pop(slot)
        if not _graph_is_kept():
            self._let_go(slot)
        return torch.nn.functional.pad(share, (0, 0, self._prefix, 0)) if self._prefix else share

    def _make(self, slot: int, terms: TermGradients) -> dict[int, Tensor]:
        """The gradient of this layer and of those before it, which come next."""
        assert self._by_layer is not None
        for at, layer in enumerate(self._states):
            if layer is not None and layer._version != self._versions[at]:
                raise RuntimeError(
                    f"the hidden states of layer {at} were changed in place between the CARMA loss and its backward. "
                    "Clone them before they are written to."
                )
        here = self._states[slot]
        assert here is not None
        # for those that were let go of, which are next to no layer whose gradient is to be made, any will do
        states = [here if layer is None else layer for layer in self._states]
        slots = [at for at in range(slot, -1, -1) if at in self._waiting][:_AT_ONCE]
        return self._by_layer.of_layers(states, terms, slots)

    def _let_go(self, slot: int) -> None:
        """Of the hidden states that were last needed for this layer's gradient."""
        self._waiting.discard(slot)
        for done in (slot - 1, slot, slot + 1):
            if 0 <= done < len(self._states) and not {done - 1, done, done + 1} & self._waiting:
                self._states[done] = None
        if not self._waiting:
            self._by_layer = None


def without_prefix(states: Tensor, prefix: int) -> Tensor:
    """`[B, T, D]` of `[B, prefix + T, D]`: the states as they are, or a copy of the rest, which kernels can read."""
    return states[:, prefix:].contiguous() if prefix else states


def _graph_is_kept() -> bool:
    """`backward(retain_graph=True)`."""
    kept: bool = torch._C._autograd._get_current_graph_task_keep_graph()
    return kept


class _Identity(torch.autograd.Function):
    """A block's output, unchanged, once the share of the layer before is there to be held back."""

    @staticmethod
    def forward(
        ctx: Any, passes: weakref.ref[PassThrough], slot: int, states: Tensor, _share_before: Tensor | None
    ) -> Tensor:
        ctx.passes, ctx.slot = passes, slot
        ctx.set_materialize_grads(False)
        return states.detach()  # of a view autograd would forbid the in-place operations that it allows of `states`

    @staticmethod
    def backward(ctx: Any, incoming: Tensor | None) -> tuple[Any, ...]:
        if (passes := ctx.passes()) is not None:
            passes.let_go(ctx.slot)
        return None, None, incoming, None


class _Share(torch.autograd.Function):
    """The losses of one layer's hidden states, as an empty tensor that stands for them."""

    @staticmethod
    def forward(ctx: Any, passes: weakref.ref[PassThrough], slot: int, states: Tensor) -> Tensor:
        ctx.passes, ctx.slot = passes, slot
        ctx.set_materialize_grads(False)
        return states.new_empty(0)

    @staticmethod
    def backward(ctx: Any, _nothing: Tensor | None) -> tuple[Any, ...]:
        passes = ctx.passes()
        return None, None, None if passes is None else passes.share(ctx.slot)


class _Join(torch.autograd.Function):
    """The values of a loss, connected to the hidden states, which get their gradients from their shares."""

    @staticmethod
    def forward(ctx: Any, passes: PassThrough, loss: _Loss, _last_share: Tensor) -> tuple[Tensor, ...]:
        ctx.passes, ctx.loss = passes, loss  # also keeps them alive as long as the graph
        ctx.set_materialize_grads(False)
        return tuple(output.detach() for output in loss.output[:3])

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Any, ...]:
        ctx.loss.arrive(upstream)
        return None, None, None
