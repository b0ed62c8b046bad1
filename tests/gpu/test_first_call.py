"""Compiling: once, in seconds, and not again for another batch."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import triton

import carma_kernels as ck
from carma_kernels import TokenSpans
from carma_kernels.kernels import mi, mi_backward, pairs, short, similarity, stability
from tests.cli.processes import ROOT

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("users_defaults")]

FIRST_STEP = """
import time
start = last = time.perf_counter()

def took(what):
    global last
    now = time.perf_counter()
    if now - last > 0.01:
        print(f"{what} {now - last:.2f}")
    last = now

import torch
hidden = torch.randn(12, 16, 58, 768, device="cuda", dtype=torch.bfloat16, requires_grad=True)
torch.cuda.synchronize()
took("torch and its device")
start = last
import triton
took("import of triton")
import carma_kernels as ck, carma_kernels.ops
from carma_kernels import _runtime
took("import of carma_kernels")
import torch._dynamo  # by the first call of an operator
took("import of torch._dynamo")
launch = _runtime.launch

def timed(kernel, *arguments, **options):
    took("the host before " + kernel.__name__)
    compiled = launch(kernel, *arguments, **options)
    took("compiling, loading and launching " + kernel.__name__)
    return compiled

_runtime.launch = timed
spans = ck.TokenSpans.from_lists([[(0, 3), (4, 6)]] * 16, seq_len=58).to("cuda")
ck.carma_loss(hidden, spans, backend="triton").loss.backward()
torch.cuda.synchronize()
took("the rest")
print(f"in all {last - start:.2f}")
"""


@pytest.mark.alone
def test_a_cold_cache(tmp_path: Path, measured: Callable[[str], None]) -> None:
    """Most of it are others' imports, Triton's passes over three kernels, and a C compiler for their launchers."""
    result = subprocess.run(
        [sys.executable, "-c", FIRST_STEP],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "TRITON_CACHE_DIR": str(tmp_path)},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    parts = result.stdout.strip()
    measured("the first step with a cold cache, in seconds: " + parts.replace("\n", "; "))
    assert float(parts.split()[-1]) <= 15.0, parts


def compiled() -> dict[str, int]:
    """How many versions there are of each kernel."""
    kernels = {
        name: kernel
        for module in (mi, mi_backward, pairs, short, similarity, stability)
        for name, kernel in vars(module).items()
        if isinstance(kernel, triton.JITFunction) and name.endswith("_kernel")
    }
    return {name: len(kernel.device_caches[torch.cuda.current_device()][0]) for name, kernel in kernels.items()}


def step(B: int, T: int) -> None:
    hidden = [torch.randn(B, T, 768, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    spans = TokenSpans.from_lists([[(at, at + 2 + B % 2) for at in range(0, T - 3, 3 + B)]] * B, seq_len=T)
    listed = spans.sample_pairs(3).to("cuda")
    there = spans.to("cuda")
    loss = ck.carma_loss(hidden, there, mask=there.attention_mask, backend="triton").loss
    loss = loss + ck.mi_loss(hidden, listed, backend="triton") + ck.stability_loss(hidden, backend="triton")
    (loss + ck.pairwise_similarity(hidden, backend="triton").sum()).backward()


@pytest.mark.parametrize(("first", "others"), [(50, (49, 57, 58, 64)), (300, (256, 301, 512))])
def test_other_batches(first: int, others: tuple[int, ...]) -> None:
    """Not for another length, also one that 16 divides, another number of sequences, also 1, or other words."""
    step(3, first)
    before = compiled()
    for T in others:
        for B in (1, 2, 16):
            step(B, T)
    assert compiled() == before
