"""The modules compute what the functions do, and keep what belongs to a model."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import carma_kernels as ck
from carma_kernels import CarmaConfig, CarmaLoss, MILoss, StabilityLoss, TokenSpans

SPANS = TokenSpans.from_lists([[(0, 3), (3, 5)], [(2, 4)]], seq_len=6, attention_mask=[[1] * 6, [0] + [1] * 5])
HIDDEN = torch.randn(4, 2, 6, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
MASK = SPANS.attention_mask


def learnable(value: float = 0.5) -> nn.Parameter:
    return nn.Parameter(torch.tensor(value, dtype=torch.float64))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"negatives": "batch", "match_negatives": 5, "temperature": 0.5},
        {"metric": "dot", "temperature": 3.0, "layers": (1, 2), "reduction": "none"},
        {"reduction": "sum", "backend": "torch"},
    ],
)
def test_mi(options):
    expected = ck.mi_loss(HIDDEN, SPANS, **options)
    assert torch.equal(MILoss(**options)(HIDDEN, SPANS), expected)
    assert not torch.equal(expected, ck.mi_loss(HIDDEN, SPANS, temperature=0.7))


def test_mi_takes_pairs_and_their_number():
    pairs = SPANS.sample_pairs(3, torch.Generator().manual_seed(0))
    assert torch.equal(MILoss()(HIDDEN, pairs), ck.mi_loss(HIDDEN, pairs))
    assert torch.equal(MILoss()(HIDDEN, SPANS, num_pairs=50), ck.mi_loss(HIDDEN, SPANS, num_pairs=50))


@pytest.mark.parametrize("options", [{}, {"layers": (1, 3), "eps": 0.5, "reduction": "none"}, {"reduction": "mean"}])
@pytest.mark.parametrize("mask", [None, MASK])
def test_stability(options, mask):
    expected = ck.stability_loss(HIDDEN, mask=mask, **options)
    assert torch.equal(StabilityLoss(**options)(HIDDEN, mask), expected)
    assert torch.equal(StabilityLoss(**options)(HIDDEN, mask=mask), expected)


@pytest.mark.parametrize(
    "config",
    [
        None,
        CarmaConfig(),
        CarmaConfig(mi_weight=2, stability_weight=3, temperature=0.4, negatives="batch", mi_layers=(1, 2), eps=0.1),
        CarmaConfig(metric="dot", match_negatives=5, stability_layers=(0, 1)),
    ],
)
def test_carma(config):
    for options in ({}, {"mask": MASK, "num_pairs": 50}):
        expected = ck.carma_loss(HIDDEN, SPANS, *([] if config is None else [config]), **options)
        output = CarmaLoss(config)(HIDDEN, SPANS, **options)
        assert type(output) is ck.CarmaOutput
        for name in ck.CarmaOutput._fields:
            ours, theirs = getattr(output, name), getattr(expected, name)
            assert torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs


def test_the_parts_add_up():
    config = CarmaConfig(mi_weight=2, stability_weight=3, mi_layers=(0, 2), temperature=0.4)
    output = CarmaLoss(config)(HIDDEN, SPANS, MASK)
    assert torch.equal(output.mi, ck.mi_loss(HIDDEN, SPANS, layers=(0, 2), temperature=0.4))
    assert torch.equal(output.stability, ck.stability_loss(HIDDEN, mask=MASK))
    torch.testing.assert_close(output.loss, 2 * output.mi + 3 * output.stability)
    torch.testing.assert_close(output.mi, output.mi_per_layer.mean())
    torch.testing.assert_close(output.stability, output.stability_per_layer.sum())
    assert (output.mi_per_layer.shape, output.stability_per_layer.shape) == ((3,), (3,))
    assert output.num_pairs == SPANS.num_pairs == 5


def test_per_layer_values_carry_no_graph():
    output = CarmaLoss()(HIDDEN.clone().requires_grad_(), SPANS)
    assert output.loss.requires_grad
    assert output.mi.requires_grad
    assert output.stability.requires_grad
    assert not output.mi_per_layer.requires_grad
    assert not output.stability_per_layer.requires_grad


def make_mi(temperature):
    return MILoss(temperature=temperature)


def make_carma(temperature):
    return CarmaLoss(CarmaConfig(temperature=temperature))


def loss_of(module: nn.Module) -> torch.Tensor:
    output = module(HIDDEN, SPANS)
    return output if isinstance(output, torch.Tensor) else output.loss


@pytest.mark.parametrize("make", [make_mi, make_carma])
class TestTemperature:
    def test_a_number_is_no_state(self, make):
        module = make(0.5)
        assert list(module.parameters()) == list(module.buffers()) == []
        assert module.state_dict() == {}
        assert module.temperature == 0.5

    def test_a_parameter_is_the_modules_only_one(self, make):
        temperature = learnable()
        module = make(temperature)
        assert dict(module.named_parameters()) == {"temperature": temperature}
        assert list(module.state_dict()) == ["temperature"]
        assert list(module.buffers()) == []

    def test_a_tensor_moves_with_the_module_and_is_not_trained(self, make):
        module = make(torch.tensor(0.5, dtype=torch.float64))
        assert list(module.parameters()) == []
        assert list(module.state_dict()) == ["temperature"]
        assert module.to("meta").temperature.device.type == "meta"

    def test_it_is_trained(self, make):
        module = make(learnable())
        optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
        losses = []
        for _ in range(5):
            optimizer.zero_grad()
            loss = loss_of(module)
            loss.backward()
            losses.append(loss.item())
            optimizer.step()
        assert module.temperature.item() != 0.5
        assert losses == sorted(losses, reverse=True)
        assert losses[-1] < losses[0] - 1e-4

    def test_its_gradient_is_the_slope(self, make):
        module = make(learnable())
        loss_of(module).backward()
        step = 1e-6
        slope = (loss_of(make(0.5 + step)) - loss_of(make(0.5 - step))) / (2 * step)
        torch.testing.assert_close(module.temperature.grad, slope, rtol=1e-6, atol=1e-9)

    def test_a_loaded_state_counts(self, make):
        state = make(learnable(0.3)).state_dict()
        for assign in (False, True):  # in place, or with another parameter in its stead
            module = make(learnable())
            module.load_state_dict(state, assign=assign)
            assert torch.equal(loss_of(module), loss_of(make(0.3)))
            loss_of(module).backward()
            [parameter] = module.parameters()
            assert parameter.grad is not None

    def test_a_copy_is_a_module_of_its_own(self, make):
        module = make(learnable())
        other = copy.deepcopy(module)
        with torch.no_grad():
            other.temperature.fill_(0.3)
        assert torch.equal(loss_of(other), loss_of(make(0.3)))
        assert torch.equal(loss_of(module), loss_of(make(0.5)))

    def test_it_moves_from_meta(self, make):
        """As a model does whose weights are made where they belong."""
        with torch.device("meta"):
            module = make(nn.Parameter(torch.tensor(0.5, dtype=torch.float64)))
        module.to_empty(device="cpu")
        with torch.no_grad():
            module.temperature.fill_(0.3)
        assert torch.equal(loss_of(module), loss_of(make(0.3)))

    def test_it_changes_its_dtype_with_the_module(self, make):
        module = make(learnable()).float()
        assert module.temperature.dtype == torch.float32
        torch.testing.assert_close(loss_of(module), loss_of(make(0.5)))

    def test_repr_is_one_line_for_each_module(self, make):
        for temperature, shown in ((0.5, "temperature=0.5"), (learnable(), "temperature=Parameter")):
            text = repr(make(temperature))
            assert shown in text
            assert "\n" not in text


def test_repr():
    assert repr(MILoss(negatives="batch")) == "MILoss(negatives='batch', temperature=0.1, metric='cosine')"
    assert repr(StabilityLoss(layers=(1, 2))) == "StabilityLoss(layers=(1, 2), eps=1e-08, reduction='sum')"
    assert repr(CarmaLoss(CarmaConfig(mi_weight=0.25))).startswith("CarmaLoss(mi_weight=0.25, stability_weight=0.2,")


def test_the_config_is_what_the_module_was_made_with():
    config = CarmaConfig(mi_weight=0.25, negatives="batch")
    assert CarmaLoss(config).config == config
    assert CarmaLoss().config == CarmaConfig()
    temperature = learnable()
    assert CarmaLoss(CarmaConfig(temperature=temperature)).config.temperature is temperature


def test_within_a_model():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(8, 8, dtype=torch.float64) for _ in range(3))
            self.carma = CarmaLoss(CarmaConfig(temperature=learnable()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = [x := block(x).tanh() for block in self.blocks]
            return ck.total_loss(x.square().mean(), self.carma(hidden, SPANS).loss, self.carma.config.carma_weight)

    model = Model()
    assert "carma.temperature" in dict(model.named_parameters())
    model(HIDDEN[0]).backward()
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in model.parameters())
