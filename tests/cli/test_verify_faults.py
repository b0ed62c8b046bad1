"""`verify` misses nothing: faults planted in a backend, each found with the default settings where it shows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import carma_kernels
from carma_kernels import PairIndex, TokenSpans, eager
from carma_kernels.__main__ import main
from carma_kernels.verify import table
from carma_kernels.verify.errors import TOLERANCE
from carma_kernels.verify.problems import Check

pytestmark = pytest.mark.usefixtures("no_interpreter")

SIMILARITY = Check("pairwise_similarity", metric="dot")
MI = Check("mi_loss", "sequence", "cosine")
BATCH = Check("mi_loss", "batch", "dot")
SAMPLED = Check("mi_loss", "sampled", "cosine")
STABILITY = Check("stability_loss")
CARMA = Check("carma_loss", "batch", "cosine")
LONG = Check("carma_loss", "sequence", "cosine", long=True)

ALL = set(TOLERANCE)
FP32 = {torch.float32}
BF16 = {torch.bfloat16}
FP16 = {torch.float16}

Terms = Callable[..., Any]
"""`carma_terms(hidden, mi, stability)` of a backend, or a public function"""


class Through(torch.autograd.Function):
    """The same numbers; in the backward, what `change` makes of the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.change = change
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.change(grad), None


def scaled(tensor: Tensor, factor: float) -> Tensor:
    return Through.apply(tensor, lambda grad: grad * factor)


def of_results(change: Callable[[Tensor], Tensor]) -> Callable[[Terms], Terms]:
    return lambda terms: lambda *arguments: tuple(map(change, terms(*arguments)))


def of_layers(change: Callable[[int, Tensor], Tensor]) -> Callable[[Terms], Terms]:
    """`change(layer, [B, T, D])` of the hidden states, and so of their gradients."""

    def broken(terms: Terms) -> Terms:
        def changed(hidden: Any, *arguments: Any) -> Any:
            layers = [change(at, layer) for at, layer in enumerate(hidden)]
            return terms(torch.stack(layers) if isinstance(hidden, Tensor) else layers, *arguments)

        return changed

    return broken


def of_mi(change: Callable[[Any], Any]) -> Callable[[Terms], Terms]:
    return lambda terms: lambda hidden, mi, stability: terms(hidden, mi and change(mi), stability)


def of_temperature(change: Callable[[Tensor], Tensor]) -> Callable[[Terms], Terms]:
    def changed(mi: Any) -> Any:
        if not isinstance(mi.similarity.temperature, Tensor):
            return mi
        similarity = dataclasses.replace(mi.similarity, temperature=change(mi.similarity.temperature))
        return dataclasses.replace(mi, similarity=similarity)

    return of_mi(changed)


def without_its_mask(terms: Terms) -> Terms:
    return lambda hidden, mi, stability: terms(hidden, mi, dataclasses.replace(stability, mask=None))


def without_a_neighbour(terms: Terms) -> Terms:
    """The stencil of the second layer lacks the layer after it."""

    def changed(hidden: Any, mi: Any, stability: Any) -> Any:
        sums, changes = terms(hidden, mi, stability)
        cut = [layer.detach() if at == 1 else layer for at, layer in enumerate(hidden)]
        _, without = terms(torch.stack(cut) if isinstance(hidden, Tensor) else cut, None, stability)
        is_after = torch.arange(stability.layers.start, stability.layers.stop - 1) == 1  # the step from layer 1 to 2
        return sums, torch.where(is_after, without, changes)

    return changed


def a_fiftieth_more_padding(layer: Tensor) -> Tensor:
    """Where a hidden state is NaN or 0, its gradient is not quite 0."""
    unread = layer.detach().nan_to_num().eq(0).all(-1, keepdim=True)
    return Through.apply(layer, lambda grad: grad + unread * grad.abs().max() / 50)


def shortened(function: Terms) -> Terms:
    """Words of three tokens or more lose their last."""

    def changed(hidden: Any, spans: TokenSpans, **options: Any) -> Tensor:
        words = [[(start, end - (end - start > 2)) for start, end in words] for words in spans.to_lists()]
        shorter = TokenSpans.from_lists(words, seq_len=spans.shape[1], attention_mask=spans.attention_mask)
        return function(hidden, shorter, **options)

    return changed


def the_other_way_round(function: Terms) -> Terms:
    """The later token of a pair is the anchor."""

    def changed(hidden: Any, pairs: PairIndex, **options: Any) -> Tensor:
        return function(hidden, PairIndex(pairs.positive, pairs.anchor, pairs.negatives, pairs.shape), **options)

    return changed


def crash(terms: Terms) -> Terms:
    def changed(*arguments: Any) -> Any:
        raise RuntimeError("an illegal memory access\nwas encountered")

    return changed


