"""The torch backend where operations are launched: how many, in how much memory, and whether it computes the same.

No GPU is needed: the launches are counted on tensors that have shapes and no memory, on the device "meta", which the
backend takes for one; the rest is done by CPU tensors, on which it goes the way of a GPU.
"""

from __future__ import annotations

from itertools import cycle
from typing import Any

import pytest
import torch
from torch import Tensor

import carma_kernels as ck
from carma_kernels._operators import CarmaUpstream
from carma_kernels._terms import MITerm, Similarity, StabilityTerm, Terms
from carma_kernels.eager import carma, layers
from carma_kernels.measure import peak_memory
from carma_kernels.spans import ContrastTable
from tests.cases import BF16, FP32, MI_CASES, SIMILARITY_CASES, STABILITY_CASES, TORCH, Case
from tests.ops import test_carma, test_mi, test_similarity, test_stability
from tests.ops.launches import Launches

B, T, D = 16, 58, 768


def spans_of(lengths: list[int], wordless: tuple[int, ...] = ()) -> ck.TokenSpans:
    """Words of two to four tokens, 18 pairs in a full sequence, in sequences of these lengths."""
    words: list[list[tuple[int, int]]] = []
    for b, length in enumerate(lengths):
        at, sizes = 1, cycle((2, 3, 2, 4))
        words.append([])
        while b not in wordless and at + 4 < length:
            words[-1].append((at, at + next(sizes)))
            at += 9
    mask = [[int(t < length) for t in range(T)] for length in lengths]
    return ck.TokenSpans.from_lists(words, seq_len=T, attention_mask=mask)


DENSE = ck.TokenSpans.from_lists(
    [[(at, at + 4) for at in range(0, T - 6 * (b % 2) - 4, 4)] for b in range(B)],
    seq_len=T,
    attention_mask=[[int(t < T - 6 * (b % 2)) for t in range(T)] for b in range(B)],
)
SPANS = {
    "covering": spans_of([T] * B),
    "wordless sequences": spans_of([T] * B, wordless=(0, 3, 7, 15)),
    "padded": spans_of([T - 3 * (b % 5) for b in range(B)]),
    "padded, wordless sequences": spans_of([T - 3 * (b % 5) for b in range(B)], wordless=(2, 3, 4)),
}


def on_a_gpu(value: Any) -> Any:
    """Tensors and tables, but for their numbers."""
    if isinstance(value, Tensor):
        return torch.empty(value.shape, dtype=value.dtype, device="meta")
    if isinstance(value, ContrastTable):
        return value._replace(**{name: on_a_gpu(x) for name, x in value._asdict().items() if isinstance(x, Tensor)})
    return ck.PairIndex(on_a_gpu(value.anchor), on_a_gpu(value.positive), on_a_gpu(value.negatives), value.shape)


@pytest.fixture
def products_of_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    """As CUDA has them."""
    multiply = torch.bmm

    def bmm(left: Tensor, right: Tensor, *, out_dtype: torch.dtype | None = None, **options: Any) -> Tensor:
        if out_dtype is None or left.is_meta:
            return multiply(left, right, **options | ({"out_dtype": out_dtype} if out_dtype else {}))
        return multiply(left.to(out_dtype), right.to(out_dtype), **options)

    monkeypatch.setattr(torch, "bmm", bmm)
    monkeypatch.setattr(layers, "multiplies_halves", lambda _: True)


def launches(L: int, pairs: ContrastTable | ck.PairIndex, mask: Tensor | None, dtype: torch.dtype) -> tuple[int, int]:
    """Of the forward and of the backward for L layers."""
    with torch.no_grad():
        hidden = [torch.empty(B, T, D, dtype=dtype, device="meta") for _ in range(L)]
        mi = MITerm(range(L), on_a_gpu(pairs), Similarity(cosine=True, temperature=0.1), None)
        stability = StabilityTerm(range(L), None if mask is None else on_a_gpu(mask), 1e-8)
        problem = carma._asked(hidden, mi, stability, None)
        with Launches() as forward:
            results = carma._forward(problem)
        num_terms = len(Terms._fields)
        upstream = CarmaUpstream(*[None] * (num_terms - 1), torch.empty((), device="meta"))
        with Launches() as backward:
            carma._backward(problem, upstream, [results[1], *results[num_terms:]], [True] * L, False)
    return forward.number, backward.number


