"""What all tests share: the backends, memory that shows when it is read before it is written, and hypothesis's pace."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import settings

from tests.cases import BACKENDS, Backend
from tests.interpreter import patch_the_language_once_a_kernel

settings.register_profile("suite", deadline=None, max_examples=15, derandomize="CI" in os.environ)
settings.register_profile("interpreter", deadline=None, max_examples=4, derandomize=True)
settings.load_profile("suite")
if any(backend.interpret for backend in BACKENDS):
    settings.load_profile("interpreter")
    patch_the_language_once_a_kernel()
    np.seterr(over="ignore")  # a device says nothing of the squares of padding that it makes and leaves out


def pytest_configure(config: pytest.Config) -> None:
    """With `-m "not thorough"` the interpreter is done in minutes."""
    config.addinivalue_line("markers", "thorough: more of the kind, which takes Triton's interpreter long")


@pytest.fixture(params=BACKENDS, ids=str, scope="session")
def backend(request: pytest.FixtureRequest) -> Backend:
    """Each backend in turn; `on_backends` in a test's parameters goes before it."""
    row: Backend = request.param
    return row


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """New memory is full of NaN, which torch sees to in its deterministic mode."""
    before = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("error")
    assert torch.empty(1).isnan()
    yield
    torch.set_deterministic_debug_mode(before)


@pytest.fixture
def users_defaults(poisoned_memory: None) -> None:
    """As torch comes: without deterministic mode, whose operators are others and which writes to new memory."""
    torch.set_deterministic_debug_mode("default")


@pytest.fixture
def no_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a user's CPU: the tests of the kernels ask for Triton's interpreter, which lets them run there."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
