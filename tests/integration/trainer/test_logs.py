"""What is logged, in training and evaluation, is what the losses are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import default_data_collator

import carma_kernels as ck
from carma_kernels.integrations.transformers import HiddenStateTap
from tests.integration.trainer.toys import (
    CarmaTrainer,
    InOrder,
    batch_of,
    examples,
    forward,
    model,
    texts,
    tokenizer,
    trainer,
)

CONFIG = ck.CarmaConfig(mi_layers=(1, 2))


def losses_of(batch: dict[str, Any]) -> dict[str, float]:
    with HiddenStateTap(own := model()) as tap:
        task = forward(own, batch).loss
        carma = tap.carma_loss(batch["spans"], CONFIG, mask=batch["attention_mask"])
    (mi_1, mi_2), (change_0, change_1) = carma.mi_per_layer.tolist(), carma.stability_per_layer.tolist()
    return {
        "loss": ck.total_loss(task, carma.loss, CONFIG.carma_weight).item(),
        "task_loss": task.item(),
        "mi_loss": carma.mi.item(),
        "stability_loss": carma.stability.item(),
        "mi_loss/layer_1": mi_1,
        "mi_loss/layer_2": mi_2,
        "stability_loss/layer_0_to_1": change_0,
        "stability_loss/layer_1_to_2": change_1,
    }


def test_each_step(tmp_path: Path) -> None:
    one = trainer(tmp_path, 6, carma=CONFIG)
    one.train()
    every = examples(6)
    for step, logs in enumerate(one.state.log_history[:3]):
        expected = losses_of(batch_of(every[2 * step : 2 * step + 2]))
        assert {name: logs[name] for name in expected} == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("takes_loss_arguments", [True, False])
def test_windows_and_the_steps_since_the_last_time(takes_loss_arguments: bool, tmp_path: Path) -> None:
    """Two steps of two batches, logged together."""
    own = model()
    own.accepts_loss_kwargs = takes_loss_arguments
    one = trainer(tmp_path, 8, carma=CONFIG, gradient_accumulation_steps=2, logging_steps=2, model=own)
    one.train()
    [logs] = [logs for logs in one.state.log_history if "loss" in logs]
    total = (1 - CONFIG.carma_weight) * logs["task_loss"] + CONFIG.carma_weight * (
        CONFIG.mi_weight * logs["mi_loss"] + CONFIG.stability_weight * logs["stability_loss"]
    )
    assert logs["loss"] == pytest.approx(total, rel=1e-5)

    every = examples(8)
    steps = [losses_of(batch_of(every[at : at + 4])) for at in (0, 4)]
    assert logs["mi_loss"] == pytest.approx(sum(step["mi_loss"] for step in steps) / 2, rel=1e-5)
    parts = [losses_of(batch_of(every[at : at + 2])) for at in (0, 2, 4, 6)]
    assert logs["stability_loss"] == pytest.approx(sum(part["stability_loss"] for part in parts) / 4, rel=1e-5)


def test_evaluation(tmp_path: Path) -> None:
    """Batches of 4 and 1, on all pairs and sequences; in the middle of training, which it leaves alone."""
    every = examples(5)
    options = {"eval_dataset": every, "eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 4}
    with_evaluation = trainer(tmp_path, 4, carma=CONFIG, **options)
    with_evaluation.train()
    metrics = next(logs for logs in with_evaluation.state.log_history if "eval_loss" in logs)
    first, last = losses_of(batch_of(every[:4])), losses_of(batch_of(every[4:]))
    pairs = [batch_of(part)["spans"].num_pairs for part in (every[:4], every[4:])]
    assert pairs[1] > 0
    for name in first:
        weights = pairs if name.startswith("mi") else [4, 1]
        if name != "loss":
            expected = (weights[0] * first[name] + weights[1] * last[name]) / sum(weights)
            assert metrics[f"eval_{name}"] == pytest.approx(expected, rel=1e-5), name
    assert metrics["eval_loss"] == pytest.approx((4 * first["loss"] + last["loss"]) / 5, rel=1e-5)

    without = trainer(tmp_path, 4, carma=CONFIG)
    without.train()
    assert without.state.log_history[0]["mi_loss"] == with_evaluation.state.log_history[0]["mi_loss"]
    assert set(metrics) >= {"eval_mi_loss/layer_1", "eval_stability_loss/layer_0_to_1"}


def test_totals_alone(tmp_path: Path) -> None:
    """Of a deep model that is two numbers a layer less, in training and evaluation."""
    whole, totals = (trainer(tmp_path, 2, carma=CONFIG, carma_log_layers=layers) for layers in (True, False))
    for one in (whole, totals):
        one.train()
    [[logs, *_], [fewer, *_]] = whole.state.log_history, totals.state.log_history
    assert fewer.keys() == {name for name in logs if "layer" not in name}
    metrics = totals.evaluate(examples(2))
    assert {name for name in metrics if name.endswith("_loss") or "layer" in name} == {
        "eval_loss",
        "eval_task_loss",
        "eval_mi_loss",
        "eval_stability_loss",
    }
    assert all(fewer[name] == logs[name] for name in ("task_loss", "mi_loss", "stability_loss"))


def test_evaluation_and_prediction_without_training(tmp_path: Path) -> None:
    one = trainer(tmp_path, carma=CONFIG)
    assert one.evaluate(examples(4))["eval_mi_loss"] > 0
    output = one.predict(examples(4))
    assert output.metrics["test_mi_loss"] > 0
    assert len(output.predictions) == 4


def test_evaluation_batches_without_spans_count_for_the_task_loss(tmp_path: Path) -> None:
    one = trainer(tmp_path, carma=CONFIG)
    padded = tokenizer()(texts(4), padding=True)
    rows = [{"input_ids": ids, "attention_mask": mask} for ids, mask in zip(*padded.values(), strict=True)]
    labelled = [row | {"labels": row["input_ids"]} for row in rows]
    one.data_collator = default_data_collator  # a DataLoader of the user's own
    metrics = one.evaluate(labelled)
    with torch.no_grad():
        batch = default_data_collator(labelled)
        assert metrics["eval_loss"] == pytest.approx(model()(**batch).loss.item(), rel=1e-5)
    assert not any("mi_loss" in name for name in metrics)


def test_prediction_without_labels(tmp_path: Path) -> None:
    """Such a batch goes to the model as it is, and the spans must not."""
    one = trainer(tmp_path, carma=CONFIG)
    one.data_collator.collator = lambda chosen: tokenizer().pad(chosen, return_tensors="pt")
    given: list[set[str]] = []
    one.model.register_forward_pre_hook(lambda _module, _args, named: given.append(set(named)), with_kwargs=True)
    assert one.predict(examples(2)).predictions.shape[:2] == batch_of(examples(2))["input_ids"].shape
    assert given == [{"input_ids", "attention_mask"}]


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self) -> Any:
        return iter(examples(6))


def test_streamed_examples(tmp_path: Path) -> None:
    one = trainer(tmp_path, 2, carma=CONFIG, max_steps=3)
    one.train_dataset = Stream()
    one.train()
    assert one.state.log_history[2]["mi_loss"] == pytest.approx(
        losses_of(batch_of(examples(6)[4:]))["mi_loss"], rel=1e-5
    )


def test_training_batch_without_spans_is_an_error(tmp_path: Path) -> None:
    class Own(InOrder):
        def get_train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(self.train_dataset, 2, collate_fn=self.data_collator.collator)

    with pytest.raises(ValueError, match=r"no 'spans'.*CarmaCollator\(collator, tokenizer\)"):
        trainer(tmp_path, kind=Own).train()


class Reads(TorchDispatchMode):
    """Counts the numbers that the host reads."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def reads(one: Any, compute_loss: Any) -> int:
    """Of two steps."""
    one.current_gradient_accumulation_steps = 1
    batches = list(one.get_train_dataloader())
    with Reads() as counted:
        for batch in batches:
            one.get_batch_samples(iter([batch]), 1, one.args.device)
            compute_loss(one, one.model, batch).backward()
    return counted.count


def test_a_step_reads_nothing_that_it_does_not_read_without_carma(tmp_path: Path) -> None:
    """Losses wait on the device until they are logged."""
    one = trainer(tmp_path, 4, carma=CONFIG)
    without = reads(one, lambda _, model, batch: forward(model, batch).loss)
    assert reads(one, CarmaTrainer.compute_loss) == without
    with Reads() as counted:
        one.log({"loss": 0.0})
    assert counted.count == 0, "one copy of all, not a read of each"
