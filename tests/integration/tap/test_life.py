"""What a tap holds and for how long, and that it leaves the model as it was."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

import carma_kernels as ck
from carma_kernels.integrations.transformers import HiddenStateTap
from tests.integration.tap.models import LAYERS, SPANS, VALID, batch, blocks_of, build, gradients, hand_placed

pytestmark = pytest.mark.parametrize("pass_through", [True, False])


def hooks(model: nn.Module) -> int:
    return sum(
        len(vars(module)[name])
        for module in model.modules()
        for name in vars(module)
        if name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")) and "state_dict" not in name
    )


def test_outputs_keep_their_bits(pass_through: bool) -> None:
    plain, tapped = build(), build()
    tap = HiddenStateTap(tapped, pass_through=pass_through)
    expected, output = plain(**batch()), tapped(**batch())
    assert torch.equal(output.logits, expected.logits)
    assert torch.equal(output.loss, expected.loss)
    expected.loss.backward()
    output.loss.backward()
    before, after = gradients(plain), gradients(tapped)
    assert all(torch.equal(after[name], before[name]) for name in before)
    tap.remove()


def test_every_forward_starts_afresh(pass_through: bool) -> None:
    model = build()
    seen = hand_placed(blocks_of(model))
    tap = HiddenStateTap(model, pass_through=pass_through)
    for _ in range(3):
        seen.clear()
        model(**batch())
        assert len(tap.hidden_states) == LAYERS
        for states, output in zip(tap.hidden_states, seen, strict=True):
            assert torch.equal(states, output)
            assert states.data_ptr() == output.data_ptr()


def test_an_interrupted_forward_leaves_nothing_behind(pass_through: bool) -> None:
    model = build()
    tap = HiddenStateTap(model, pass_through=pass_through)
    model(**batch())

    def interrupt(*_: object) -> None:
        raise InterruptedError

    handle = blocks_of(model)[1].register_forward_pre_hook(interrupt)
    with pytest.raises(InterruptedError):
        model(**batch())
    with pytest.raises(RuntimeError, match=r"only 1 of 3 blocks ran.*\[1, 2\]"):
        _ = tap.hidden_states
    handle.remove()
    model(**batch())
    assert len(tap.hidden_states) == LAYERS


def test_nothing_ran(pass_through: bool) -> None:
    tap = HiddenStateTap(build(), pass_through=pass_through)
    with pytest.raises(RuntimeError, match="no forward has run"):
        _ = tap.hidden_states
    with pytest.raises(RuntimeError, match="no forward has run"):
        tap.carma_loss(SPANS)


def test_nothing_under_no_grad(pass_through: bool) -> None:
    model = build()
    tap = HiddenStateTap(model, pass_through=pass_through)
    with torch.no_grad():
        model(**batch())
    assert all(capture.states is None for capture in tap._captures)
    with pytest.raises(RuntimeError, match=r"ran under torch.no_grad.*no_grad=True"):
        _ = tap.hidden_states


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_under_no_grad_if_asked(pass_through: bool, mode) -> None:
    model = build()
    tap = HiddenStateTap(model, no_grad=True, pass_through=pass_through)
    with mode():
        model(**batch())
        loss = tap.carma_loss(SPANS).loss
    model(**batch())
    assert torch.equal(tap.carma_loss(SPANS).loss, loss)
    tap.no_grad = False
    with mode():
        model(**batch())
        with pytest.raises(RuntimeError, match=r"no_grad=True"):
            _ = tap.hidden_states


def test_a_look_aside_under_no_grad(pass_through: bool) -> None:
    """A reference's, or a metric's, forward between the one that is trained and the loss takes nothing away."""
    model = build()
    tap = HiddenStateTap(model, pass_through=pass_through)
    model(**batch())
    with torch.no_grad():
        before = tap.carma_loss(SPANS).loss
        model(**{**batch(), "input_ids": batch()["input_ids"].flip(0)})
        with pytest.raises(RuntimeError, match=r"ran under torch.no_grad"):
            _ = tap.hidden_states  # whoever evaluates would get those of the step before
    assert torch.equal(tap.carma_loss(SPANS).loss, before)


@pytest.mark.parametrize("no_grad", [False, True])
def test_generate(pass_through: bool, no_grad: bool) -> None:
    model = build().eval()
    tokens = batch()["input_ids"][2:]
    expected = model.generate(tokens, max_new_tokens=4, do_sample=False)
    tap = HiddenStateTap(model, no_grad=no_grad, pass_through=pass_through)
    assert torch.equal(model.generate(tokens, max_new_tokens=4, do_sample=False), expected)
    if no_grad:
        with torch.no_grad():
            assert [states.shape[1] for states in tap.hidden_states] == [1] * LAYERS  # the last token's forward
    else:
        assert all(capture.states is None for capture in tap._captures)
    model.train()
    model(**batch())
    tap.carma_loss(SPANS).loss.backward()
    assert gradients(model)


@pytest.mark.parametrize("how", ["remove", "with", "remove twice"])
def test_no_trace_after_remove(pass_through: bool, how: str) -> None:
    model = build()
    assert hooks(model) == 0
    with HiddenStateTap(model, pass_through=pass_through) as tap:
        assert hooks(model) == 3 + LAYERS
        model(**batch())
        states = [weakref.ref(layer) for layer in tap.hidden_states]
        if how != "with":
            tap.remove()
    if how == "remove twice":
        tap.remove()
    assert hooks(model) == 0
    assert [layer() for layer in states] == [None] * LAYERS
    with pytest.raises(RuntimeError, match="the tap was removed"):
        _ = tap.hidden_states
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None, "the tap holds the model"


def test_clear(pass_through: bool) -> None:
    model = build()
    tap = HiddenStateTap(model, pass_through=pass_through)
    model(**batch())
    states = [weakref.ref(layer) for layer in tap.hidden_states]
    tap.clear()
    assert [layer() for layer in states] == [None] * LAYERS
    with pytest.raises(RuntimeError, match="no forward has run"):
        _ = tap.hidden_states


def test_nothing_outlives_a_step(pass_through: bool) -> None:
    """Neither cycles nor graphs: a loss that is kept for logging keeps no hidden states."""
    gc.disable()
    try:
        model = build()
        tap = HiddenStateTap(model, pass_through=pass_through)
        model(**batch())
        states = [weakref.ref(layer) for layer in tap.hidden_states]
        storage = [
            torch.multiprocessing.reductions.StorageWeakRef(layer.untyped_storage()) for layer in tap.hidden_states
        ]
        carma = tap.carma_loss(SPANS)
        carma.loss.backward()
        if not pass_through:
            tap.clear()
        assert [layer() for layer in states] == [None] * LAYERS
        assert all(memory.expired() for memory in storage)
        if pass_through:
            assert tap._passing is not None
            assert [loss._by_layer for loss in tap._passing._losses] == [None]
        assert carma.loss.isfinite()
    finally:
        gc.enable()


def test_a_forward_without_backward_is_not_kept(pass_through: bool) -> None:
    gc.disable()
    try:
        model = build()
        tap = HiddenStateTap(model, pass_through=pass_through)
        model(**batch())
        tap.carma_loss(SPANS)
        states = [weakref.ref(layer) for layer in tap.hidden_states]
        model(**batch())
        assert [layer() for layer in states] == [None] * LAYERS
    finally:
        gc.enable()


def test_a_dropped_model_is_collected(pass_through: bool) -> None:
    """With its tap, and what that held: no cycle goes through autograd's graph, where Python's collector cannot see."""
    model = build()
    tap = HiddenStateTap(model, pass_through=pass_through)
    model(**batch())
    tap.carma_loss(SPANS)
    alive = [weakref.ref(model), weakref.ref(tap), *(weakref.ref(layer) for layer in tap.hidden_states)]
    del model, tap
    gc.collect()
    assert [it() for it in alive] == [None] * len(alive)


def test_a_copy_of_a_tapped_model(pass_through: bool) -> None:
    """For an average of the weights, say."""
    model = build()
    tap = HiddenStateTap(model, pass_through=pass_through)
    model(**batch())
    twin = copy.deepcopy(model)
    assert torch.equal(twin(**batch()).logits, model(**batch()).logits)
    tap.carma_loss(SPANS).loss.backward()


def test_two_taps(pass_through: bool) -> None:
    """On different layers, each with its loss."""
    model = build()
    low = HiddenStateTap(model, layers=(0, 1), pass_through=pass_through)
    high = HiddenStateTap(model, layers=(1, 2), pass_through=pass_through)
    model(**batch())
    (low.carma_loss(SPANS).loss + high.carma_loss(SPANS).loss).backward()
    twin = build()
    seen = hand_placed(blocks_of(twin))
    twin(**batch())
    (ck.carma_loss(seen[:2], SPANS).loss + ck.carma_loss(seen[1:], SPANS).loss).backward()
    expected, got = gradients(twin), gradients(model)
    assert all(torch.allclose(got[name], expected[name], rtol=1e-4, atol=1e-6) for name in expected)


def test_states_that_the_next_block_writes_to(pass_through: bool) -> None:
    """What the first block returned is no more, and the loss of what took its place would be of no layer."""

    class InPlace(nn.Module):
        def forward(self, states: Tensor) -> Tensor:
            return states.mul_(2)

    model = nn.Sequential(nn.Linear(4, 4), InPlace())
    tap = HiddenStateTap(model, blocks=[*model], pass_through=pass_through)
    model(torch.randn(*VALID.shape, 4))
    with pytest.raises(RuntimeError, match="states of layer 0 were changed in place after their block had returned"):
        tap.carma_loss(SPANS)


def test_states_that_are_not_contiguous_are_not_copied(pass_through: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend gets what the block returned, and reads it as it is, or says that it cannot."""

    class Transposed(nn.Module):
        def forward(self, states: Tensor) -> Tensor:
            return (2 * states.transpose(0, 1).contiguous()).transpose(0, 1)

    seen: list[int] = []

    def look(hidden: list[Tensor], *_: object) -> None:
        seen.extend(layer.data_ptr() for layer in hidden)
        raise InterruptedError

    for name in ("carma_terms", "carma_terms_and_gradients"):
        monkeypatch.setattr(ck._backend.eager, name, look)
    model = nn.Sequential(nn.Linear(4, 4), Transposed(), Transposed())
    tap = HiddenStateTap(model, blocks=[*model[1:]], pass_through=pass_through)
    model(torch.randn(*VALID.shape, 4))
    assert not tap.hidden_states[0].is_contiguous()
    with pytest.raises(InterruptedError):
        tap.carma_loss(SPANS)
    assert seen == [layer.data_ptr() for layer in tap.hidden_states]


def test_a_block_that_runs_twice(pass_through: bool) -> None:
    block = nn.Linear(4, 4)
    model = nn.Sequential(block, nn.ReLU(), block)
    tap = HiddenStateTap(model, blocks=[block], pass_through=pass_through)
    for _ in range(2):
        output = model(torch.randn(*VALID.shape, 4))
        with pytest.raises(RuntimeError, match="block of layer 0 ran more than once"):
            tap.carma_loss(SPANS)
        output.sum().backward()
    block(torch.randn(*VALID.shape, 4))
    assert tap.carma_loss(SPANS).loss.isfinite()
