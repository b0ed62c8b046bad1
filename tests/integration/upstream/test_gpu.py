"""The drop-in on a GPU, and with a model spread over two devices, agrees with itself on the CPU."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from carma_kernels.integrations.upstream import MILoss, StabilityLoss
from tests.integration.upstream.published import as_cache, as_spans
from tests.integration.upstream.test_quirks import states

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device"),
]

WORDS = [[(0, 3), (4, 6), (8, 9)], [(2, 4), (5, 7)]]


def losses_and_gradients(layers: list[Tensor]) -> list[Tensor]:
    random.seed(0)
    cache = as_cache(layers)
    mi = MILoss().calculate_mi_loss(cache, as_spans(WORDS))
    stability = StabilityLoss(end_layer=None).calculate_loss(cache)
    return [mi, stability, *torch.autograd.grad(mi + stability, layers)]


@pytest.mark.parametrize("T", [12, 40])
@pytest.mark.parametrize("devices", [["cuda"] * 3, ["cuda", "cuda", "cpu"]], ids=["one device", "two devices"])
def test_agrees_with_the_cpu(devices: list[str], T: int):
    on_cpu = states(L=3, T=T)
    moved = [h.detach().to(device).requires_grad_() for h, device in zip(on_cpu, devices, strict=True)]
    results = losses_and_gradients(moved)
    for got, expected in zip(results, losses_and_gradients(on_cpu), strict=True):
        torch.testing.assert_close(got.cpu(), expected)
    for one, other in zip(results, losses_and_gradients(moved), strict=True):
        assert torch.equal(one, other)
