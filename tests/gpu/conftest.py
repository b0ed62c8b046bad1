"""What only a GPU can show: `make test-gpu` names the device, and without it nothing here is collected."""

from __future__ import annotations

import os
from collections.abc import Callable

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


@pytest.fixture
def measured(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """`measured(line)` has the line printed in the summary, also from pytest-xdist's processes."""
    return lambda line: record_property("measured", line)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What the tests have measured."""
    properties = [
        entry
        for reports in terminalreporter.stats.values()
        for report in reports
        for entry in getattr(report, "user_properties", ())
    ]
    lines = dict.fromkeys(str(value) for name, value in properties if name == "measured")
    if lines:
        terminalreporter.section("measured")
        for line in lines:
            terminalreporter.line(line)
