"""Triton's interpreter at half its cost, and with an eye on every address, for tests that run kernels in it."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch


def patch_the_language_once_a_kernel() -> None:
    """Not again at every call of a device function, which is most of the time that small kernels take.

    Whatever patches `triton.language` is the interpreter's own; only what it would find patched already is left out.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    if not hasattr(interpreter, "_LangPatchScope"):
        return  # another version of Triton: slower, and as right
    original = interpreter._patch_lang
    patched: set[int] = set()  # modules, while a kernel runs

    def patch(function: Any) -> Any:
        modules = {id(value) for value in function.__globals__.values() if value is tl or value is tl.core}
        if modules <= patched:
            return None
        is_kernel = not patched
        scope = original(function)
        patched.update(modules)
        if is_kernel:
            restore = scope.restore

            def restore_all() -> None:
                patched.clear()
                restore()

            scope.restore = restore_all
        return scope

    interpreter._patch_lang = patch


@contextmanager
def within_tensors() -> Iterator[None]:
    """Refuse what a kernel reads or writes outside of tensors, or across the end of one.

    Every element of a block must lie in one tensor: a stray store that happens to hit another one would go unnoticed
    otherwise, and one that hits none spoils the heap.
    """
    from triton.runtime import interpreter

    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, launch = builder.create_masked_load, builder.create_masked_store, executor.__call__
    bounds = np.zeros((0, 2), np.uint64)  # of all storages, sorted

    def check(pointers: Any, mask: Any) -> None:
        width = np.uint64(max(1, pointers.get_element_ty().primitive_bitwidth // 8))
        addresses = pointers.data[np.broadcast_to(mask.data, pointers.data.shape).astype(bool)].reshape(-1)
        place = np.searchsorted(bounds[:, 0], addresses, side="right").astype(np.int64) - 1
        inside = (place >= 0) & (addresses + width <= bounds[place, 1])
        if not inside.all() or len(np.unique(place)) > 1:
            raise IndexError(f"{int((~inside).sum())} of {len(addresses)} elements lie outside of the tensor")

    def checked_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        check(pointers, mask)
        return load(self, pointers, mask, *rest)

    def checked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        check(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def checked_launch(self: Any, *arguments: Any, **options: Any) -> None:
        nonlocal bounds
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # others', of objects that are asked for their class
            tensors = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]
        storages = [tensor.untyped_storage() for tensor in tensors if tensor.device.type == "cpu"]
        bounds = np.array(sorted({(s.data_ptr(), s.data_ptr() + s.nbytes()) for s in storages}), np.uint64)
        launch(self, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "create_masked_load", checked_load)
        patch.setattr(builder, "create_masked_store", checked_store)
        patch.setattr(executor, "__call__", checked_launch)
        yield
