"""Extra memory: bounded by the hidden states during the passes, next to nothing between them, linear in the tokens."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

import carma_kernels as ck
from carma_kernels.eager import layers, mi
from carma_kernels.measure import peak_memory
from tests.cases import BACKENDS, BF16, FP32, Backend

pytestmark = [
    pytest.mark.usefixtures("users_defaults"),  # deterministic mode has operators, and memory, of its own
    pytest.mark.parametrize("backend", [backend for backend in BACKENDS if not backend.interpret], ids=str),
]

Loss = Callable[[Tensor], Tensor]


@pytest.fixture(autouse=True)
def no_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the torch backend, whatever the batch: 4 MB on a CPU, on a GPU what tests/ops/test_torch_on_a_gpu.py holds."""
    for name in ("_WORKSPACE", "_TILE_ON_CPU", "_AT_ONCE_ON_CPU"):
        monkeypatch.setattr(layers, name, 0)
    monkeypatch.setattr(mi, "_SMALL_BIAS", 0)


def dense(B: int, T: int) -> ck.TokenSpans:
    """Nothing but words of two to four tokens: as many anchors as there can be."""
    bounds = [0]
    while bounds[-1] < T:
        bounds.append(min(T, bounds[-1] + 2 + len(bounds) % 3))
    return ck.TokenSpans.from_lists([list(pairwise(bounds))] * B, seq_len=T)


def sparse(B: int, T: int) -> ck.TokenSpans:
    """Padding of different widths and a word of three tokens here and there."""
    valid = torch.arange(T) < torch.linspace(T // 2, T, B).long()[:, None]
    words = [[(at, at + 3) for at in range(0, int(row.sum()) - 3, 12)] for row in valid]
    return ck.TokenSpans.from_lists(words, seq_len=T, attention_mask=valid)


def losses(spans: ck.TokenSpans, backend: Backend) -> dict[str, Loss]:
    options = {"backend": backend.name}
    there = spans.to(backend.device)
    pairs = spans.sample_pairs(generator=torch.Generator().manual_seed(0)).to(backend.device)
    mask = there.attention_mask
    return {
        "sequence": lambda h: ck.mi_loss(h, there, **options),
        "batch": lambda h: ck.mi_loss(h, there, negatives="batch", **options),
        "listed": lambda h: ck.mi_loss(h, pairs, **options),
        "stability": lambda h: ck.stability_loss(h, **options),
        "stability, masked": lambda h: ck.stability_loss(h, mask=mask, **options),
        "carma": lambda h: ck.carma_loss(h, there, mask=mask, **options).loss,
    }


NAMES = ["sequence", "batch", "listed", "stability", "stability, masked", "carma"]


def room_for_similarities(name: str, hidden: Tensor) -> float:
    """On a CPU they are kept for the backward where they take up to half of the hidden states' memory."""
    return hidden.nbytes / 2 if hidden.device.type == "cpu" and name in ("sequence", "batch", "carma") else 0


def states(shape: tuple[int, ...], backend: Backend) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(backend.device, FP32).requires_grad_()


def peak(loss: Loss, hidden: Tensor, backend: Backend) -> int:
    """Of forward and backward, the gradient included."""
    return peak_memory(lambda: torch.autograd.grad(loss(hidden), hidden), backend.device)


def kept(loss: Loss, hidden: Tensor, backend: Backend) -> int:
    """Bytes alive between forward and backward, the loss included: what is left of a peak that a probe sets."""
    probe = 64 * hidden.nbytes

    def forward_then_probe() -> None:
        value = loss(hidden)
        torch.empty(probe, dtype=torch.uint8, device=backend.device)
        del value

    return peak_memory(forward_then_probe, backend.device) - probe


@pytest.mark.parametrize("spans", [dense, sparse])
@pytest.mark.parametrize("name", NAMES)
def test_the_papers_batch(backend: Backend, name: str, spans: Callable[[int, int], ck.TokenSpans]) -> None:
    """GPT-2 small: at most twice the hidden states, the gradient included; between the passes next to nothing."""
    hidden = states((12, 16, 58, 768), backend)
    loss = losses(spans(16, 58), backend)[name]
    assert peak(loss, hidden, backend) <= 2 * hidden.nbytes
    assert kept(loss, hidden, backend) <= 0.01 * hidden.nbytes + room_for_similarities(name, hidden)


@pytest.mark.parametrize("name", NAMES)
def test_half_precision(backend: Backend, name: str) -> None:
    """What is computed in fp32 is a few layers at a time, however many there are."""
    hidden = states((24, 16, 58, 256), backend).detach().to(BF16).requires_grad_()
    loss = losses(sparse(16, 58), backend)[name]
    layer = hidden[0].numel() * FP32.itemsize
    assert peak(loss, hidden, backend) <= hidden.nbytes + 8 * layer + room_for_similarities(name, hidden)
    assert kept(loss, hidden, backend) <= 0.02 * hidden.nbytes + room_for_similarities(name, hidden)


@pytest.mark.parametrize("name", NAMES)
def test_linear_in_the_tokens(backend: Backend, name: str) -> None:
    """Where a matrix of all tokens with all tokens would be 128 times the hidden states of a layer."""
    by_length = {}
    for T in (512, 1024, 2048):
        hidden = states((2, 1, T, 16), backend)
        by_length[T] = peak(losses(sparse(1, T), backend)[name], hidden, backend)
        assert by_length[T] <= 5 * hidden.nbytes
    assert by_length[2048] - by_length[1024] <= 2.1 * (by_length[1024] - by_length[512])


@pytest.mark.parametrize("name", NAMES)
def test_frozen_layers_take_no_memory(backend: Backend, name: str) -> None:
    """Of 12 layers one has a gradient: the others have no buffer for theirs."""
    shape = (16, 58, 256)
    hidden = states((12, *shape), backend).detach()
    layers = list(hidden.unbind(0))
    layers[5].requires_grad_()
    loss = losses(dense(16, 58), backend)[name]
    used = peak_memory(lambda: torch.autograd.grad(loss(layers), layers[5]), backend.device)  # type: ignore[arg-type]
    assert used <= 6 * layers[0].nbytes + room_for_similarities(name, hidden)
