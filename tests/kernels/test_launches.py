"""How many kernels a call launches: a handful, whatever the number of layers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import carma_kernels as ck
from carma_kernels import CarmaConfig, TokenSpans, _runtime
from carma_kernels.kernels import launch
from carma_kernels.ops import mi

Loss = Callable[[list[Tensor], TokenSpans], Tensor]
SHORT, LONG = 20, 130
STEPS = {"backend": "triton"}
LOSSES: dict[str, Loss] = {
    "mi": lambda h, spans: ck.mi_loss(h, spans, **STEPS),
    "batch": lambda h, spans: ck.mi_loss(h, spans, negatives="batch", **STEPS),
    "listed": lambda h, spans: ck.mi_loss(h, spans.sample_pairs(2), **STEPS),
    "stability": lambda h, spans: ck.stability_loss(h, mask=spans.attention_mask, **STEPS),
    "carma": lambda h, spans: ck.carma_loss(h, spans, mask=spans.attention_mask, **STEPS).loss,
    "carma, dot": lambda h, spans: ck.carma_loss(h, spans, CarmaConfig(metric="dot", temperature=4.0), **STEPS).loss,
    "carma, listed": lambda h, spans: ck.carma_loss(h, spans.sample_pairs(2), **STEPS).loss,
    "similarity": lambda h, _: ck.pairwise_similarity(h, **STEPS).sum(),
}


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """The kernels launched within, by name. They do not run: what they would have written is whatever was there."""
    kernels: Counter[str] = Counter()

    def count(kernel: Any, *_: object, **__: object) -> None:
        kernels[kernel.fn.__name__] += 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_runtime, "launch", count)
        yield kernels


def launches(loss: Loss, L: int, T: int, device: str, dtype: torch.dtype = torch.float32) -> tuple[int, Counter[str]]:
    """How many forward, and which backward."""
    spans = TokenSpans.from_lists([[(at, at + 2) for at in range(0, T - 2, 5)]] * 2, seq_len=T).to(device)
    hidden = [torch.randn(2, T, 16, device=device, dtype=dtype, requires_grad=True) for _ in range(L)]
    with counted() as forward:
        value = loss(hidden, spans)
    with counted() as backward:
        value.backward()
    assert all(layer.grad is not None for layer in hidden)
    return forward.total(), backward


@pytest.mark.parametrize("T", [SHORT, LONG])
@pytest.mark.parametrize("loss", LOSSES)
def test_launches_do_not_grow_with_the_layers(loss: str, T: int, device: str) -> None:
    counts = [launches(LOSSES[loss], L, T, device) for L in (2, 5, 12)]
    assert counts[0] == counts[1] == counts[2]
    forward, backward = counts[0]
    assert forward <= 4
    one = T == SHORT and loss in ("mi", "batch", "stability", "carma", "carma, dot")
    assert backward.total() <= (1 if one else 2)


@pytest.mark.parametrize("T", [1, 2, 16, 17, 64, 65, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_short_sequences(T: int, dtype: torch.dtype, device: str) -> None:
    """Both losses of 12 layers: one kernel and the sum over its parts, and one kernel backward."""
    forward, backward = launches(LOSSES["carma"], 12, T, device, dtype)
    assert (forward, backward.total()) == (2, 1)


def test_two_launches_a_workspace_chunk(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the layers whose weights it holds."""
    monkeypatch.setattr(mi, "WORKSPACE_BYTES", 1)  # so that the larger, a layer, holds: of fp32 weights of one or two
    _, backward = launches(LOSSES["mi"], 4, LONG, device)
    chunks = backward["_mi_weights_kernel"]
    assert chunks > 1
    assert backward == {"_mi_weights_kernel": chunks, "_mi_gradient_kernel": chunks}


def grids(
    loss: Loss, shape: tuple[int, int, int], dtype: torch.dtype = torch.float32, D: int = 1
) -> dict[str, tuple[int, ...]]:
    """Of each kernel that a loss launches for L layers `[B, T, D]`, of shape `(L, B, T)`."""
    L, B, T = shape
    found: dict[str, tuple[int, ...]] = {}

    def record(kernel: Any, grid: tuple[int, ...], *_: object, **__: object) -> None:
        found[kernel.fn.__name__] = grid

    spans = TokenSpans.from_lists([[(0, 2)]] * B, seq_len=T)
    hidden = [torch.empty(B, T, D, dtype=dtype).requires_grad_() for _ in range(L)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_runtime, "launch", record)
        loss(hidden, spans).backward()
    return found


MOST = (2**31 - 1, 2**16 - 1, 2**16 - 1)
"""Programs along the axes of a CUDA grid"""


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("short", [True, False], ids=["short", "long"])
def test_more_groups_than_a_second_axis_takes(loss: str, short: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not short:
        monkeypatch.setitem(launch.TABLE, "short_forward", [])
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # of workspaces, for nothing
    found = grids(LOSSES[loss], (2, 2**16, 3))
    assert found
    for grid in found.values():
        assert all(programs <= most for programs, most in zip(grid, MOST, strict=False)), found


def test_more_programs_than_a_device_can_number(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_runtime, "MOST_PROGRAMS", 1)
    hidden = [torch.ones(2, 3, 4, device=device)] * 2
    with pytest.raises(ValueError, match=r"hidden_states .* \d+ programs.*2\^31 - 1.*backend='torch'"):
        LOSSES["similarity"](hidden, TokenSpans.from_lists([[], []], seq_len=3))


@pytest.mark.parametrize(
    ("shape", "multiprocessors", "pieces"),
    [
        ((12, 16, 58), 132, 1),  # the paper's: two programs a multiprocessor hold all at once
        ((12, 16, 58), 304, 3),
        ((12, 11, 58), 132, 2),
        ((12, 22, 58), 132, 1),
        ((12, 100, 58), 132, 1),
        ((2, 1, 58), 132, 4),
    ],
    ids=str,
)
def test_how_many_programs_share_a_groups_columns(
    shape: tuple[int, int, int], multiprocessors: int, pieces: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One more than the device holds together would make all wait for a second round."""
    here = replace(_runtime.TARGETS["sm_90"], multiprocessors=multiprocessors)
    monkeypatch.setattr(_runtime, "target", lambda _device: here)
    L, B, _ = shape
    found = grids(LOSSES["carma"], shape, torch.bfloat16, D=768)
    assert math.prod(found["_short_backward_kernel"]) == L * B * pieces
