"""A tap on the hidden states that a model computes anyway: references to what its blocks return, and nothing else."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from carma_kernels import CarmaConfig, CarmaOutput, PairIndex, TokenSpans, carma_loss
from carma_kernels._validate import layer_range
from carma_kernels.integrations.transformers.blocks import find_blocks, given_blocks, ran_compiled
from carma_kernels.integrations.transformers.pass_through import PassThrough, without_prefix


class HiddenStateTap:
    """Captures the raw outputs of a model's blocks, forward by forward.

        tap = HiddenStateTap(model)
        task_loss = model(**batch).loss
        carma = tap.carma_loss(spans, config)        # or ck.carma_loss(tap.hidden_states, spans, config)
        loss = ck.total_loss(task_loss, carma.loss, config.carma_weight)

    Works on Hugging Face causal language models and encoders, TransformerLens's, and any module with its blocks in a
    `ModuleList`; as they are or within DDP, FSDP, `torch.compile` and PEFT. The hooks only keep references: the model's
    outputs keep their bits, nothing is copied, cast or stacked, and activation checkpointing neither captures twice nor
    loses a gradient. `docs/hidden_states.md` says how.

    Attributes:
        no_grad: capture what runs under `torch.no_grad()` too, for evaluation; may be set at any time.
    """

    no_grad: bool

    def __init__(
        self,
        model: nn.Module,
        layers: tuple[int, int] | None = None,
        *,
        blocks: str | Sequence[nn.Module] | None = None,
        no_grad: bool = False,
        pass_through: bool = True,
    ) -> None:
        """Set the hooks.

        Args:
            model: before or after it is wrapped; but before it first runs compiled.
            layers: `(start, end)`, both included, of the blocks to tap; None for all. A config's `mi_layers` and
                `stability_layers` count from the first of them.
            blocks: the model's blocks, for a model in which they are not found: the path of their list
                ("decoder.block"), or the modules.
            no_grad: capture what runs under `torch.no_grad()` too.
            pass_through: have the backward of `tap.carma_loss` add each layer's gradient to the task's as it passes by,
                instead of making those of all layers first. It lets go of the hidden states too: read `hidden_states`
                before it.

        Raises:
            TypeError, ValueError: no blocks found, blocks that are not the model's, or layers out of range.
        """
        owner, modules = find_blocks(model) if blocks is None else given_blocks(model, blocks)
        chosen = layer_range(layers, len(modules))
        if ran_compiled(model):
            warnings.warn(
                f"{type(model).__name__} has already run compiled, and torch.compile takes no notice of hooks set "
                "afterwards: nothing will be captured. Set the tap before the first step, or call "
                "torch.compiler.reset() now.",
                stacklevel=2,
            )
        self.no_grad = no_grad
        self._peft: Any = next((part for part in model.modules() if hasattr(type(part), "active_peft_config")), None)
        self._captures = [_Capture(self, slot) for slot in range(len(chosen))]
        self._passes_through = pass_through
        self._passing: PassThrough | None = None
        self._attached = True
        self._begun = False  # a forward has begun and not ended
        self._capturing = False  # the forward in progress, or the last one
        self._skipped = False  # a forward under no_grad came after what is captured
        self._handles = [
            owner.register_forward_pre_hook(self._begin),
            owner.register_forward_hook(self._end),
            modules[chosen[0]].register_forward_pre_hook(self._begin_late),
            *(
                modules[layer].register_forward_hook(capture.keep)
                for layer, capture in zip(chosen, self._captures, strict=True)
            ),
        ]

    @property
    def hidden_states(self) -> list[Tensor]:
        """The block outputs of the last forward, L times `[B, T, D]`, in the dtype and on the device of each.

        The virtual tokens that prompt tuning puts first are left out: `T` counts the batch's own tokens.

        Raises:
            RuntimeError: nothing was captured, or not by every block.
        """
        prefix = self.num_virtual_tokens
        return [states[:, prefix:] if prefix else states for states in self._captured()]

    @property
    def num_virtual_tokens(self) -> int:
        """How many tokens prompt tuning (peft) puts before each sequence; 0 without it."""
        adapter: Any = self._peft.active_peft_config if self._peft is not None else None
        # prefix tuning gives keys and values to the attention, and no token to the blocks
        if adapter is None or not adapter.is_prompt_learning or adapter.peft_type == "PREFIX_TUNING":
            return 0
        return int(adapter.num_virtual_tokens)

    def carma_loss(
        self,
        spans_or_pairs: TokenSpans | PairIndex,
        config: CarmaConfig = CarmaConfig(),  # noqa: B008 (frozen)
        **options: Any,
    ) -> CarmaOutput:
        """`carma_kernels.carma_loss` of the hidden states of the last forward, with its arguments."""
        states, prefix = self._captured(), self.num_virtual_tokens
        if self._passing is not None:
            output = self._passing.carma_loss(states, prefix, spans_or_pairs, config, **options)
            if output is not None:
                return output
        return carma_loss([without_prefix(layer, prefix) for layer in states], spans_or_pairs, config, **options)

    def clear(self) -> None:
        """Let go of what is captured; the next forward does so itself."""
        for capture in self._captures:
            capture.clear()
        if self._passing is not None:
            self._passing.forget_captures()  # its backward may be still to come
        self._passing = None
        self._skipped = self._begun = False

    def remove(self) -> None:
        """Take the hooks off the model and let go of everything."""
        self._attached = False
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._peft = None
        self.clear()

    def __enter__(self) -> HiddenStateTap:
        """The tap itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """`remove()`."""
        self.remove()

    def __getstate__(self) -> dict[str, Any]:
        """A copy of a tapped model carries the hooks along; its tap is an idle one."""
        idle: dict[str, Any] = {"_peft": None, "_captures": [], "_passing": None, "_handles": [], "_attached": False}
        return {**vars(self), **idle, "_capturing": False}

    def _begin(self, _owner: nn.Module, _inputs: object) -> None:
        """A forward begins."""
        if not self._attached or _recomputing():  # not attached: a copy of a tapped model
            return
        # asked here rather than at a block: reentrant checkpointing runs the blocks under no_grad
        self._capturing = self.no_grad or torch.is_grad_enabled()
        self._skipped = not self._capturing
        if self._capturing:
            self.clear()
            if self._passes_through and torch.is_grad_enabled() and not torch.compiler.is_compiling():
                self._passing = PassThrough(self._captures)
        self._begun = True

    def _end(self, _owner: nn.Module, _inputs: object, _output: object) -> None:
        """And ends."""
        if not _recomputing():
            self._begun = False

    def _begin_late(self, block: nn.Module, inputs: object) -> None:
        """The first block runs; if nobody called its owner, as TransformerLens's `run_with_hooks`, a forward begins."""
        if not self._begun:
            self._begin(block, inputs)
            self._begun = False  # nobody says when it ends

    def _captured(self) -> list[Tensor]:
        """What the blocks returned, L times `[B, prefix + T, D]`, virtual tokens included; or raise."""
        captured = [capture.states for capture in self._captures if capture.states is not None]
        if len(captured) < len(self._captures) or (self._skipped and not torch.is_grad_enabled()):
            raise RuntimeError(self._why_incomplete())
        for capture in self._captures:
            capture.check()
        return captured

    def _why_incomplete(self) -> str:
        missing = [capture.slot for capture in self._captures if capture.states is None]
        wanted = len(self._captures)
        if not self._attached:
            return "the tap was removed from its model, and holds no hidden states. Set a new one."
        if self._skipped:
            return (
                "the last forward ran under torch.no_grad(), which the tap does not capture unless asked. For "
                "evaluation use HiddenStateTap(model, no_grad=True), or set tap.no_grad = True before it."
            )
        if self._passing is not None and self._passing.released:
            return (
                "the backward has let go of the hidden states. Read them before it, or keep them with "
                "backward(retain_graph=True)."
            )
        if len(missing) < wanted:
            return (
                f"only {wanted - len(missing)} of {wanted} blocks ran in the last forward; layers {missing} of the tap "
                "did not (LayerDrop, or an early exit). Turn that off, or tap the layers that always run with layers=."
            )
        return (
            "no forward has run since the tap was set or cleared. Run the model, by calling it, before the loss; a "
            "model that had run compiled before the tap was set needs torch.compiler.reset() first."
        )


