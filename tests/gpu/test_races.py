"""Fifty repeats come to the same bits while another stream keeps the device busy, and to the right numbers.

A product that reads a tile while the next is loaded over it is right most of the time, and wrong where the device is
slow to come by: at some widths, in some lengths of groups, on some devices.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.cases import BF16, FP16, FP32, Backend
from tests.gpu.losses import LOSSES, step_of

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("users_defaults")]

REPEATS = 50
LENGTHS = [33, 64, 100, 128, 300]
WIDTHS = [48, 64, 80, 208, 768]


class Load:
    """Products and copies on a stream of their own."""

    def __init__(self, device: str, size: int = 2048) -> None:
        self._stream = torch.cuda.Stream()
        self._matrix = torch.randn(size, size, device=device).to(BF16)
        self._product = torch.empty_like(self._matrix)
        self._stream.wait_stream(torch.cuda.current_stream())

    def more(self) -> None:
        with torch.cuda.stream(self._stream):
            for _ in range(4):
                torch.mm(self._matrix, self._matrix, out=self._product)
                self._product.copy_(self._matrix)


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view({2: torch.int16, 4: torch.int32}[x.element_size()])


def count_changes(step: Callable[[], list[Tensor]], expected: list[Tensor], load: Load) -> int:
    """In how many numbers the repeats differ; the host waits for the device at the end alone."""
    changes = torch.zeros((), dtype=torch.int64, device=expected[0].device)
    for _ in range(REPEATS):
        load.more()
        for x, y in zip(step(), expected, strict=True):
            changes += (bits(x) != bits(y)).sum()
    return int(changes)


@pytest.mark.parametrize("dtype", [FP16, BF16, FP32], ids=str)
@pytest.mark.parametrize("D", WIDTHS)
@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("loss", LOSSES)
def test_repeats(backend: Backend, loss: str, T: int, D: int, dtype: torch.dtype) -> None:
    step = step_of(loss, (2, 4, T, D), dtype, backend.name, backend.device)
    expected = step()
    assert count_changes(step, expected, Load(backend.device)) == 0
    exact = step_of(loss, (2, 4, T, D), dtype, "torch", backend.device)()
    for x, y in zip(expected[:2], exact[:2], strict=True):  # to what halves round; a race is off by more
        torch.testing.assert_close(x.float(), y.float(), rtol=0.02, atol=0.02 * float(y.float().abs().max()))


def test_a_change_is_noticed() -> None:
    """Of one bit, in one repeat."""
    calls = 0

    def step() -> list[Tensor]:
        nonlocal calls
        calls += 1
        x = torch.ones(3, device="cuda")
        if calls == REPEATS // 2:
            x[1] += 2**-23
        return [x]

    assert count_changes(step, [torch.ones(3, device="cuda")], Load("cuda")) == 1
