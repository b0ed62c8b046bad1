"""The kernels of short groups against csrc_ref, beyond what `tests/ops` asks of them through the losses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import csrc_ref
from carma_kernels import TokenSpans
from carma_kernels._terms import MITerm, Similarity, StabilityTerm
from tests.cases import BF16, FP16, FP32, FP64, read

pytest.importorskip("triton")

TOLERANCE = {FP32: 2e-6, FP16: 1e-3, BF16: 8e-3}  # of the largest gradient: weights and result are rounded
L = 3


@dataclass(frozen=True)
class Problem:
    drawing: tuple[str, ...] = ("aab.ccc_", "aaaaaa__", "........")
    negatives: str = "sequence"
    cosine: bool = True
    tau: float = 0.1
    match: float | None = None
    mi_layers: range = range(L)
    stability_layers: range = range(L)
    masked: bool = True
    dtype: torch.dtype = FP32
    D: int = 24

    def hidden(self) -> Tensor:
        B, T = len(self.drawing), len(self.drawing[0])
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(L, B, T, self.D, generator=generator) + torch.randn(self.D, generator=generator)
        return hidden.to(self.dtype)

    def spans(self) -> tuple[TokenSpans, Tensor]:
        words, valid = read(self.drawing)
        return TokenSpans.from_lists(words, seq_len=valid.shape[1], attention_mask=valid), valid


class Results(NamedTuple):
    sums: Tensor  # [L_mi]
    losses: Tensor  # [steps]
    gradients: list[Tensor | None]
    tau_gradient: Tensor


def upstream(size: int) -> Tensor:
    return torch.linspace(-1, 2, size)


def run(device: str, problem: Problem, hidden: Tensor, frozen: tuple[int, ...] = ()) -> Results:
    """Both losses of a list of layers, by way of the operator."""
    from carma_kernels import ops

    spans, valid = problem.spans()
    layers = [h.to(device).requires_grad_(at not in frozen) for at, h in enumerate(hidden)]
    tau = torch.tensor(problem.tau, device=device, requires_grad=True)
    mask = valid.to(device) if problem.masked else None
    sums, losses, *_ = ops.carma_terms(
        layers,
        MITerm(
            problem.mi_layers,
            spans.to(device).contrast_table(problem.negatives),
            Similarity(problem.cosine, tau),
            problem.match,
        ),
        StabilityTerm(problem.stability_layers, mask, 1e-8),
    )
    outputs = [(sums, upstream(len(sums)).to(device))]
    if len(losses):
        outputs.append((losses, upstream(len(losses)).to(device)))
    torch.autograd.backward(*zip(*outputs, strict=True))
    gradients = [None if h.grad is None else h.grad.cpu() for h in layers]
    assert tau.grad is not None
    return Results(sums.detach().cpu(), losses.detach().cpu(), gradients, tau.grad.cpu())


def reference(problem: Problem, hidden: Tensor) -> Results:
    spans, valid = problem.spans()
    hidden = hidden.double().requires_grad_()
    tau = torch.tensor(problem.tau, dtype=FP64, requires_grad=True)
    sums = csrc_ref.mi_loss(
        hidden,
        spans,
        negatives=problem.negatives,
        temperature=tau,
        metric="cosine" if problem.cosine else "dot",
        layers=(problem.mi_layers.start, problem.mi_layers.stop - 1),
        match_negatives=problem.match,
        reduction="none",
        num_pairs=1,
    )
    losses = torch.zeros(0, dtype=FP64)
    if len(problem.stability_layers) > 1:
        losses = csrc_ref.stability_loss(
            hidden,
            layers=(problem.stability_layers.start, problem.stability_layers.stop - 1),
            mask=valid if problem.masked else None,
            reduction="none",
        )
    loss = (sums * upstream(len(sums))).sum() + (losses * upstream(len(losses))).sum()
    gradient, tau_gradient = torch.autograd.grad(loss, (hidden, tau))
    return Results(sums.detach(), losses.detach(), list(gradient), tau_gradient)


def compare(device: str, problem: Problem) -> None:
    hidden = problem.hidden()
    wanted = reference(problem, hidden)
    if problem.masked:  # padding of any kind changes nothing
        _, valid = problem.spans()
        hidden[:, ~valid] = torch.nan
        hidden[:, ~valid, ::2] = torch.inf
    actual = run(device, problem, hidden)
    torch.testing.assert_close(actual.sums.double(), wanted.sums, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(actual.losses.double(), wanted.losses, rtol=1e-6, atol=0)
    torch.testing.assert_close(actual.tau_gradient.double(), wanted.tau_gradient, rtol=1e-5, atol=1e-4)
    # fp32 holds scores of up to 1/tau to 2^-24 of that, and the weights are their exponentials
    tolerance = max(TOLERANCE[problem.dtype], 2**-24 / problem.tau)
    for ours, exact in zip(actual.gradients, wanted.gradients, strict=True):
        assert ours is not None
        assert exact is not None
        atol = tolerance * exact.abs().max().item()
        torch.testing.assert_close(ours.double(), exact, rtol=0, atol=atol)


@pytest.fixture
def small_tiles(tiles: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Several steps through D, the last one in part, by one program."""
    from carma_kernels.ops import short

    monkeypatch.setattr(short, "_MOST_PIECES", 1)
    for kernel in ("short_forward", "short_backward"):
        tiles(kernel, BLOCK_M=16, BLOCK_T=16, BLOCK_D=16, NUM_BUFFERS=2)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)
