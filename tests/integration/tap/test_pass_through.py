"""The pass-through's gradients are the plain call's, whatever the backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import carma_kernels as ck
from carma_kernels.integrations.transformers import HiddenStateTap
from tests.integration.tap.models import SPANS, VALID, batch, blocks_of, build, distance, gradients
from tests.integration.tap.test_checkpointing import WAYS


@pytest.fixture(autouse=True, params=[1, 2], ids="{} at once".format)
def at_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer layers' gradients at a time than the model has layers."""
    monkeypatch.setattr("carma_kernels.integrations.transformers.pass_through._AT_ONCE", request.param)


Combine = Callable[[Tensor, ck.CarmaOutput], Tensor]

COMBINATIONS: dict[str, Combine] = {
    "as documented": lambda task, carma: ck.total_loss(task, carma.loss, 0.5),
    "carma alone": lambda _task, carma: carma.loss,
    "each loss by itself": lambda task, carma: task + carma.mi - 2 * carma.stability,
    "one loss": lambda _task, carma: carma.stability,
    "two paths to one": lambda task, carma: task + carma.loss * carma.loss.detach() + carma.loss,
    "not used": lambda task, _carma: task,
}


def run(
    pass_through: bool,
    combine: Combine = COMBINATIONS["as documented"],
    config: ck.CarmaConfig = ck.CarmaConfig(),  # noqa: B008 (frozen)
    *,
    way: str = "none",
    tapped: tuple[int, int] | None = None,
    pairs: Any = SPANS,
    **options: Any,
) -> dict[str, Tensor]:
    model = build().double()
    WAYS[way](model)
    tap = HiddenStateTap(model, tapped, pass_through=pass_through)
    task = model(**batch(), use_cache=False).loss
    combine(task, tap.carma_loss(pairs, config, **options)).backward()
    return gradients(model)


@pytest.mark.parametrize("combine", COMBINATIONS)
def test_equal_gradients(combine: str) -> None:
    assert distance(run(True, COMBINATIONS[combine]), run(False, COMBINATIONS[combine])) < 1e-13


@pytest.mark.parametrize(
    "config",
    [
        ck.CarmaConfig(mi_layers=(1, 2), stability_layers=(2, 2)),
        ck.CarmaConfig(mi_layers=(2, 2), stability_layers=(1, 2)),
        ck.CarmaConfig(mi_layers=(0, 0), stability_layers=(0, 1)),
        ck.CarmaConfig(metric="dot", temperature=2.0, negatives="batch", match_negatives=5),
        ck.CarmaConfig(temperature=torch.tensor(0.1)),
    ],
    ids=str,
)
def test_configs(config: ck.CarmaConfig) -> None:
    for alone in (COMBINATIONS["as documented"], COMBINATIONS["carma alone"]):
        assert distance(run(True, alone, config), run(False, alone, config)) < 1e-13


