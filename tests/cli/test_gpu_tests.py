"""The tests that need a GPU are no part of the others, and say so where there is none."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.cli.processes import ROOT


def collect(**variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "CARMA_KERNELS_TEST_DEVICE"}
    return subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "tests/gpu"],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        env={**environment, **variables},
    )


def test_without_being_asked_for_they_are_not_collected():
    result = collect()
    assert result.returncode == 5, result.stdout  # pytest's status for no tests
    assert "no tests collected" in result.stdout


def test_without_a_gpu_they_fail():
    result = collect(CARMA_KERNELS_TEST_DEVICE="cuda", CUDA_VISIBLE_DEVICES="", HIP_VISIBLE_DEVICES="")
    assert result.returncode == 4, result.stdout
    assert "finds no GPU that it can use" in result.stdout + result.stderr
    assert "Nothing was tested." in result.stdout + result.stderr
