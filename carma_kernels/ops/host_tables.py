"""Small tables of numbers on their way to a device, for which the host does not wait, in a CUDA graph's capture too."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_BLOCK = 2**17  # numbers, 1 MiB: the tables of hundreds of captured calls


def copied_to(values: Sequence[int], device: torch.device) -> Tensor:
    """`values` as int64 on the device."""
    table = torch.from_numpy(np.array(values, dtype=np.int64))  # half the time of torch.tensor
    if device.type == "cpu":
        return table
    if torch.cuda.is_current_stream_capturing():
        source = _captured.keep(table)
    else:
        _captured.reserve()
        source = table.pin_memory()
    return source.to(device, non_blocking=True)


class _Captured:
    """Tables that graphs hold copies from.

    A captured copy reads the host's memory again at every replay. So each table takes a place of its own, for good, in
    memory that is never freed, and that was pinned before the capture, during which none can be had.
    """

    def __init__(self) -> None:
        """Nothing is pinned yet."""
        self._free = torch.empty(0, dtype=torch.int64)
        self._blocks: list[Tensor] = []
        self._lock = threading.Lock()

    def reserve(self) -> None:
        """Have memory ready for the next captures."""
        if len(self._free) < _BLOCK // 4:
            with self._lock:
                self._new_block()

    def keep(self, table: Tensor) -> Tensor:
        """A copy of the table, never to be changed."""
        with self._lock:
            if len(self._free) < len(table):
                self._new_block()
            place, self._free = self._free[: len(table)], self._free[len(table) :]
        return place.copy_(table)

    def _new_block(self) -> None:
        self._free = _pinned(_BLOCK)
        self._blocks.append(self._free)


def _pinned(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.int64, pin_memory=True)


_captured = _Captured()
