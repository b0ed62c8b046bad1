"""Nothing that a kernel has not written is read: whatever new memory holds, the results keep their bits.

NaN shows what reaches a sum, a large number what reaches a maximum, or a comparison that NaN would fail.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from carma_kernels import _runtime
from tests.cases import BF16, FP16, FP32, Backend
from tests.contracts.ops import same_bits
from tests.gpu.losses import LOSSES, step_of

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("users_defaults")]


@pytest.fixture
def fill(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], list[Tensor]]:
    """`fill(number)` fills new tensors with it from then on, and returns the list to which they are added."""

    def start(number: float) -> list[Tensor]:
        filled: list[Tensor] = []

        def filling(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
            def made(*arguments: Any, **options: Any) -> Tensor:
                new = make(*arguments, **options)
                if new.is_floating_point():
                    most = torch.finfo(new.dtype).max
                    new.fill_(number if number != number else min(number, most))
                    filled.append(new)
                return new

            return made

        for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
            monkeypatch.setattr(owner, name, filling(getattr(owner, name)))
        return filled

    return start


@pytest.mark.parametrize("number", [torch.nan, 1e30])
@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)
@pytest.mark.parametrize("shape", [(3, 2, 13, 48), (2, 3, 70, 80), (2, 2, 131, 64), (2, 2, 300, 33)], ids=str)
@pytest.mark.parametrize("loss", LOSSES)
def test_results_do_not_depend_on_new_memory(
    backend: Backend, loss: str, shape: tuple[int, ...], dtype: torch.dtype, number: float, fill: Any
) -> None:
    step = step_of(loss, shape, dtype, backend.name, backend.device)
    expected = step()
    filled = fill(number)
    assert all(map(same_bits, step(), expected))
    assert len(filled) > 2, "of the workspaces, none was filled"


@pytest.mark.parametrize("number", [torch.nan, 1e30])
@pytest.mark.parametrize("T", [13, 131])
def test_what_a_kernel_leaves_out_is_noticed(
    backend: Backend, T: int, number: float, fill: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each kernel in turn is not launched."""
    step = step_of("carma", (2, 2, T, 48), FP32, backend.name, backend.device)
    launch, names = _runtime.launch, []

    def recording(kernel: Any, *arguments: Any, **options: Any) -> Any:
        names.append(kernel.__name__)
        return launch(kernel, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(_runtime, "launch", recording)
        expected = step()
    assert len(names) > 2
    fill(number)
    for missing in range(len(names)):
        left = iter(range(len(names)))

        def leaving_out(
            kernel: Any, *arguments: Any, _left: Any = left, _missing: int = missing, **options: Any
        ) -> Any:
            return None if next(_left) == _missing else launch(kernel, *arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(_runtime, "launch", leaving_out)
            assert not all(map(same_bits, step(), expected)), names[missing]
