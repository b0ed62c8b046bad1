"""The commands as a user starts them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import carma_kernels

ROOT = Path(carma_kernels.__file__).resolve().parent.parent


def run(*arguments: str, code: str | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    """`python -m carma_kernels ARGUMENTS`, or Python code, from another folder than the checkout's."""
    start = ["-m", "carma_kernels", *arguments] if code is None else ["-c", code]
    return subprocess.run(
        [sys.executable, "-W", "error", *start],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT.anchor,
        env={**_environment(), **variables},
    )


def _environment() -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if name != "CARMA_KERNELS_BACKEND"}
    return {**inherited, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def without(*modules: str) -> str:
    """Code that makes these modules look as if they were not installed."""
    return f"import sys; sys.modules.update(dict.fromkeys({modules!r}))\n"
