"""Sampled negatives: an interrupted run draws what an uninterrupted one would."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import carma_kernels as ck
from tests.integration.trainer.toys import InOrder, batch_of, examples, trainer

CONFIG = ck.CarmaConfig(carma_weight=0.5)
SETTINGS = {"learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 3, "gradient_accumulation_steps": 2}


def losses(one: InOrder) -> list[tuple[float, float]]:
    return [(logs["loss"], logs["mi_loss"]) for logs in one.state.log_history if "mi_loss" in logs]


def run(folder: Path, resume: Path | None = None, **options: object) -> InOrder:
    one = trainer(folder, 24, carma=CONFIG, sampled_negatives=3, **(SETTINGS | options))
    one.train(resume_from_checkpoint=None if resume is None else str(resume))
    return one


def test_resuming_keeps_the_random_stream(tmp_path: Path) -> None:
    whole = losses(run(tmp_path / "whole"))
    assert len(whole) == 6
    resumed = losses(run(tmp_path / "resumed", tmp_path / "whole" / "checkpoint-3"))
    assert resumed[-3:] == whole[-3:]


def test_a_checkpoint_without_the_stream_says_so(tmp_path: Path) -> None:
    whole = losses(run(tmp_path / "whole"))
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    (checkpoint / "carma_negatives_0.pth").unlink()
    with pytest.warns(UserWarning, match="negatives are drawn from the seed again"):
        resumed = losses(run(tmp_path / "resumed", checkpoint))
    assert resumed[-1] != whole[-1]


def test_evaluation_draws_from_a_stream_of_its_own(tmp_path: Path) -> None:
    plain = losses(run(tmp_path / "plain"))
    evaluated = run(tmp_path / "evaluated", eval_dataset=examples(4), eval_strategy="steps", eval_steps=1)
    assert losses(evaluated) == plain
    assert evaluated.evaluate()["eval_mi_loss"] == evaluated.evaluate()["eval_mi_loss"]


def test_exact_negatives_save_no_stream(tmp_path: Path) -> None:
    trainer(tmp_path, 8, **SETTINGS, max_steps=3).train()
    assert not (tmp_path / "checkpoint-3" / "carma_negatives_0.pth").exists()


def test_draws_are_those_of_the_seed(tmp_path: Path) -> None:
    one = trainer(tmp_path, 2, carma=CONFIG, sampled_negatives=3, learning_rate=0.0)
    one.train()
    batch = batch_of(examples(2))
    pairs = batch["spans"].sample_pairs(3, torch.Generator().manual_seed(one.args.seed))
    with torch.no_grad():
        one.model.eval()
        tap = one._tap_of_model()
        tap.no_grad = True
        one.model(batch["input_ids"], attention_mask=batch["attention_mask"])
        assert losses(one)[0][1] == pytest.approx(tap.carma_loss(pairs, CONFIG).mi.item(), rel=1e-5)
