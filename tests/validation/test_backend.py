"""Which backend runs when nobody says: Triton where it can be used, and otherwise torch, with one warning."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import subprocess
import sys
import warnings
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import carma_kernels as ck
from carma_kernels import _backend, eager
from tests.validation.calls import FUNCTIONS, HIDDEN, SPANS, call

pytestmark = pytest.mark.usefixtures("no_interpreter")
GPU = "cuda:0"


def in_triton(error: Exception) -> Callable[..., None]:
    """A function of Triton's that raises."""
    module = {"__name__": "triton.runtime.jit", "error": error}
    exec("def run(*arguments):\n    raise error", module)
    return module["run"]  # type: ignore[return-value]


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing tried and nothing said, and Triton the choice for GPUs."""
    monkeypatch.delenv("CARMA_KERNELS_BACKEND", raising=False)
    monkeypatch.setattr(_backend, "TRITON_BY_DEFAULT", True)
    monkeypatch.setattr(_backend, "_obstacles", {})
    monkeypatch.setattr(_backend, "_warned", set())
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(_backend, "_installed_triton", _backend._installed_triton.__wrapped__)
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "3.7.1")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))


@pytest.fixture
def ops(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Stands for the Triton backend; counts its calls."""
    calls: list[str] = []

    def carma_terms(hidden, *arguments):
        calls.append("carma_terms")
        return eager.carma_terms(hidden, *arguments)

    fake = SimpleNamespace(
        carma_terms=carma_terms,
        pairwise_similarity=lambda *arguments: calls.append("similarity") or eager.pairwise_similarity(*arguments),
        probe=lambda device: calls.append(f"probe {device}"),
        takes=lambda layer: layer.dtype != torch.float64,
        calls=calls,
    )
    monkeypatch.setitem(sys.modules, "carma_kernels.ops", fake)
    monkeypatch.setattr(ck, "ops", fake, raising=False)
    return fake


