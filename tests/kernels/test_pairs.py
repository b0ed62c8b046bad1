"""The kernels of listed pairs against csrc_ref, beyond what `tests/ops` asks of them through `mi_loss`."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import csrc_ref
from carma_kernels import PairIndex
from tests.cases import BF16, FP16, FP32, FP64

pytest.importorskip("triton")

TOLERANCE = {FP32: 1e-5, FP16: 1e-3, BF16: 4e-3}  # with the rounding of what is stored


@pytest.fixture
def small_tiles(tiles: Callable[..., None]) -> None:
    tiles("pairs_forward", BLOCK_D=16)


def make_pairs(shape: tuple[int, int, int], tokens: tuple[int, int]) -> PairIndex:
    """Random `[P, K]` or `[L, P, K]` negatives among the first half of the tokens, a fifth of the slots empty."""
    generator = torch.Generator().manual_seed(0)
    L, P, K = shape
    half = tokens[0] * tokens[1] // 2
    negatives = torch.randint(half, (L, P, K), generator=generator)
    negatives[torch.rand(L, P, K, generator=generator) < 0.2] = -1
    negatives[:, 0] = -1
    anchor = torch.randint(half, (P,), generator=generator)
    anchor[1:4] = anchor[0]  # one token in many pairs
    positive = (anchor + torch.randint(1, half, (P,), generator=generator)) % half
    return PairIndex(anchor, positive, negatives if L > 1 else negatives[0], tokens)


def run(
    device: str,
    hidden: Tensor,
    layers: range,
    pairs: PairIndex,
    cosine: bool,
    grad: Tensor,
    stability: tuple[range, Tensor | None, Tensor, Tensor, Tensor] | None = None,
    frozen: tuple[int, ...] = (),
) -> tuple[Tensor, list[Tensor], Tensor]:
    """Costs `[L, P]`, the gradients of all layers (NaN where none is written), and the work `[L]`."""
    from carma_kernels.ops import pairs as ops
    from carma_kernels.ops.layers import LayerTable, ScaledSimilarity, Upstream, readable
    from carma_kernels.ops.stability import StabilityGradient

    there = [h.to(device) for h in hidden]
    norm = torch.stack([h.double().norm(dim=-1).view(-1) for h in hidden])[layers.start : layers.stop]
    inverse_norms = torch.where(norm > 1e-8, 1 / norm, 0.0).float().to(device) if cosine else None
    similarity = ScaledSimilarity(cosine, torch.tensor(1 / 0.2, device=device), None)
    pairs = pairs.to(device)
    shapes = ops.listed_state_shapes(pairs, len(layers))
    state = (torch.full(shapes[0], torch.nan, device=device), torch.full(shapes[1], torch.nan, device=device))
    table = readable(there)
    cost = ops.listed_forward(table, layers, pairs, similarity, inverse_norms, state)
    out = [torch.full_like(h, torch.nan) for h in there]
    no_loss = (range(0), None, *[torch.zeros(0, device=device)] * 3)
    layers_of_loss, stability_mask, losses, scale, upstream = stability or no_loss
    work = ops.listed_backward(
        table,
        layers,
        pairs,
        similarity,
        inverse_norms,
        state,
        Upstream(grad.to(device)),
        StabilityGradient(layers_of_loss, stability_mask, losses, scale, Upstream(upstream)),
        LayerTable(tuple(None if layer in frozen else o for layer, o in enumerate(out))),
        needs_work=True,
    )
    assert work is not None
    return cost.cpu(), [o.cpu() for o in out], work.cpu()


def reference(
    hidden: Tensor, layers: range, pairs: PairIndex, cosine: bool, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over pairs `[L]`, the gradient of the hidden states, and the temperature's."""
    hidden = hidden.double().requires_grad_()
    tau = torch.tensor(0.2, dtype=FP64, requires_grad=True)
    metric = "cosine" if cosine else "dot"
    asked = {"metric": metric, "layers": (layers.start, layers.stop - 1), "reduction": "none", "num_pairs": 1}
    sums = csrc_ref.mi_loss(hidden, pairs, temperature=tau, **asked)
    return sums.detach(), *torch.autograd.grad((sums * grad).sum(), (hidden, tau))


