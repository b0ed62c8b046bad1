"""The whole demo on a tiny model."""

from __future__ import annotations

import contextlib
import io
import json
import math
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.demo.conftest import TINY

RUNS = ("task loss only", "with CARMA")


class Outcome(NamedTuple):
    status: int
    printed: str
    out: Path

    @property
    def results(self) -> dict[str, Any]:
        return json.loads((self.out / "results.json").read_text(encoding="utf-8"))


def run_tiny(demo: Callable[..., int], tiny_file: Path, out: Path, *more: object) -> Outcome:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        status = demo(*TINY.split(), "--data", tiny_file, "--out", out, *more)
    return Outcome(status, printed.getvalue(), out)


@pytest.fixture(scope="module")
def outcome(demo: Callable[..., int], tiny_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return run_tiny(demo, tiny_file, tmp_path_factory.mktemp("runs") / "new" / "folder")


def numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from numbers(item)
    elif isinstance(value, int | float):
        yield value


def test_succeeds_and_says_where_the_results_are(outcome: Outcome) -> None:
    assert outcome.status == 0
    files = {"curves.png", "results.json", "table.txt", "task-only", "with-carma"}
    assert {path.name for path in outcome.out.iterdir()} == files
    for name in (outcome.out.name, *files):
        assert name in outcome.printed


def test_models_can_be_loaded(outcome: Outcome) -> None:
    loaded = {
        name: (AutoModelForCausalLM.from_pretrained(at), AutoTokenizer.from_pretrained(at))
        for name in ("task-only", "with-carma")
        if (at := outcome.out / name)
    }
    (task_only, tokenizer), (with_carma, _) = loaded.values()
    assert tokenizer("a cat").word_ids()[-1] == 1
    parameters = zip(task_only.parameters(), with_carma.parameters(), strict=True)
    assert any(not torch.equal(one, other) for one, other in parameters)


def test_table_names_what_was_compared(outcome: Outcome) -> None:
    for table in (outcome.printed, (outcome.out / "table.txt").read_text(encoding="utf-8")):
        for label in (
            *RUNS,
            "task loss",
            "top-1 accuracy",
            "top-10 accuracy",
            "L_MI",
            "layer 1",
            "layer 2",
            "L_Stability",
            "layers 1 to 2",
            "time a step",
            "CARMA's share",
            "peak memory",
        ):
            assert label in table


def test_says_how_many_words_are_split(outcome: Outcome) -> None:
    share = outcome.results["text"]["split_share"]
    assert f"splits {share:.0%} of their" in " ".join(outcome.printed.split())


def test_both_runs_learn(outcome: Outcome) -> None:
    for name in RUNS:
        first, *_, last = outcome.results["runs"][name]["held_out"]
        assert last["task_loss"] < first["task_loss"] - 0.2


def test_runs_start_equal(outcome: Outcome) -> None:
    without, carma = (outcome.results["runs"][name] for name in RUNS)
    assert without["held_out"][0] == carma["held_out"][0]
    assert without["training_task_loss"][0] == carma["training_task_loss"][0]


def test_carma_ends_lower_in_both_of_its_terms(outcome: Outcome) -> None:
    without, carma = (outcome.results["runs"][name]["held_out"][-1] for name in RUNS)
    assert carma["mi"] < 0.8 * without["mi"]
    assert carma["stability"] < 0.8 * without["stability"]


def test_terms_add_up_over_layers(outcome: Outcome) -> None:
    last = outcome.results["runs"]["with CARMA"]["held_out"][-1]
    assert last["mi"] == pytest.approx(sum(last["mi_per_layer"]) / 2)
    assert last["stability"] == pytest.approx(sum(last["stability_per_layer"]))


def test_every_number_is_finite_and_costs_are_positive(outcome: Outcome) -> None:
    found = list(numbers(outcome.results))
    assert len(found) > 100
    assert all(math.isfinite(number) for number in found)
    without, carma = (outcome.results["runs"][name] for name in RUNS)
    assert 0 < without["peak_memory_bytes"] < carma["peak_memory_bytes"]
    assert len(without["step_seconds"]) == len(carma["step_seconds"]) == 20
    assert min(without["step_seconds"] + carma["step_seconds"]) > 0
    assert outcome.results["carma_share"]["losses_alone_seconds"] > 0


def test_picture_is_one(outcome: Outcome) -> None:
    with Image.open(outcome.out / "curves.png") as picture:
        assert picture.size[0] > 1000
        assert len(picture.convert("RGB").getcolors(maxcolors=picture.size[0] * picture.size[1])) > 10


def measured(outcome: Outcome) -> dict[str, Any]:
    return {name: (run["held_out"], run["training_task_loss"]) for name, run in outcome.results["runs"].items()}


def test_same_seed_same_numbers(outcome: Outcome, demo: Callable[..., int], tiny_file: Path, tmp_path: Path) -> None:
    once, again = (
        measured(run_tiny(demo, tiny_file, tmp_path / name, "--steps", 3, "--seed", 1)) for name in ("once", "again")
    )
    assert once == again
    for name in RUNS:
        assert once[name][0][0] != measured(outcome)[name][0][0]  # untrained, with another seed


def test_without_weight_both_runs_are_one(demo: Callable[..., int], tiny_file: Path, tmp_path: Path) -> None:
    runs = measured(run_tiny(demo, tiny_file, tmp_path, "--steps", 4, "--carma-weight", 0))
    assert runs["with CARMA"] == runs["task loss only"]


@pytest.mark.parametrize("negatives", ["batch", "sampled"])
def test_other_negatives(
    negatives: str, outcome: Outcome, demo: Callable[..., int], tiny_file: Path, tmp_path: Path
) -> None:
    other = run_tiny(demo, tiny_file, tmp_path, "--steps", 2, "--negatives", negatives)
    untrained = other.results["runs"]["with CARMA"]["held_out"][0]["mi"]
    exact = outcome.results["runs"]["with CARMA"]["held_out"][0]["mi"]
    # the more negatives, the larger the loss: 5 drawn ones < those of the definition < those of the batch
    assert (untrained > exact) if negatives == "batch" else (untrained < exact)


def test_divergence_is_reported(
    demo: Callable[..., int], tiny_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert demo(*TINY.split(), "--data", tiny_file, "--out", tmp_path, "--learning-rate", 1e30) == 1
    assert "Lower --learning-rate" in capsys.readouterr().err


def test_ctrl_c_leaves_without_traceback(
    demo: Callable[..., int],
    tiny_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from carma_kernels.demo import training

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(training.Run, "train_on", interrupt)
    assert demo(*TINY.split(), "--data", tiny_file, "--out", tmp_path / "new") == 130
    assert capsys.readouterr().err == "stopped; no results were written.\n"
    assert not list(tmp_path.iterdir())


def test_example_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    script = Path(__file__).parents[2] / "examples" / "train_idm.py"
    monkeypatch.setattr(sys, "argv", [str(script), "--steps", "2"])
    runpy.run_path(str(script), run_name="__main__")
    printed = capsys.readouterr().out
    assert "step 0: task" in printed
    assert "step 1: task" in printed
