"""A GPU and Triton kernels that are not there, for tests of the choice between the backends."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from types import SimpleNamespace

import pytest
import torch

import carma_kernels as ck
from carma_kernels import _backend, _runtime, _triton_here, eager


@pytest.fixture
def fresh(no_interpreter: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing tried and nothing said, and a new Triton installed."""
    monkeypatch.delenv("CARMA_KERNELS_BACKEND", raising=False)
    monkeypatch.delenv("CARMA_KERNELS_SELF_CHECK", raising=False)
    monkeypatch.setattr(_backend, "_obstacles", {})
    monkeypatch.setattr(_backend, "_admitted", set())
    monkeypatch.setattr(_backend, "_warned", set())
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "triton" or find_spec(name))
    monkeypatch.setattr(_triton_here, "_version", _triton_here._version.__wrapped__)
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "3.7.1")


def gpu_like(device: torch.device) -> _runtime.Target | None:
    """CUDA devices, there or not."""
    return _runtime.TARGETS["sm_90"] if device.type == "cuda" else None


def kernels_for(layer, mi) -> str:
    if mi is None:
        return "stability alone"
    return "listed pairs" if hasattr(mi.pairs, "negatives") else "short groups"


@pytest.fixture
def ops(fresh: None, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Stands for the Triton backend: right, and counts its calls."""
    calls: list[str] = []

    def carma_terms(hidden, mi, stability, group=None):
        calls.append("carma_terms")
        return eager.carma_terms(hidden, mi, stability, group)

    def pairwise_similarity(*arguments):
        calls.append("similarity")
        return eager.pairwise_similarity(*arguments)

    fake = SimpleNamespace(
        carma_terms=carma_terms,
        pairwise_similarity=pairwise_similarity,
        takes=lambda layer: layer.dtype != torch.float64,
        kernels_for=kernels_for,
        calls=calls,
    )
    monkeypatch.setitem(sys.modules, "carma_kernels.ops", fake)
    monkeypatch.setattr(ck, "ops", fake, raising=False)
    monkeypatch.setattr(_runtime, "target", gpu_like)
    return fake


@pytest.fixture
def on_gpu(ops: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The CPU passes for a GPU, also for a build of torch that would ask a driver which is not there."""
    monkeypatch.setattr(_runtime, "target", lambda _: _runtime.TARGETS["sm_90"])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return ops