def only_in(dtype: torch.dtype, factor: float) -> Callable[[int, Tensor], Tensor]:
    return lambda _, layer: scaled(layer, factor) if layer.dtype == dtype else layer


FAULTS = {
    "a value is off by 2e-5": (of_results(lambda sums: sums * (1 + 2e-5)), [MI, STABILITY, CARMA, LONG], ALL),
    "a value is NaN": (of_results(lambda sums: sums * float("nan")), [MI, STABILITY, CARMA], ALL),
    "it raises": (crash, [MI, STABILITY, CARMA], ALL),
    "all gradients are 2 % too large": (of_results(lambda sums: scaled(sums, 1.02)), [MI, STABILITY, CARMA], ALL),
    "one layer's gradient is 3 % too large": (
        of_layers(lambda at, layer: scaled(layer, 1.03) if at == 1 else layer),
        [MI, STABILITY, CARMA, LONG],
        ALL,
    ),
    "the last layer has no gradient": (
        of_layers(lambda at, layer: layer.detach() if at == 1 else layer),
        [MI, STABILITY, CARMA, LONG],
        ALL,
    ),
    "the temperature's gradient is missing": (of_temperature(torch.Tensor.detach), [MI, BATCH, SAMPLED], ALL),
    "the temperature's gradient is 5 % too large": (of_temperature(lambda tau: scaled(tau, 1.05)), [MI], ALL),
    "in bfloat16 alone gradients are 2 % too large": (of_layers(only_in(torch.bfloat16, 1.02)), [MI, CARMA], BF16),
    "in float16 alone gradients are 0.3 % too small": (of_layers(only_in(torch.float16, 0.997)), [MI, STABILITY], FP16),
    "padding gets a gradient": (of_layers(lambda _, layer: a_fiftieth_more_padding(layer)), [MI, STABILITY], ALL),
    "the stability loss reads what is masked": (without_its_mask, [STABILITY], ALL),
    "a neighbour is missing in one layer's stencil": (without_a_neighbour, [STABILITY], ALL),
    "match_negatives is forgotten": (of_mi(lambda mi: dataclasses.replace(mi, match_negatives=None)), [MI], ALL),
    "only the first layer takes part": (
        of_mi(lambda mi: dataclasses.replace(mi, layers=range(mi.layers.start, mi.layers.start + 1))),
        [MI],
        ALL,
    ),
}
FAULTS_OF_MI_LOSS = {
    "words end a token too early": (shortened, MI, ALL),
    "the later token is the anchor": (the_other_way_round, SAMPLED, ALL),
}


def misses(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, check: Check) -> set[str]:
    """The dtypes in which the check misses, with the default settings."""
    monkeypatch.setattr(table, "CHECKS", (check,))
    status = main(["verify", "--backend", "torch"])
    out, err = capsys.readouterr()
    assert err == ""
    rows = [line.split() for line in out.splitlines() if line.startswith(check.function)]
    found = {words[3] for words in rows if words[-1] == "MISS"}
    assert len(rows) == len(TOLERANCE)
    assert status == bool(found)
    assert ("MISS: this installation does not compute what the reference does." in out) == bool(found)
    return found


def names(dtypes: set[torch.dtype]) -> set[str]:
    return {str(dtype).removeprefix("torch.") for dtype in dtypes}


@pytest.mark.parametrize(
    ("fault", "check"), [(fault, check) for fault, (_, checks, _) in FAULTS.items() for check in checks], ids=str
)
def test_a_fault_in_a_backend_is_a_miss(capsys, monkeypatch, fault: str, check: Check):
    break_it, _, dtypes = FAULTS[fault]
    monkeypatch.setattr(eager, "carma_terms", break_it(eager.carma_terms))
    assert misses(capsys, monkeypatch, check) == names(dtypes)


@pytest.mark.parametrize("fault", FAULTS_OF_MI_LOSS)
def test_a_fault_before_the_backend_is_a_miss(capsys, monkeypatch, fault: str):
    break_it, check, dtypes = FAULTS_OF_MI_LOSS[fault]
    monkeypatch.setattr(carma_kernels, "mi_loss", break_it(carma_kernels.mi_loss))
    assert misses(capsys, monkeypatch, check) == names(dtypes)


def test_a_wrong_similarity_is_a_miss(capsys, monkeypatch):
    similarity = eager.pairwise_similarity
    monkeypatch.setattr(eager, "pairwise_similarity", lambda *arguments: similarity(*arguments) * (1 + 2e-5))
    assert misses(capsys, monkeypatch, SIMILARITY) == names(ALL)
    assert misses(capsys, monkeypatch, MI) == set()