class _Capture:
    """What one block returned last.

    An object for each block, and no number that tells the blocks apart: `torch.compile`, of one block after the other,
    would compile the hook again for each number.
    """

    def __init__(self, tap: HiddenStateTap, slot: int) -> None:
        self.tap = tap
        self.slot = slot
        self.states: Tensor | None = None
        self._version: int | None = None  # of the states as the block returned them, where that is known
        self._again = False  # the block has run twice

    def keep(self, _block: nn.Module, _inputs: object, output: Any) -> Any:
        """The block has run. Nothing is computed here, or reentrant checkpointing would give it no gradient."""
        if not self.tap._capturing or _recomputing():
            return None
        if self.states is not None:
            self._again = True
            return None
        states: Tensor = output if isinstance(output, Tensor) else output[0]
        self.states, self._version = states, None
        if torch.compiler.is_compiling():  # a block compiled by itself, too, in a forward that set identities up
            return None
        self._version = None if states.is_inference() else states._version
        through = self.tap._passing
        if through is None or not states.requires_grad or type(output) not in (Tensor, tuple):
            return None
        self.states = states = through.identity(self.slot, states)
        return states if isinstance(output, Tensor) else (states, *output[1:])

    def clear(self) -> None:
        """Let go of the states; another forward begins."""
        self.states, self._again = None, False

    def check(self) -> None:
        """Raise if the states are not all that the block has returned, or not any more."""
        if self._again:
            raise RuntimeError(
                f"the block of layer {self.slot} ran more than once in the last forward, and which of its outputs is "
                "the layer's is not to be told. Compute the losses with carma_kernels.carma_loss, of a list with all "
                "of them (output_hidden_states=True, say)."
            )
        if self.states is not None and self._version is not None and self.states._version != self._version:
            raise RuntimeError(
                f"the hidden states of layer {self.slot} were changed in place after their block had returned them, by "
                "the next block perhaps: what it returned is no more. Have that operation make a new tensor, or tap "
                "other layers with layers=."
            )

    def __getstate__(self) -> dict[str, Any]:
        """A copy has captured nothing."""
        return {**vars(self), "states": None}


def _recomputing() -> bool:
    """Within a backward: activation checkpointing runs forwards again there, whose outputs nobody uses."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
