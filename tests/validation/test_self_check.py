"""The self-check passes what is right, and misses nothing that is wrong, in one place or a little everywhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from carma_kernels import _self_check, _small_problem, eager
from carma_kernels._small_problem import SmallProblem, like_similarity, like_terms
from carma_kernels._terms import MITerm, Similarity, StabilityTerm
from tests.validation.calls import PAIRS, SPANS

pytestmark = pytest.mark.usefixtures("no_interpreter")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CPU = torch.device("cpu")
Change = Callable[[Tensor], Tensor]
MASK = SPANS.attention_mask


@pytest.fixture(autouse=True)
def smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_small_problem, "_NUMBERS", 2**14)


def losses(
    dtype: torch.dtype = torch.float32,
    pairs: Any = SPANS.contrast_table("sequence"),  # noqa: B008
    similarity: Similarity = Similarity(cosine=True, temperature=0.1),  # noqa: B008
    stability: bool = True,
) -> SmallProblem:
    hidden = [torch.empty(2, 6, 32, dtype=dtype)] * 4
    term = StabilityTerm(range(4), MASK, 1e-8) if stability else None
    return like_terms("short groups", hidden, MITerm(range(4), pairs, similarity, None), term)


def matrix(dtype: torch.dtype = torch.float32, out_dtype: torch.dtype = torch.float32) -> SmallProblem:
    similarity = Similarity(cosine=True, temperature=torch.tensor(0.2))
    return like_similarity("similarity", torch.empty(4, 2, 6, 32, dtype=dtype), range(4), similarity, MASK, out_dtype)


class Changed(torch.autograd.Function):
    """A tensor, and its gradient, each as a function changes it."""

    @staticmethod
    def forward(ctx, tensor: Tensor, value: Change | None, gradient: Change | None) -> Tensor:
        ctx.change = gradient
        return tensor.view_as(tensor) if value is None else value(tensor)

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return upstream if ctx.change is None else ctx.change(upstream), None, None


def backend(
    *, layer: Change | None = None, temperature: Change | None = None, result: Change | None = None, at: int = 0
) -> SimpleNamespace:
    """The torch backend with the gradient of a layer, or of the temperature, or a result changed."""

    def given(hidden: Any) -> Any:
        if isinstance(hidden, Tensor):
            return Changed.apply(hidden, None, layer)
        return [Changed.apply(each, None, layer if index == at else None) for index, each in enumerate(hidden)]

    def similarity(asked: Similarity) -> Similarity:
        if not isinstance(asked.temperature, Tensor):
            return asked
        return Similarity(asked.cosine, Changed.apply(asked.temperature, None, temperature))

    def carma_terms(hidden, mi, stability):
        if mi is not None:
            mi = MITerm(mi.layers, mi.pairs, similarity(mi.similarity), mi.match_negatives)
        results = list(eager.carma_terms(given(hidden), mi, stability))
        if result is not None:
            results[at] = Changed.apply(results[at], result, None)
        return tuple(results)

    def pairwise_similarity(hidden, layers, asked, mask, out_dtype):
        found = eager.pairwise_similarity(given(hidden), layers, similarity(asked), mask, out_dtype)
        return Changed.apply(found, result, None)

    return SimpleNamespace(carma_terms=carma_terms, pairwise_similarity=pairwise_similarity)


def disagreement(problem: SmallProblem, **changes: Any) -> str | None:
    return _self_check.disagreement(lambda: problem, CPU, backend(**changes))


def one_percent(tensor: Tensor) -> Tensor:
    return tensor * 1.01


def one_number(tensor: Tensor) -> Tensor:
    """Lost: one of a few hundred, so that the whole tensor is hardly any different."""
    changed = tensor.clone()
    largest = changed.abs().argmax()
    changed.view(-1)[largest] = 0
    return changed


def nan_at_the_end(tensor: Tensor) -> Tensor:
    changed = tensor.clone()
    changed.view(-1)[-1] = float("nan")
    return changed


LEARNED = Similarity(cosine=True, temperature=torch.tensor(0.3))
PROBLEMS = {
    "sequence": losses,
    "batch": lambda dtype: losses(dtype, SPANS.contrast_table("batch")),
    "listed": lambda dtype: losses(dtype, PAIRS),
    "learned": lambda dtype: losses(dtype, similarity=LEARNED),
    "dot": lambda dtype: losses(dtype, similarity=Similarity(cosine=False, temperature=3.0)),
    "sharp": lambda dtype: losses(dtype, similarity=Similarity(cosine=True, temperature=0.01)),
    "without stability": lambda dtype: losses(dtype, stability=False),
    "stability alone": lambda dtype: losses(dtype, SPANS_WITHOUT_PAIRS),
    "matrix": matrix,
    "matrix in halves": lambda dtype: matrix(dtype, torch.bfloat16),
}
SPANS_WITHOUT_PAIRS = type(SPANS).from_lists([[], []], seq_len=6).contrast_table("sequence")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PROBLEMS)
def test_what_is_right(name: str, dtype: torch.dtype):
    assert disagreement(PROBLEMS[name](dtype)) is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_of_every_kind(dtype: torch.dtype):
    assert _self_check.disagreement_of_any_kind(dtype, CPU, backend()) is None
    found = _self_check.disagreement_of_any_kind(dtype, CPU, backend(result=one_percent, at=1))
    assert found is not None
    assert found.startswith(f"carma_loss (short groups) of hidden states [3, 2, 58, 768] in {dtype} on cpu: ")
    assert "the stability loss differs" in found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("change", [one_percent, one_number, nan_at_the_end])
def test_a_wrong_loss(change: Change, at: int, dtype: torch.dtype):
    found = disagreement(losses(dtype), result=change, at=at)
    assert found is not None
    assert f"{('the MI loss', 'the stability loss')[at]} differs by " in found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("change", [one_percent, one_number, nan_at_the_end])
def test_a_wrong_matrix(change: Change, dtype: torch.dtype):
    found = disagreement(matrix(dtype), result=change)
    assert found is not None
    assert "the matrix differs by " in found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("at", [0, 2])
@pytest.mark.parametrize("change", [one_percent, one_number, nan_at_the_end])
def test_a_wrong_gradient(change: Change, at: int, dtype: torch.dtype):
    found = disagreement(losses(dtype), layer=change, at=at)
    assert found is not None
    assert f"the gradient of layer {at} differs by " in found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("change", [one_percent, nan_at_the_end])
@pytest.mark.parametrize("make", [PROBLEMS["learned"], matrix])
def test_a_wrong_gradient_of_the_temperature(make, change: Change, dtype: torch.dtype):
    found = disagreement(make(dtype), temperature=change)
    assert found is not None
    assert "the gradient of the temperature differs by " in found


def test_a_temperatures_gradient_is_held_against_the_loss():
    """Its terms may cancel, and their roundings do not."""
    problem = losses(similarity=LEARNED)
    expected = {"the MI loss": torch.tensor([2.0, 4.0]), _self_check._TEMPERATURE: torch.tensor(1e-6)}
    sizes = _self_check._sizes(problem, expected, [torch.ones(2)])
    worst, _ = sizes[_self_check._TEMPERATURE]
    assert worst == pytest.approx(6 / 0.1)
    assert sizes["the MI loss"] == pytest.approx((4, 20**0.5))


@pytest.mark.parametrize(("got", "passes"), [(0.0, True), (1e-30, False), (float("nan"), False)])
def test_what_has_to_be_zero(got: float, passes: bool):
    problem = losses()
    found, expected = {"the MI loss": torch.tensor([got])}, {"the MI loss": torch.zeros(1)}
    sizes = _self_check._sizes(problem, expected, [])
    assert (_self_check._difference(problem, found, expected, sizes) is None) == passes


def test_each_loss_has_its_part_of_the_gradient():
    """However large the one is and however small the other: an error of a percent of either shows."""
    for wrong in (0, 1):

        def carma_terms(hidden, mi, stability, wrong=wrong):
            results = list(eager.carma_terms(hidden, mi, stability))
            results[wrong] = Changed.apply(results[wrong], None, one_percent)
            return tuple(results)

        ops = SimpleNamespace(carma_terms=carma_terms)
        for dtype in (torch.float32, torch.float16):
            found = _self_check.disagreement(lambda dtype=dtype: losses(dtype), CPU, ops)
            assert found is not None
            assert "the gradient of layer 0 differs by " in found


@pytest.mark.parametrize("what", ["result", "layer"])
@pytest.mark.parametrize("time", range(1, _self_check._REPEATS))
def test_a_flaky_kernel(what: str, time: int):
    """One bit of one number, once."""
    calls = []

    def flip(tensor: Tensor) -> Tensor:
        calls.append(tensor)
        changed = tensor.detach().clone()
        if len(calls) == time + 1:
            changed.view(torch.int32).view(-1)[-1] ^= 1
        return changed

    found = disagreement(losses(), **{what: flip}, at=1)
    assert found is not None
    assert "is not the same when it is computed again, in 1 of " in found
    assert len(calls) == time + 1


def test_a_gradient_that_never_arrives():
    def carma_terms(hidden, mi, stability):
        return tuple(result.detach() for result in eager.carma_terms(hidden, mi, stability))

    found = _self_check.disagreement(losses, CPU, SimpleNamespace(carma_terms=carma_terms))
    assert found is not None
    assert "RuntimeError: " in found


@pytest.fixture
def tf32() -> Iterator[Callable[[], None]]:
    """Turns it on."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    yield lambda: setattr(matmul, "fp32_precision", "tf32")
    matmul.fp32_precision = before


def test_more_is_allowed_in_tf32(tf32: Callable[[], None]):
    def allowed(dtype: torch.dtype) -> float:
        return _self_check._allowed(losses(dtype), "the gradient of layer 0", dtype).worst

    assert allowed(torch.float32) == pytest.approx(1e-4)
    assert allowed(torch.bfloat16) == pytest.approx(3e-2 + 1e-4)
    tf32()
    assert allowed(torch.float32) == pytest.approx(5e-3)
    assert allowed(torch.bfloat16) == pytest.approx(3e-2 + 5e-3)


def test_more_is_allowed_at_sharp_temperatures():
    def allowed(cosine: bool, temperature: float) -> float:
        problem = losses(similarity=Similarity(cosine, temperature))
        return _self_check._allowed(problem, "the MI loss", torch.float32).worst

    usual = allowed(True, 0.1)
    assert allowed(True, 0.01) == pytest.approx(10 * usual, rel=0.01)
    assert allowed(True, 10.0) == allowed(False, 0.01) == usual  # a dot product's scores are moderate