def close(actual: Tensor, wanted: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual.double(), wanted, rtol=0, atol=tolerance * max(1e-30, wanted.abs().max().item()))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)
@pytest.mark.parametrize("cosine", [True, False], ids=["cosine", "dot"])
@pytest.mark.parametrize("shape", [(1, 9, 1), (1, 5, 40), (2, 5, 4)], ids=["K=1", "K in blocks", "by layer"])
def test_against_the_oracle(device: str, shape: tuple[int, int, int], cosine: bool, dtype: torch.dtype) -> None:
    T = 20 if shape[2] > 16 else 6  # enough tokens for the largest score to be in any block
    hidden = torch.randn(4, 2, T, 21, generator=torch.Generator().manual_seed(0)).mul(0.5).to(dtype)
    hidden[1, 0, 2] = 0
    pairs = make_pairs(shape, (2, T))
    hidden[:, 1] = torch.nan  # tokens in no pair
    layers = range(1, 3)
    grad = torch.tensor([0.75, -2.0])
    cost, out, work = run(device, hidden, layers, pairs, cosine, grad)
    sums, wanted, wanted_tau = reference(hidden, layers, pairs, cosine, grad)
    close(cost.sum(1), sums, TOLERANCE[FP32])
    for layer in layers:
        close(out[layer], wanted[layer], TOLERANCE[dtype])
    assert out[0].isnan().all()
    assert out[3].isnan().all()
    torch.testing.assert_close(-(grad * work).sum().double() / 0.2, wanted_tau, rtol=2e-6, atol=2e-5)


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_the_stability_part_is_added(device: str, masked: bool) -> None:
    """Once to every row that takes part, in pairs or not; a weight of 0 stands for a neighbour that is not read."""
    hidden = torch.randn(4, 1, 10, 21, generator=torch.Generator().manual_seed(0))
    pairs = make_pairs((1, 5, 3), (1, 10))
    layers = range(1, 4)
    grad = torch.tensor([0.5, 1.0, -1.0])
    mask = torch.tensor([1, 1, 0, 1, 1, 1, 1, 1, 0, 1]).bool() if masked else torch.ones(10).bool()
    losses, scale, upstream = torch.tensor([[0.5, 0.7], [0.3, 0.2], [1.0, -1.0]], device=device)  # of layers 0 to 2
    weights = [(0.0, 0.3, -0.15), (0.3, -0.2, -0.01), (-0.2, 0.0, 0.14), (0.0, 0.0, 0.0)]
    read = torch.where(mask[None, None, :, None], hidden, torch.nan)
    if masked:
        hidden[:, :, 8] = torch.nan  # token 8 is in no pair
    _, plain, _ = run(device, hidden, layers, pairs, True, grad)
    stability = (range(3), mask.to(torch.uint8).to(device) if masked else None, losses, scale, upstream)
    _, fused, _ = run(device, hidden, layers, pairs, True, grad, stability)
    for layer in layers:
        before, after, own = weights[layer]
        part = own * read[layer]
        if layer > 1:
            part = part + before * (read[layer] - read[layer - 1])
        if layer < 2:
            part = part - after * (read[layer + 1] - read[layer])
        if layer == 1:
            part = part + before * (read[layer] - read[0])
        part = torch.where(mask[None, :, None], part if layer < 3 else torch.zeros(()), 0.0)
        torch.testing.assert_close(fused[layer], plain[layer] + part, rtol=1e-5, atol=1e-6)


def test_frozen_layers_are_not_written(device: str) -> None:
    hidden = torch.randn(3, 1, 6, 8, generator=torch.Generator().manual_seed(0))
    pairs = make_pairs((1, 3, 2), (1, 6))
    arguments = (device, hidden, range(3), pairs, True, torch.ones(3))
    _, whole, work = run(*arguments)
    _, some, same_work = run(*arguments, frozen=(1,))
    assert some[1].isnan().all()
    assert torch.equal(some[0], whole[0])
    assert torch.equal(some[2], whole[2])
    assert torch.equal(work, same_work)


def test_the_order_of_the_sums_is_fixed(device: str) -> None:
    """The index lists the edges of a token in the order of the pairs, whatever sorts them."""
    from carma_kernels.ops.pairs import _EdgeIndex

    pairs = make_pairs((2, 9, 3), (1, 12)).to(device)
    index = _EdgeIndex.of(pairs, 12)
    negatives = pairs.negatives.cpu()
    for layer in range(2):
        for token in range(12):
            slots = torch.cat([pairs.positive.cpu()[:, None], negatives[layer]], dim=1)  # [P, 1+K]
            held = slots >= 0
            as_anchor = [
                (p * 4 + k, int(slots[p, k])) for p, k in held.nonzero().tolist() if int(pairs.anchor[p]) == token
            ]
            as_token = [(p * 4 + k, int(pairs.anchor[p])) for p, k in (slots == token).nonzero().tolist()]
            start, stop = index.start[layer, token : token + 2].tolist()
            listed = list(zip(index.edge[start:stop].tolist(), index.other[start:stop].tolist(), strict=True))
            assert listed == as_anchor + as_token
