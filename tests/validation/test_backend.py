"""Which backend runs when nobody says: Triton where nothing is known against it, else torch, with one warning."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import warnings
from types import SimpleNamespace

import pytest
import torch

import carma_kernels as ck
from carma_kernels import _backend, _runtime
from tests.validation.calls import FUNCTIONS, HIDDEN, SPANS, call

pytestmark = pytest.mark.usefixtures("fresh")
GPU = "cuda:0"


@pytest.mark.parametrize("device", [GPU, "cuda:1", "cuda"])
def test_triton_on_gpus(device: str, ops: SimpleNamespace):
    backend, reason = ck.choose_backend(None, device)
    assert backend == "triton"
    assert reason == f"Triton runs on {device}, and is compared with the torch backend at the first call"
    assert ops.calls == []  # nothing is launched


def test_the_reason_names_what_has_agreed(on_gpu: SimpleNamespace):
    ck.stability_loss(HIDDEN)
    ck.mi_loss(HIDDEN.half(), SPANS)
    backend, reason = ck.choose_backend(None, "cpu")
    assert backend == "triton"
    assert reason.endswith("agreed with the torch backend: short groups in float16, stability alone in float32")


def test_the_reason_names_who_goes_without(ops: SimpleNamespace, monkeypatch):
    monkeypatch.setenv("CARMA_KERNELS_SELF_CHECK", "0")
    assert ck.choose_backend(None, GPU) == ("triton", "Triton runs on cuda:0, unchecked: CARMA_KERNELS_SELF_CHECK=0")


def test_a_device_without_a_number_is_the_current_one(ops: SimpleNamespace, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setitem(_backend._obstacles, torch.device("cuda:3"), "it is broken")
    assert ck.choose_backend(None, "cuda") == ("torch", "Triton cannot be used on cuda:3: it is broken")


@pytest.mark.parametrize("interpret", ["0", "1"])
@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_torch_elsewhere(device: str, interpret: str, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    assert ck.choose_backend(None, device) == ("torch", f"it runs on every device, {device} included")
    ck.mi_loss(HIDDEN, SPANS)


def test_the_interpreter_is_for_those_who_ask(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    backend, reason = ck.choose_backend(None, GPU)
    assert backend == "torch"
    assert "TRITON_INTERPRET=1" in reason
    assert ck.choose_backend("triton", GPU)[0] == "triton"
    assert ck.choose_backend("triton", "cpu")[0] == "triton"


def not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)


def too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "3.5.1+git0")


def too_old_on_rocm(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name == "triton":
            raise importlib.metadata.PackageNotFoundError(name)
        return "3.5.1"

    monkeypatch.setattr(importlib.metadata, "version", version)


def old_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_runtime, "target", lambda _: _runtime.Target("sm_75", 64 * 1024, 72, (7, 5)))


def broken_import(monkeypatch: pytest.MonkeyPatch) -> None:
    def import_module(name: str) -> None:
        assert name == "carma_kernels.ops"
        raise ImportError("libtriton.so: cannot open shared object file")

    monkeypatch.setattr(importlib, "import_module", import_module)


OBSTACLES = [
    (not_installed, "Triton is not installed"),
    (too_old, "Triton 3.5.1+git0 is installed, and 3.6 or later is needed"),
    (too_old_on_rocm, "Triton 3.5.1 is installed"),
    (old_gpu, "its compute capability is 7.5, and 8.0 is needed"),
    (broken_import, "ImportError: libtriton.so: cannot open shared object file"),
]


@pytest.mark.parametrize(("obstacle", "words"), OBSTACLES)
def test_an_obstacle_is_a_reason_for_torch(obstacle, words: str, ops: SimpleNamespace, monkeypatch):
    obstacle(monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # asking is no use
        backend, reason = ck.choose_backend(None, GPU)
    assert backend == "torch"
    assert reason.startswith(f"Triton cannot be used on cuda:0: {words}")


@pytest.mark.parametrize(("obstacle", "words"), OBSTACLES)
def test_one_warning(obstacle, words: str, on_gpu: SimpleNamespace, monkeypatch):
    obstacle(monkeypatch)
    with pytest.warns(RuntimeWarning, match="The torch backend runs instead") as caught:
        [call(function) for function in [*FUNCTIONS, *FUNCTIONS]]
    assert len(caught) == 1
    assert f"Triton cannot be used on cpu: {words}" in str(caught[0].message)
    assert "CARMA_KERNELS_BACKEND=torch" in str(caught[0].message)
    assert caught[0].filename.endswith("calls.py")  # who called the package
    assert on_gpu.calls == []


def test_no_warning_for_who_chose_torch(on_gpu: SimpleNamespace, monkeypatch):
    not_installed(monkeypatch)
    ck.choose_backend(None, "cpu")
    ck.mi_loss(HIDDEN, SPANS, backend="torch")
    monkeypatch.setenv("CARMA_KERNELS_BACKEND", "torch")
    ck.mi_loss(HIDDEN, SPANS)
    assert on_gpu.calls == []


def test_what_triton_has_no_kernels_for_runs_on_torch(on_gpu: SimpleNamespace):
    ck.mi_loss(HIDDEN.double(), SPANS)
    ck.pairwise_similarity(HIDDEN.double())
    assert on_gpu.calls == []


@pytest.mark.parametrize("by_variable", [False, True])
def test_who_asks_for_triton_gets_it_as_it_is(by_variable: bool, on_gpu: SimpleNamespace, monkeypatch):
    """Unchecked, and its errors too."""
    backend = None if by_variable else "triton"
    if by_variable:
        monkeypatch.setenv("CARMA_KERNELS_BACKEND", "triton")
    for function in FUNCTIONS:
        call(function, backend=backend)
    assert on_gpu.calls == ["similarity", "carma_terms", "carma_terms", "carma_terms"]

    def fail(*_: object) -> None:
        raise RuntimeError("PassManager::run failed")

    on_gpu.carma_terms = fail
    with pytest.raises(RuntimeError, match="PassManager"):
        ck.mi_loss(HIDDEN, SPANS, backend=backend)


@pytest.mark.parametrize("obstacle", [not_installed, too_old])
def test_who_asks_for_a_triton_that_is_not_there(obstacle, monkeypatch):
    obstacle(monkeypatch)
    with pytest.raises(RuntimeError, match=r"backend= asks for the triton backend, but Triton .*(not installed|3\.6)"):
        ck.choose_backend("triton", GPU)


@pytest.mark.parametrize(
    ("triton", "numpy", "runs"),
    [
        ("3.6.0", "2.3.5", True),
        ("3.6.0", "2.4.0", False),
        ("3.6.1+git1", "2.10.0", False),
        ("3.7.0", "2.4.6", True),
        ("3.10.0", "2.4.6", True),
    ],
)
def test_an_interpreter_that_numpy_is_too_new_for(triton: str, numpy: str, runs: bool, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", {"triton": triton, "numpy": numpy}.__getitem__)
    monkeypatch.setattr(_runtime, "target", lambda _: _runtime.TARGETS["sm_90"])
    assert ck.choose_backend("triton", GPU)[0] == "triton"  # a GPU has nothing to do with it
    monkeypatch.setattr(_runtime, "target", lambda _: _runtime.INTERPRETER)
    if runs:
        assert ck.choose_backend("triton", "cpu")[0] == "triton"
    else:
        with pytest.raises(RuntimeError, match=rf"Triton {triton[:5]}.*numpy {numpy}.*triton >= 3\.7 or numpy < 2\.4"):
            ck.choose_backend("triton", "cpu")
