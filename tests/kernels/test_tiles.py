"""The losses where sequences take several tiles: those of `tests/ops` are so short that most kernels have one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import carma_kernels
import csrc_ref
from carma_kernels import TokenSpans
from tests.cases import BF16, FP16, FP32, MI_CASES, TRITON, Backend, Case, thinned
from tests.compare import assert_close_to_oracle, differentiate
from tests.contracts.ops import OPS, Op, make_problem, same_bits
from tests.contracts.test_leaks import assert_not_read, everywhere
from tests.interpreter import within_tensors
from tests.ops import test_mi as mi
from tests.ops import test_stability as stability

pytest.importorskip("triton")


@pytest.fixture
def backend(device: str) -> Backend:
    return replace(TRITON, device=device, interpret=device == "cpu")


@pytest.fixture
def small_tiles(tiles: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """For every kernel; and the general kernels of the MI loss, for which groups must be longer otherwise."""
    from carma_kernels.kernels import launch

    tile = {"BLOCK_M": 16, "BLOCK_D": 16, "PIECES": 2}
    for kernel, constants in {
        "mi_scores": {**tile, "BLOCK_N": 32},
        "mi_weights": {**tile, "BLOCK_N": 32},
        "mi_gradient": {**tile, "BLOCK_K": 16},
        "pairs_forward": {"BLOCK_D": 16},
        "pairs_backward": {"BLOCK_D": 16},
        "similarity_norms": {"BLOCK_T": 16, "BLOCK_D": 16},
        "similarity_tiles": {"BLOCK_T": 16, "BLOCK_D": 16},
        "similarity_backward": {"BLOCK_T": 16, "BLOCK_J": 16, "BLOCK_D": 16},
        "stability_forward": {"BLOCK_ROWS": 4, "BLOCK_D": 128},  # whole rows: no case is wider
        "stability_backward": {"BLOCK_ROWS": 4, "BLOCK_D": 16},
    }.items():
        tiles(kernel, **constants)
    monkeypatch.setitem(launch.TABLE, "short_forward", [])


GENERAL = [case for case in MI_CASES if case.dtype in TRITON.tolerance and not case.negatives.startswith("listed")]


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("case", GENERAL, ids=str)
def test_mi(backend: Backend, case: Case) -> None:
    """Every case of the MI loss through the general kernels."""
    mi.compare(backend, case)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("op", [op for op in OPS if not op.reads_padding], ids=str)
def test_padding_is_not_read(backend: Backend, op: Op) -> None:
    problem = make_problem(op, backend, Case(L=3, D=24, pad="both"))
    assert_not_read(problem, everywhere(problem, ~problem.given.mask), torch.nan)


TILED = [op for op in OPS if op.name != "mi of listed pairs"]  # a pair knows no tiles


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("op", TILED, ids=str)
def test_a_frozen_layer(backend: Backend, op: Op) -> None:
    case = Case(L=3, D=24, stacked=False)
    whole, problem = make_problem(op, backend, case), make_problem(op, backend, case)
    problem.hidden[1].requires_grad_(False)
    expected = whole.gradients()
    assert all(map(same_bits, problem.gradients(), (expected[0], *expected[2:])))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("op", TILED, ids=str)
def test_a_list_and_a_second_run_change_no_bit(backend: Backend, op: Op) -> None:
    stacked, listed = (make_problem(op, backend, Case(L=2, D=24, stacked=way)) for way in (True, False))
    assert all(map(same_bits, stacked.forward(), listed.forward()))
    first, *rest = stacked.gradients()
    assert all(map(same_bits, (*first, *rest), listed.gradients()))


@pytest.fixture(params=["table", "small"])
def any_tiles(request: pytest.FixtureRequest) -> None:
    """Those of the launch table, and small ones."""
    if request.param == "small":
        request.getfixturevalue("small_tiles")


@pytest.mark.usefixtures("any_tiles")
@pytest.mark.parametrize(
    "case",
    [Case(D=33), *thinned([], [Case(D=17, drawing="long"), Case(D=33, stacked=False, dtype=FP16), Case(D=64)])],
    ids=str,
)
@pytest.mark.parametrize("op", OPS, ids=str)
def test_nothing_but_tensors_is_read_and_written(backend: Backend, op: Op, case: Case) -> None:
    if not backend.interpret:
        pytest.skip("only the interpreter shows every address; on a GPU compute-sanitizer does")
    problem = make_problem(op, backend, case, dtype=FP32 if case.dtype not in TRITON.tolerance else case.dtype)
    with within_tensors():
        problem.gradients()


@pytest.mark.parametrize(("first", "stop"), [(-1, 4), (0, 5), (4, 5)])
def test_a_stray_address_is_noticed(device: str, first: int, stop: int) -> None:
    from triton.runtime.errors import InterpreterError

    from tests.kernels.stray import stray_kernel

    if device != "cpu":
        pytest.skip("only the interpreter shows every address")
    with within_tensors():
        stray_kernel[(1,)](torch.zeros(4), 0, 4)
        with pytest.raises(InterpreterError, match="outside of the tensor"):
            stray_kernel[(1,)](torch.zeros(4), first, stop)


LENGTHS = [1, 2, 31, 58, 64, 65, 129, 200]


def words_of(T: int) -> list[tuple[int, int]]:
    """Of one to seven tokens, with a gap here and there."""
    words, at = [], 0
    for number in range(T):
        size = 1 + number * 5 % 7
        if at + size <= T and number % 4:
            words.append((at, at + size))
        at += size
    return words


@pytest.mark.parametrize("negatives", ["sequence", "batch"])
@pytest.mark.parametrize(("T", "L"), [(T, (1, 2, 5)[at % 3]) for at, T in enumerate(LENGTHS)])
def test_lengths_of_sequences(backend: Backend, T: int, L: int, negatives: str) -> None:
    """Through the launch table as it is, whose tiles these lengths fill exactly, leave part empty or spill over."""
    dtype = (FP32, FP16, BF16)[LENGTHS.index(T) % 3]
    case = Case(L=L, D=19, dtype=dtype, stacked=T % 2 == 0, negatives=negatives)
    B = 2 if negatives == "batch" else 1
    valid = torch.ones(B, T, dtype=torch.bool)
    if T > 2:
        valid[0, -(T // 8) - 1 :] = False
    spans = TokenSpans.from_lists([words_of(int(row.sum())) for row in valid], seq_len=T, attention_mask=valid)
    compare(backend, case, spans)


def compare(backend: Backend, case: Case, spans: TokenSpans) -> None:
    """`carma_loss` and its gradients, garbage in the padding."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(case.L, *spans.shape, case.D, generator=generator).to(case.dtype).double()
    hidden += torch.randn(case.D, generator=generator).to(case.dtype).double()
    hidden = hidden.to(case.dtype).double()
    hidden[:, ~spans.attention_mask] = torch.nan
    asked = {"negatives": case.negatives, "metric": case.metric}

    def ours(h: Any, tau: Any) -> tuple[torch.Tensor, ...]:
        there = spans.to(backend.device)
        config = carma_kernels.CarmaConfig(temperature=tau, **asked)
        return carma_kernels.carma_loss(h, there, config, mask=there.attention_mask, backend="triton")[:5]

    def reference(h: Any, tau: Any) -> tuple[torch.Tensor, ...]:
        config = csrc_ref.CarmaConfig(temperature=tau, **asked)
        return csrc_ref.carma_loss(h, spans, config, mask=spans.attention_mask)[:5]

    oracle = differentiate(reference, hidden, case, exact=True)
    actual = differentiate(ours, hidden, case, device=backend.device)
    assert_close_to_oracle(actual, oracle, backend.tolerance[case.dtype])


