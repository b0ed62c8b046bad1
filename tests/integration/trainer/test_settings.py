"""The trainer's options: the task loss stays the trainer's in each of them, and the CARMA losses what they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from transformers import DataCollatorForLanguageModeling, Trainer

import carma_kernels as ck
from carma_kernels.integrations.transformers import HiddenStateTap
from tests.integration.trainer.test_scaling import steps_of, windows
from tests.integration.trainer.toys import (
    CARMA_ALONE,
    Gradients,
    InOrder,
    arguments,
    assert_same,
    batch_of,
    examples,
    forward,
    gradients,
    model,
    tokenizer,
    trainer,
    window_gradients,
)

# what peft reads, and the old name of activation_checkpointing, which all versions know
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")


def summed(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """A user's loss: with a sum over the tokens, divided by those of the window."""
    logits, following = outputs.logits[:, :-1], labels[:, 1:]
    return F.cross_entropy(logits.flatten(0, 1), following.flatten(), reduction="sum") / num_items_in_batch


TASKS: dict[str, dict[str, Any]] = {
    "as it comes": {},
    "label smoothing": {"label_smoothing_factor": 0.1},
    "the user's own": {"compute_loss_func": summed},
    "tokens of this rank": {"average_tokens_across_devices": False},
}


@pytest.mark.parametrize("name", TASKS)
def test_total_is_of_the_trainers_own_task_loss_and_of_the_window(name: str, tmp_path: Path) -> None:
    """With lambda: (1 - lambda) of what `Trainer` would do, and lambda of the CARMA losses."""
    options = TASKS[name] | {"gradient_accumulation_steps": 2}
    alone = Gradients()
    own = {"compute_loss_func": options.pop("compute_loss_func")} if "compute_loss_func" in options else {}

    class Plain(Trainer):
        _get_train_sampler = InOrder._get_train_sampler

    Plain(
        model(),
        arguments(tmp_path, **options),
        DataCollatorForLanguageModeling(tokenizer(), mlm=False),
        train_dataset=examples(6),
        callbacks=[alone],
        **own,
    ).train()
    config = ck.CarmaConfig(carma_weight=0.3, mi_layers=(0, 1), stability_layers=(0, 2))
    mixed = steps_of(tmp_path, 6, carma=config, **options, **own)
    assert len(mixed) == len(alone.steps) == 2
    for total, task, batches in zip(mixed, alone.steps, windows(6, 2), strict=True):
        carma = window_gradients(batches)
        zero = torch.zeros(())
        assert_same(total, {name: 0.7 * task[name] + 0.3 * carma.get(name, zero) for name in task})


def with_lora() -> nn.Module:
    own = get_peft_model(model(), LoraConfig(target_modules=["q_proj", "v_proj"], r=2, init_lora_weights=False))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in own.named_parameters():
        if "lora" in name:
            parameter.data.normal_(std=0.3, generator=generator)
    return own


def with_frozen_layers() -> nn.Module:
    own = model()
    own.model.embed_tokens.requires_grad_(False)
    own.model.layers[0].requires_grad_(False)
    return own


def with_prompt() -> nn.Module:
    """Four tokens that are in no text come first."""
    torch.manual_seed(0)
    return get_peft_model(model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))


@pytest.mark.parametrize("build", [with_lora, with_frozen_layers, with_prompt])
def test_parts_that_are_trained(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    seen = steps_of(tmp_path, 6, gradient_accumulation_steps=2, model=build())
    trained = {name for name, parameter in build().named_parameters() if parameter.requires_grad}
    for actual, batches in zip(seen, windows(6, 2), strict=True):
        assert actual.keys() <= trained
        assert_same(actual, window_gradients(batches, build=build))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("build", [model, with_lora])
def test_gradient_checkpointing(build: Callable[[], nn.Module], reentrant: bool, tmp_path: Path) -> None:
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    seen = steps_of(tmp_path, 6, gradient_accumulation_steps=2, model=build(), **options)
    for actual, batches in zip(seen, windows(6, 2), strict=True):
        assert_same(actual, window_gradients(batches, build=build))


def test_bf16_autocast(tmp_path: Path) -> None:
    seen = steps_of(tmp_path, 4, bf16=True)
    with torch.autocast("cpu", torch.bfloat16):
        expected = [window_gradients(batches) for batches in windows(4, 1)]
    for actual, gradient in zip(seen, expected, strict=True):
        assert_same(actual, gradient)


def test_bf16_weights(tmp_path: Path) -> None:
    [actual] = steps_of(tmp_path, 2, model=model().bfloat16())
    reference, batch = model().bfloat16(), batch_of(examples(2))
    with HiddenStateTap(reference) as tap:
        forward(reference, batch)
        tap.carma_loss(batch["spans"], CARMA_ALONE, mask=batch["attention_mask"]).loss.backward()
    expected = gradients(reference)
    assert {gradient.dtype for gradient in expected.values()} == {torch.bfloat16}
    assert_same(actual, expected)


def test_workers_of_the_data_loader(tmp_path: Path) -> None:
    one = trainer(tmp_path, 8, dataloader_num_workers=2, learning_rate=1e-2)
    one.train()
    assert one.state.log_history[3]["mi_loss"] < one.state.log_history[0]["mi_loss"]


def test_a_second_model_gets_the_tap(tmp_path: Path) -> None:
    """As a hyperparameter search makes them."""
    one = trainer(tmp_path, 2)
    first = one.model
    one.train()
    one.model = one.model_wrapped = model()
    one.train()
    assert not any(module._forward_hooks for module in first.modules())


def test_own_collator_is_left_alone_and_others_are_wrapped(tmp_path: Path) -> None:
    one = trainer(tmp_path)
    again = trainer(tmp_path, data_collator=one.data_collator)
    assert again.data_collator is one.data_collator
    assert one.data_collator.tokenizer is tokenizer()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [({"carma": 0.3}, TypeError, "config must be a CarmaConfig"), ({"sampled_negatives": 0}, ValueError, "k must be")],
)
def test_wrong_options(options: dict[str, Any], error: type[Exception], message: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        trainer(tmp_path, 2, **options).train()
