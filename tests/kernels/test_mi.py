"""The general MI kernels against csrc_ref, through their host functions and with tiles far smaller than a group."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import csrc_ref
from carma_kernels import TokenSpans
from tests.cases import BF16, FP16, FP32, FP64, Case
from tests.compare import assert_close_to_oracle, differentiate

pytest.importorskip("triton")

# of the computation, before the rounding of what is stored: the weights meet the tokens in the dtype of the tokens
TOLERANCE = {FP32: 1e-5, FP16: 1e-3, BF16: 8e-3}


@dataclass(frozen=True)
class Problem:
    """A batch, and what is asked of the kernels besides what `Case` says."""

    case: Case = field(default_factory=lambda: Case(dtype=FP32))
    lengths: tuple[int, ...] = (37, 21, 0, 5)  # valid tokens of each sequence
    T: int = 37
    longest_word: int = 5
    mi_layers: range | None = None  # all
    stability: range | None = None  # the layers of a stability loss beside it
    mask: bool = False  # of the stability loss
    frozen: tuple[int, ...] = ()  # layers without gradient
    bounded: bool = False
    likeness: float = 1.0  # size of what the tokens of a sequence have in common

    def __str__(self) -> str:
        default = Problem(self.case)
        differing = [f.name for f in fields(self)[1:] if getattr(self, f.name) != getattr(default, f.name)]
        return ", ".join([str(self.case), *(f"{name}={getattr(self, name)}" for name in differing)])

    @property
    def layers(self) -> range:
        return self.mi_layers or range(self.case.L)


def make_spans(problem: Problem) -> TokenSpans:
    """Words of one to `longest_word` tokens, side by side, some tokens between them in no word."""
    generator = torch.Generator().manual_seed(3)
    words = []
    for length in problem.lengths:
        row, at = [], 0
        while at < length:
            size = int(torch.randint(1, problem.longest_word + 1, (1,), generator=generator))
            if torch.rand(1, generator=generator) < 0.75:
                row.append((at, min(at + size, length)))
            at += size
        words.append(row)
    valid = torch.arange(problem.T) < torch.tensor(problem.lengths)[:, None]
    return TokenSpans.from_lists(words, seq_len=problem.T, attention_mask=valid)


def make_hidden(problem: Problem, spans: TokenSpans) -> Tensor:
    """`[L, B, T, D]`, NaN and inf in the padding."""
    B, T = spans.shape
    case = problem.case
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(case.L, B, T, case.D, generator=generator, dtype=FP64)
    hidden += problem.likeness * torch.randn(1, B, 1, case.D, generator=generator, dtype=FP64)
    if case.zero_vectors:
        hidden[:, 0, [0, 3, 8, 9]] = 0
    hidden = (case.scale * hidden).to(case.dtype).to(FP64)
    padding = ~spans.attention_mask
    hidden[:, padding] = torch.nan
    hidden[:, padding, ::2] = torch.inf
    return hidden


def run(
    problem: Problem, spans: TokenSpans, hidden: Tensor | list[Tensor], tau: Tensor | float, device: str
) -> tuple[Tensor, ...]:
    """Sums of the MI loss over the pairs, and the stability loss, differentiated by the host functions."""
    from carma_kernels.ops.layers import ScaledSimilarity, Upstream, readable
    from carma_kernels.ops.mi import contrast_backward, contrast_forward, contrast_state_shapes
    from carma_kernels.ops.stability import StabilityGradient

    case, layers = problem.case, problem.layers
    ranks = spans.to(device).contrast_table(case.negatives).ranks
    assert ranks is not None
    mask = spans.attention_mask.to(device) if problem.mask else None

    class Operator(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, tau: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
            ctx.table = readable([layer for tensor in tensors for layer in (tensor if tensor.dim() == 4 else [tensor])])
            value = torch.as_tensor(tau, dtype=FP32, device=device)
            ctx.tau = value
            ctx.similarity = ScaledSimilarity(
                case.metric == "cosine", value.reciprocal(), case.match_negatives, problem.bounded
            )
            chosen = [ctx.table.layers[layer] for layer in layers]
            ctx.inverse_norms = inverse_norms(chosen) if case.metric == "cosine" else None
            ctx.state = tuple(torch.empty(shape, device=device) for shape in contrast_state_shapes(ranks, len(layers)))
            partials = contrast_forward(ctx.table, layers, ranks, ctx.similarity, ctx.inverse_norms, ctx.state)
            losses, ctx.scale = stability(ctx.table.layers, problem.stability, mask, tensors[0])
            ctx.losses = losses
            return partials.sum(-1), losses.to(FP32)

        @staticmethod
        def backward(ctx: Any, grad_sums: Tensor, grad_losses: Tensor) -> tuple[Tensor | None, ...]:
            mask_bytes = None if mask is None else mask.flatten().to(torch.uint8)
            stencil = StabilityGradient(
                problem.stability or range(0), mask_bytes, ctx.losses.float(), ctx.scale.float(), Upstream(grad_losses)
            )
            gradients = [torch.empty_like(layer) for layer in ctx.table.layers]
            out = type(ctx.table)(
                tuple(None if at in problem.frozen else gradient for at, gradient in enumerate(gradients))
            )
            work = contrast_backward(
                ctx.table, layers, ranks, ctx.similarity, ctx.inverse_norms, ctx.state, Upstream(grad_sums), stencil,
                out, needs_work=not case.number,
            )  # fmt: skip
            for at, gradient in enumerate(gradients):
                if at in problem.frozen or at not in layers:
                    assert gradient.isnan().all(), "written"  # new memory is full of NaN
                    gradient.zero_()
            grad_tau = None if work is None else -(grad_sums @ work) / ctx.tau
            return grad_tau, *([torch.stack(gradients)] if case.stacked else gradients)

    tensors = [hidden] if isinstance(hidden, Tensor) else hidden
    sums, losses = Operator.apply(tau, *tensors)
    return (sums, losses) if problem.stability is not None else (sums,)


def inverse_norms(layers: list[Tensor]) -> Tensor:
    norm = torch.stack(layers).double().flatten(1, 2).norm(dim=-1)  # [L, N]
    return torch.where(norm > 1e-8, norm.reciprocal(), 0.0).nan_to_num(0.0).float()


def stability(
    layers: tuple[Tensor, ...], chosen: range | None, mask: Tensor | None, like: Tensor
) -> tuple[Tensor, Tensor]:
    """`r_l` and `k_l`, `[steps]` fp64."""
    if chosen is None:
        return like.new_zeros(0, dtype=FP64), like.new_zeros(0, dtype=FP64)
    rows = [layers[layer].double() if mask is None else layers[layer][mask].double() for layer in chosen]
    energy = torch.stack([row.square().mean() for row in rows])
    change = torch.stack([(b - a).square().mean() for a, b in pairwise(rows)])
    denominator = energy[1:] + energy[:-1] + 1e-8
    return change / denominator, 2 / (rows[0].numel() * denominator)


def reference(
    problem: Problem, spans: TokenSpans, hidden: Tensor | list[Tensor], tau: Tensor | float
) -> tuple[Tensor, ...]:
    case = problem.case
    mi = csrc_ref.mi_loss(
        hidden,
        spans,
        negatives=case.negatives,
        temperature=tau,
        metric=case.metric,
        layers=(problem.layers.start, problem.layers.stop - 1),
        match_negatives=case.match_negatives,
        reduction="none",
        num_pairs=1,
    )
    if problem.stability is None:
        return (mi,)
    mask = spans.attention_mask if problem.mask else None
    layers = (problem.stability.start, problem.stability.stop - 1)
    return mi, csrc_ref.stability_loss(hidden, layers=layers, mask=mask, reduction="none")


def compare(problem: Problem, device: str) -> None:
    case = problem.case
    spans = make_spans(problem)
    assert spans.num_pairs > 0
    hidden = make_hidden(problem, spans)
    if problem.stability is not None and not problem.mask:
        hidden = hidden.nan_to_num(0.25, posinf=0.5)  # padding takes part
    oracle = differentiate(lambda h, tau: reference(problem, spans, h, tau), hidden, case, exact=True)
    actual = differentiate(lambda h, tau: run(problem, spans, h, tau, device), hidden, case, device=device)
    for layer in range(case.L):
        if (
            layer in problem.frozen or layer not in problem.layers
        ):  # the stability loss's part of it is written elsewhere
            oracle.hidden[layer] = 0
    assert_close_to_oracle(actual, oracle, TOLERANCE[case.dtype])


Tiles = Callable[..., None]


@dataclass(frozen=True)
class Sizes:
    """Tiles of the three kernels: rows, columns (or depth), width, pieces of the epilogue."""

    scores: tuple[int, int, int, int] = (16, 16, 16, 1)
    weights: tuple[int, int, int, int] = (16, 16, 16, 1)
    gradient: tuple[int, int, int, int] = (16, 16, 32, 1)

    def use(self, tiles: Tiles) -> None:
        tiles("mi_scores", **dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_D", "PIECES"), self.scores, strict=True)))
        tiles("mi_weights", **dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_D", "PIECES"), self.weights, strict=True)))
        tiles("mi_gradient", **dict(zip(("BLOCK_M", "BLOCK_K", "BLOCK_D", "PIECES"), self.gradient, strict=True)))


@pytest.fixture
def small(tiles: Tiles) -> None:
    Sizes().use(tiles)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("bounded", [False, True], ids=["online", "bounded"])
@pytest.mark.parametrize("negatives", ["sequence", "batch"])
def test_cosine(device: str, negatives: str, bounded: bool) -> None:
    compare(Problem(Case(dtype=FP32, negatives=negatives, D=24, number=bounded), bounded=bounded), device)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("negatives", ["sequence", "batch"])
def test_dot(device: str, negatives: str) -> None:
    case = Case(dtype=FP32, negatives=negatives, metric="dot", temperature=2.0, D=33, stacked=False, match_negatives=5)
    compare(Problem(case), device)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    "problem",
    [
        Problem(Case(dtype=FP32, D=17, match_negatives=64.5)),
        Problem(Case(dtype=FP32, temperature=0.01)),
        # words longer than a tile, across tiles
        Problem(Case(dtype=FP32, L=1), lengths=(61, 3), T=61, longest_word=40),
        # a word that covers its sequence has no negatives there, and those of the batch elsewhere
        Problem(lengths=(2, 2, 2), T=3, longest_word=9),
        Problem(Case(dtype=FP32, negatives="batch", match_negatives=3), lengths=(2, 2, 2), T=3, longest_word=9),
        # sizes about those of the tiles
        Problem(Case(dtype=FP32, L=1, D=16), lengths=(16, 17), T=17),
        Problem(Case(dtype=FP32, L=1, D=1, metric="dot"), lengths=(33, 32), T=33),
        Problem(Case(dtype=FP32, zero_vectors=True, D=32)),
        Problem(Case(dtype=FP32, zero_vectors=True, number=True), bounded=True),
        # all layers but the first and last; one of them without gradient
        Problem(Case(dtype=FP32, L=4), mi_layers=range(1, 3), lengths=(23,), T=29),
        Problem(Case(dtype=FP32, L=3, stacked=False), frozen=(1,), lengths=(23,), T=29),
    ],
    ids=str,
)
def test_special(device: str, problem: Problem) -> None:
    compare(problem, device)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    "problem",
    [
        Problem(Case(dtype=FP32, L=3), stability=range(3)),
        Problem(Case(dtype=FP32, L=3, D=33, negatives="batch"), stability=range(3), mask=True),
        Problem(Case(dtype=FP32, L=3, metric="dot", temperature=2.0, stacked=False), stability=range(3), mask=True),
        # ranges that overlap in part: a layer's neighbour may lie outside of the MI loss, or of the stability loss
        Problem(Case(dtype=FP32, L=4), mi_layers=range(1, 3), stability=range(2, 4), mask=True),
        Problem(Case(dtype=FP32, L=4, stacked=False), stability=range(1, 3), mask=True, frozen=(0, 2)),
    ],
    ids=str,
)
def test_with_stencil(device: str, problem: Problem) -> None:
    compare(problem, device)


@pytest.mark.parametrize(
    "sizes",
    [
        Sizes((32, 16, 32, 2), (16, 32, 16, 4), (32, 16, 16, 2)),
        Sizes((16, 64, 16, 4), (64, 16, 32, 2), (16, 16, 64, 4)),
        Sizes((64, 32, 64, 1), (32, 64, 16, 8), (64, 32, 32, 1)),
    ],
    ids=str,
)
@pytest.mark.parametrize("negatives", ["sequence", "batch"])
def test_tiles_of_other_sizes(device: str, tiles: Tiles, negatives: str, sizes: Sizes) -> None:
    sizes.use(tiles)
    compare(Problem(Case(dtype=FP32, negatives=negatives, D=40), stability=range(2), mask=True), device)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
@pytest.mark.parametrize("metric", ["cosine", "dot"])
def test_halves(device: str, metric: str, dtype: torch.dtype) -> None:
    case = Case(dtype=dtype, metric=metric, temperature=0.1 if metric == "cosine" else 4.0, D=40)
    compare(Problem(case, stability=range(2), mask=True), device)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("scale", [1e-3, 300.0])
def test_halves_of_other_magnitudes(device: str, scale: float) -> None:
    """With vectors of norm 0.01 or 2000 the weights would leave the range of fp16."""
    compare(Problem(Case(dtype=FP16, scale=scale, D=40)), device)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("negatives", "budget", "kinds"),
    [
        # bytes: of all layers, of a layer, of some groups, of less than one
        ("sequence", 2**30, {(3, 4, True, True)}),
        ("sequence", 4 * 4 * 16 * 256 + 1, {(1, 4, True, True)}),
        ("sequence", 2 * 4 * 16 * 256 + 1, {(1, 2, True, True)}),
        ("sequence", 4 * 16 * 256 - 1, {(1, 1, True, False), (1, 1, False, True)}),
        ("batch", 4 * 16 * 256 + 1, {(1, 1, True, False), (1, 1, False, True)}),
    ],
)
def test_small_workspaces(
    device: str, monkeypatch: pytest.MonkeyPatch, negatives: str, budget: int, kinds: set[tuple[int, int, bool, bool]]
) -> None:
    from carma_kernels.ops import mi

    seen = []
    original = mi._Problem.windows

    def spied(self: Any, *sizes: int) -> list[Any]:
        seen.extend(original(self, *sizes))
        return list(original(self, *sizes))

    monkeypatch.setattr(mi._Problem, "budget", budget)
    monkeypatch.setattr(mi._Problem, "windows", spied)
    compare(Problem(Case(dtype=FP32, L=3, negatives=negatives), stability=range(3), mask=True), device)
    assert {(len(w.layers), len(w.groups), w.writes_anchors, w.writes_others) for w in seen} == kinds


@pytest.mark.usefixtures("small")
def test_no_anchor(device: str) -> None:
    """Nothing to compute, and rows to write all the same."""
    problem = Problem(Case(dtype=FP32, L=2), stability=range(2), mask=True)
    spans = TokenSpans.from_lists([[], [(0, 1)]], seq_len=5, attention_mask=[[1, 1, 1, 0, 0]] * 2)
    hidden = make_hidden(problem, spans)
    oracle = differentiate(lambda h, tau: reference(problem, spans, h, tau), hidden, problem.case, exact=True)
    actual = differentiate(lambda h, tau: run(problem, spans, h, tau, device), hidden, problem.case, device=device)
    assert_close_to_oracle(actual, oracle, TOLERANCE[FP32])


def test_several_windows_of_keys(device: str, monkeypatch: pytest.MonkeyPatch, tiles: Tiles) -> None:
    """Only beyond 256 tokens a group's keys come in parts."""
    from carma_kernels.ops import mi

    Sizes((64, 64, 16, 1), (32, 64, 16, 1), (64, 32, 16, 1)).use(tiles)
    monkeypatch.setattr(mi._Problem, "budget", 4 * 64 * 512)
    compare(Problem(Case(dtype=FP32, L=1, negatives="batch"), lengths=(100, 90, 100), T=100), device)


@pytest.mark.usefixtures("small")
def test_tokens_that_are_nearly_alike(device: str) -> None:
    """Almost all of M' h is then along h_i, and goes only if the projection is of M' as it was rounded."""
    compare(Problem(Case(dtype=BF16, L=1, D=48), lengths=(37,), likeness=8.0), device)
