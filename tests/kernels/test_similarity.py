"""The similarity kernels against csrc_ref, where a sequence takes several tiles: `tests/ops` has sequences of one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import csrc_ref
from carma_kernels._terms import Similarity
from tests.cases import BF16, FP16, FP32, FP64, Case
from tests.compare import assert_close_to_oracle, differentiate

pytest.importorskip("triton")

# of the computation, before the rounding of what is stored: coefficients meet the tokens in the precision of the tokens
TOLERANCE = {FP32: 1e-5, FP16: 5e-4, BF16: 4e-3}


@pytest.fixture
def small_tiles(tiles: Callable[..., None]) -> None:
    tiles("similarity_norms", BLOCK_T=16, BLOCK_D=16)
    tiles("similarity_tiles", BLOCK_T=16, BLOCK_D=16)
    tiles("similarity_backward", BLOCK_T=32, BLOCK_J=16, BLOCK_D=16)  # blocks of tokens of another size


def pairwise_similarity(
    hidden: Tensor | list[Tensor], tau: Tensor | float, mask: Tensor | None, **asked: Any
) -> Tensor:
    from carma_kernels.ops.similarity import pairwise_similarity as operator

    layers = range(asked.get("start", 0), len(hidden))
    out_dtype = asked.get("out_dtype", FP32)
    return operator(hidden, layers, Similarity(asked.get("metric", "cosine") == "cosine", tau), mask, out_dtype)


def make_hidden(L: int, B: int, T: int, D: int) -> tuple[Tensor, Tensor]:
    """Hidden states `[L, B, T, D]` and a mask `[B, T]` that leaves out tokens here and there."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(L, B, T, D, generator=generator, dtype=FP64)
    hidden += 0.5 * torch.randn(1, B, 1, D, generator=generator, dtype=FP64)
    return hidden, torch.rand(B, T, generator=generator) < 0.7


def compare(device: str, case: Case, hidden: Tensor, mask: Tensor | None) -> None:
    hidden = hidden.to(case.dtype).to(FP64)
    if mask is not None:
        hidden = torch.where(mask[:, :, None], hidden, torch.nan)

    def ours(h: Tensor | list[Tensor], tau: Tensor | float) -> tuple[Tensor]:
        there = mask.to(device) if mask is not None else None
        return (pairwise_similarity(h, tau, there, metric=case.metric),)

    def reference(h: Tensor | list[Tensor], tau: Tensor | float) -> tuple[Tensor]:
        s = csrc_ref.pairwise_similarity(h, temperature=tau, mask=mask, metric=case.metric, out_dtype=FP64)
        return (s,)

    oracle = differentiate(reference, hidden, case, exact=True)
    actual = differentiate(ours, hidden, case, device=device)
    assert_close_to_oracle(actual, oracle, TOLERANCE[case.dtype])


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(("metric", "masked"), [("cosine", False), ("cosine", True), ("dot", True)])
@pytest.mark.parametrize(("T", "D"), [(2, 5), (16, 33), (17, 16), (33, 40)])
def test_several_tiles(device: str, T: int, D: int, metric: str, masked: bool) -> None:
    hidden, mask = make_hidden(2, 2 if T < 20 else 1, T, D)
    compare(device, Case(dtype=FP32, metric=metric, temperature=0.5), hidden, mask if masked else None)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
@pytest.mark.parametrize("metric", ["cosine", "dot"])
def test_halves(device: str, metric: str, dtype: torch.dtype) -> None:
    hidden, mask = make_hidden(2, 1, 33, 40)
    compare(device, Case(dtype=dtype, metric=metric, stacked=False), hidden, mask)


@pytest.mark.parametrize(("T", "dtype"), [(31, FP32), (58, FP16), (65, FP32), (129, BF16)], ids=str)
def test_tiles_of_the_launch_table(device: str, T: int, dtype: torch.dtype) -> None:
    hidden, mask = make_hidden(1, 1, T, 24)
    compare(device, Case(dtype=dtype), hidden, mask)


@pytest.mark.usefixtures("small_tiles")
def test_tokens_that_are_nearly_alike(device: str) -> None:
    """Mean cosine 0.996: the projection cancels most of the sum, so it must come from the same rounded numbers."""
    hidden, _ = make_hidden(1, 1, 33, 40)
    compare(device, Case(dtype=BF16, number=True), hidden + 16.0, None)


@pytest.mark.usefixtures("small_tiles")
def test_tiles_are_mirrored_to_the_last_bit(device: str) -> None:
    hidden, _ = make_hidden(1, 2, 33, 40)
    s = pairwise_similarity(hidden.to(device, FP32), 0.1, None)
    assert torch.equal(s[..., :16, 16:], s.mT[..., :16, 16:])


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("out_dtype", [FP16, BF16], ids=str)
def test_the_gradient_does_not_depend_on_the_rounding_of_the_matrix(device: str, out_dtype: torch.dtype) -> None:
    hidden, mask = make_hidden(1, 2, 17, 24)
    upstream = torch.randint(-8, 9, (1, 2, 17, 17), generator=torch.Generator().manual_seed(1))
    gradients = []
    for dtype in (out_dtype, FP32):
        h = hidden.to(device, FP32).requires_grad_()
        s = pairwise_similarity(h, 0.1, mask.to(device), out_dtype=dtype)
        gradients += torch.autograd.grad(s, h, upstream.to(device, dtype))
    assert torch.equal(*gradients)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("factor", [2.0**-24, 2.0**24])
def test_upstream_gradients_outside_the_range_of_fp16(device: str, factor: float) -> None:
    """Loss scales, and means over a large matrix: a power of two that the temperature takes back changes no bit."""
    hidden, _ = make_hidden(1, 1, 17, 24)
    upstream = torch.randn(1, 1, 17, 17, generator=torch.Generator().manual_seed(1)).to(device)
    gradients = []
    for scale in (1.0, factor):
        h = hidden.to(device, FP16).requires_grad_()
        s = pairwise_similarity(h, scale, None)
        gradients += torch.autograd.grad(s, h, scale * upstream)
    assert torch.equal(*gradients)


@pytest.mark.usefixtures("small_tiles")
def test_frozen_layers_and_layers_outside_the_range(device: str) -> None:
    hidden, mask = make_hidden(4, 1, 17, 8)
    leaves = [h.to(device, FP32).requires_grad_(layer != 2) for layer, h in enumerate(hidden)]
    stacked = hidden.to(device, FP32).requires_grad_()
    tau = torch.tensor(0.3, device=device)
    gradients = []
    for h, inputs in ((leaves, [leaves[layer] for layer in (0, 1, 3)]), (stacked, [stacked])):
        s = pairwise_similarity(h, tau, mask.to(device), start=1)
        gradients.append(torch.autograd.grad(s.square().sum(), inputs))
    of_list, (of_stack,) = gradients
    assert (of_stack[0] == 0).all()
    assert torch.equal(torch.stack(of_list), of_stack[[0, 1, 3]])
