"""More than 2^31 numbers, more sequences than 2^16: what comes last is what the same tokens give alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import carma_kernels as ck
from carma_kernels import TokenSpans

pytestmark = [pytest.mark.gpu, pytest.mark.alone, pytest.mark.usefixtures("users_defaults")]

L, B, T, D = 2, 17, 4096, 16384
WORDS = [(0, 3), (5, 7), (T - 4, T)]


@pytest.fixture(scope="module")
def hidden() -> Tensor:
    """4.6 GB, `[L, B, T, D]`."""
    needed = 6 * L * B * T * D
    if torch.cuda.get_device_properties(0).total_memory < needed:
        pytest.skip(f"needs a GPU with {needed / 2**30:.0f} GiB")
    assert L * B * T * D > 2**31
    generator = torch.Generator("cuda").manual_seed(0)
    return torch.randn(L, B, T, D, device="cuda", dtype=torch.float16, generator=generator)


def gradient(loss: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
    leaf = hidden.detach().requires_grad_()
    return torch.autograd.grad(loss(leaf), leaf)[0]


@pytest.mark.parametrize("listed", [False, True], ids=["sequence", "listed"])
def test_mi(hidden: Tensor, listed: bool) -> None:
    """The sum over pairs of the last sequence alone is part of the sum over all: same terms, same gradient."""

    def loss(sequences: int) -> Callable[[Tensor], Tensor]:
        spans = TokenSpans.from_lists([[]] * (sequences - 1) + [WORDS], seq_len=T)
        pairs = spans.sample_pairs(5, torch.Generator().manual_seed(0)) if listed else spans
        there = pairs.to("cuda")
        return lambda h: ck.mi_loss(h, there, reduction="sum", backend="triton")

    last = hidden[:, -1:].contiguous()
    torch.testing.assert_close(loss(B)(hidden), loss(1)(last), rtol=1e-5, atol=0)
    whole, alone = gradient(loss(B), hidden), gradient(loss(1), last)
    torch.testing.assert_close(whole[:, -1:], alone, rtol=2e-3, atol=1e-7)
    assert not whole[:, :-1].any()
    assert alone.any()


def test_stability(hidden: Tensor) -> None:
    """Masked but for the last tokens."""
    mask = torch.zeros(B, T, dtype=torch.bool, device="cuda")
    mask[-1, -5:] = True
    last = hidden[:, -1:, -5:].contiguous()

    def whole(h: Tensor) -> Tensor:
        return ck.stability_loss(h, mask=mask, backend="triton")

    def alone(h: Tensor) -> Tensor:
        return ck.stability_loss(h, backend="triton")

    torch.testing.assert_close(whole(hidden), alone(last), rtol=1e-5, atol=0)
    found = gradient(whole, hidden)
    torch.testing.assert_close(found[:, -1:, -5:], gradient(alone, last), rtol=2e-3, atol=1e-7)
    assert not found[:, -1, :-5].any()
    assert not found[:, :-1].any()


def test_similarity() -> None:
    """A matrix of more than 2^31 numbers, of few hidden states."""
    tokens = 33000
    h = torch.randn(2, 1, tokens, 16, device="cuda", dtype=torch.float16)
    assert 2 * tokens**2 > 2**31
    matrix = ck.pairwise_similarity(h, out_dtype=torch.float16, backend="triton")
    unit = torch.nn.functional.normalize(h.float(), dim=-1)
    expected = unit[1, 0, -50:] @ unit[1, 0].T
    torch.testing.assert_close(matrix[1, 0, -50:].float(), expected, rtol=2e-3, atol=2e-3)
    leaf = h.detach().requires_grad_()
    upstream = torch.zeros_like(matrix)
    upstream[1, 0, -1, -2] = 1.0
    (found,) = torch.autograd.grad(
        ck.pairwise_similarity(leaf, out_dtype=torch.float16, backend="triton"), leaf, upstream
    )
    pair = h[1:, :, -2:].detach().requires_grad_()
    (wanted,) = torch.autograd.grad(ck.pairwise_similarity(pair, backend="triton")[0, 0, 1, 0], pair)
    torch.testing.assert_close(found[1:, :, -2:], wanted, rtol=5e-3, atol=1e-5)
    assert not found[:, :, :-2].any()
