"""What the torch backend launches on a GPU: its operations are counted on tensors that have shapes and no memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from math import ceil
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# what an operation launches on CUDA, by ATen's sources, where it is not one kernel
KERNELS: dict[str, Callable[..., int]] = {
    "logsumexp": lambda *_, **__: 9,  # amax, abs, eq, masked_fill, sub, exp, sum, log, add
    # cast, aminmax, two comparisons and asserts, remainder, mul, divide, arange, sort (3), put; without accumulate, put
    "index_put_": lambda _self, _index, _rows, accumulate=False, **_: 14 if accumulate else 1,
    "masked_fill": lambda *_, **__: 2,  # copies first
    "constant_pad_nd": lambda *_, **__: 2,  # fills first
    "searchsorted": lambda *_, **__: 1,
    # blocks of 65536 numbers, 320 of them a launch
    "_foreach_copy_": lambda to, *_, **__: ceil(sum(ceil(tensor.numel() / 65536) for tensor in to) / 320),
    # the pointers of at most 128 tensors go with a launch
    "stack": lambda tensors, *_, **__: ceil(len(tensors) / 128),
    "cat": lambda tensors, *_, **__: ceil(len(tensors) / 128),
}
NO_KERNEL = {"empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "_unsafe_view", "detach"}


class Launches(TorchDispatchMode):
    """Counts kernels by operation while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.of: Counter[str] = Counter()

    @property
    def number(self) -> int:
        return self.of.total()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        result = func(*args, **(kwargs or {}))
        if not is_view(func) and name not in NO_KERNEL and not is_empty(result):
            self.of[name] += KERNELS.get(name, lambda *_, **__: 1)(*args, **(kwargs or {}))
        return result


def is_view(func: Any) -> bool:
    aliases = [given.alias_info for given in func._schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)


def is_empty(result: Any) -> bool:
    return isinstance(result, Tensor) and not result.numel()
