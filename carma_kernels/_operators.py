"""What the registered operators of all backends have in common: their arguments, and how their gradients come about."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from carma_kernels._terms import Gradients, HiddenStates, MITerm, Similarity, StabilityTerm
from carma_kernels.pairs import PairIndex
from carma_kernels.spans import ContrastTable


class CarmaArguments(NamedTuple):
    """Of the operators behind `carma_terms`, in the order of `CARMA_SCHEMA`."""

    hidden: list[Tensor]  # [L, B, T, D] alone, or L times [B, T, D]
    pairs: list[Tensor]  # of a ContrastTable, what the backend reads; of a PairIndex, all three; or none
    num_pairs: int
    covers_batch: bool  # as in a ContrastTable
    mask: Tensor | None  # [B, T] of the stability term
    temperature: Tensor | None  # 0-d
    temperature_value: float  # if temperature is None
    cosine: bool
    match_negatives: float | None
    eps: float
    ranges: list[int]  # start and stop of the MI layers, then of the stability layers
    group: str | None  # name of the process group whose joined batch the losses are of

    @property
    def layers(self) -> tuple[Tensor, ...]:
        """`[B, T, D]` each."""
        return layer_views(self.hidden)

    @property
    def mi_layers(self) -> range:
        """Those of the MI term; empty without."""
        return range(*self.ranges[:2])


CARMA_SCHEMA = (
    "Tensor[] hidden, Tensor[] pairs, SymInt num_pairs, bool covers_batch, Tensor? mask, Tensor? temperature, "
    "float temperature_value, bool cosine, float? match_negatives, float eps, int[] ranges, str? group"
)


def carma_arguments(
    hidden: HiddenStates,
    mi: MITerm | None,
    stability: StabilityTerm | None,
    group: str | None,
    tables: Callable[[ContrastTable], list[Tensor]],
) -> CarmaArguments:
    """What `carma_terms` was asked; `tables` picks what the backend reads of a contrast table."""
    pairs, num_pairs, covers_batch = _pairs(mi, tables)
    temperature, value = _temperature(mi.similarity if mi is not None else Similarity(cosine=True, temperature=1.0))
    mi_layers = mi.layers if mi is not None else range(0)
    stability_layers = stability.layers if stability is not None else range(0)
    return CarmaArguments(
        hidden=[hidden] if isinstance(hidden, Tensor) else list(hidden),
        pairs=pairs,
        num_pairs=num_pairs,
        covers_batch=covers_batch,
        mask=stability.mask if stability is not None else None,
        temperature=temperature,
        temperature_value=value,
        cosine=mi is None or mi.similarity.cosine,
        match_negatives=mi.match_negatives if mi is not None else None,
        eps=stability.eps if stability is not None else 0.0,
        ranges=[mi_layers.start, mi_layers.stop, stability_layers.start, stability_layers.stop],
        group=group,
    )


def _pairs(mi: MITerm | None, tables: Callable[[ContrastTable], list[Tensor]]) -> tuple[list[Tensor], int, bool]:
    if mi is None:
        return [], 0, False
    if isinstance(mi.pairs, PairIndex):
        return [mi.pairs.anchor, mi.pairs.positive, mi.pairs.negatives], mi.pairs.num_pairs, False
    assert mi.pairs.ranks is not None
    return tables(mi.pairs), mi.pairs.ranks.num_pairs, mi.pairs.covers_batch


class SimilarityArguments(NamedTuple):
    """Of the operators behind `pairwise_similarity`, in the order of `SIMILARITY_SCHEMA`."""

    hidden: list[Tensor]  # [L, B, T, D] alone, or L times [B, T, D]
    mask: Tensor | None  # [B, T]
    temperature: Tensor | None  # 0-d
    temperature_value: float  # if temperature is None
    cosine: bool
    range: list[int]  # start and stop of the layers compared
    out_dtype: torch.dtype


SIMILARITY_SCHEMA = (
    "Tensor[] hidden, Tensor? mask, Tensor? temperature, float temperature_value, bool cosine, int[] range, "
    "ScalarType out_dtype"
)


def similarity_arguments(
    hidden: HiddenStates, layers: range, similarity: Similarity, mask: Tensor | None, out_dtype: torch.dtype
) -> SimilarityArguments:
    """What `carma_kernels.pairwise_similarity` was asked."""
    return SimilarityArguments(
        [hidden] if isinstance(hidden, Tensor) else list(hidden),
        mask,
        *_temperature(similarity),
        similarity.cosine,
        [layers.start, layers.stop],
        out_dtype,
    )


def _temperature(similarity: Similarity) -> tuple[Tensor | None, float]:
    temperature = similarity.temperature
    return (temperature, 1.0) if isinstance(temperature, Tensor) else (None, temperature)


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


def terms_and_gradients(forward: Any, backward: Any, arguments: CarmaArguments) -> tuple[Tensor, Tensor, Gradients]:
    """Both losses, unreduced and connected to nothing, and what makes the gradients of some layers when it is called.

    Args:
        forward, backward: the registered operators, as for `register_gradient`.
        arguments: of both; the gradient of a temperature is not to be had so. The hidden states are not held on to.
    """
    with torch.no_grad():
        sums, changes, *kept = forward(*arguments)
    without_states = arguments._replace(hidden=[])

    def gradients(
        hidden: Sequence[Tensor], grad_sums: Tensor | None, grad_changes: Tensor | None, wanted: list[bool]
    ) -> list[Tensor]:
        asked = without_states._replace(hidden=list(hidden))
        with torch.no_grad():
            found, _ = backward(grad_sums, grad_changes, [changes, *kept], wanted, False, *asked)
        return list(found)

    return sums, changes, gradients


def register_gradient(forward: Any, backward: Any, arguments: Any, num_losses: int, function: str) -> None:
    """Register the gradient of an operator, and have a gradient's gradient raise and say why.

    Args:
        forward: the registered operator. All that it returns but the first is kept for `backward`.
        backward: the registered operator of: the gradient that arrives for each of the first `num_losses` results
            of `forward`; what was kept; which of the hidden states need a gradient; whether the temperature does; and
            the arguments of `forward`. It returns the gradients of those hidden states, and `-tau` times that of the
            temperature.
        arguments: of both: `CarmaArguments` or `SimilarityArguments`.
        num_losses: as for `backward`; the user gets these.
        function: what the user called.
    """
    temperature_at = arguments._fields.index("temperature")

    def keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor | tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)
        tensors: list[Tensor] = []
        ctx.arguments = [_put_away(argument, tensors) for argument in inputs]
        ctx.save_for_backward(*tensors, *(() if isinstance(output, Tensor) else output[1:]))

    def differentiate(ctx: Any, *upstream: Tensor | None) -> tuple[Any, ...]:
        tensors = iter(ctx.saved_tensors)
        given = arguments(*(_taken_out(argument, tensors) for argument in ctx.arguments))
        found = [[None] * len(argument) if _is_list(argument) else None for argument in given]
        needs_hidden = [bool(needed) for needed in ctx.needs_input_grad[0]]
        needs_temperature = bool(ctx.needs_input_grad[temperature_at])
        losses = upstream[:num_losses]
        if any(gradient is not None for gradient in losses):
            gradients, work = backward(*losses, list(tensors), needs_hidden, needs_temperature, *given)
            found[0] = [gradients.pop(0) if needed else None for needed in needs_hidden]
            if needs_temperature:  # d s / d tau = -s / tau
                found[temperature_at] = (-work / given.temperature).to(given.temperature.dtype)
        return tuple(found)

    def refuse(*_: Any) -> Any:
        raise RuntimeError(
            f"the gradient of {function} cannot be differentiated again: its backward is written by hand, and has "
            "none. Leave the CARMA terms out of a gradient penalty, or compute them with csrc_ref, which autograd "
            "differentiates."
        )

    forward.register_autograd(differentiate, setup_context=keep)
    backward.register_autograd(refuse)


class _Kept(NamedTuple):
    """Stands for tensors that autograd keeps."""

    number: int | None  # None for one that was not in a list


def _is_list(argument: Any) -> bool:
    return isinstance(argument, list) and all(isinstance(item, Tensor) for item in argument)


def _put_away(argument: Any, tensors: list[Tensor]) -> Any:
    """Add the tensors of an argument to those that autograd is to keep."""
    if isinstance(argument, Tensor):
        tensors.append(argument)
        return _Kept(None)
    if _is_list(argument):
        tensors += argument
        return _Kept(len(argument))
    return argument


def _taken_out(argument: Any, tensors: Iterator[Tensor]) -> Any:
    if not isinstance(argument, _Kept):
        return argument
    return next(tensors) if argument.number is None else [next(tensors) for _ in range(argument.number)]
