"""A call never waits for the device: it reads no tensor on the host, and asks for no shape that depends on data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from tests.cases import BF16, FP32, Backend, Case
from tests.contracts.ops import Op, make_problem

SYNCS = {
    "aten::_local_scalar_dense",  # item(), tolist(), bool(), float(), int(), index()
    "aten::nonzero",  # boolean indices too
    "aten::masked_select",
    "aten::repeat_interleave",
    "aten::equal",
    "aten::is_nonzero",
    "aten::unique_dim",
    "aten::_unique",
    "aten::_unique2",
    "aten::unique_consecutive",
    "aten::bincount",
}


def host_syncs(call: Callable[[], object]) -> set[str]:
    """Operators for which a GPU would be waited for, also those that run within others."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        call()
    return {event.name for event in profiler.events() or ()} & SYNCS


def refuse(*_: Any, **__: Any) -> Any:
    raise AssertionError("reads a tensor on the host")


@pytest.fixture
def unreadable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No tensor can be read on the host: what on a CPU does not go through an operator is caught at the method."""
    with monkeypatch.context() as patch:
        for name in ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__", "__array__"):
            patch.setattr(Tensor, name, refuse)
        yield


@pytest.fixture
def no_interpreter_at_work(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that the interpreter would run with NumPy do nothing when launched: what is left is the host's part."""
    if backend.interpret:
        from triton.runtime.interpreter import GridExecutor

        monkeypatch.setattr(GridExecutor, "__call__", lambda *_, **__: None)


@pytest.mark.usefixtures("no_interpreter_at_work")
@pytest.mark.parametrize("case", [Case(L=3), Case(L=3, D=64, stacked=False)], ids=str)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_forward_and_backward(
    backend: Backend, op: Op, case: Case, dtype: torch.dtype, request: pytest.FixtureRequest
) -> None:
    problem = make_problem(op, backend, case, dtype=dtype)
    request.getfixturevalue("unreadable")  # from here on
    assert host_syncs(problem.gradients) == set()


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
    ],
)
def test_the_guard_notices(sync: Callable[[Tensor], object]) -> None:
    assert host_syncs(lambda: sync(torch.ones(3)))


@pytest.mark.usefixtures("unreadable")
def test_tensors_are_unreadable() -> None:
    for read in (Tensor.tolist, Tensor.numpy, bool, float, int, range):
        with pytest.raises(AssertionError, match="on the host"):
            read(torch.ones(()))
