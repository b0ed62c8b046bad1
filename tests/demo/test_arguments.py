"""Bad arguments are refused, with the way out, before any work starts."""

from __future__ import annotations

import argparse
import datetime
import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest

from carma_kernels import CarmaConfig
from carma_kernels.demo import cli
from carma_kernels.demo.arguments import results_folder
from tests.demo.conftest import TINY


@pytest.fixture(autouse=True)
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    from carma_kernels.demo import experiment

    def work(*_: object) -> None:
        raise AssertionError("work started")

    monkeypatch.setattr(experiment, "run_experiment", work)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--steps 0", "--steps: must be a whole number >= 1, got '0'"),
        ("--steps many", "--steps: must be a whole number >= 1, got 'many'"),
        ("--batch-size -3", "--batch-size: must be a whole number >= 1"),
        ("--layers 1", "--layers: must be a whole number >= 2"),
        ("--width 12.5", "--width: must be a whole number >= 1"),
        ("--heads 0", "--heads: must be a whole number >= 1"),
        ("--vocab-size 256", "--vocab-size: must be a whole number >= 257"),
        ("--num-negatives 0", "--num-negatives: must be a whole number >= 1"),
        ("--seed -1", "--seed: must be a whole number >= 0"),
        ("--learning-rate 0", "--learning-rate: must be a number > 0, got '0'"),
        ("--learning-rate fast", "--learning-rate: must be a number > 0"),
        ("--temperature inf", "--temperature: must be a number > 0"),
        ("--carma-weight 1.5", "--carma-weight: must be a number from 0 to 1"),
        ("--mi-weight -1", "--mi-weight: must be a number >= 0"),
        ("--stability-weight nan", "--stability-weight: must be a number >= 0"),
        ("--negatives some", "--negatives: invalid choice: 'some'"),
        ("--backend cuda", "--backend: invalid choice: 'cuda'"),
    ],
)
def test_bad_value(arguments: str, message: str, demo: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        demo(*arguments.split())
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--width 30 --heads 4", "--width 30 cannot be shared by --heads 4; take a multiple of it."),
        ("--device quantum", "--device quantum cannot be used here: "),
        ("--device meta", "--device meta cannot be used here: "),
        ("--device cuda:77", "--device cuda:77 cannot be used here: "),
    ],
)
def test_arguments_that_cannot_work(
    arguments: str, message: str, demo: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert demo(*TINY.split(), *arguments.split()) == 2
    assert capsys.readouterr().err.startswith(message)


def test_backend_that_does_not_run_here(
    demo: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CARMA_KERNELS_BACKEND", "abacus")
    assert demo(*TINY.split()) == 2
    assert capsys.readouterr().err.startswith("--backend auto cannot be used here: CARMA_KERNELS_BACKEND must be")


def test_output_folder_that_cannot_be_made(
    demo: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert demo(*TINY.split(), "--out", tmp_path / "file") == 2
    message = capsys.readouterr().err
    assert message.startswith(f"--out {tmp_path / 'file'} cannot be made")
    assert "take another folder" in message


@pytest.mark.parametrize("library", ["transformers", "tokenizers", "rich", "matplotlib"])
def test_missing_library_is_named_with_the_command_that_installs_it(
    library: str, demo: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == library else found(name))
    assert demo() == 1
    assert capsys.readouterr().err == f"the demo needs {library}: pip install 'carma-kernels[demo]'\n"


def test_help_explains_every_knob_and_its_default() -> None:
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    for action in parser._actions:
        assert action.help
    shown = " ".join(parser.format_help().split())
    for default in ("(default: 0.3)", "(default: sequence)", "(default: 150)", "(default: runs/demo-<date>-<time>)"):
        assert default in shown


def test_the_losses_defaults_are_the_papers() -> None:
    """Written out, so that help need not import what `CarmaConfig` does."""
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    names = ("carma_weight", "mi_weight", "stability_weight", "temperature", "negatives")
    assert {name: parser.get_default(name) for name in names} == {name: getattr(CarmaConfig(), name) for name in names}


class Clock(datetime.datetime):
    @classmethod
    def now(cls, tz: datetime.tzinfo | None = None) -> Clock:
        return cls(2026, 1, 2, 3, 4, 5, tzinfo=tz)


def test_the_output_folder_has_the_time_in_its_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("carma_kernels.demo.arguments.datetime.datetime", Clock)
    monkeypatch.chdir(tmp_path)
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    with results_folder(parser.get_default("out")) as folder:
        (folder / "table.txt").touch()
    assert (tmp_path / "runs" / "demo-20260102-030405" / "table.txt").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, FloatingPointError])
def test_an_output_folder_that_stays_empty_does_not_stay(error: type[BaseException], tmp_path: Path) -> None:
    folder = results_folder(tmp_path / "runs" / "new")
    with pytest.raises(error), folder:
        raise error
    assert list(tmp_path.iterdir()) == []


def test_an_output_folder_that_was_there_stays(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), results_folder(tmp_path):
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt), results_folder(tmp_path / "new") as folder:
        write_and_stop(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def write_and_stop(folder: Path) -> None:
    (folder / "table.txt").touch()
    raise KeyboardInterrupt