@pytest.mark.parametrize(
    "options",
    [
        {"mask": VALID},
        {"num_pairs": 7},
        {"pairs": SPANS.sample_pairs(3, torch.Generator().manual_seed(0), num_layers=3)},
        {"tapped": (1, 2)},
        {"tapped": (1, 1)},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options(options: dict[str, Any]) -> None:
    assert distance(run(True, **options), run(False, **options)) < 1e-13


@pytest.mark.parametrize("way", list(WAYS)[1:])
def test_checkpointing(way: str) -> None:
    assert distance(run(True, way=way), run(False)) < 1e-13


def test_a_learned_temperature() -> None:
    """Its gradient needs every layer at once: the plain call it is."""
    taus = [torch.tensor(0.1, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    first, second = (
        run(way, config=ck.CarmaConfig(temperature=tau)) for way, tau in zip((True, False), taus, strict=True)
    )
    assert distance(first, second) < 1e-13
    assert taus[0].grad is not None
    assert torch.equal(taus[0].grad, taus[1].grad)  # type: ignore[arg-type]


def test_values() -> None:
    model = build()
    tap = HiddenStateTap(model, pass_through=True)
    model(**batch())
    ours, plain = tap.carma_loss(SPANS), ck.carma_loss(tap.hidden_states, SPANS)
    for got, expected in zip(ours[:-1], plain[:-1], strict=True):
        assert torch.equal(got, expected)
        assert got.requires_grad == expected.requires_grad
    assert ours.num_pairs == plain.num_pairs


def test_frozen_layers_stay_frozen() -> None:
    """Only what needs a gradient gets one; nothing is made for a frozen layer."""
    grads = []
    for pass_through in (True, False):
        model = build().double()
        for module in (model.get_input_embeddings(), *blocks_of(model)[:2]):
            module.requires_grad_(False)
        tap = HiddenStateTap(model, pass_through=pass_through)
        task = model(**batch()).loss
        assert [states.requires_grad for states in tap.hidden_states] == [False, False, True]
        ck.total_loss(task, tap.carma_loss(SPANS).loss, 0.5).backward()
        grads.append(gradients(model))
    assert distance(*grads) < 1e-13


def test_everything_frozen() -> None:
    model = build().requires_grad_(False)
    tap = HiddenStateTap(model, pass_through=True)
    model(**batch())
    assert not tap.carma_loss(SPANS).loss.requires_grad


def test_retain_graph() -> None:
    """A second backward adds the same again; one through the task alone adds the task's alone."""
    model = build().double()
    tap = HiddenStateTap(model, pass_through=True)
    task = model(**batch()).loss
    loss = ck.total_loss(task, tap.carma_loss(SPANS).loss, 0.5)
    loss.backward(retain_graph=True)
    once = gradients(model)
    loss.backward(retain_graph=True)
    assert distance(gradients(model), {name: 2 * grad for name, grad in once.items()}) < 1e-13

    model.zero_grad()
    task.backward(retain_graph=True)
    assert distance(gradients(model), run(True, COMBINATIONS["not used"])) < 1e-13

    model.zero_grad()
    loss.backward()
    assert distance(gradients(model), once) < 1e-13
    with pytest.raises(RuntimeError, match=r"second time"):
        loss.backward()


def test_accumulation() -> None:
    """Two forwards before one backward, and a backward after each."""
    parts = [{name: value[rows] for name, value in batch().items()} for rows in (slice(0, 2), slice(1, 3))]
    words = SPANS.to_lists()
    spans = [
        ck.TokenSpans.from_lists(words[rows], seq_len=VALID.shape[1], attention_mask=VALID[rows])
        for rows in (slice(0, 2), slice(1, 3))
    ]
    grads = []
    for pass_through, together in ((False, False), (True, False), (True, True)):
        model = build().double()
        tap = HiddenStateTap(model, pass_through=pass_through)
        losses = []
        for part, its in zip(parts, spans, strict=True):
            task = model(**part).loss
            losses.append(ck.total_loss(task, tap.carma_loss(its).loss, 0.5))
            if not together:
                losses.pop().backward()
        if together:
            torch.stack(losses).sum().backward()
        grads.append(gradients(model))
    assert distance(grads[1], grads[0]) < 1e-13
    assert distance(grads[2], grads[0]) < 1e-13


def test_the_backward_of_an_earlier_forward_leaves_a_later_one_alone() -> None:
    model = build()
    tap = HiddenStateTap(model, pass_through=True)
    model(**batch())
    earlier = tap.carma_loss(SPANS).loss
    model(**batch())
    earlier.backward()
    model.zero_grad()
    tap.carma_loss(SPANS).loss.backward()
    assert gradients(model)


def test_two_losses_of_one_forward() -> None:
    sharp = ck.CarmaConfig(temperature=0.05, mi_layers=(1, 2))
    grads = []
    for pass_through in (True, False):
        model = build().double()
        tap = HiddenStateTap(model, pass_through=pass_through)
        task = model(**batch()).loss
        (task + tap.carma_loss(SPANS).loss + 2 * tap.carma_loss(SPANS, sharp).loss).backward()
        grads.append(gradients(model))
    assert distance(*grads) < 1e-13


def test_gradients_of_some_parameters() -> None:
    """`torch.autograd.grad` runs no more of the graph than it needs."""
    found = []
    for pass_through in (True, False):
        model = build().double()
        tap = HiddenStateTap(model, pass_through=pass_through)
        model(**batch())
        weight = blocks_of(model)[1].mlp.up_proj.weight
        found.append(torch.autograd.grad(tap.carma_loss(SPANS).loss, weight)[0])
    assert torch.allclose(*found, rtol=1e-12, atol=1e-15)


def test_a_backward_that_does_not_come_to_every_layer() -> None:
    """What it made for the others is not theirs in the next backward. (In a chain of blocks it would be made again.)"""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

        def forward(self, states: Tensor) -> Tensor:
            first, second = (block(states) for block in self.blocks)
            return first + second

    model = Model()
    tap = HiddenStateTap(model, pass_through=True)
    model(torch.randn(3, 11, 4))
    loss, plain = tap.carma_loss(SPANS).loss, ck.carma_loss(tap.hidden_states, SPANS).loss
    torch.autograd.grad(loss, model.blocks[1].weight, retain_graph=True)
    [expected] = torch.autograd.grad(2 * plain, model.blocks[0].weight, retain_graph=True)
    [got] = torch.autograd.grad(2 * loss, model.blocks[0].weight)
    assert torch.allclose(got, expected, rtol=1e-5)


def test_the_incoming_gradient_is_not_written_to() -> None:
    """Others may have been handed the same tensor."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
            self.bias = nn.Parameter(torch.zeros(3, 11, 4))

        def forward(self, states: Tensor) -> Tensor:
            bias = 2 * self.bias  # runs before the blocks, and so its backward after theirs
            for block in self.blocks:
                states = block(states)
            return states + bias

    model = Model()
    tap = HiddenStateTap(model, pass_through=True)
    (model(torch.randn(3, 11, 4)).sum() + tap.carma_loss(SPANS).loss).backward()
    assert model.bias.grad is not None
    assert torch.equal(model.bias.grad, torch.full((3, 11, 4), 2.0))


def test_hidden_states_changed_in_place() -> None:
    model = build()
    tap = HiddenStateTap(model, pass_through=True)
    model(**batch())
    loss = tap.carma_loss(SPANS).loss
    with torch.no_grad():
        tap.hidden_states[1].mul_(2)
    with pytest.raises(RuntimeError, match="layer 1 were changed in place"):
        loss.backward()


def test_reading_after_the_backward() -> None:
    model = build()
    tap = HiddenStateTap(model, pass_through=True)
    model(**batch())
    tap.carma_loss(SPANS).loss.backward()
    with pytest.raises(RuntimeError, match="the backward has let go"):
        _ = tap.hidden_states


def test_half_precision() -> None:
    """The sums of a bf16 gradient come in another order; neither is nearer to the exact one."""

    def error(pass_through: bool) -> float:
        model, exact = build().bfloat16(), build().bfloat16().double()
        for one, through in ((model, pass_through), (exact, False)):
            tap = HiddenStateTap(one, pass_through=through)
            ck.total_loss(one(**batch()).loss, tap.carma_loss(SPANS).loss, 0.5).backward()
        got, expected = (nn.utils.parameters_to_vector([p.grad for p in m.parameters()]) for m in (model, exact))
        return ((got.double() - expected).norm() / expected.norm()).item()

    assert error(True) < 1.1 * error(False)
