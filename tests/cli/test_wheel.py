"""The wheel, installed beside torch and numpy and what they require: the losses and the checks need nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import carma_kernels
from tests.cli.processes import ROOT
from tests.cli.wheels import requirements_below

ABSENT = ("transformers", "tokenizers", "accelerate", "rich", "matplotlib", "triton", "pytest", "pip")
LOSS = """
import torch
import carma_kernels as ck

hidden = torch.randn(3, 2, 6, 8, requires_grad=True)
loss = ck.carma_loss(hidden, ck.TokenSpans.from_lists([[(0, 3)], [(1, 3), (3, 6)]], seq_len=6)).loss
loss.backward()
assert loss > 0
assert hidden.grad.isfinite().all() and hidden.grad.any()
"""


class Environment:
    """A virtual environment, with another folder than the checkout's to start its programs from."""

    def __init__(self, folder: Path) -> None:
        self.programs = folder / "environment" / "bin"
        self.elsewhere = folder / "elsewhere"
        self.elsewhere.mkdir()

    def run(self, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "CARMA_"))}
        return subprocess.run(
            [self.programs / program, *arguments],
            capture_output=True,
            text=True,
            timeout=300,
            cwd=self.elsewhere,
            env={**inherited, "OMP_NUM_THREADS": "1"},
        )

    def evaluate(self, code: str) -> str:
        result = self.run("python", "-W", "error", "-c", code)
        assert result.returncode == 0, result.stderr
        return result.stdout.strip()


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """Without a network: built with what is installed here, whose torch and numpy it then shares."""
    folder = tmp_path_factory.mktemp("wheel")
    call("-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT))
    [wheel] = folder.glob("*.whl")
    assert wheel.name == f"carma_kernels-{carma_kernels.__version__}-py3-none-any.whl"

    call("-m", "venv", "--without-pip", str(folder / "environment"))
    [packages] = (folder / "environment").glob("lib/python*/site-packages")
    for name, distribution in requirements_below("torch", "numpy").items():
        if name != "triton":  # as with torch's builds for CPUs
            tops = {file.parts[0] for file in distribution.files or [] if file.parts[0] not in ("..", "__pycache__")}
            for top in tops:
                link = packages / top
                if not link.is_symlink():  # a namespace that distributions share
                    link.symlink_to(distribution.locate_file(top))
    python = str(folder / "environment" / "bin" / "python")
    call("-m", "pip", "--python", python, "install", "--quiet", "--no-index", "--no-deps", str(wheel))
    return Environment(folder)


def call(*arguments: str) -> None:
    result = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr


def test_nothing_else_is_there(environment: Environment):
    found = environment.evaluate(
        f"import importlib.util\nprint([name for name in {ABSENT} if importlib.util.find_spec(name)])"
    )
    assert found == "[]"


@pytest.mark.parametrize("package", ["carma_kernels", "csrc_ref"])
def test_it_is_the_wheels(environment: Environment, package: str):
    place = Path(environment.evaluate(f"import {package}\nprint({package}.__file__)"))
    assert place.is_relative_to(environment.programs.parent)
    assert (place.parent / "py.typed").is_file()


def test_a_loss(environment: Environment):
    assert environment.evaluate(LOSS) == ""


def test_doctor(environment: Environment):
    result = environment.run("carma-kernels", "doctor")
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.startswith(f"carma_kernels {carma_kernels.__version__}\n")  # no checkout's commit
    assert "no problems found." in result.stdout


def test_verify(environment: Environment):
    result = environment.run("carma-kernels", "verify", "--cases", "1", "--device", "cpu")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "52 of 52 checks within tolerance" in result.stdout
    assert "Not checked: triton backend on cpu." in result.stdout


@pytest.mark.parametrize("command", ["demo", "evaluate"])
def test_what_needs_more_says_what(environment: Environment, command: str):
    result = environment.run("carma-kernels", command)
    assert result.returncode == 1
    [line] = result.stderr.splitlines()
    assert line.endswith("pip install 'carma-kernels[demo]'")
    assert result.stdout == ""
    assert list(environment.elsewhere.iterdir()) == []


def test_the_demos_data_is_there(environment: Environment):
    code = "from carma_kernels.demo.definitions import shipped_file\nprint(shipped_file())"
    file = Path(environment.evaluate(code))
    assert file.is_relative_to(environment.programs.parent)
    assert file.stat().st_size > 10_000
