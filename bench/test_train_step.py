"""The bench of whole training steps runs, and says what it is asked to say."""

from __future__ import annotations

import json

import pytest

from bench import report, saved, train_step

pytestmark = pytest.mark.smoke


@pytest.mark.parametrize("checkpointing", ["no", "yes"])
def test_every_implementation_takes_its_steps(monkeypatch, tmp_path, capsys, checkpointing):
    monkeypatch.setattr(saved, "RESULTS", tmp_path)
    options = ["--models", "tiny", "--shapes", "2x20", "--steps", "2", "--checkpointing", checkpointing, "--save"]
    train_step.main(options)
    (path,) = tmp_path.glob("*/*-train-step.json")
    runs = json.loads(path.read_text())["steps"]
    assert [run["losses"] for run in runs] == list(train_step.LOSSES)
    assert all(len(run["seconds"]) == 2 for run in runs)
    assert report.steps(runs) in capsys.readouterr().out


def test_what_carma_adds_is_against_the_same_step_without():
    def run(losses, seconds, peak_bytes, B=16):
        where = {"model": "gpt2", "dtype": "float32", "checkpointing": False, "B": B, "T": 58, "words": "wordnet"}
        return where | {"losses": losses, "seconds": [seconds] * 3, "peak_bytes": peak_bytes}

    runs = [run("none", 1.0, 1000), run("none", 9.0, 9000, B=1), run("tap", 1.25, 1020)]
    row = next(line for line in report.steps(runs).splitlines() if "tap" in line)
    cells = [cell.strip() for cell in row.split("|")]
    assert cells[3:8] == ["tap", "1250", "1250 to 1250 (3)", "+25.0 %", "742.4"]
    assert cells[9] == "+2.00 %"
