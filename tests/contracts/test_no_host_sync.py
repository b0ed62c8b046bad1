"""A call never waits for the device: it reads no tensor on the host, and asks for no shape that depends on data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.cases import BF16, FP32, Backend, Case
from tests.contracts.ops import Op, make_problem

aten = torch.ops.aten
SYNCS = {
    aten._local_scalar_dense,  # item(), tolist(), bool(), float(), int(), index()
    aten.is_nonzero,
    aten.equal,
    aten.nonzero,
    aten.nonzero_numpy,
    aten.masked_select,
    aten.unique_dim,
    aten._unique,
    aten._unique2,
    aten.unique_consecutive,
    aten.bincount,
    aten.histc,
}


class NoHostSync(TorchDispatchMode):
    """Raises where a call on a GPU would wait for it."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket
        by_mask = name in (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_) and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        by_counts = name is aten.repeat_interleave and func is not aten.repeat_interleave.self_int
        moves = name is aten._to_copy and kwargs.get("device") not in (None, args[0].device)
        if name in SYNCS or by_mask or by_counts or moves:
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **kwargs)


def refuse(*_: Any, **__: Any) -> Any:
    raise AssertionError("reads a tensor on the host")


@pytest.fixture
def unreadable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No tensor can be read on the host: what on a CPU does not go through an operator is caught at the method."""
    with monkeypatch.context() as patch:
        for name in ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__", "__array__"):
            patch.setattr(Tensor, name, refuse)
        yield


@pytest.mark.parametrize("case", [Case(L=3), Case(L=3, D=64, stacked=False)], ids=str)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_forward_and_backward(
    backend: Backend, op: Op, case: Case, dtype: torch.dtype, request: pytest.FixtureRequest
) -> None:
    problem = make_problem(op, backend, case, dtype=dtype)
    request.getfixturevalue("unreadable")  # from here on
    with NoHostSync():
        problem.gradients()


@pytest.mark.parametrize(
    "sync",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).all()),
        lambda x: torch.equal(x, x),
        lambda x: x[x > 0],
        lambda x: x.masked_select(x > 0),
        lambda x: x.index_put_((x > 0,), torch.tensor(0.0)),
        lambda x: torch.repeat_interleave(x, torch.tensor([1, 2, 3])),
        lambda x: x.unique(),
        lambda x: torch.where(x > 0),
        lambda x: x.to("meta"),
    ],
)
def test_the_guard_notices(sync: Callable[[Tensor], object]) -> None:
    with pytest.raises(AssertionError, match="waits for the device"), NoHostSync():
        sync(torch.ones(3))


@pytest.mark.usefixtures("unreadable")
def test_tensors_are_unreadable() -> None:
    for read in (Tensor.tolist, Tensor.numpy, bool, float, int, range):
        with pytest.raises(AssertionError, match="on the host"):
            read(torch.ones(()))
