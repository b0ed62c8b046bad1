"""What `verify` holds errors against."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import csrc_ref
from carma_kernels.verify import errors
from carma_kernels.verify.problems import CHECKS, Check, Problem, random_problem

CPU = torch.device("cpu")
COMPARED = [check for check in CHECKS if check.metric != "-" and not check.long]


def layers_of(problem: Problem) -> Tensor:
    hidden = problem.hidden[0] if problem.hidden[0].dim() == 4 else torch.stack(problem.hidden)
    return hidden.double()


def gradients_of(problem: Problem) -> list[Tensor]:
    return errors._evaluate(csrc_ref, problem, torch.float64, CPU)[1]


@pytest.mark.parametrize("metric", ["cosine", "dot"])
def test_the_terms_of_a_gradient(metric: str):
    """Each score's own gradient, by autograd, and the sum of their sizes."""
    problem = random_problem(Check("pairwise_similarity", metric=metric), torch.float64, 0, 1)
    hidden = layers_of(problem).requires_grad_()
    L, B, T, _ = hidden.shape
    options = {**problem.options, "out_dtype": torch.float64}
    scores = csrc_ref.pairwise_similarity(hidden, temperature=problem.temperature, mask=problem.mask, **options)
    upstream = torch.rand(scores.shape, generator=torch.Generator().manual_seed(problem.seed), dtype=torch.float64)
    terms = torch.zeros(L, B, T, hidden.shape[-1], dtype=torch.float64)
    for at in torch.cartesian_prod(*map(torch.arange, scores.shape)).tolist():
        weighted = scores[tuple(at)] * (upstream[tuple(at)] + 0.5)
        terms += torch.autograd.grad(weighted, hidden, retain_graph=True)[0].abs()
    torch.testing.assert_close(errors._term_sizes(csrc_ref, problem), terms)


@pytest.mark.parametrize("check", COMPARED, ids=str)
@pytest.mark.parametrize("case", range(4))
def test_sizes_are_the_gradients_where_nothing_cancels(check: Check, case: int):
    """Never smaller, and at most few times as large."""
    problem = random_problem(check, torch.float64, 0, case)
    gradients = gradients_of(problem)
    sizes = errors._gradient_sizes(csrc_ref, problem, gradients)
    for gradient, size in zip(gradients, sizes, strict=True):
        assert (size >= gradient.abs()).all()
        assert size.max() <= 3 * gradient.abs().max()


def test_without_similarities_sizes_are_the_gradients():
    problem = random_problem(Check("stability_loss"), torch.float64, 0, 0)
    gradients = gradients_of(problem)
    sizes = errors._gradient_sizes(csrc_ref, problem, gradients)
    assert all(map(torch.equal, sizes, map(torch.abs, gradients)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_gradient_that_cancels_may_be_off_by_as_much_as_its_terms(dtype: torch.dtype):
    """Two vectors on either side of a third pull it in opposite directions; each pull is rounded to the dtype."""
    angle = torch.tensor([0.0, 1.0, -1.01], dtype=torch.float64)
    hidden = torch.stack([angle.cos(), angle.sin()], -1)[None, None].to(dtype)  # [1, 1, 3, 2]
    options = {"metric": "cosine", "layers": None, "out_dtype": torch.float32}
    check = Check("pairwise_similarity", metric="cosine")
    problem = Problem(check, (hidden,), random_problem(check, dtype, 0, 0).pairs, None, 1.0, options, 7)
    [gradient] = gradients_of(problem)
    [size] = errors._gradient_sizes(csrc_ref, problem, [gradient])
    first = gradient[0, 0].abs().max()
    assert first < gradient.abs().max()
    assert size[0, 0].max() > 2 * first
    assert errors._error([gradient.to(dtype)], [gradient], [size]) <= torch.finfo(dtype).eps


@pytest.mark.parametrize("check", COMPARED, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_two_roundings_are_allowed(check: Check, seed: int):
    """The most that rounding each dL/ds, and the result, can do to any problem is within a half's tolerance."""
    dtype = torch.bfloat16
    problem = random_problem(check, dtype, seed, 1)
    gradients = gradients_of(problem)
    sizes = errors._gradient_sizes(csrc_ref, problem, gradients)
    terms = errors._term_sizes(csrc_ref, problem)
    half = torch.finfo(dtype).eps / 2
    worst = [
        gradient + half * (term + gradient.abs()) for gradient, term in zip(gradients[: len(terms)], terms, strict=True)
    ]
    error = errors._error(worst, gradients[: len(terms)], sizes[: len(terms)])
    assert error <= errors.TOLERANCE[dtype][1] * (1 + 1e-9)


def test_a_temperatures_gradient_is_held_against_its_terms():
    """The similarities of a batch have both signs, and so its gradient, their weighted sum, may be next to nothing."""
    problem = random_problem(Check("pairwise_similarity", metric="cosine"), torch.float32, 89, 2)
    own, size = gradients_of(problem)[-1]
    assert own.abs() < size / 100
    outcome = errors.compare(csrc_ref, problem, torch.float32, CPU, "torch")
    assert outcome.excess < 1
