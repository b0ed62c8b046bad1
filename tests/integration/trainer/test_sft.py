"""TRL's `SFTTrainer`, which tokenizes, truncates and collates by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

import carma_kernels as ck
from carma_kernels.integrations.transformers import CarmaTrainerMixin, HiddenStateTap
from tests.integration.trainer.toys import CARMA_ALONE, Gradients, assert_same, forward, gradients, model, texts
from tests.integration.trainer.toys import tokenizer as shared

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),
    # its own, of what these tests ask it for
    pytest.mark.filterwarnings("ignore:.*will be removed in v2.0.0:FutureWarning"),
]


class CarmaSFTTrainer(CarmaTrainerMixin, SFTTrainer):
    def _get_train_sampler(self, *_: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=shared().backend_tokenizer, pad_token="<pad>", eos_token="<pad>", padding_side="right"
    )


def sft(folder: Path, count: int = 6, **options: Any) -> CarmaSFTTrainer:
    own = {"peft_config", "carma", "callbacks", "eval_dataset", "compute_loss_func"}
    given = {name: options.pop(name) for name in own & options.keys()}
    quiet = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "save_strategy": "no", "logging_steps": 1}
    plain = {"max_grad_norm": 0.0, "learning_rate": 0.0, "num_train_epochs": 1, "per_device_train_batch_size": 2}
    defaults = {"gradient_checkpointing": False, "bf16": False, "max_length": None}
    return CarmaSFTTrainer(
        model(),
        args=SFTConfig(output_dir=str(folder), **(quiet | plain | defaults | options)),
        train_dataset=Dataset.from_dict({"text": texts(count)}),
        processing_class=tokenizer(),
        **({"carma": CARMA_ALONE} | given),
    )


def expected_gradients(one: CarmaSFTTrainer, rows: slice) -> dict[str, torch.Tensor]:
    """Of the losses of one batch, from the examples as the trainer has prepared them."""
    batch = one.data_collator([one.train_dataset[row] for row in range(rows.start, rows.stop)])
    reference = model()
    with HiddenStateTap(reference) as tap:
        forward(reference, batch)
        tap.carma_loss(batch["spans"], CARMA_ALONE, mask=batch["attention_mask"]).loss.backward()
    return gradients(reference)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="as it comes"),
        pytest.param({"gradient_checkpointing": True}, id="checkpointing"),
        pytest.param({"label_smoothing_factor": 0.1}, id="label smoothing, and so a second forward"),
        pytest.param({"compute_loss_func": lambda outputs, *_, **__: outputs.logits.sum()}, id="own loss"),
        pytest.param({"max_length": 12}, id="truncation"),
    ],
)
def test_gradient_is_that_of_the_losses(options: dict[str, Any], tmp_path: Path) -> None:
    seen = Gradients()
    one = sft(tmp_path, callbacks=[seen], **options)
    one.train()
    assert len(seen.steps) == 3
    for step, actual in enumerate(seen.steps):
        assert_same(actual, expected_gradients(one, slice(2 * step, 2 * step + 2)))


def test_words_are_those_of_the_texts(tmp_path: Path) -> None:
    one = sft(tmp_path)
    [first, *_] = one.get_train_dataloader()
    expected = ck.TokenSpans.from_encoding(tokenizer()(texts(2), padding=True))
    for actual, words in zip(first["spans"].to_lists(), expected.to_lists(), strict=True):
        assert actual == words  # the end of text, which SFTTrainer adds, is no word


def test_lora_checkpointing_accumulation_and_evaluation(tmp_path: Path) -> None:
    """All at once, and it learns."""
    one = sft(
        tmp_path,
        16,
        carma=ck.CarmaConfig(),
        peft_config=LoraConfig(target_modules="all-linear", r=4, task_type="CAUSAL_LM"),
        gradient_checkpointing=True,
        gradient_accumulation_steps=2,
        learning_rate=2e-2,
        num_train_epochs=4,
        eval_dataset=Dataset.from_dict({"text": texts(20)[16:]}),
        eval_strategy="epoch",
    )
    one.train()
    logs = [entry for entry in one.state.log_history if "mi_loss" in entry]
    assert len(logs) == 16
    assert logs[-1]["mi_loss"] < 0.9 * logs[0]["mi_loss"]
    assert logs[-1]["task_loss"] < logs[0]["task_loss"]
    evaluations = [entry for entry in one.state.log_history if "eval_loss" in entry]
    assert evaluations[-1]["eval_mi_loss"] < evaluations[0]["eval_mi_loss"]
    assert {"eval_task_loss", "eval_stability_loss", "eval_mi_loss/layer_0"} <= evaluations[0].keys()