@pytest.mark.usefixtures("products_of_halves")
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("negatives", ["sequence", "batch"])
@pytest.mark.parametrize("spans", SPANS.values(), ids=SPANS)
def test_launches(spans: ck.TokenSpans, negatives: str, dtype: torch.dtype) -> None:
    """Of all layers together: those of twice as many are a third more."""
    table = spans.contrast_table(negatives)
    mask = spans.attention_mask if spans.is_padded else None
    paper = sum(launches(12, table, mask, dtype))
    assert paper <= 210
    assert sum(launches(24, table, mask, dtype)) - paper <= 80


@pytest.mark.usefixtures("products_of_halves")
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_launches_of_many_anchors(dtype: torch.dtype) -> None:
    """Almost every token against the whole batch: the tiles of a few layers fill the workspace."""
    table = DENSE.contrast_table("batch")
    paper = sum(launches(12, table, DENSE.attention_mask, dtype))
    assert paper <= 210
    assert sum(launches(24, table, DENSE.attention_mask, dtype)) - paper <= 160


@pytest.mark.usefixtures("products_of_halves")
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("by_layer", [False, True])
def test_launches_of_listed_pairs(by_layer: bool, dtype: torch.dtype) -> None:
    spans = SPANS["covering"]
    pairs = {L: spans.sample_pairs(5, num_layers=L if by_layer else None) for L in (12, 24)}
    paper = sum(launches(12, pairs[12], None, dtype))
    assert paper <= 310
    assert sum(launches(24, pairs[24], None, dtype)) - paper <= 270


@pytest.fixture(params=[1 << 25, 9000, 2500], ids=["all layers", "two layers", "one layer"])
def the_way_of_a_gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Taken by CPU tensors, with all layers at a time, with two in most cases, or with one and anchors in pieces."""
    monkeypatch.setattr(layers, "launches_cost", lambda _: True)
    monkeypatch.setattr(layers, "_WORKSPACE", request.param)


def each_once(cases: list[Case]) -> list[Case]:
    """In fp64, which takes every branch, and in halves, which are read as they are."""
    return [case for case in cases if case.dtype != FP32]


@pytest.mark.usefixtures("the_way_of_a_gpu", "products_of_halves")
class TestTheSameResults:
    @pytest.mark.parametrize("case", each_once(MI_CASES), ids=str)
    def test_mi(self, case: Case) -> None:
        test_mi.compare(TORCH, case)

    @pytest.mark.parametrize("case", each_once(STABILITY_CASES), ids=str)
    def test_stability(self, case: Case) -> None:
        test_stability.test_values_and_gradients(TORCH, case)

    @pytest.mark.parametrize("case", each_once(SIMILARITY_CASES), ids=str)
    def test_similarity(self, case: Case) -> None:
        test_similarity.test_values_and_gradients(TORCH, case)

    @pytest.mark.parametrize(("mi_layers", "stability_layers"), test_carma.RANGES)
    @pytest.mark.parametrize("case", each_once(test_carma.CASES), ids=str)
    def test_carma(
        self, case: Case, mi_layers: tuple[int, int] | None, stability_layers: tuple[int, int] | None
    ) -> None:
        test_carma.test_values_and_gradients(TORCH, case, mi_layers, stability_layers)


@pytest.mark.usefixtures("users_defaults")
@pytest.mark.parametrize("stacked", [False, True], ids=["list", "stacked"])
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("pairs", [*SPANS, "dense", "dense, batch", "listed"])
def test_memory(pairs: str, dtype: torch.dtype, stacked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The workspace and the gradients."""
    workspace = 1 << 22
    monkeypatch.setattr(layers, "launches_cost", lambda _: True)
    monkeypatch.setattr(layers, "_WORKSPACE", workspace)
    hidden = torch.randn(12, B, T, D // 4).to(dtype)
    leaves = [hidden.requires_grad_()] if stacked else [layer.clone().requires_grad_() for layer in hidden]
    dense = {"dense": DENSE, "dense, batch": DENSE}
    spans_or_pairs = {"listed": SPANS["covering"].sample_pairs(), **dense, **SPANS}[pairs]
    config = ck.CarmaConfig(negatives="batch" if "batch" in pairs else "sequence")

    def step() -> None:
        states = leaves[0] if stacked else leaves
        torch.autograd.grad(ck.carma_loss(states, spans_or_pairs, config, backend="torch").loss, leaves)

    assert peak_memory(step, torch.device("cpu")) <= hidden.nbytes + workspace * FP32.itemsize
