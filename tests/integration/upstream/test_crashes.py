"""Where the published code crashes: the value that makes sense, or an error that says what to do."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from carma_kernels.integrations.upstream import MILoss, StabilityLoss
from tests.integration.upstream.published import as_cache, as_spans
from tests.integration.upstream.test_quirks import mi, states


@pytest.mark.parametrize("words", [[], [[], []], [[(0, 3)], [(1, 2), (2, 5)]]], ids=["none", "empty", "last only"])
@pytest.mark.parametrize("stable", [False, True])
def test_no_word_of_two_tokens(words: list[list[tuple[int, int]]], stable: bool):
    """42 % of the published default's batches of one definition. Connected: another rank may wait for the gradient."""
    layers = states()
    with torch.no_grad():
        layers[0][0, 3] = torch.nan
    loss = mi(layers, words, MILoss(stable=stable))
    assert loss.item() == 0.0
    assert random.getstate() == random.Random(0).getstate()
    for gradient in torch.autograd.grad(loss, layers):
        assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("stable", [False, True])
@pytest.mark.parametrize("per_sample", [False, True])
def test_a_word_that_covers_the_sequence(stable: bool, per_sample: bool):
    """No negatives: it costs 0 and counts."""
    layers = states(L=1, B=1, T=4)
    both, covered, other = ([[*words, (0, 1)]] for words in ([(0, 4), (1, 3)], [(0, 4)], [(1, 3)]))
    options: dict[str, Any] = {"stable": stable, "per_sample": per_sample, "n_negatives": 400}
    assert mi(layers, covered, MILoss(**options)).item() == 0.0
    gradient = torch.autograd.grad(mi(layers, covered, MILoss(**options)), layers)[0]
    assert torch.equal(gradient, torch.zeros_like(gradient))
    # 6 pairs of the long word and 1 of the other
    ratio = mi(layers, both, MILoss(**options)) / mi(layers, other, MILoss(**options))
    assert ratio.item() == pytest.approx(1 / 7, rel=0.05)


@pytest.mark.parametrize("stable", [False, True])
def test_a_sequence_without_a_token_to_draw(stable: bool):
    """Its own spans end before the word begins, and nothing stands in for them."""
    layers = states(L=1)
    with torch.no_grad():
        layers[0][1, 0] = torch.nan
    loss = mi(layers, [[(2, 4), (4, 5)], []], MILoss(padding_negatives=False, stable=stable))
    [gradient] = torch.autograd.grad(loss, layers)
    assert loss.isfinite()
    assert torch.equal(gradient[1], torch.zeros_like(gradient[1]))
    assert gradient[0].isfinite().all()


def test_words_of_any_length():
    layers = states(T=80)
    assert mi(layers, [[(0, 70), (70, 71)]], MILoss(max_length=58)).isfinite()


def test_mi_end_layer_none_is_the_last():
    layers = states(L=3)
    assert mi(layers, [[(0, 2), (2, 3)]], MILoss(1, None)) == mi(layers, [[(0, 2), (2, 3)]], MILoss(1, 2))


@pytest.mark.parametrize("word", [(10, 13), (12, 14), (-13, -11), (-1, 1), (-2, 0)])
def test_a_word_outside_of_the_sequence(word: tuple[int, int]):
    with pytest.raises(ValueError, match=rf"within the 12 tokens .* got \[{word[0]}, {word[1]}\)"):
        mi(states(), [[word, (0, 1)]])


@pytest.mark.parametrize("loss", [MILoss(), StabilityLoss()], ids=["mi", "stability"])
@pytest.mark.parametrize("prefix", ["module.transformer.h.", "_orig_mod.transformer.h.", "model.layers."])
def test_no_layers(loss: MILoss | StabilityLoss, prefix: str):
    cache = as_cache(states(), prefix=prefix)
    with pytest.raises(ValueError, match=rf"named 'transformer.h.<number>.* it holds '{prefix}0'.*prefix"):
        call(loss, cache)


@pytest.mark.parametrize("loss", [MILoss(end_layer=1), StabilityLoss(end_layer=1)], ids=["mi", "stability"])
@pytest.mark.parametrize(
    ("value", "got"),
    [(None, "NoneType"), ([1.0], "list"), ((None,), "NoneType"), (torch.ones(3, 4), r"shape \[3, 4\]")],
)
def test_no_hidden_states(loss: MILoss | StabilityLoss, value: Any, got: str):
    with pytest.raises(ValueError, match=rf"cache\['transformer.h.1'\] must be a tensor \[B, T, D\].* got {got}"):
        call(loss, as_cache(states(L=1)) | {"transformer.h.1": value})


def test_no_number():
    with pytest.raises(ValueError, match=r"holds 'transformer.h.first'.*number"):
        call(MILoss(), {"transformer.h.first": states()[0]})


def test_layers_of_two_batches():
    cache = as_cache([states(B=2)[0], states(B=1)[0]])
    with pytest.raises(ValueError, match=r"\[1, 12, 4\], cache\['transformer.h.0'\] \[2, 12, 4\]"):
        call(MILoss(), cache)


def test_no_layer_chosen():
    with pytest.raises(ValueError, match="start_layer=3, end_layer=5 choose none of the 2 layers"):
        call(MILoss(3, 5), as_cache(states()))


def test_unknown_metric():
    with pytest.raises(ValueError, match="'cosine', 'dot_product', got 'l2'"):
        call(MILoss(similarity_metric="l2"), as_cache(states()))


def test_no_negatives():
    with pytest.raises(ValueError, match="n_negatives must be at least 1, got 0"):
        MILoss(n_negatives=0)


def call(loss: MILoss | StabilityLoss, cache: dict[str, Any]) -> object:
    if isinstance(loss, MILoss):
        return loss.calculate_mi_loss(cache, as_spans([[(0, 2), (2, 3)]]))
    return loss.calculate_loss(cache)
