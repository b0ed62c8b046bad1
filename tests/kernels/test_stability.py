"""The kernels of the stability loss against csrc_ref, beyond what `tests/ops` asks of them through `stability_loss`."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

import csrc_ref
from carma_kernels._terms import Terms
from tests.cases import BF16, FP16, FP32

pytest.importorskip("triton")

# of the largest gradient: the computation's error and one rounding
TOLERANCE = {FP32: 1e-6, FP16: 2**-11 + 1e-6, BF16: 2**-8 + 1e-6}


@pytest.fixture
def small_tiles(tiles: Callable[..., None]) -> None:
    """Several programs, the last one with rows to spare."""
    tiles("stability_forward", BLOCK_ROWS=4, BLOCK_D=64)
    tiles("stability_backward", BLOCK_ROWS=4, BLOCK_D=64)


def make_hidden(dtype: torch.dtype = FP32, L: int = 5, D: int = 33) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(L, 2, 7, D, generator=generator) + torch.randn(2, 7, D, generator=generator)
    return hidden.to(dtype)


MASK = torch.tensor([[1, 1, 0, 1, 1, 0, 0], [0, 0, 0, 1, 0, 1, 1]]).bool()


def reference(hidden: Tensor, layers: range, mask: Tensor | None, upstream: Tensor) -> tuple[Tensor, Tensor]:
    """`r_l` of each step and the gradient of all layers, fp64."""
    hidden = hidden.double().requires_grad_()
    losses = csrc_ref.stability_loss(hidden, layers=(layers.start, layers.stop - 1), mask=mask, reduction="none")
    (gradient,) = torch.autograd.grad((losses * upstream).sum(), hidden)
    return losses.detach(), gradient


def forward(
    device: str, hidden: Tensor, layers: range, mask: Tensor | None, norms_layers: range = range(0)
) -> tuple[Tensor, Tensor, Tensor]:
    """`r_l`, `k_l`, and the inverse norms of `norms_layers`."""
    from carma_kernels.ops.layers import readable
    from carma_kernels.ops.stability import finalize, stability_forward

    table = readable(list(hidden.to(device)))
    inverse_norms = torch.full((len(norms_layers), 14), torch.nan, device=device)
    partials = stability_forward(table, layers, as_bytes(mask, device), norms_layers, inverse_norms)
    losses, scale = torch.full((2, max(0, len(layers) - 1)), torch.nan, device=device).unbind()
    no_layer = torch.empty(0, 0, device=device)
    nowhere = torch.full((3,), torch.nan, device=device).unbind()
    terms = Terms(no_layer.view(-1), losses, *nowhere)
    divisor = torch.ones((), device=device)
    finalize(no_layer, divisor, partials, layers, hidden.shape[-1], 1e-8, (1.0, 1.0), terms, scale)
    return losses, scale, inverse_norms


def backward(
    device: str,
    hidden: Tensor,
    layers: range,
    mask: Tensor | None,
    upstream: Tensor,
    skipped: range = range(0),
    frozen: tuple[int, ...] = (),
) -> Tensor:
    """The gradient of all layers, NaN where none is written."""
    from carma_kernels.ops.layers import LayerTable, Upstream, readable
    from carma_kernels.ops.stability import StabilityGradient, stability_backward

    losses, scale, _ = forward(device, hidden, layers, mask)
    gradient = StabilityGradient(layers, as_bytes(mask, device), losses, scale, Upstream(upstream.to(device)))
    out = [torch.full_like(layer, torch.nan, device=device) for layer in hidden]
    table = LayerTable(tuple(None if layer in frozen else room for layer, room in enumerate(out)))
    stability_backward(readable(list(hidden.to(device))), gradient, table, skipped)
    return torch.stack(out).cpu()


def as_bytes(mask: Tensor | None, device: str) -> Tensor | None:
    return None if mask is None else mask.flatten().to(device).view(torch.uint8)


def close(actual: Tensor, wanted: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual.double(), wanted, rtol=0, atol=tolerance * wanted.abs().max().item())


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("layers", [range(5), range(1, 3), range(2, 5)], ids=str)
def test_against_the_oracle(device: str, layers: range, masked: bool, dtype: torch.dtype) -> None:
    hidden = make_hidden(dtype)
    mask = MASK if masked else None
    upstream = torch.linspace(-1, 2, len(layers) - 1)
    wanted, wanted_gradient = reference(hidden, layers, mask, upstream)
    if masked:
        hidden[:, ~MASK] = torch.nan
        hidden[:, ~MASK, ::2] = torch.inf
    losses, _, _ = forward(device, hidden, layers, mask)
    torch.testing.assert_close(losses.cpu().double(), wanted, rtol=1e-6, atol=0)
    gradient = backward(device, hidden, layers, mask, upstream)
    close(gradient, wanted_gradient, TOLERANCE[dtype])
    outside = [layer for layer in range(5) if layer not in layers]
    assert (gradient[outside] == 0).all()


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("layers", [range(0), range(3), range(3, 5)], ids=str)
def test_norms_on_the_way(device: str, layers: range) -> None:
    """Of layers in and outside the loss; 0 for a vector of no length, and for one too short to have a direction."""
    hidden = make_hidden()
    hidden[2, 0, 1] = 0
    hidden[2, 0, 2] = 0.9e-8 / 33**0.5
    hidden[2, 0, 3] = 1.1e-8 / 33**0.5
    _, _, inverse_norms = forward(device, hidden, layers, None, norms_layers=range(2, 4))
    norm = hidden[2:4].double().norm(dim=-1).view(2, -1)
    wanted = torch.where(norm > 1e-8, 1 / norm, 0.0)
    assert (wanted == 0).sum() == 2
    torch.testing.assert_close(inverse_norms.cpu().double(), wanted, rtol=1e-6, atol=0)


@pytest.mark.usefixtures("small_tiles")
def test_skipped_and_frozen_layers_are_not_written(device: str) -> None:
    hidden, upstream = make_hidden(), torch.ones(4)
    _, wanted = reference(hidden, range(5), None, upstream)
    gradient = backward(device, hidden, range(5), None, upstream, skipped=range(1, 3), frozen=(4,))
    assert gradient[[1, 2, 4]].isnan().all()
    close(gradient[[0, 3]], wanted[[0, 3]], TOLERANCE[FP32])


@pytest.mark.parametrize("num_mi", [0, 1, 16, 37])
@pytest.mark.parametrize("num_steps", [0, 1, 17, 33])
def test_totals(device: str, num_mi: int, num_steps: int) -> None:
    """Of more layers, and of more parts of each, than are added up at a time; between layers of no loss."""
    from carma_kernels.ops.stability import StabilityPartials, finalize

    generator = torch.Generator().manual_seed(num_mi)
    mi_partials = torch.rand(num_mi, 700, generator=generator)
    layers, walked = range(2, 3 + num_steps), range(1, 5 + num_steps)
    sums = torch.rand(2 * len(walked) + 1, 1100, generator=generator)
    if not num_steps:
        sums.fill_(3e38)  # what nobody has written, and nobody is to add up
    divisor, D, eps, weights = torch.tensor(7.0), 3, 0.25, (0.5, 0.2)
    terms = Terms(*(torch.full(shape, torch.nan, device=device) for shape in ((num_mi,), (num_steps,), (), (), ())))
    scale = torch.full((num_steps,), torch.nan, device=device)
    partials = StabilityPartials(sums.to(device), walked)
    with np.errstate(over="raise"):  # in the interpreter
        finalize(mi_partials.to(device), divisor.to(device), partials, layers, D, eps, weights, terms, scale)

    means = mi_partials.double().sum(1) / 7
    energy, change, rows = sums.double().sum(1).split([len(walked), len(walked), 1])
    count = rows * D if num_steps else torch.ones(1)
    here = slice(1, 2 + num_steps)  # of those walked
    denominator = (energy[here][:-1] + energy[here][1:]) / count + eps
    losses = change[here][1:] / count / denominator
    mi, stability = means.sum() / max(1, num_mi), losses.sum()
    wanted = Terms(means, losses, mi, stability, 0.5 * mi + 0.2 * stability)
    for found, expected in zip((*terms, scale), (*wanted, 2 / (count * denominator)), strict=True):
        torch.testing.assert_close(found.cpu().double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("D", [1, 40, 520])
def test_the_launch_table_covers_the_widths(device: str, D: int) -> None:
    hidden, upstream = make_hidden(L=2, D=D), torch.ones(1)
    wanted, wanted_gradient = reference(hidden, range(2), None, upstream)
    torch.testing.assert_close(forward(device, hidden, range(2), None)[0].cpu().double(), wanted, rtol=1e-6, atol=0)
    close(backward(device, hidden, range(2), None, upstream), wanted_gradient, TOLERANCE[FP32])


def test_a_width_beyond_the_launch_table_is_refused(device: str) -> None:
    with pytest.raises(ValueError, match=r"width 16385.*backend='torch'"):
        forward(device, torch.zeros(2, 2, 7, 16385), range(2), None)
