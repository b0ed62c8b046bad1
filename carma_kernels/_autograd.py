"""An operation whose gradient is written by hand: for autograd, and for whoever looks at operators.

In eager mode it is an `autograd.Function`. `torch.compile`, `torch.export`, selective checkpointing, fake tensors and
dispatch modes see registered operators instead, one forward and one backward. Both run the same code, so they give the
same bits; the operators cost the host several times as much.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Generic, NamedTuple, NoReturn, TypeVar

import torch
from torch import Tensor, library
from torch.nn import Parameter

from carma_kernels._operators import CARMA_SCHEMA, CarmaArguments, SimilarityArguments
from carma_kernels._terms import Terms

Problem = TypeVar("Problem", bound=CarmaArguments | SimilarityArguments)
Results = tuple[Tensor, ...]
Upstream = tuple[Tensor | None, ...]


class Operation(Generic[Problem]):
    """Results of some hidden states, and their gradients."""

    def __init__(
        self,
        name: str,
        function: str,
        schema: str,
        problem: Callable[..., Problem],
        *,
        forward: Callable[[Problem], Results],
        empty: Callable[[Problem], Results],
        num_results: int,
        num_outputs: int,
        kept: Sequence[int],
        backward: Callable[[Problem, Upstream, list[Tensor], list[bool], bool], tuple[list[Tensor], Tensor]],
        empty_backward: Callable[[Problem, list[bool]], tuple[list[Tensor], Tensor]],
        forward_for_backward: Callable[[Problem], Results] | None = None,
    ) -> None:
        """Register the operators.

        Args:
            name: of the forward operator; that of the backward has `_backward` behind it.
            function: what the user called.
            schema: of the arguments, which are the fields of `problem`.
            problem: what was asked, a named tuple with `hidden` and `temperature`.
            forward: computes all results.
            empty: results of the same shapes and dtypes, for fake tensors.
            num_results: how many.
            num_outputs: how many of them, from the first on, the user gets.
            kept: the numbers of those that the backward needs.
            backward: from what was asked, the gradient that arrives for each output, the results that were kept, which
                of the hidden states need a gradient, and whether the temperature does: the gradients of those hidden
                states, and `-tau` times that of the temperature.
            empty_backward: the same, empty.
            forward_for_backward: `forward` where autograd will ask for the gradient at once; it may keep more for it.
        """
        self.name, self.function, self.problem, self.num_outputs, self.kept = name, function, problem, num_outputs, kept
        self.compute, self.differentiate = forward, backward
        self.compute_for_backward = forward_for_backward or forward
        tensors = ", ".join(["Tensor"] * num_results)
        returned = "Tensor" if num_results == 1 else f"({tensors})"
        arriving = ", ".join(f"Tensor? grad_{output}" for output in range(num_outputs))

        def run(*arguments: Any) -> Any:
            return _as_returned(forward(problem(*arguments)))

        def run_empty(*arguments: Any) -> Any:
            return _as_returned(empty(problem(*arguments)))

        def split(arguments: tuple[Any, ...]) -> tuple[Upstream, list[Tensor], list[bool], bool, Problem]:
            upstream, (kept, needs_grad, needs_work, *asked) = arguments[:num_outputs], arguments[num_outputs:]
            return upstream, kept, needs_grad, needs_work, problem(*asked)

        def run_backward(*arguments: Any) -> tuple[list[Tensor], Tensor]:
            upstream, kept, needs_grad, needs_work, asked = split(arguments)
            return backward(asked, upstream, kept, needs_grad, needs_work)

        def run_empty_backward(*arguments: Any) -> tuple[list[Tensor], Tensor]:
            _, _, needs_grad, _, asked = split(arguments)
            return empty_backward(asked, needs_grad)

        self._forward = library.custom_op(
            f"carma_kernels::{name}", run, mutates_args=(), schema=f"({schema}) -> {returned}"
        )
        self._backward = library.custom_op(
            f"carma_kernels::{name}_backward",
            run_backward,
            mutates_args=(),
            schema=f"({arriving}, Tensor[] kept, bool[] needs_grad, bool needs_work, {schema}) -> (Tensor[], Tensor)",
        )
        self._forward.register_fake(run_empty)
        self._backward.register_fake(run_empty_backward)
        self._forward.register_autograd(self._of_operator, setup_context=self._keep)
        self._backward.register_autograd(self.refuse)

    def __call__(self, asked: Problem) -> Results:
        """The outputs, connected to the hidden states and, where it is a tensor, to the temperature."""
        inputs = (*asked.hidden, asked.temperature)
        if _is_watched(_tensors(asked)):
            return _as_results(self._forward(*asked))[: self.num_outputs]
        if not torch.is_grad_enabled():
            return self.compute(asked)[: self.num_outputs]
        outputs: Results = _Eager.apply(self, asked, *inputs)
        return outputs

    def apart(self, asked: Problem) -> tuple[Results, Callable[[Sequence[Tensor], Upstream, list[bool]], list[Tensor]]]:
        """The outputs, connected to nothing, and what makes the gradients of hidden states that are brought along.

        The gradient of a temperature is not to be had so. The hidden states are not held on to.
        """
        with torch.no_grad():
            results = self.compute(asked)
        kept = [results[number] for number in self.kept]
        without_states: Any = asked._replace(hidden=[])

        def gradients(hidden: Sequence[Tensor], upstream: Upstream, wanted: list[bool]) -> list[Tensor]:
            asked_again = without_states._replace(hidden=list(hidden))
            with torch.no_grad():
                found, _ = self.differentiate(asked_again, upstream, kept, wanted, False)
            return found

        return results[: self.num_outputs], gradients

    def gradients(self, asked: Problem, upstream: Upstream, kept: list[Tensor], needs: Sequence[bool]) -> list[Any]:
        """Of the hidden states, and of the temperature; None for one that needs none. `needs` says which do."""
        *needs_hidden, needs_temperature = needs
        if all(gradient is None for gradient in upstream):
            return [None] * len(needs)
        if _is_watched((*_tensors(asked), *kept, *upstream)):
            found, work = self._backward(*upstream, kept, needs_hidden, needs_temperature, *asked)
        else:
            with torch.no_grad():
                found, work = self.differentiate(asked, upstream, kept, needs_hidden, needs_temperature)
        rest = iter(found)
        gradients: list[Any] = [next(rest) if needed else None for needed in needs_hidden]
        if not needs_temperature:
            return [*gradients, None]
        assert asked.temperature is not None
        return [*gradients, (-work / asked.temperature).to(asked.temperature.dtype)]  # d s / d tau = -s / tau

    def _keep(self, ctx: Any, inputs: tuple[Any, ...], output: Tensor | Results) -> None:
        results = _as_results(output)
        _save(ctx, self, self.problem(*inputs), results)

    def _of_operator(self, ctx: Any, *upstream: Tensor | None) -> tuple[Any, ...]:
        asked, kept = _saved(ctx)
        at = asked._fields.index("temperature")
        needs = [bool(needed) for needed in ctx.needs_input_grad[0]]
        *of_hidden, of_temperature = self.gradients(
            asked, upstream[: self.num_outputs], kept, [*needs, bool(ctx.needs_input_grad[at])]
        )
        found = [[None] * len(argument) if _is_list(argument) else None for argument in asked]
        found[0], found[at] = of_hidden, of_temperature
        return tuple(found)

    def refuse(self, *_: Any) -> NoReturn:
        """Raise for a gradient of a gradient."""
        raise RuntimeError(
            f"the gradient of {self.function} cannot be differentiated again: its backward is written by hand, and has "
            "none. Leave the CARMA terms out of a gradient penalty, or compute them with csrc_ref, which autograd "
            "differentiates."
        )


def _as_returned(results: Results) -> Tensor | Results:
    """By an operator: one result alone is no tuple."""
    return results[0] if len(results) == 1 else results


def _as_results(returned: Tensor | Results) -> Results:
    return (returned,) if isinstance(returned, Tensor) else returned


def carma_operation(
    name: str, problem: Callable[..., Problem], num_saved: int, **functions: Callable[..., Any]
) -> Operation[Problem]:
    """The operation behind `carma_terms`: its results are `Terms`, then what is saved beside the stability losses.

    Args:
        name, problem: as for `Operation`.
        num_saved: of the results after `Terms`.
        functions: `forward`, `empty`, `backward` and `empty_backward` of `Operation`.
    """
    outputs = len(Terms._fields)
    return Operation(
        name,
        "the CARMA losses",
        CARMA_SCHEMA,
        problem,
        num_results=outputs + num_saved,
        num_outputs=outputs,
        kept=(Terms._fields.index("stability_per_layer"), *range(outputs, outputs + num_saved)),
        **functions,
    )


class _Eager(torch.autograd.Function):
    """An operation on tensors that nobody watches."""

    @staticmethod
    def forward(ctx: Any, operation: Operation[Any], asked: Any, *_: Tensor | None) -> Results:
        results = operation.compute_for_backward(asked)
        _save(ctx, operation, asked, results)
        return results[: operation.num_outputs]

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Any, ...]:
        operation: Operation[Any] = ctx.operation
        asked, kept = _saved(ctx)
        found = operation.gradients(asked, upstream, kept, ctx.needs_input_grad[2:])
        if torch.is_grad_enabled():  # create_graph=True
            sources = (*asked.hidden, asked.temperature, *upstream)
            found = [None if gradient is None else _Once.apply(operation, gradient, *sources) for gradient in found]
        return None, None, *found


class _Once(torch.autograd.Function):
    """A gradient that cannot be differentiated: whoever tries is told so."""

    @staticmethod
    def forward(ctx: Any, operation: Operation[Any], gradient: Tensor, *_sources: Tensor | None) -> Tensor:
        ctx.operation = operation
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        ctx.operation.refuse()


class _Kept(NamedTuple):
    """Stands for tensors that autograd keeps."""

    number: int | None  # None for one that was not in a list


def _save(ctx: Any, operation: Operation[Any], asked: Any, results: Results) -> None:
    """Have autograd keep what the backward needs."""
    ctx.set_materialize_grads(False)
    tensors: list[Tensor] = []
    ctx.operation = operation
    ctx.asked = [_put_away(argument, tensors) for argument in asked]
    ctx.save_for_backward(*tensors, *(results[number] for number in operation.kept))


def _saved(ctx: Any) -> tuple[Any, list[Tensor]]:
    """What was asked, and the results that were kept."""
    tensors = iter(ctx.saved_tensors)
    asked = ctx.operation.problem(*(_taken_out(argument, tensors) for argument in ctx.asked))
    return asked, list(tensors)


def _is_list(argument: Any) -> bool:
    return isinstance(argument, list) and all(isinstance(item, Tensor) for item in argument)


def _put_away(argument: Any, tensors: list[Tensor]) -> Any:
    """Add the tensors of an argument to those that autograd is to keep."""
    if isinstance(argument, Tensor):
        tensors.append(argument)
        return _Kept(None)
    if isinstance(argument, list) and argument and isinstance(argument[0], Tensor):
        tensors += argument
        return _Kept(len(argument))
    return argument


def _taken_out(argument: Any, tensors: Iterator[Tensor]) -> Any:
    if not isinstance(argument, _Kept):
        return argument
    return next(tensors) if argument.number is None else [next(tensors) for _ in range(argument.number)]


def _tensors(asked: tuple[Any, ...]) -> list[Tensor]:
    """All of an operation's arguments that are some."""
    found: list[Tensor] = []
    for argument in asked:
        _put_away(argument, found)
    return found


_PLAIN = (Tensor, Parameter, type(None))


def _is_watched(tensors: Iterable[Tensor | None]) -> bool:
    """Whether somebody looks at the operators that tensors like these go through."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.maybe_current_level() is not None
        or torch._C._is_tracing()
        or any(type(tensor) not in _PLAIN for tensor in tensors)
    )
