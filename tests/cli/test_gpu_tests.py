"""The tests that need a GPU are no part of the others, have targets of make, and say so where there is none."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.processes import ROOT

NO_GPU = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
TARGETS = ["test-gpu-quick", "test-gpu", "test-gpu-sanitizer"]


def run(*command: str, cwd: Path = ROOT, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "CARMA_KERNELS_TEST_DEVICE"}
    return subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
        cwd=cwd,
        env={**environment, **variables},
    )


def collect(**variables: str) -> subprocess.CompletedProcess[str]:
    options = ("--collect-only", "-q", "-p", "no:cacheprovider")
    return run(sys.executable, "-m", "pytest", *options, "tests/gpu", **variables)


def test_without_being_asked_for_they_are_not_collected():
    result = collect()
    assert result.returncode == 5, result.stdout  # pytest's status for no tests
    assert "no tests collected" in result.stdout


def test_without_a_gpu_they_fail():
    result = collect(CARMA_KERNELS_TEST_DEVICE="cuda", **NO_GPU)
    assert result.returncode == 4, result.stdout
    assert "finds no GPU that it can use" in result.stdout
    assert "Nothing was tested." in result.stdout


def make(target: str, *options: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """With this Python, and without setting anything up."""
    if shutil.which("make") is None:
        pytest.skip("needs make")
    return run("make", target, "READY=", f"BIN={Path(sys.executable).parent}", *options, **variables)


def pytest_commands(target: str, *options: str) -> list[list[str]]:
    """What make would start, in words, less what comes before pytest's options."""
    result = make(target, "--dry-run", *options)
    assert result.returncode == 0, result.stdout
    lines = [
        shlex.split(line.replace("|| status=1; \\", "")) for line in result.stdout.splitlines() if "pytest" in line
    ]
    return [words[words.index("pytest") + 1 :] for words in lines]


def paths(command: list[str]) -> set[str]:
    """The files and folders that pytest is to look at."""
    ignored = {command[at + 1] for at, word in enumerate(command) if word == "--ignore"}
    return {word for word in command if word.startswith("tests/")} - ignored


def option(command: list[str], name: str) -> str:
    return command[command.index(name) + 1]


@pytest.mark.parametrize("target", [*TARGETS, "bench-gpu-quick"])
def test_without_a_gpu_the_targets_fail(target: str):
    result = make(target, **NO_GPU)
    assert result.returncode == 2, result.stdout  # make's status for a command that failed
    assert "finds none that it can use: see make doctor" in result.stdout
    assert "pytest" not in result.stdout
    assert "gpu_quick" not in result.stdout


def test_the_quick_bench_takes_options():
    result = make("bench-gpu-quick", "--dry-run", "--no-print-directory", "ARGS=--seconds 300 --only rates")
    assert result.stdout.splitlines()[-1].endswith("python -m bench.gpu_quick --seconds 300 --only rates")


@pytest.mark.parametrize("target", TARGETS)
def test_what_the_targets_name_is_there(target: str):
    for command in pytest_commands(target):
        assert paths(command)
        assert not [path for path in paths(command) if not (ROOT / path).exists()]


def test_every_file_is_in_a_target():
    """One after the other on the device in the last command, and side by side, but for the sanitizer, in the first."""
    files = {f"tests/gpu/{file.name}" for file in (ROOT / "tests" / "gpu").glob("test_*.py")}
    (quick, quick_alone), (rest, rest_alone), (sanitizer,) = map(pytest_commands, TARGETS)
    for command in (quick, rest):
        assert option(command, "-m") == "not alone"
        assert option(command, "-n") == "12"
    for command in (quick_alone, rest_alone, sanitizer):
        assert option(command, "-m") == "alone"
        assert "-n" not in command
    assert paths(sanitizer) == {"tests/gpu/test_sanitizer.py"}
    assert paths(quick) | paths(rest) >= files - paths(sanitizer)
    assert paths(quick_alone) | paths(rest_alone) == files - paths(sanitizer)
    assert not paths(quick) & paths(rest)
    assert {"tests/ops", "tests/kernels"} < paths(quick)
    assert {"tests/contracts", "tests/metamorphic"} < paths(rest)
    assert option(quick, "--ignore") == "tests/kernels/test_compile.py"  # of compiling for devices that are not there


def test_the_variables(tmp_path: Path):
    for target in TARGETS:
        commands = pytest_commands(target, "JOBS=3", f"JUNIT={tmp_path}", "PYTEST_ARGS=-k carma")
        assert all(option(command, "-k") == "carma" for command in commands)
        assert {option(command, "-n") for command in commands if "-n" in command} <= {"3"}
        results = [option(command, "--junitxml") for command in commands]
        assert len(set(results)) == len(results)
        assert all(Path(file).parent == tmp_path for file in results)


WARNS = """
import time
import warnings

def test_that_warns():
    warnings.warn("of this device alone", UserWarning, stacklevel=1)

def test_that_hangs():
    time.sleep(60)
"""


def test_a_warning_fails_nothing_and_a_hang_ends(tmp_path: Path):
    """With each command's options; without them a warning is an error, as in all other tests."""
    (tmp_path / "test_it.py").write_text(WARNS)
    configuration = ("-c", str(ROOT / "pyproject.toml"), "--rootdir", str(tmp_path), "test_it.py")
    strict = run(sys.executable, "-m", "pytest", *configuration, "-k", "warns", cwd=tmp_path)
    assert strict.returncode == 1, strict.stdout
    assert "of this device alone" in strict.stdout
    commands = [command for target in TARGETS for command in pytest_commands(target, "JOBS=2")]
    for options in {
        tuple(word for word in command if "tests/" not in word and word != "--ignore") for command in commands
    }:
        given = list(options)
        given[given.index("-m") + 1] = ""  # that is about the suite's own marks
        given[given.index("--timeout") + 1] = "2"
        result = run(sys.executable, "-m", "pytest", *given, *configuration, cwd=tmp_path)
        assert result.returncode == 1, result.stdout
        assert "UserWarning: of this device alone" in result.stdout
        assert "FAILED test_it.py::test_that_hangs" in result.stdout
        assert "1 failed, 1 passed, 1 warning" in result.stdout
