"""compute-sanitizer finds no access out of bounds and no race in any kernel."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
import torch

from tests.cli.processes import ROOT

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_clean(tool: str) -> None:
    sanitizer = shutil.which("compute-sanitizer", path=os.environ["PATH"] + os.pathsep + "/usr/local/cuda/bin")
    if sanitizer is None or torch.version.hip is not None:
        pytest.skip("needs compute-sanitizer, of NVIDIA's CUDA toolkit, on the PATH")
    result = subprocess.run(
        [sanitizer, "--tool", tool, "--error-exitcode", "3", sys.executable, "-m", "tests.gpu.small_set"],
        capture_output=True,
        text=True,
        timeout=3600,
        cwd=ROOT,
        # each tensor an allocation of its own, so that its neighbours are out of bounds
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    )
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
    assert "0 errors" in result.stdout + result.stderr or "0 hazards" in result.stdout + result.stderr
