"""A tiny model, a tokenizer that splits words, and definitions to learn: what the trainer's tests share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    DataCollatorForLanguageModeling,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import carma_kernels as ck
from carma_kernels.demo.definitions import read_definitions, shipped_file
from carma_kernels.demo.text import train_tokenizer
from carma_kernels.integrations.transformers import CarmaTrainerMixin, HiddenStateTap

LAYERS = 3
CARMA_ALONE = ck.CarmaConfig(carma_weight=1.0, mi_layers=(0, 1), stability_layers=(0, 2))
"""With nothing of the task loss: what is left is what the trainer makes of the CARMA losses."""


class CarmaTrainer(CarmaTrainerMixin, Trainer):
    pass


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """With so few tokens that one more text in ten might be the rest of a contraction, were it cut at its beginning."""
    one = train_tokenizer(read_definitions(shipped_file())[:40], 400)
    one.truncation_side = "right"
    return one


def texts(count: int) -> list[str]:
    return [entry.definition for entry in read_definitions(shipped_file())[:count]]


def examples(count: int) -> list[dict[str, Any]]:
    """Tokenized one by one, without padding."""
    return [{"input_ids": tokenizer()(text)["input_ids"]} for text in texts(count)]


def model() -> LlamaForCausalLM:
    """The same weights every time."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer()),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=LAYERS,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=128,
            pad_token_id=tokenizer().pad_token_id,
            bos_token_id=None,
            eos_token_id=None,
            use_cache=False,
        )
    )


class Gradients(TrainerCallback):
    """Those of each optimizer step, as the optimizer gets them."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, *_: Any, **kwargs: Any) -> None:
        self.steps.append(gradients(kwargs["model"]))


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    quiet = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "save_strategy": "no"}
    plain = {"max_grad_norm": 0.0, "learning_rate": 0.0, "num_train_epochs": 1, "per_device_train_batch_size": 2}
    return TrainingArguments(output_dir=str(folder), **(quiet | plain | {"logging_steps": 1} | options))


class InOrder(CarmaTrainer):
    """Takes the examples as they come, so that a test knows what is in a window."""

    def _get_train_sampler(self, *_: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def trainer(folder: Path, count: int = 8, kind: type[CarmaTrainer] = InOrder, **options: Any) -> CarmaTrainer:
    """Arguments of the trainer by their names, all others those of `TrainingArguments`."""
    own = {"carma", "carma_blocks", "carma_log_layers", "sampled_negatives", "compute_loss_func", "callbacks"}
    own |= {"eval_dataset", "train_dataset", "data_collator", "model", "model_init", "optimizers"}
    given = {name: options.pop(name) for name in own & options.keys()}
    collator = DataCollatorForLanguageModeling(tokenizer(), mlm=False)
    defaults = {"data_collator": collator, "carma": CARMA_ALONE, "train_dataset": examples(count)}
    if "model_init" not in given:
        defaults["model"] = model()
    return kind(
        args=arguments(folder, **options),
        processing_class=tokenizer(),
        **(defaults | given),
    )


def batch_of(chosen: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A batch with its spans, made without the collator under test."""
    padded = tokenizer().pad(list(chosen), return_tensors="pt")
    encoding = tokenizer()([tokenizer().decode(e["input_ids"]) for e in chosen], padding=True)
    assert encoding["input_ids"] == padded["input_ids"].tolist()
    labels = padded["input_ids"].masked_fill(padded["attention_mask"] == 0, -100)
    return {**padded, "labels": labels, "spans": ck.TokenSpans.from_encoding(encoding)}


def window_gradients(
    batches: Sequence[Sequence[dict[str, Any]]],
    config: ck.CarmaConfig = CARMA_ALONE,
    build: Callable[[], nn.Module] = model,
) -> dict[str, Tensor]:
    """What a window's CARMA losses come to: MI as of one large batch, stability the mean over the batches."""
    whole = batch_of([example for batch in batches for example in batch])
    reference = build()
    with HiddenStateTap(reference) as tap:
        forward(reference, whole)
        mi = ck.mi_loss(tap.hidden_states, whole["spans"], layers=config.mi_layers, temperature=config.temperature)
        loss = config.mi_weight * mi
        for batch in [whole] if len(batches) == 1 else map(batch_of, batches):
            if batch is not whole:  # one graph, as in training: in bf16 the sum of two is another
                forward(reference, batch)
            mask = batch["attention_mask"]
            stability = ck.stability_loss(tap.hidden_states, layers=config.stability_layers, mask=mask)
            loss = loss + config.stability_weight * stability / len(batches)
    loss.backward()
    return gradients(reference)


def forward(module: nn.Module, batch: dict[str, Any]) -> Any:
    return module(**{name: value for name, value in batch.items() if name != "spans"})


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """To 1e-7, or two units in the last place of the parameter's largest element where that is more.

    Parameters that the losses do not reach have a gradient of 0, or none.
    """
    assert any((gradient != 0).any() for gradient in expected.values())
    for name in actual.keys() | expected.keys():
        ours, theirs = torch.broadcast_tensors(*(one.get(name, torch.zeros(())) for one in (actual, expected)))
        atol = max(1e-7, 2**-22 * theirs.abs().max().item())
        torch.testing.assert_close(
            ours, theirs, rtol=2e-5, atol=atol, check_dtype=False, msg=lambda text, name=name: f"{name}: {text}"
        )
