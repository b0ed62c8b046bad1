"""What `doctor` finds, also where something is broken."""

from __future__ import annotations

import importlib.metadata
import json
import sys
import tomllib
from types import ModuleType

import pytest
import torch

import carma_kernels
from carma_kernels import _backend, _runtime, _triton_here
from carma_kernels.__main__ import main
from carma_kernels.doctor import findings as doctor
from tests.cli import processes

pytestmark = pytest.mark.usefixtures("no_interpreter")


@pytest.fixture(autouse=True)
def no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CARMA_KERNELS_BACKEND", raising=False)


@pytest.fixture
def report(capsys):
    def make(*arguments: str) -> tuple[int, str]:
        status = main(["doctor", *arguments])
        out, err = capsys.readouterr()
        assert err == ""
        assert "Traceback" not in out
        return status, out

    return make


def line(text: str, start: str) -> str:
    [found] = [line.strip() for line in text.splitlines() if line.strip().startswith(start)]
    return " ".join(found.split())


def test_a_sound_installation(report):
    status, out = report()
    assert status == 0
    assert out.startswith(f"carma_kernels {carma_kernels.__version__}")
    assert torch.__version__ in line(out, "torch ")
    assert line(out, "numpy").split()[1] == importlib.metadata.version("numpy")
    assert "cores" in line(out, "CPU")
    name, reason = carma_kernels.choose_backend(None, "cpu")
    assert line(out, "cpu ") == f"cpu {name}: {reason}"
    assert "CARMA_KERNELS_BACKEND is not set" in out
    assert "no problems found." in out
    assert all(len(line) < 200 for line in out.splitlines())


def test_json_says_the_same(report):
    status, out = report("--json")
    findings = json.loads(out)
    assert status == 0
    assert findings["version"] == carma_kernels.__version__
    assert findings["environment"]["torch"] == torch.__version__
    assert findings["variable"] is None
    assert findings["backends"]["cpu"]["backend"] == "torch"
    assert findings["optional"]["bench"]["pytest"] == importlib.metadata.version("pytest")
    assert findings["problems"] == []
    assert list(findings["backends"]) == [str(device) for device in doctor.devices()]


@pytest.mark.parametrize("value", ["nonsense", "triton"])
def test_a_variable_that_cannot_be_followed(report, monkeypatch, value: str):
    monkeypatch.setenv("CARMA_KERNELS_BACKEND", value)
    with pytest.raises(ValueError, match="CARMA_KERNELS_BACKEND") as refused:
        carma_kernels.choose_backend(None, "cpu")
    status, out = report()
    assert status == 1
    assert f"CARMA_KERNELS_BACKEND is '{value}'" in out
    assert line(out, "PROBLEM") == f"PROBLEM: no backend for cpu: {refused.value}"
    assert "1 problem found." in out
    status, out = report("--json")
    assert status == 1
    assert json.loads(out)["backends"]["cpu"] == {"backend": None, "reason": str(refused.value)}
    assert json.loads(out)["variable"] == value


def test_a_variable_that_can(report, monkeypatch):
    monkeypatch.setenv("CARMA_KERNELS_BACKEND", "torch")
    status, out = report()
    assert status == 0
    assert line(out, "cpu ") == "cpu torch: CARMA_KERNELS_BACKEND asks for it"


def test_what_is_missing_comes_with_the_command_that_adds_it(report, monkeypatch):
    version = importlib.metadata.version

    def without_rich(name: str) -> str:
        if name in ("rich", "pytest-benchmark", "pytest"):
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", without_rich)
    status, out = report()
    assert status == 0  # they are optional
    assert "tokenizers" in line(out, "demo")
    assert line(out, "demo").endswith("missing rich: pip install 'carma-kernels[demo]'")
    assert line(out, "bench").endswith("; missing pytest, pytest-benchmark: pip install 'carma-kernels[bench]'")


def test_the_extras_are_those_of_the_package():
    with open(processes.ROOT / "pyproject.toml", "rb") as file:
        extras = tomllib.load(file)["project"]["optional-dependencies"]
    for extra, packages in doctor.OPTIONAL.items():
        assert [requirement.split(">")[0] for requirement in extras[extra]] == list(packages)


def environment_with(**changes: object):
    found = {**doctor.environment(), **changes}
    return lambda: found


def test_triton_is_missing(report, monkeypatch):
    monkeypatch.setattr(doctor, "environment", environment_with(triton=None))
    status, out = report()
    assert status == 0
    assert line(out, "triton") == "triton not installed"
    assert "Triton is not installed" in line(out, "Note")


