"""What a CUDA graph needs of a step: its launches, made again, compute it for whatever the hidden states hold then.

Torch's own operations between them would be captured, too, and are not made again here: of these there are none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import carma_kernels as ck
from carma_kernels import _runtime
from tests.contracts.ops import same_bits


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], Any]]:
    """Those made, to be made again."""
    made: list[Callable[[], Any]] = []
    launch = _runtime.launch

    def record(*arguments: Any, **options: Any) -> Any:
        made.append(lambda: launch(*arguments, **options))
        return launch(*arguments, **options)

    monkeypatch.setattr(_runtime, "launch", record)
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("T", "number"), [(12, 3), (140, 6)], ids=["short", "long"])
def test_a_step_is_its_launches(
    device: str, T: int, number: int, dtype: torch.dtype, launches: list[Callable[[], Any]]
) -> None:
    generator = torch.Generator().manual_seed(T)
    hidden = [torch.randn(2, T, 16, generator=generator).to(device, dtype).requires_grad_() for _ in range(3)]
    spans = ck.TokenSpans.from_lists([[(0, 3), (4, 6)], [(1, 5), (6, 8)]], seq_len=T).to(device)

    def step() -> tuple[Tensor, ...]:
        found = ck.carma_loss(hidden, spans, backend="triton")
        return (*found[:5], *torch.autograd.grad(found.loss, hidden))

    results = step()
    assert len(launches) == number
    once = list(launches)
    with torch.no_grad():
        for layer in hidden:
            layer.copy_(torch.randn(layer.shape, generator=generator))
    expected = step()
    assert not same_bits(results[0], expected[0])
    for again in once:
        again()
    assert all(map(same_bits, results, expected))
