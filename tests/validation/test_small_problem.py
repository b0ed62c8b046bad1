"""The problem of the self-check is small, and runs the kernels that the call is about to run."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from carma_kernels import PairIndex, TokenSpans, _runtime, _small_problem, eager
from carma_kernels._small_problem import SmallProblem, like_similarity, like_terms
from carma_kernels._terms import MITerm, Similarity, StabilityTerm

pytestmark = pytest.mark.usefixtures("no_interpreter")

COSINE = Similarity(cosine=True, temperature=0.1)


class Recorder:
    """A backend that keeps what it is asked."""

    def carma_terms(self, hidden, mi, stability):
        self.hidden, self.mi, self.stability = hidden, mi, stability
        return eager.carma_terms(hidden, mi, stability)

    def pairwise_similarity(self, hidden, layers, similarity, mask, out_dtype):
        self.hidden, self.similarity, self.mask, self.out_dtype = hidden, similarity, mask, out_dtype
        return eager.pairwise_similarity(hidden, layers, similarity, mask, out_dtype)


def asked(problem: SmallProblem) -> Recorder:
    recorder = Recorder()
    outputs = problem.outputs(recorder, problem.inputs)
    assert len(outputs) == len(problem.results)
    assert all(output.isfinite().all() and output.numel() for output in outputs)
    return recorder


def layers(B: int, T: int, D: int, dtype: torch.dtype = torch.float32, L: int = 4) -> list[torch.Tensor]:
    return [torch.empty(1, dtype=dtype).expand(B, T, D)] * L


def spans(B: int, T: int) -> TokenSpans:
    return TokenSpans.from_lists([[(0, 2)]] * B, seq_len=T)


def table(B: int, T: int, negatives: str, **term: Any) -> MITerm:
    given = {"layers": range(4), "similarity": COSINE, "match_negatives": None, **term}
    return MITerm(pairs=spans(B, T).contrast_table(negatives), **given)


@pytest.mark.parametrize("target", _runtime.TARGETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("negatives", ["sequence", "batch"])
def test_the_same_kernels(target: str, dtype: torch.dtype, negatives: str, monkeypatch):
    pytest.importorskip("triton")
    from carma_kernels.kernels import launch
    from carma_kernels.ops import usable
    from carma_kernels.ops.short import ShortMI

    monkeypatch.setattr(_runtime, "target", lambda _: _runtime.TARGETS[target])
    monkeypatch.setattr(usable, "_longest", {})
    shapes = [(1, 2), (1, 16), (1, 17), (2, 8), (3, 64), (16, 58), (1, 128), (2, 128), (1, 129), (64, 3), (2, 4000)]
    for B, T, D in [*((B, T, 768) for B, T in shapes), (6, 40, 16384)]:
        hidden, mi = layers(B, T, D, dtype), table(B, T, negatives)
        kernels = usable.kernels_for(hidden[0], mi)
        group = B * T if negatives == "batch" else T
        assert (kernels == "short groups") == ShortMI.takes(group, hidden[0])
        small = asked(like_terms(kernels, hidden, mi, None))
        assert usable.kernels_for(small.hidden[0], small.mi) == kernels
        if kernels == "short groups":
            small_B, small_T, _ = small.hidden[0].shape
            small_group = small_T * small_B // small.mi.pairs.ranks.token.shape[0]
            for kernel in ("short_forward", "short_backward"):
                of_call, of_small = (
                    launch.choose(kernel, _runtime.TARGETS[target], size, dtype.itemsize)
                    for size in (group, small_group)
                )
                assert of_call is of_small


@pytest.mark.parametrize("mi", [None, "without pairs", "listed without pairs"])
def test_stability_alone(mi: str | None):
    pytest.importorskip("triton")
    from carma_kernels.ops import kernels_for

    nothing = TokenSpans.from_lists([[], []], seq_len=9)
    pairs = {"without pairs": nothing.contrast_table("batch"), "listed without pairs": nothing.sample_pairs(2)}
    hidden = layers(2, 9, 16)
    term = None if mi is None else MITerm(range(4), pairs[mi], COSINE, None)
    assert kernels_for(hidden[0], term) == "stability alone"
    problem = like_terms("stability alone", hidden, term, StabilityTerm(range(1), None, 0.5))
    assert (problem.loss, problem.results) == ("stability_loss", ("the stability loss", "their total"))
    small = asked(problem)
    assert small.mi is None
    assert (len(small.stability.layers), small.stability.eps) == (3, 0.5)


def test_what_triton_takes():
    pytest.importorskip("triton")
    from carma_kernels.ops import takes

    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert takes(layers(1, 1, 16384, dtype)[0])
        assert not takes(layers(1, 1, 16385, dtype)[0])
    assert not takes(layers(1, 1, 8, torch.float64)[0])


@pytest.mark.parametrize(("D", "most"), [(1, 2**22), (768, 2**22), (16384, 2**24)])
@pytest.mark.parametrize(("B", "T"), [(1, 2), (16, 58), (1, 8000)])
def test_small_and_with_many_programs(B: int, T: int, D: int, most: int):
    """Where two sequences alone are more, they are it."""
    hidden = layers(B, T, D)
    of_spans = spans(B, T)
    for problem in (
        like_terms("short groups", hidden, table(B, T, "sequence"), None),
        like_terms("long groups", hidden, table(max(B, 2), T, "batch"), None),
        like_terms("listed pairs", hidden, MITerm(range(4), of_spans.sample_pairs(100), COSINE, None), None),
        like_similarity("similarity", hidden, range(4), COSINE, None, torch.float32),
    ):
        numbers = sum(layer.numel() for layer in problem.hidden)
        sequences, tokens, width = problem.hidden[0].shape
        if problem.loss == "pairwise_similarity":
            numbers = max(numbers, 3 * sequences * tokens * tokens)  # of the matrix
        assert numbers <= most
        assert width == max(D, 2)
        assert 2 <= sequences <= 256
        assert tokens == min(max(T, 8), 160)
        assert sequences in (2, 256) or numbers > 2**20


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_what_is_constant_in_a_kernel_is_the_calls(stacked: bool, dtype: torch.dtype):
    hidden: Any = layers(2, 20, 24, dtype)
    hidden = torch.stack(hidden) if stacked else hidden
    for cosine in (False, True):
        for match, masked, some in ((None, False, False), (5.0, True, True)):
            mi = table(2, 20, "sequence", similarity=Similarity(cosine, 0.3), match_negatives=match)
            mi = MITerm(range(1, 3) if some else range(4), mi.pairs, mi.similarity, mi.match_negatives)
            mask = torch.ones(2, 20, dtype=torch.bool) if masked else None
            small = asked(like_terms("short groups", hidden, mi, StabilityTerm(range(4), mask, 1e-3)))
            assert isinstance(small.hidden, torch.Tensor) == stacked
            assert small.hidden[0].dtype == dtype
            assert (small.mi.similarity.cosine, small.mi.similarity.temperature) == (cosine, 0.3)
            assert small.mi.match_negatives == match
            assert (len(small.mi.layers) < len(small.hidden)) == some
            assert (small.stability.mask is not None) == masked
            assert small.stability.eps == 1e-3
            small = asked(like_similarity("similarity", hidden, range(4), mi.similarity, mask, dtype))
            assert (small.similarity, small.out_dtype) == (mi.similarity, dtype)
            assert (small.mask is not None) == masked


@pytest.mark.parametrize("stability", [None, StabilityTerm(range(1), None, 1e-8)])
def test_no_stability_loss_without_a_step(stability: StabilityTerm | None):
    problem = like_terms("short groups", layers(2, 20, 24), table(2, 20, "sequence"), stability)
    assert (problem.loss, problem.results) == ("mi_loss", ("the MI loss", "their total"))
    assert asked(problem).stability is None


@pytest.mark.parametrize(("K", "small_K"), [(0, 1), (1, 1), (5, 5), (1000, 33)])
@pytest.mark.parametrize("by_layer", [False, True])
def test_listed_pairs(K: int, small_K: int, by_layer: bool):
    shape = (2, 1, K) if by_layer else (1, K)
    one = torch.zeros(1, dtype=torch.int32)
    pairs = PairIndex(one, one, torch.zeros(shape, dtype=torch.int32), (2, 20))
    found = asked(like_terms("listed pairs", layers(2, 20, 24), MITerm(range(1, 3), pairs, COSINE, None), None)).mi
    assert isinstance(found.pairs, PairIndex)
    assert found.pairs.negatives.shape == (
        (2, found.pairs.num_pairs, small_K) if by_layer else (found.pairs.num_pairs, small_K)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_learned_temperature(dtype: torch.dtype):
    users = torch.tensor(7.0, dtype=dtype, requires_grad=True)
    problem = like_terms(
        "short groups", layers(2, 20, 24), table(2, 20, "sequence", similarity=Similarity(True, users)), None
    )
    assert problem.temperature is not users
    assert problem.inputs[-1] is problem.temperature
    assert problem.temperature.dtype == dtype
    assert problem.temperature.requires_grad
    assert asked(problem).mi.similarity.temperature is problem.temperature


@pytest.mark.parametrize("temperature", [1e-30, 1e-3, 0.1, 1e3, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_scores_are_moderate(temperature: float, dtype: torch.dtype):
    mi = table(2, 20, "sequence", similarity=Similarity(False, temperature))
    small = asked(like_terms("short groups", layers(2, 20, 64, dtype), mi, None))
    of_one = small.hidden[0][0].detach().float()  # [T, D]
    scores = of_one @ of_one.T / small.mi.similarity.temperature
    assert 2 < scores.abs().max() < 50


def test_batches_are_ragged_and_have_words():
    batch = _small_problem._spans(8, 58)
    assert {end - start for words in batch.to_lists() for start, end in words} == {2, 3, 4, 5}
    valid = batch.attention_mask.sum(1)
    assert valid.unique().numel() > 2
    assert not batch.attention_mask[:, 0].all()  # padding on the left
    assert not batch.attention_mask[:, -1].all()  # and on the right
