"""The options, and the sum of the losses."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest
import torch

import carma_kernels as ck
from carma_kernels import CarmaConfig


def test_the_papers_defaults():
    assert dataclasses.asdict(CarmaConfig()) == {
        "mi_weight": 0.5,
        "stability_weight": 0.2,
        "carma_weight": 0.3,
        "temperature": 0.1,
        "metric": "cosine",
        "negatives": "sequence",
        "match_negatives": None,
        "mi_layers": None,
        "stability_layers": None,
        "eps": 1e-8,
    }


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(CarmaConfig)])
def test_frozen(name: str):
    config = CarmaConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config, name, getattr(config, name))


def test_a_config_is_a_value():
    config = CarmaConfig(mi_weight=0.1, mi_layers=(1, 2))
    assert config == CarmaConfig(mi_weight=0.1, mi_layers=(1, 2)) != CarmaConfig()
    assert hash(config) == hash(CarmaConfig(mi_weight=0.1, mi_layers=(1, 2)))
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config


def test_replace_checks_again():
    assert dataclasses.replace(CarmaConfig(), temperature=0.3).temperature == 0.3
    with pytest.raises(ValueError, match="temperature must be a finite number > 0"):
        dataclasses.replace(CarmaConfig(), temperature=0)


def test_layers_and_k_are_checked_where_there_are_layers_and_pairs():
    config = CarmaConfig(mi_layers=(0, 9))
    with pytest.raises(ValueError, match=r"mi_layers is \(0, 9\)"):
        ck.carma_loss(torch.zeros(2, 1, 3, 4), ck.TokenSpans.from_lists([[]], seq_len=3), config)


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_total_loss(weight: float):
    task = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    carma = torch.tensor(5.0, dtype=torch.float64, requires_grad=True)
    total = ck.total_loss(task, carma, weight)
    assert total.item() == pytest.approx((1 - weight) * 2 + weight * 5, rel=1e-12)
    total.backward()
    assert (task.grad.item(), carma.grad.item()) == pytest.approx((1 - weight, weight), rel=1e-12)
