"""compute-sanitizer finds no access out of bounds in any kernel; what it says of races is reported."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

from tests.cli.processes import ROOT

pytestmark = [pytest.mark.gpu, pytest.mark.alone, pytest.mark.timeout(0)]  # each process has a limit of its own

SECONDS = 200
SMALL_SET = [sys.executable, "-m", "tests.gpu.small_set", "--dtypes", "bfloat16", "--lengths", "70", "131"]


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SECONDS,
        check=False,
        cwd=ROOT,
        # each tensor an allocation of its own, so that its neighbours are out of bounds
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    )


@pytest.fixture(scope="module")
def sanitizer() -> str:
    """Where it is, once the kernels are compiled, which it would look at, too."""
    found = shutil.which("compute-sanitizer", path=os.environ["PATH"] + os.pathsep + "/usr/local/cuda/bin")
    if found is None or torch.version.hip is not None:
        pytest.skip("needs compute-sanitizer, of NVIDIA's CUDA toolkit, on the PATH")
    compiling = run(*SMALL_SET)
    assert compiling.returncode == 0, compiling.stdout[-5000:]
    return found


def sanitized(sanitizer: str, tool: str) -> str:
    options = ["--tool", tool, "--target-processes", "application-only", "--error-exitcode", "3"]
    return run(sanitizer, *options, *SMALL_SET).stdout


def test_memcheck(sanitizer: str) -> None:
    output = sanitized(sanitizer, "memcheck")
    assert "ERROR SUMMARY: 0 errors" in output, output[-5000:]


def test_racecheck(sanitizer: str, measured: Callable[[str], None]) -> None:
    """It does not know all of how tensor cores and copies wait for each other, and may see hazards that are none."""
    try:
        output = sanitized(sanitizer, "racecheck")
    except subprocess.TimeoutExpired:
        pytest.xfail(f"racecheck was not through in {SECONDS} s")
    summary = re.search(r"RACECHECK SUMMARY: .*", output)
    assert summary, output[-5000:]
    measured(summary.group())
    if "SUMMARY: 0 hazards" not in summary.group():
        kernels = sorted(set(re.findall(r"_\w+_kernel", output)))
        pytest.xfail(f"{summary.group()}: {', '.join(kernels)}")
