"""Forward and backward come to the same scores, to the last bit, of i with j as of j with i.

Seen from outside: where scores are a million, a softmax takes one token and leaves the others, `z` is the score of that
token, and its weight `exp(s - z)` is 1. So every derivative of the loss by a score is a whole number. A score that in
the backward is the next number of fp32 is off by 1/16, and of the 1 makes 1.06, which a bf16 shows as well.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import carma_kernels as ck
from carma_kernels import TokenSpans, _runtime
from tests.cases import BF16, FP16, FP32, Backend

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("users_defaults")]

L, B = 2, 3
SHAPES = [(58, 768), (100, 768), (128, 1024), (131, 768), (300, 2048)]  # T, D: short groups, then long ones


def batch(T: int, D: int, dtype: torch.dtype) -> tuple[Tensor, TokenSpans]:
    """Vectors `[L, B, T, D]` whose products are a million or so, and words of three tokens.

    Of the words' first two tokens, each is an anchor and among the keys of other anchors. The last T columns hold a 1
    for each token, which no product with another token sees: the gradient there is the derivative by a score.
    """
    length = (1e6 / (D - T) ** 0.5) ** 0.5
    generator = torch.Generator().manual_seed(0)
    hidden = length * torch.randn(L, B, T, D, generator=generator, dtype=torch.float64)
    hidden[..., D - T :] = torch.eye(T)
    words = [[(at, at + 3) for at in range(0, T - 3, 5)]] * B
    return hidden.to(dtype).double(), TokenSpans.from_lists(words, seq_len=T)


def weights(hidden: Tensor, spans: TokenSpans, temperature: float, backend: str, metric: str) -> Tensor:
    """The derivatives by the scores of each two tokens, times tau; `[L, B, T, T]` fp64."""
    T, device = hidden.shape[2], hidden.device
    leaf = hidden.detach().requires_grad_()
    tau = torch.tensor(temperature, device=device, dtype=torch.promote_types(hidden.dtype, FP32), requires_grad=True)
    ck.mi_loss(leaf, spans, temperature=tau, metric=metric, reduction="sum", backend=backend).backward()
    assert leaf.grad is not None
    own = torch.eye(T, dtype=torch.bool, device=device)
    return (leaf.grad[..., -T:].double() * temperature).masked_fill(own, 0).cpu()


def judge(
    backend: Backend, shape: tuple[int, int], dtype: torch.dtype, temperature: float = 1.0, metric: str = "dot"
) -> None:
    hidden, spans = batch(*shape, dtype)
    exact = weights(hidden, spans, temperature, "torch", "dot")
    whole = exact.round()
    assert (exact - whole).abs().max() < 1e-6, "two scores of the batch are too close"
    assert (whole > 0).sum() > L * B * hidden.shape[2] // 8
    there = spans.to(backend.device)
    found = weights(hidden.to(backend.device, dtype), there, temperature, backend.name, metric)
    wrong = ((found - whole).abs() > 2**-8 * whole.abs().clamp_min(0.1)).nonzero().tolist()
    assert not wrong, f"{len(wrong)} scores, the first of layer, sequence and tokens {wrong[0]}"


@pytest.mark.parametrize("temperature", [1.0, 0.3])  # 1/0.3 rounds the score once more
@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_of_dot_products(backend: Backend, shape: tuple[int, int], dtype: torch.dtype, temperature: float) -> None:
    judge(backend, shape, dtype, temperature)


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[0] > 128], ids=str)
def test_of_the_cosines_kernels(
    backend: Backend, shape: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With norms of one in place of the real ones, a cosine is the dot product."""
    launch = _runtime.launch

    def with_norms_of_one(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> Any:
        if kernel.__name__.startswith("_mi_"):
            for name, argument in zip(kernel.arg_names, arguments, strict=False):
                if name == "inverse_norm_ptr":
                    argument.fill_(1.0)
        return launch(kernel, grid, *arguments, **options)

    monkeypatch.setattr(_runtime, "launch", with_norms_of_one)
    judge(backend, shape, dtype, metric="cosine")
