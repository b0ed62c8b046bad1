"""Tables on their way to a device: what a CUDA graph copies from is never written to again."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from carma_kernels.ops import host_tables, layers
from carma_kernels.ops.layers import LayerTable, OnDevice, readable


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> host_tables._Captured:
    """With blocks of eight numbers, which need not be pinned where there is no GPU."""
    monkeypatch.setattr(host_tables, "_BLOCK", 8)
    monkeypatch.setattr(host_tables, "_pinned", lambda size: torch.zeros(size, dtype=torch.int64))
    return host_tables._Captured()


def test_captured_tables_stay_as_they_are(captured: host_tables._Captured) -> None:
    tables = [torch.arange(3) + 10 * number for number in range(7)]
    kept = [captured.keep(table) for table in tables]
    for table, original in zip(kept, tables, strict=True):
        assert torch.equal(table, original)
    assert len({table.data_ptr() for table in kept}) == len(kept)
    assert len(captured._blocks) == 4  # two tables in each, and none was given back


def test_memory_is_there_before_a_capture(captured: host_tables._Captured) -> None:
    captured.reserve()
    captured.keep(torch.arange(3))
    captured.reserve()
    assert len(captured._blocks) == 1
    captured.keep(torch.arange(4))
    captured.reserve()
    assert len(captured._blocks) == 2


@pytest.mark.parametrize("capturing", [False, True])
def test_where_a_copy_comes_from(
    capturing: bool, captured: host_tables._Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the kept ones while a graph is captured, and from memory that is given back otherwise."""
    pinned: list[Tensor] = []
    monkeypatch.setattr(host_tables, "_captured", captured)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: pinned.append(self) or self)
    copy = host_tables.copied_to([5, 6, 7], torch.device("meta"))
    assert copy.shape == (3,)
    assert len(captured._blocks) == 1
    assert captured._blocks[0][:3].tolist() == ([5, 6, 7] if capturing else [0, 0, 0])
    assert len(pinned) == int(not capturing)


@pytest.mark.parametrize("frozen", [None, (), (1,)], ids=str)
@pytest.mark.parametrize("number", [0.0, 10.0, 1 / 0.07, 1e300])
def test_numbers_and_both_tables_travel_together(number: float, frozen: tuple[int, ...] | None, monkeypatch) -> None:
    copies: list[object] = []
    monkeypatch.setattr(layers, "copied_to", lambda *asked: copies.append(asked) or host_tables.copied_to(*asked))
    hidden = [torch.randn(2, 3, 4) for _ in range(3)]
    places = [None if frozen and at in frozen else torch.empty_like(layer) for at, layer in enumerate(hidden)]
    out = None if frozen is None else LayerTable(tuple(places))
    there = OnDevice.of((number, 0.5), readable(hidden), out)
    assert there.hidden.addresses.tolist() == [layer.data_ptr() for layer in hidden]
    assert [value.shape for value in there.numbers] == [(), ()]
    assert there.numbers == (min(torch.tensor(number), torch.tensor(torch.finfo(torch.float32).max)), 0.5)
    assert (there.out is None) == (out is None)
    if there.out is not None:
        assert there.out.addresses.tolist() == [0 if place is None else place.data_ptr() for place in places]
    assert len(copies) == 1
