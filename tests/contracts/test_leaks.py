"""What does not take part is not read: NaN and inf there change no bit of the loss or of any gradient."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import carma_kernels as ck
from tests.cases import BF16, FP32, Backend, Case, thinned
from tests.compare import upstream_gradients
from tests.contracts.ops import OPS, Op, Problem, make_problem, same_bits

GARBAGE = pytest.mark.parametrize("garbage", thinned([torch.nan], [torch.inf, -torch.inf, 3e38]), ids=str)


def spoiled(problem: Problem, where: Tensor, garbage: float) -> Problem:
    """The problem with garbage in the tokens `where` `[L, B, T]`."""
    assert isinstance(problem.hidden, Tensor)
    hidden = problem.hidden.detach().clone()
    assert where.any()
    hidden[where] = garbage
    return problem.with_hidden(hidden.requires_grad_())


def assert_not_read(problem: Problem, where: Tensor, garbage: float) -> None:
    outputs, gradients = problem.forward(), problem.gradients()
    spoilt = spoiled(problem, where, garbage)
    assert all(output.isfinite().all() for output in outputs)
    assert all(map(same_bits, spoilt.forward(), outputs))
    assert all(map(same_bits, spoilt.gradients(), gradients))
    assert (gradients[0][where] == 0).all()
    assert (gradients[0][~where] != 0).any(), "nothing takes part"


def everywhere(problem: Problem, tokens: Tensor) -> Tensor:
    """Tokens `[B, T]` of every layer."""
    return tokens.expand(len(problem.hidden), *tokens.shape)


@GARBAGE
@pytest.mark.parametrize("dtype", thinned([FP32], [BF16]), ids=str)
@pytest.mark.parametrize("pad", thinned(["both"], ["left", "right"]))
@pytest.mark.parametrize("op", [op for op in OPS if not op.reads_padding], ids=str)
def test_padding(backend: Backend, op: Op, pad: str, dtype: torch.dtype, garbage: float) -> None:
    problem = make_problem(op, backend, Case(L=3, pad=pad), dtype=dtype)
    assert_not_read(problem, everywhere(problem, ~problem.given.mask), garbage)


@GARBAGE
@pytest.mark.parametrize("D", [6, 64])
def test_sequences_without_a_pair(backend: Backend, D: int, garbage: float) -> None:
    (op,) = [op for op in OPS if op.name == "mi of sequences"]
    problem = make_problem(op, backend, Case(L=3, D=D, drawing="sparse"))
    foreign = torch.zeros_like(problem.given.mask)
    foreign[[0, 2]] = True
    assert_not_read(problem, everywhere(problem, foreign), garbage)


@GARBAGE
def test_tokens_that_no_pair_lists(backend: Backend, garbage: float) -> None:
    (op,) = [op for op in OPS if op.name == "mi of listed pairs"]
    problem = make_problem(op, backend)
    pairs = problem.given.pairs
    pairs.negatives[pairs.negatives % 3 == 0] = -1
    listed = torch.cat([pairs.anchor, pairs.positive, pairs.negatives[pairs.negatives >= 0]]).long()
    unlisted = torch.ones(problem.given.mask.numel(), dtype=torch.bool, device=backend.device)
    unlisted[listed] = False
    assert_not_read(problem, everywhere(problem, unlisted.view(problem.given.mask.shape)), garbage)


def _layers_of(name: str) -> Callable[[Problem, Tensor | list[Tensor]], Tensor]:
    def call(problem: Problem, hidden: Tensor | list[Tensor]) -> Tensor:
        spans, pairs, mask, options = problem.given
        if name == "carma":
            config = ck.CarmaConfig(mi_layers=(1, 2), stability_layers=(2, 3))
            return ck.carma_loss(hidden, spans, config, mask=mask, **options).loss
        chosen = {"layers": (1, 3), **options}
        if name == "stability":
            return ck.stability_loss(hidden, **chosen)
        if name == "similarity":
            return ck.pairwise_similarity(hidden, **chosen)
        if name == "listed":
            return ck.mi_loss(hidden, pairs, **chosen)
        return ck.mi_loss(hidden, spans, negatives=name, **chosen)

    return call


@GARBAGE
@pytest.mark.parametrize("stacked", thinned([True], [False]))
@pytest.mark.parametrize("name", ["sequence", "batch", "listed", "stability", "similarity", "carma"])
def test_layers_that_were_not_chosen(backend: Backend, name: str, stacked: bool, garbage: float) -> None:
    problem = make_problem(OPS[0], backend, Case(L=5))
    call = _layers_of(name)

    def run(outside: float | None) -> tuple[Tensor, Tensor]:
        leaf = problem.hidden.detach().clone()  # type: ignore[union-attr]
        if outside is not None:
            leaf[[0, 4]] = outside
        leaf.requires_grad_()
        loss = call(problem, leaf if stacked else list(leaf.unbind(0)))
        (gradient,) = torch.autograd.grad(loss, leaf, upstream_gradients([loss]))
        return loss, gradient

    loss, gradient = run(None)
    assert all(map(same_bits, run(garbage), (loss, gradient)))
    assert (gradient[[0, 4]] == 0).all()
    assert all((layer != 0).any() for layer in gradient[1:4])


def test_layers_of_a_list_that_were_not_chosen_get_no_gradient(backend: Backend) -> None:
    problem = make_problem(OPS[0], backend, Case(L=5, stacked=False))
    _layers_of("carma")(problem, list(problem.hidden)).backward()
    assert [layer.grad is not None for layer in problem.hidden] == [False, True, True, True, False]


def test_a_bad_token_stays_in_its_sequence(backend: Backend) -> None:
    """NaN where it is read spoils the loss, but the gradient of its own sequence only."""
    (op,) = [op for op in OPS if op.name == "mi of sequences"]
    problem = make_problem(op, backend)
    clean = problem.gradients()[0]
    where = torch.zeros_like(everywhere(problem, problem.given.mask), dtype=torch.bool)
    where[:, 1, 1] = True
    gradient = spoiled(problem, where, torch.nan).gradients()[0]
    assert gradient[:, 1].isnan().any()
    gradient[:, 1] = clean[:, 1]
    assert same_bits(gradient, clean)