def test_a_word_of_more_than_256_tokens(backend: Backend) -> None:
    spans = TokenSpans.from_lists([[(3, 273), (274, 280)]], seq_len=290)
    compare(backend, Case(L=1, D=8, dtype=FP32, metric="dot", temperature=8.0), spans)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("masked", [False, True])
def test_stability_of_wide_layers(backend: Backend, masked: bool) -> None:
    """The gradient in several blocks of D."""
    case = Case(L=4, D=50, dtype=FP32, masked=masked)
    batch = stability.make_batch(case, poison=masked)
    stability.compare(backend, case, batch.hidden, **({"mask": batch.valid} if masked else {}))


@pytest.mark.parametrize("D", [40_000])
def test_pairs_of_any_width(backend: Backend, D: int) -> None:
    """Beyond what a program holds of a row."""
    spans = TokenSpans.from_lists([[(0, 2)]], seq_len=4)
    pairs = spans.sample_pairs(2, generator=torch.Generator().manual_seed(0))
    case = Case(L=1, D=D, dtype=FP32, metric="dot", temperature=100.0)
    hidden = torch.randn(1, 1, 4, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64).mul(0.1).float()
    asked = {"metric": "dot"}
    oracle = differentiate(
        lambda h, tau: (csrc_ref.mi_loss(h, pairs, temperature=tau, **asked),), hidden.double(), case, exact=True
    )
    there = pairs.to(backend.device)
    actual = differentiate(
        lambda h, tau: (carma_kernels.mi_loss(h, there, temperature=tau, backend="triton", **asked),),
        hidden.double(),
        case,
        device=backend.device,
    )
    assert_close_to_oracle(actual, oracle, backend.tolerance[FP32])
