"""A kernel is compiled once for a kind of problem: no size of a batch is built into it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.cli.processes import ROOT

ALLOWED = {
    "D",  # the model's
    *("R", "ROWS", "COLUMNS"),  # rounded up to whole tiles: 16 divides them all
    *("log_match", "eps"),  # not whole numbers, of which there is one kind
}
LIST_SPECIALIZED = f"""
import importlib, pkgutil, triton
import carma_kernels.kernels as kernels
for module in pkgutil.iter_modules(kernels.__path__):
    for name, kernel in vars(importlib.import_module("carma_kernels.kernels." + module.name)).items():
        if isinstance(kernel, triton.JITFunction) and name.endswith("_kernel"):
            for p in kernel.params:
                pointer = p.name.endswith(("_ptr", "_table"))
                if not (pointer or p.is_constexpr or p.do_not_specialize or p.name in {ALLOWED}):
                    print(name, p.name)
            print("looked at", name)
"""


def test_no_size_of_a_batch_is_specialized_on() -> None:
    """Triton compiles again for a number that is 1, or that 16 divides, unless told not to."""
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", LIST_SPECIALIZED], capture_output=True, text=True, check=True, cwd=ROOT, env=environment
    )
    lines = result.stdout.splitlines()
    assert len({line for line in lines if line.startswith("looked at")}) >= 12
    assert [line for line in lines if not line.startswith("looked at")] == []
