"""A kernel is compiled once for a kind of problem: no size of a batch and no address is built into it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.cli.processes import ROOT

ALLOWED = {
    "D",  # the model's
    *("R", "ROWS", "COLUMNS", "STRIDE", "DOTS_STRIDE", "WIDTH_STRIDE"),  # rounded up: 16 divides them all
    *("log_match", "eps"),  # not whole numbers, of which there is one kind
}
ALIGNED = {"weight_ptr", "dots_ptr", "out_ptr", "product_ptr"}  # our own workspaces, which begin where allocations do
LIST_SPECIALIZED = f"""
import importlib, pkgutil, triton
import carma_kernels.kernels as kernels
for module in pkgutil.iter_modules(kernels.__path__):
    for name, kernel in vars(importlib.import_module("carma_kernels.kernels." + module.name)).items():
        if isinstance(kernel, triton.JITFunction) and name.endswith("_kernel"):
            for p in kernel.params:
                if p.name.endswith(("_ptr", "_table")):
                    free = p.do_not_specialize_on_alignment or p.name in {ALIGNED}
                else:
                    free = p.is_constexpr or p.do_not_specialize or p.name in {ALLOWED}
                if not free:
                    print(name, p.name)
            print("looked at", name)
"""


def compiled(*command: str) -> list[str]:
    """What a process prints in which Triton compiles for a device."""
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, check=False, cwd=ROOT, env=environment
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def test_no_size_and_no_address_is_specialized_on() -> None:
    """Triton compiles again for a number that is 1, or that 16 divides, as it does an address, unless told not to."""
    lines = compiled("-c", LIST_SPECIALIZED)
    assert len({line for line in lines if line.startswith("looked at")}) >= 12
    assert [line for line in lines if not line.startswith("looked at")] == []


def test_random_batches() -> None:
    """After the first batches of each length of group, 300 others compile nothing, whatever the loss."""
    found = [json.loads(line) for line in compiled("-m", "tests.kernels.versions", "300")]
    assert {row["loss"] for row in found} >= {"carma", "carma, listed", "carma, dense", "mi", "stability", "similarity"}
    assert [row for row in found if row["later"] or row["versions"] > 6] == []
