"""The MI kernels around `torch.bmm` against csrc_ref: the problems of test_mi, and what is different here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

import carma_kernels as ck
from carma_kernels import CarmaConfig, _runtime
from tests.cases import BF16, FP16, FP32, Case, thinned
from tests.kernels.test_launches import LOSSES, launches
from tests.kernels.test_mi import Problem, compare, make_hidden, make_spans

pytest.importorskip("triton")

from carma_kernels._ranks import RankTable
from carma_kernels.kernels import launch
from carma_kernels.ops import mi, mi_dense
from carma_kernels.ops.layers import LayerTable, ScaledSimilarity
from carma_kernels.ops.short import ShortMI

Compare = Callable[..., None]


@pytest.fixture(autouse=True)
def small(tiles: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    tiles("dense_gather", BLOCK_M=32, BLOCK_D=32)
    tiles("dense_statistics", BLOCK_N=32)
    tiles("dense_weights", BLOCK_M=16, BLOCK_N=32)
    tiles("dense_rows", BLOCK_M=32, BLOCK_D=32)
    monkeypatch.setattr(mi_dense, "_PIECE_STEP", 16)


@pytest.fixture
def compared(device: str, monkeypatch: pytest.MonkeyPatch) -> Compare:
    """`compare`, of these kernels."""

    def use(problem: Problem, path: str = "dense") -> None:
        monkeypatch.setattr(launch, "LONG_PATH", path)
        text = make_spans(problem).to(device).contrast_table(problem.case.negatives).word

        def shapes(pairs: Any, num_layers: int) -> Any:
            return mi_dense.dense_state_shapes(pairs, text, num_layers)

        def forward(hidden: Any, layers: range, pairs: Any, *rest: Any) -> Tensor:
            return mi_dense.dense_forward(hidden, layers, pairs, text, *rest)

        def backward(hidden: Any, layers: range, pairs: Any, *rest: Any, **more: Any) -> Tensor | None:
            return mi_dense.dense_backward(hidden, layers, pairs, text, *rest, **more)

        monkeypatch.setattr(mi, "contrast_state_shapes", shapes)
        monkeypatch.setattr(mi, "contrast_forward", forward)
        monkeypatch.setattr(mi, "contrast_backward", backward)
        compare(problem, device)

    return use


PROBLEMS = [
    *(
        Problem(Case(dtype=FP32, negatives=negatives, D=24, number=bounded), bounded=bounded)
        for negatives in ("sequence", "batch")
        for bounded in (False, True)
    ),
    *(
        Problem(
            Case(
                dtype=FP32,
                negatives=negatives,
                metric="dot",
                temperature=2.0,
                D=33,
                stacked=False,
                match_negatives=5,
            )
        )
        for negatives in ("sequence", "batch")
    ),
    Problem(Case(dtype=FP32, D=17, match_negatives=64.5)),
    Problem(Case(dtype=FP32, temperature=0.01)),
    # words longer than a block, across blocks
    Problem(Case(dtype=FP32, L=1), lengths=(61, 3), T=61, longest_word=40),
    # a word that covers its sequence has no negatives there, and those of the batch elsewhere
    Problem(lengths=(2, 2, 2), T=3, longest_word=9),
    Problem(Case(dtype=FP32, negatives="batch", match_negatives=3), lengths=(2, 2, 2), T=3, longest_word=9),
    Problem(Case(dtype=FP32, L=1, D=16), lengths=(16, 17), T=17),
    Problem(Case(dtype=FP32, L=1, D=1, metric="dot"), lengths=(33, 32), T=33),
    Problem(Case(dtype=FP32, zero_vectors=True, D=32)),
    Problem(Case(dtype=FP32, zero_vectors=True, number=True), bounded=True),
    # all layers but the first and last; one of them without gradient
    Problem(Case(dtype=FP32, L=4), mi_layers=range(1, 3), lengths=(23,), T=29),
    Problem(Case(dtype=FP32, L=3, stacked=False), frozen=(1,), lengths=(23,), T=29),
    # with the stability loss beside it
    Problem(Case(dtype=FP32, L=3), stability=range(3)),
    Problem(Case(dtype=FP32, L=3, D=33, negatives="batch"), stability=range(3), mask=True),
    Problem(Case(dtype=FP32, L=3, metric="dot", temperature=2.0, stacked=False), stability=range(3), mask=True),
    Problem(Case(dtype=FP32, L=4), mi_layers=range(1, 3), stability=range(2, 4), mask=True),
    Problem(Case(dtype=FP32, L=4, stacked=False), stability=range(1, 3), mask=True, frozen=(0, 2)),
    *(
        Problem(
            Case(dtype=dtype, metric=metric, temperature=0.1 if metric == "cosine" else 4.0, D=40),
            stability=range(2),
            mask=True,
        )
        for dtype in (FP16, BF16)
        for metric in ("cosine", "dot")
    ),
    # vectors of norm 0.01 or 2000: the weights would leave the range of fp16
    *(Problem(Case(dtype=FP16, scale=scale, D=40)) for scale in (1e-3, 300.0)),
    # tokens that are nearly alike: the projection has to be of M' as it was rounded
    Problem(Case(dtype=BF16, L=1, D=48), lengths=(37,), likeness=8.0),
]


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_values_and_gradients(compared: Compare, problem: Problem) -> None:
    compared(problem)


@pytest.mark.parametrize("problem", thinned(PROBLEMS[:3], PROBLEMS[3:]), ids=str)
def test_kept_dot_products(compared: Compare, problem: Problem) -> None:
    compared(problem, "kept")


@pytest.mark.parametrize(
    ("negatives", "path", "groups_weights", "kinds", "num_pieces"),
    [
        # in halves of the workspace, the weights of so many groups fit; then: groups at a time, whether the gradient
        # of the weights' rows is made of them, and that of the other keys; and pieces of anchors
        ("sequence", "dense", 4, {(4, True, True)}, 1),
        ("sequence", "dense", 2, {(2, True, True)}, 1),
        ("sequence", "dense", 0.5, {(1, True, False), (1, False, True)}, 1),
        ("batch", "dense", 1, {(1, True, True)}, 2),
        ("batch", "dense", 0.5, {(1, True, False), (1, False, True)}, 2),
        ("batch", "kept", 0.5, {(1, True, False), (1, False, True)}, 2),
    ],
)
def test_small_workspaces(
    compared: Compare,
    monkeypatch: pytest.MonkeyPatch,
    negatives: str,
    path: str,
    groups_weights: float,
    kinds: set[tuple[int, bool, bool]],
    num_pieces: int,
) -> None:
    """In parts: groups, anchors, keys, D."""
    problem = Problem(Case(dtype=FP32, L=1, D=40, negatives=negatives))
    ranks = make_spans(problem).contrast_table(negatives).ranks
    S, A = ranks.num_negatives.shape
    tokens = -(-len(problem.lengths) * problem.T // S // 16) * 16
    seen: list[tuple[Any, int, int]] = []
    windows = mi_dense._DenseMI.windows

    def spied(self: Any) -> list[Any]:
        found = list(windows(self))
        seen.extend((window, len(list(self.widths(window))), len(list(self.anchor_pieces()))) for window in found)
        return found

    monkeypatch.setattr(mi._Problem, "budget", int(2 * groups_weights * 4 * A * tokens))
    monkeypatch.setattr(mi_dense._DenseMI, "windows", spied)
    compared(problem, path)
    assert {(len(w.groups), w.writes_rows, w.writes_keys) for w, *_ in seen} == kinds
    assert max(widths for _, widths, _ in seen) > 1
    assert {pieces for *_, pieces in seen} == {num_pieces}


@pytest.mark.parametrize("dtype", [FP16, FP32], ids=str)
@pytest.mark.parametrize(("B", "T", "D"), [(8, 1024, 3072), (1, 8192, 2048), (2, 16384, 4096), (1, 2**17, 2048)])
@pytest.mark.parametrize("share", [0.2, 0.8])
def test_the_workspace_is_as_small_as_it_says(B: int, T: int, D: int, share: float, dtype: torch.dtype) -> None:
    """128 MiB, or a layer if that is more, whatever the number of anchors."""
    A = int(share * T)
    hidden = LayerTable((torch.empty(B, T, D, dtype=dtype, device="meta"),))
    shapes = ((B, T), (B, T), (B, 2), (B, A + 1), (B, A))
    ranks = RankTable(*(torch.empty(shape, dtype=torch.int32, device="meta") for shape in shapes), num_pairs=A)
    similarity = ScaledSimilarity(True, torch.empty((), device="meta"), None)
    problem = mi_dense._DenseMI(hidden, range(1), ranks, ranks.word, similarity, None, (ranks.word, ranks.word))
    budget = max(128 * 2**20, B * T * D * dtype.itemsize)
    anchors = max(map(len, problem.anchor_pieces()))
    for window in problem.windows():
        groups, bytes_of_rows = len(window.groups), dtype.itemsize * D
        weights = groups * len(window.rows) * len(window.keys) * dtype.itemsize
        dots = groups * min(anchors, len(window.rows)) * (4 * len(window.keys) + bytes_of_rows)
        gathered_keys = 0 if len(window.keys) == T else len(window.keys) * bytes_of_rows
        width = max(map(len, problem.widths(window)))
        factors = groups * len(problem.factors(window)) * width * dtype.itemsize
        products = groups * len(window.written) * width * 4
        assert weights + max(gathered_keys + dots, factors + products) <= 1.01 * budget


Run = Callable[..., list[Tensor]]


@contextmanager
def launched() -> Iterator[set[str]]:
    """The names of the kernels launched within."""
    names: set[str] = set()
    original = _runtime.launch

    def noted(kernel: Any, *arguments: Any, **options: Any) -> Any:
        names.add(kernel.fn.__name__)
        return original(kernel, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_runtime, "launch", noted)
        yield names


@pytest.fixture
def run(device: str, monkeypatch: pytest.MonkeyPatch) -> Run:
    """`run(path)`: a call of `carma_loss` by that path; the loss, and its gradients: of two of three layers, and tau's.

    The last layer is outside of the MI loss, the first of the stability loss.
    """
    monkeypatch.setattr(mi_dense, "SHORTEST", 1)
    monkeypatch.setattr(ShortMI, "takes", staticmethod(lambda *_: False))
    problem = Problem(Case(dtype=FP32, L=3, D=24), lengths=(19, 11, 0), T=19)
    spans = make_spans(problem)
    states = make_hidden(problem, spans)

    def of_path(path: str, then: str | None = None, around: Any = None) -> list[Tensor]:
        monkeypatch.setattr(launch, "LONG_PATH", path)
        hidden = [layer.float().to(device).requires_grad_(at != 1) for at, layer in enumerate(states)]
        tau = torch.tensor(0.1, device=device, requires_grad=True)
        config = CarmaConfig(temperature=tau, mi_layers=(0, 1), stability_layers=(1, 2), match_negatives=5)
        with around or nullcontext():
            loss = ck.carma_loss(hidden, spans.to(device), config, backend="triton").loss
            monkeypatch.setattr(launch, "LONG_PATH", then or path)
            loss.backward()
        gradients = [layer.grad for at, layer in enumerate(hidden) if at != 1]
        assert hidden[1].grad is None
        return [loss.detach(), *gradients, tau.grad]

    return of_path


@pytest.mark.parametrize("path", ["dense", "kept"])
def test_the_switch(run: Run, path: str) -> None:
    """Every path computes the same, in the public function; off, none of these kernels is launched."""
    with launched() as kernels:
        expected = run("tiles")
    assert not any("dense" in name for name in kernels)
    with launched() as kernels:
        found = run(path)
    assert not any("_mi_" in name for name in kernels)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


def test_the_same_bits(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Again; whether dot products are kept, of no layer or of one; under autocast."""
    expected = run("dense")
    bits = [run("dense"), run("kept", around=torch.autocast(expected[0].device.type, dtype=BF16))]
    for most in (0, 4 * 3 * 8 * 32):
        monkeypatch.setattr(mi_dense, "KEPT_BYTES", most)
        bits.append(run("kept"))
    assert all(torch.equal(a, b) for found in bits for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("path", "then"), [("dense", "tiles"), ("kept", "tiles"), ("kept", "dense"), ("dense", "kept")]
)
def test_the_switch_may_turn_before_the_backward(run: Run, path: str, then: str) -> None:
    """What the forward leaves is the same."""
    for ours, theirs in zip(run(path, then), run(then), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize(("path", "expected"), [("tiles", (4, 2)), ("dense", (8, 12)), ("kept", (8, 9))])
def test_launches(device: str, monkeypatch: pytest.MonkeyPatch, path: str, expected: tuple[int, int]) -> None:
    """Besides the products, of three layers: two forward and four backward each, or three if the dots were kept."""
    monkeypatch.setattr(launch, "LONG_PATH", path)
    forward, backward = launches(LOSSES["carma"], 3, 512, device)
    assert (forward, backward.total()) == expected