@pytest.mark.parametrize("cosine", [True, False], ids=["cosine", "dot"])
@pytest.mark.parametrize("match", [None, 5.0], ids=["", "match"])
def test_against_the_oracle(device: str, dtype: torch.dtype, cosine: bool, match: float | None) -> None:
    compare(device, Problem(dtype=dtype, cosine=cosine, tau=0.1 if cosine else 20.0, match=match))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(
    ("mi_layers", "stability_layers"),
    [
        (range(3), range(0)),
        (range(1, 2), range(3)),
        (range(2), range(1, 3)),
        (range(2, 3), range(2)),
        (range(3), range(1, 3)),
        (range(1), range(2, 3)),
    ],
    ids=str,
)
@pytest.mark.parametrize("masked", [True, False], ids=["masked", "all"])
def test_ranges_of_layers(device: str, mi_layers: range, stability_layers: range, masked: bool) -> None:
    compare(device, Problem(mi_layers=mi_layers, stability_layers=stability_layers, masked=masked))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("match", [None, 5.0], ids=["", "match"])
def test_a_batch_in_one_tile(device: str, match: float | None) -> None:
    compare(device, Problem(drawing=("aab_", ".cc.", "____", "dddd"), negatives="batch", match=match))


@pytest.mark.parametrize(
    ("dtype", "cosine", "masked"),
    [(FP32, True, False), (FP32, False, True), (FP16, True, True), (BF16, True, False), (BF16, False, True)],
    ids=str,
)
def test_rows_in_several_programs(
    device: str, dtype: torch.dtype, cosine: bool, masked: bool, tiles: Callable[..., None]
) -> None:
    """A word on both sides of where one program's rows end and the next one's begin, and rows of padding alone."""
    for kernel in ("short_forward", "short_backward"):
        tiles(kernel, BLOCK_M=16, BLOCK_T=32, BLOCK_D=16, NUM_BUFFERS=2)
    drawing = ("aaa..........bbbbbb..cc", "__dddd" + "_" * 17)
    tau = 0.1 if cosine else 20.0
    compare(device, Problem(drawing=drawing, dtype=dtype, cosine=cosine, tau=tau, masked=masked, D=20))


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 33, 65, 128])
def test_every_length_as_it_is_launched(device: str, length: int) -> None:
    row = ("aab" * length)[: length - 1] + "."
    compare(device, Problem(drawing=(row, row.replace("b", "_")), D=24, mi_layers=range(1), stability_layers=range(2)))


@pytest.mark.usefixtures("small_tiles")
def test_sharp_scores_overflow_nowhere(device: str) -> None:
    compare(device, Problem(tau=0.005))


@pytest.mark.usefixtures("small_tiles")
def test_a_frozen_layer(device: str) -> None:
    problem = Problem()
    hidden = problem.hidden()
    free, frozen = run(device, problem, hidden), run(device, problem, hidden, frozen=(1,))
    assert frozen.gradients[1] is None
    for at in (0, 2):
        one, other = free.gradients[at], frozen.gradients[at]
        assert one is not None
        assert other is not None
        assert torch.equal(one, other)
    assert torch.equal(free.tau_gradient, frozen.tau_gradient)


@pytest.mark.parametrize("pieces", [2, 3])
def test_how_the_columns_are_shared_out_changes_no_bit(
    device: str, pieces: int, small_tiles: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from carma_kernels.ops import short

    problem = Problem(D=56)
    hidden = problem.hidden()
    whole = run(device, problem, hidden)
    monkeypatch.setattr(short, "_MOST_PIECES", pieces)
    for one, other in zip(whole.gradients, run(device, problem, hidden).gradients, strict=True):
        assert one is not None
        assert other is not None
        assert torch.equal(one, other)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("scale", [1e-4, 300.0])
def test_the_range_of_a_half(device: str, scale: float) -> None:
    """Weights of short and of long vectors, which fp16 could not hold as they are."""
    problem = Problem(dtype=FP16, stability_layers=range(0))
    hidden = (problem.hidden().float() * scale).to(FP16)
    wanted = reference(problem, hidden)
    for ours, exact in zip(run(device, problem, hidden).gradients, wanted.gradients, strict=True):
        assert ours is not None
        assert exact is not None
        smallest = 2.0**-24  # what fp16 can tell from 0
        atol = max(TOLERANCE[FP16] * exact.abs().max().item(), smallest)
        torch.testing.assert_close(ours.double(), exact, rtol=0, atol=atol)


def test_the_general_path_gives_the_same(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from carma_kernels.kernels import launch

    problem = Problem(mi_layers=range(1, 3))
    hidden = problem.hidden()
    short = run(device, problem, hidden)
    monkeypatch.setitem(launch.TABLE, "short_forward", [])
    general = run(device, problem, hidden)
    torch.testing.assert_close(short.sums, general.sums, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(short.losses, general.losses, rtol=1e-6, atol=0)
    torch.testing.assert_close(short.tau_gradient, general.tau_gradient, rtol=1e-5, atol=1e-4)
    for one, other in zip(short.gradients, general.gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_groups_of_up_to_128_tokens_are_short_on_every_target() -> None:
    from carma_kernels import _runtime
    from carma_kernels.kernels import launch

    for target in _runtime.TARGETS.values():
        for kernel in ("short_forward", "short_backward"):
            for element_bytes in (2, 4):
                assert launch.choose(kernel, target, 128, element_bytes) is not None
                assert launch.choose(kernel, target, 129, element_bytes) is None
