"""fp32 on tensor cores: as three parts of bfloat16 each, where that loses nothing, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import carma_kernels as ck
from carma_kernels import TokenSpans, _runtime
from tests.cases import BF16, FP32

pytest.importorskip("triton")


@contextmanager
def precisions() -> Iterator[set[str]]:
    """Of the dot products of the kernels launched within, which do not run."""
    found: set[str] = set()

    def record(_kernel: Any, _grid: Any, *_: object, **options: Any) -> None:
        if "PRECISION" in options:
            found.add(options["PRECISION"])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_runtime, "launch", record)
        yield found


@pytest.mark.parametrize(
    ("target", "dtype", "metric", "T", "expected"),
    [
        ("sm_90", FP32, "cosine", 130, "bf16x6"),
        ("sm_90", FP32, "cosine", 64, "bf16x6"),
        ("sm_90", FP32, "cosine", 65, "ieee"),
        ("sm_90", FP32, "dot", 130, "ieee"),
        ("sm_90", FP32, "dot", 64, "ieee"),
        ("sm_90", BF16, "cosine", 130, "ieee"),
        ("gfx942", FP32, "cosine", 130, "ieee"),
    ],
)
def test_what_is_multiplied_how(
    target: str, dtype: torch.dtype, metric: str, T: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward and backward in the same way, since they must come to the same scores."""
    monkeypatch.setattr(_runtime, "target", lambda _device: _runtime.TARGETS[target])
    spans = TokenSpans.from_lists([[(0, 2), (3, 5)]], seq_len=T)
    hidden = [torch.randn(1, T, 8, dtype=dtype, requires_grad=True) for _ in range(2)]
    with precisions() as found:
        ck.mi_loss(hidden, spans, metric=metric, backend="triton").backward()
    assert found == {expected}


@pytest.fixture
def tf32() -> Iterator[None]:
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
    yield
    matmul.fp32_precision = before


@pytest.mark.usefixtures("tf32")
@pytest.mark.parametrize("T", [64, 130])
def test_tf32_where_torch_is_told_to(T: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_runtime, "target", lambda _device: _runtime.TARGETS["sm_90"])
    hidden = [torch.randn(1, T, 8, requires_grad=True)]
    with precisions() as found:
        ck.mi_loss(hidden, TokenSpans.from_lists([[(0, 2)]], seq_len=T), backend="triton").backward()
    assert found == {"tf32"}


def parts(x: Tensor) -> list[Tensor]:
    """Three of bfloat16 that add up to `x`."""
    high = x.bfloat16().float()
    middle = (x - high).bfloat16().float()
    return [high, middle, (x - high - middle).bfloat16().float()]


def on_tensor_cores(terms: list[tuple[Tensor, Tensor]], depth: int) -> Tensor:
    """Sum of `a @ b`, `depth` of the inner dimension at a time, as tensor cores add up.

    The products are exact; they and the sum so far are aligned to the largest of them and cut off at fp32's last digit.
    A step of 32 begins at zero and is then added in fp32, as Triton does it.
    """
    inner = terms[0][0].shape[1]
    total = torch.zeros(terms[0][0].shape[0], terms[0][1].shape[1])
    for start in range(0, inner, 32):
        step = torch.zeros_like(total, dtype=torch.float64)
        for a, b in terms:
            for first in range(start, min(start + 32, inner), depth):
                some = slice(first, first + depth)
                products = a[:, some, None].double() * b[None, some].double()
                addends = torch.cat([products, step[:, None]], 1)
                _, exponent = addends.abs().amax(1, keepdim=True).frexp()
                digit = (exponent - 24.0).double().exp2()
                step = ((addends / digit).trunc() * digit).sum(1)
                _, exponent = step.frexp()
                digit = (exponent - 24.0).double().exp2()
                step = (step / digit).trunc() * digit
        total += step.float()
    return total


def bf16x6(a: Tensor, b: Tensor) -> Tensor:
    left, right = parts(a), parts(b)
    order = ((1, 1), (2, 0), (0, 2), (1, 0), (0, 1), (0, 0))
    return on_tensor_cores([(left[i], right[j]) for i, j in order], 16)


def tf32x3(a: Tensor, b: Tensor) -> Tensor:
    def two(x: Tensor) -> tuple[Tensor, Tensor]:
        high = ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(FP32)
        return high, (((x - high).view(torch.int32) + 0x1000) & ~0x1FFF).view(FP32)

    (high, low), (other_high, other_low) = two(a), two(b)
    return on_tensor_cores([(low, other_high), (high, other_low), (high, other_high)], 8)


def one_by_one(a: Tensor, b: Tensor) -> Tensor:
    """Without matrix units: a fused multiply-add for each product."""
    total = torch.zeros(len(a), b.shape[1])
    for k in range(a.shape[1]):
        total = (total.double() + a[:, k, None].double() * b[None, k].double()).float()
    return total


def error(dot: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor) -> float:
    """Root mean square, of the products of unit vectors."""
    exact = a.double() @ b.double()
    norm = a.double().norm(dim=1)[:, None] * b.double().norm(dim=0)[None]
    return ((dot(a, b).double() - exact) / norm).square().mean().sqrt().item()


@pytest.mark.parametrize("likeness", [0.0, 1.0, 10.0])
@pytest.mark.parametrize("D", [64, 768])
def test_six_products_are_as_accurate_as_fp32s_own(D: int, likeness: float) -> None:
    """And twice as accurate as the three of tf32x3, as fast, which leave out squares where tokens are alike."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(16, D, generator=generator) + likeness * torch.randn(D, generator=generator)
    both = (tokens, tokens.T.contiguous())
    assert error(bf16x6, *both) <= error(one_by_one, *both)
    assert error(bf16x6, *both) < error(tf32x3, *both) / 2


def test_three_parts_have_all_digits() -> None:
    numbers = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * torch.logspace(-30, 30, 1000)
    assert torch.equal(sum(parts(numbers)), numbers)
