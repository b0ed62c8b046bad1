"""What only a GPU can show: `make test-gpu` names the device, and without it nothing here is collected."""

from __future__ import annotations

import os

import pytest
import torch

from tests.cases import BACKENDS, Backend
from tests.contracts.ops import OPS, Op

DEVICE = os.environ.get("CARMA_KERNELS_TEST_DEVICE")
if DEVICE is None:
    collect_ignore_glob = ["test_*.py"]
elif torch.device(DEVICE).type == "cuda" and not torch.cuda.is_available():
    raise pytest.UsageError(
        f"CARMA_KERNELS_TEST_DEVICE is {DEVICE}, but torch {torch.__version__} finds no GPU that it can use: "
        "`python -m carma_kernels doctor` says what it finds. Nothing was tested."
    )


@pytest.fixture(params=[backend for backend in BACKENDS if backend.name == "triton"], ids=str)
def backend(request: pytest.FixtureRequest) -> Backend:
    """The Triton backend on the GPU."""
    row: Backend = request.param
    return row


@pytest.fixture(params=OPS, ids=str)
def op(request: pytest.FixtureRequest) -> Op:
    """Each loss in turn."""
    chosen: Op = request.param
    return chosen
