"""A learned temperature is a parameter of the model, as the optimizer and the checkpoints have it; or it raises."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaForCausalLM

import carma_kernels as ck
from tests.integration.trainer.test_scaling import windows
from tests.integration.trainer.toys import (
    Gradients,
    InOrder,
    assert_same,
    model,
    trainer,
    window_gradients,
)

LAYERS = {"carma_weight": 1.0, "mi_layers": (0, 1), "stability_layers": (0, 2)}
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")  # peft's


def learning() -> LlamaForCausalLM:
    own = model()
    own.carma_temperature = nn.Parameter(torch.tensor(0.2))
    return own


def config(own: nn.Module) -> ck.CarmaConfig:
    return ck.CarmaConfig(**LAYERS, temperature=own.carma_temperature)


def trained(folder: Path, count: int, resume: Path | None = None, **options: Any) -> InOrder:
    own = learning()
    one = trainer(folder, count, model=own, carma=config(own), **options)
    one.train(resume_from_checkpoint=None if resume is None else str(resume))
    return one


@pytest.mark.parametrize("steps", [1, 2])
def test_its_gradient_is_that_of_the_window(steps: int, tmp_path: Path) -> None:
    seen = Gradients()
    trained(tmp_path, 8, callbacks=[seen], gradient_accumulation_steps=steps)
    for actual, batches in zip(seen.steps, windows(8, steps), strict=True):
        reference = learning()
        expected = window_gradients(batches, config(reference), lambda own=reference: own)
        assert expected["carma_temperature"] != 0
        assert_same(actual, expected)


def test_a_resumed_run_goes_on_with_it(tmp_path: Path) -> None:
    options: dict[str, Any] = {"learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 2}
    options["gradient_accumulation_steps"] = 2
    whole = trained(tmp_path / "whole", 16, **options).model.carma_temperature
    assert whole.item() != pytest.approx(0.2, abs=1e-3)
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    saved = load_file(checkpoint / "model.safetensors")["carma_temperature"]
    assert 0.2 != saved.item() != whole.item()
    resumed = trained(tmp_path / "resumed", 16, checkpoint, **options).model.carma_temperature
    assert resumed.item() == whole.item()


def test_models_made_anew_have_the_same_parameter(tmp_path: Path) -> None:
    tau = nn.Parameter(torch.tensor(0.2))

    def model_init() -> LlamaForCausalLM:
        own = model()
        own.carma_temperature = tau
        with torch.no_grad():
            tau.fill_(0.2)
        return own

    one = trainer(
        tmp_path, 4, model_init=model_init, carma=ck.CarmaConfig(**LAYERS, temperature=tau), learning_rate=1e-2
    )
    learned = []
    for _ in range(2):
        one.train()
        learned.append(tau.item())
    assert learned[0] == learned[1] != pytest.approx(0.2, abs=1e-3)


def frozen() -> LlamaForCausalLM:
    own = learning()
    own.carma_temperature.requires_grad_(False)
    return own


def with_lora() -> nn.Module:
    return get_peft_model(learning(), LoraConfig(target_modules=["q_proj"]))


def with_another_optimizer() -> dict[str, Any]:
    own = learning()
    return {
        "model": own,
        "carma": config(own),
        "optimizers": (torch.optim.SGD(own.model.parameters(), lr=0.1), None),
    }


def of(own: nn.Module) -> dict[str, Any]:
    return {"model": own, "carma": config(own)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            lambda: {"carma": config(learning())},
            "no parameter of the LlamaForCausalLM.*model.carma_temperature = nn.Param",
        ),
        (
            lambda: {"model_init": model, "carma": config(learning())},
            "no parameter.*model_init has to register the same",
        ),
        (lambda: {"carma": ck.CarmaConfig(temperature=torch.tensor(0.1, requires_grad=True) * 2)}, "no parameter of"),
        (lambda: of(frozen()), r"is frozen. Call requires_grad_\(True\)"),
        (lambda: of(with_lora()), "cannot be learned with a peft model.*Pass a number"),
        (with_another_optimizer, "not among the parameters of the optimizer.*Add it there"),
    ],
)
def test_one_that_nothing_would_learn(options: Any, message: str, tmp_path: Path) -> None:
    """When the trainer is made, before a step."""
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, 2, **options())


def test_a_constant_tensor_is_no_parameter(tmp_path: Path) -> None:
    trainer(tmp_path, 2, carma=ck.CarmaConfig(temperature=torch.tensor(0.1))).train()


class Replaced(InOrder):
    """Something, a wrapper say, puts another parameter in its place once the trainer is made."""

    def _wrap_model(self, wrapped: Any, *args: Any, **kwargs: Any) -> Any:
        wrapped.carma_temperature = nn.Parameter(torch.tensor(0.2))
        return super()._wrap_model(wrapped, *args, **kwargs)


class LeftOut(InOrder):
    def create_optimizer(self, model: Any = None) -> Any:
        self.optimizer = torch.optim.SGD((model or self.model).model.parameters(), lr=0.1)
        return self.optimizer


@pytest.mark.parametrize(("kind", "message"), [(Replaced, "no parameter of"), (LeftOut, "not among the parameters of")])
def test_one_that_is_lost_before_the_first_step(kind: type[InOrder], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, 2, kind, **of(learning())).train()
