"""The kernels run on a GPU if there is one, and otherwise in Triton's interpreter, with tiles of a size for it."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported


@pytest.fixture
def device() -> str:
    """Where the kernels run."""
    pytest.importorskip("triton")
    return DEVICE


@pytest.fixture
def tiles(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`tiles(kernel, BLOCK_T=16, ...)` lets a kernel be launched with these constants only."""
    pytest.importorskip("triton")
    from carma_kernels.kernels import launch

    def use(kernel: str, **constants: int) -> None:
        monkeypatch.setitem(launch.TABLE, kernel, [launch.Configuration(constants)])

    return use