@pytest.fixture
def on_gpu(ops: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The CPU passes for a GPU."""
    monkeypatch.setattr(_backend, "_GPUS", ("cuda", "cpu"))
    return ops


def test_triton_on_gpus(ops: SimpleNamespace):
    assert ck.choose_backend(None, GPU) == ("triton", "Triton runs on cuda:0")
    assert ck.choose_backend(None, GPU)[0] == "triton"
    assert ops.calls == ["probe cuda:0"]  # once
    assert ck.choose_backend(None, "cuda:1")[0] == "triton"
    assert ops.calls == ["probe cuda:0", "probe cuda:1"]


@pytest.mark.parametrize("interpret", ["0", "1"])
@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_torch_elsewhere(ops: SimpleNamespace, device: str, interpret: str, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    assert ck.choose_backend(None, device)[0] == "torch"
    assert ops.calls == []


def test_not_until_the_kernels_have_run_on_a_gpu(ops: SimpleNamespace, monkeypatch):
    monkeypatch.setattr(_backend, "TRITON_BY_DEFAULT", False)
    backend, reason = ck.choose_backend(None, GPU)
    assert backend == "torch"
    assert "backend='triton'" in reason
    assert ops.calls == []


def test_the_interpreter_is_for_those_who_ask(ops: SimpleNamespace, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert ck.choose_backend(None, GPU)[0] == "torch"
    assert ck.choose_backend("triton", GPU)[0] == "triton"
    assert ck.choose_backend("triton", "cpu")[0] == "triton"


def not_installed(monkeypatch: pytest.MonkeyPatch, ops: SimpleNamespace) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)


def too_old(monkeypatch: pytest.MonkeyPatch, ops: SimpleNamespace) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "3.5.1+git0")


def too_old_on_rocm(monkeypatch: pytest.MonkeyPatch, ops: SimpleNamespace) -> None:
    def version(name: str) -> str:
        if name == "triton":
            raise importlib.metadata.PackageNotFoundError(name)
        return "3.5.1"

    monkeypatch.setattr(importlib.metadata, "version", version)


def old_gpu(monkeypatch: pytest.MonkeyPatch, ops: SimpleNamespace) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))


def broken_import(monkeypatch: pytest.MonkeyPatch, ops: SimpleNamespace) -> None:
    def probe(device):
        raise ImportError("libtriton.so: cannot open shared object file")

    ops.probe = probe


def no_compiler(monkeypatch: pytest.MonkeyPatch, ops: SimpleNamespace) -> None:
    ops.probe = in_triton(subprocess.CalledProcessError(1, ["gcc", "main.c"]))


def no_launch(monkeypatch: pytest.MonkeyPatch, ops: SimpleNamespace) -> None:
    ops.probe = in_triton(RuntimeError("Triton Error [CUDA]: device kernel image is invalid"))


OBSTACLES = [
    (not_installed, "Triton is not installed"),
    (too_old, "Triton 3.5.1+git0 is installed, and 3.6 or later is needed"),
    (too_old_on_rocm, "Triton 3.5.1 is installed"),
    (old_gpu, "its compute capability is 7.5, and 8.0 is needed"),
    (broken_import, "ImportError: libtriton.so: cannot open shared object file"),
    (no_compiler, "CalledProcessError: Command '['gcc', 'main.c']' returned non-zero exit status 1."),
    (no_launch, "RuntimeError: Triton Error [CUDA]: device kernel image is invalid"),
]


@pytest.mark.parametrize(("obstacle", "words"), OBSTACLES)
def test_an_obstacle_is_a_reason_for_torch(obstacle, words: str, ops: SimpleNamespace, monkeypatch):
    obstacle(monkeypatch, ops)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # asking is no use
        backend, reason = ck.choose_backend(None, GPU)
    assert backend == "torch"
    assert reason.startswith(f"Triton cannot be used on cuda:0: {words}")


@pytest.mark.parametrize(("obstacle", "words"), OBSTACLES)
def test_one_warning(obstacle, words: str, on_gpu: SimpleNamespace, monkeypatch):
    obstacle(monkeypatch, on_gpu)
    with pytest.warns(RuntimeWarning, match="The torch backend runs instead") as caught:
        [call(function) for function in [*FUNCTIONS, *FUNCTIONS]]
    assert len(caught) == 1
    assert f"Triton cannot be used on cpu: {words}" in str(caught[0].message)
    assert "CARMA_KERNELS_BACKEND=torch" in str(caught[0].message)
    assert "carma_terms" not in on_gpu.calls


def test_no_warning_for_who_chose_torch(on_gpu: SimpleNamespace, monkeypatch):
    not_installed(monkeypatch, on_gpu)
    ck.choose_backend(None, "cpu")
    ck.mi_loss(HIDDEN, SPANS, backend="torch")
    monkeypatch.setenv("CARMA_KERNELS_BACKEND", "torch")
    ck.mi_loss(HIDDEN, SPANS)


def test_the_losses_run_on_triton(on_gpu: SimpleNamespace):
    ck.mi_loss(HIDDEN, SPANS)
    ck.stability_loss(HIDDEN)
    ck.pairwise_similarity(HIDDEN)
    assert on_gpu.calls == ["probe cpu", "carma_terms", "carma_terms", "similarity"]


def test_what_it_has_no_kernels_for_runs_on_torch(on_gpu: SimpleNamespace):
    ck.mi_loss(HIDDEN.double(), SPANS)
    ck.pairwise_similarity(HIDDEN.double())
    assert on_gpu.calls == ["probe cpu"]


def loss_and_gradient() -> tuple[Tensor, Tensor]:
    hidden = HIDDEN.detach().clone().requires_grad_()
    loss = ck.carma_loss(hidden, SPANS).loss
    return loss, torch.autograd.grad(loss, hidden)[0]


@pytest.mark.parametrize(
    "error", [RuntimeError("PassManager::run failed"), ValueError("cannot convert"), AssertionError()], ids=repr
)
def test_a_kernel_that_fails(error: Exception, on_gpu: SimpleNamespace, monkeypatch):
    """In its first call: torch computes this one and all others."""
    tried = []
    fail = in_triton(error)
    on_gpu.carma_terms = lambda *_: tried.append(1) or fail()
    with pytest.warns(RuntimeWarning, match=f"Triton cannot be used on cpu: {type(error).__name__}") as caught:
        results = [*loss_and_gradient(), *loss_and_gradient()]
    assert len(caught) == 1
    assert len(tried) == 1
    assert ck.choose_backend(None, "cpu")[0] == "torch"
    monkeypatch.setenv("CARMA_KERNELS_BACKEND", "torch")
    assert all(map(torch.equal, results, [*loss_and_gradient()] * 2))


def not_in_triton(*_: object) -> None:
    raise ValueError("hidden_states have width 20000")


@pytest.mark.parametrize(
    ("fail", "error"),
    [
        (not_in_triton, ValueError),
        (in_triton(torch.OutOfMemoryError("CUDA out of memory.")), torch.OutOfMemoryError),
        (in_triton(RuntimeError("Triton Error [CUDA]: out of memory")), RuntimeError),
        (in_triton(MemoryError()), MemoryError),
        (in_triton(KeyboardInterrupt()), KeyboardInterrupt),  # type: ignore[arg-type]
    ],
)
@pytest.mark.parametrize("where", ["carma_terms", "probe"])
def test_what_is_not_tritons_fault_is_raised(fail, error, where: str, on_gpu: SimpleNamespace):
    works = getattr(on_gpu, where)
    setattr(on_gpu, where, fail)
    for _ in range(2):
        with pytest.raises(error):
            ck.mi_loss(HIDDEN, SPANS)
    setattr(on_gpu, where, works)
    ck.mi_loss(HIDDEN, SPANS)
    assert on_gpu.calls[-1] == "carma_terms"


@pytest.mark.parametrize("by_variable", [False, True])
def test_who_asks_for_triton_gets_its_errors(by_variable: bool, on_gpu: SimpleNamespace, monkeypatch):
    on_gpu.carma_terms = in_triton(RuntimeError("PassManager::run failed"))
    if by_variable:
        monkeypatch.setenv("CARMA_KERNELS_BACKEND", "triton")
    with pytest.raises(RuntimeError, match="PassManager"):
        ck.mi_loss(HIDDEN, SPANS, backend=None if by_variable else "triton")
    assert on_gpu.calls == []  # no probe


@pytest.mark.parametrize("obstacle", [not_installed, too_old])
def test_who_asks_for_a_triton_that_is_not_there(obstacle, ops: SimpleNamespace, monkeypatch):
    obstacle(monkeypatch, ops)
    with pytest.raises(RuntimeError, match=r"backend= asks for the triton backend, but Triton .*(not installed|3\.6)"):
        ck.choose_backend("triton", GPU)