def test_gpus_are_described(report, monkeypatch):
    gpu = {"name": "NVIDIA H100", "capability": "9.0", "memory": 80 * 2**30}
    changed = environment_with(gpus=[gpu, gpu], cuda="13.0", gpu_driver="580.1")
    monkeypatch.setattr(doctor, "environment", changed)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    _, out = report()
    assert line(out, "GPUs").count("NVIDIA H100 (capability 9.0, 80 GiB)") == 2
    assert line(out, "GPU driver") == "GPU driver 580.1"
    assert "cuda:1 torch: " in " ".join(out.split())


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is one, and nothing is known against it."""
    monkeypatch.setattr(doctor, "environment", environment_with(gpus=[]))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(_runtime, "target", lambda device: _runtime.TARGETS["sm_90"] if device.type == "cuda" else None)
    monkeypatch.setattr(_backend, "_obstacles", {torch.device("cuda:0"): None})
    monkeypatch.setitem(sys.modules, "carma_kernels.ops", ModuleType("carma_kernels.ops"))


def gpu_lines(out: str) -> list[str]:
    return [" ".join(line.split()) for line in out.splitlines() if line.strip().startswith("cuda:0")]


@pytest.mark.parametrize("why", ["Triton is not installed", RuntimeError("no driver")])
def test_triton_cannot_be_used_on_a_gpu(report, monkeypatch, gpu, why):
    def obstacle(device: torch.device) -> str:
        if isinstance(why, RuntimeError):
            raise why
        return why

    monkeypatch.setattr(doctor, "triton_obstacle", obstacle)
    monkeypatch.setattr(_backend, "triton_obstacle", obstacle)
    status, out = report()
    picked, used = gpu_lines(out)
    assert used == f"cuda:0 cannot be used: {why}"
    assert status == isinstance(why, RuntimeError)
    assert status or picked.startswith("cuda:0 torch: ")
    findings = json.loads(report("--json")[1])
    assert (findings["triton"], findings["self_check"]) == ({"cuda:0": str(why)}, {})


@pytest.mark.parametrize("found", [None, "carma_loss (long groups): the MI loss differs", RuntimeError("no\nimage")])
def test_triton_is_held_against_torch_on_a_gpu(report, monkeypatch, gpu, found):
    """In each dtype; what differs in one is a problem."""

    def disagreement(dtype: torch.dtype, device: torch.device, ops: object) -> str | None:
        assert device == torch.device("cuda:0")
        if dtype != torch.float16:
            return None
        if isinstance(found, RuntimeError):
            raise found
        return found

    monkeypatch.setattr(doctor, "disagreement_of_any_kind", disagreement)
    status, out = report()
    agrees = "agrees with the torch backend"
    other = "RuntimeError: no image" if isinstance(found, RuntimeError) else found or agrees
    picked, *used = gpu_lines(out)
    assert picked.startswith("cuda:0 triton: Triton runs on cuda:0")
    assert used == [f"cuda:0 float32 {agrees}", f"cuda:0 float16 {other}", f"cuda:0 bfloat16 {agrees}"]
    assert status == (found is not None)
    if found is not None:
        assert line(out, "PROBLEM") == f"PROBLEM: the Triton backend on cuda:0 in float16: {other}"
    status, out = report("--json")
    assert status == (found is not None)
    findings = json.loads(out)
    assert findings["triton"] == {"cuda:0": None}
    assert findings["self_check"] == {"cuda:0": {"float32": agrees, "float16": other, "bfloat16": agrees}}


def test_nothing_is_held_against_anything_in_the_interpreter(report, monkeypatch, gpu):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(_runtime, "target", lambda _: _runtime.INTERPRETER)
    monkeypatch.setattr(doctor, "disagreement_of_any_kind", None)
    status, out = report()
    assert status == 0
    assert gpu_lines(out)[1] == "cuda:0 cannot be used: TRITON_INTERPRET=1, under which nothing is compiled for it"


@pytest.mark.parametrize(("triton", "numpy", "noted"), [("3.6.0", "2.4.6", True), ("3.7.1", "2.4.6", False)])
def test_an_interpreter_that_numpy_is_too_new_for(report, monkeypatch, triton: str, numpy: str, noted: bool):
    monkeypatch.setattr(_triton_here, "_version", {"triton": triton, "numpy": numpy}.get)
    status, out = report()
    assert status == 0
    note = "Note: the interpreter of Triton 3.6.0 does not run with numpy 2.4.6: use triton >= 3.7 or numpy < 2.4."
    assert (note in out) == noted


def test_a_gpu_that_torch_was_not_built_for(report, monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/usr/bin/nvidia-smi" if name == "nvidia-smi" else None)
    for version, noted in ((None, True), ("13.0", False)):
        monkeypatch.setattr(torch.version, "cuda", version)
        _, out = report()
        assert ("built without CUDA" in out) == noted


@pytest.mark.parametrize(("installed", "noted"), [("0.0.1", True), (carma_kernels.__version__, False), (None, False)])
def test_another_version_is_installed(report, monkeypatch, installed, noted):
    monkeypatch.setattr(doctor, "environment", environment_with(carma_kernels=installed))
    assert ("version 0.0.1 is installed" in report()[1]) == noted


def test_versions_that_cannot_be_read(report, monkeypatch):
    def broken():
        raise OSError("libcuda.so:\n  cannot open shared object file")

    monkeypatch.setattr(doctor, "environment", broken)
    status, out = report()
    assert status == 1
    assert line(out, "PROBLEM").endswith("libcuda.so: cannot open shared object file")
    assert line(out, "cpu ").startswith("cpu torch")  # the rest is still there


def test_an_error_without_words_has_its_name():
    assert doctor.one_line(RuntimeError()) == "RuntimeError"
