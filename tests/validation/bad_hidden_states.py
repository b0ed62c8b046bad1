"""Hidden states that every loss must refuse."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor

from tests.validation.calls import FUNCTIONS, HIDDEN, call
from tests.validation.house_style import Bad

Row = tuple[str, Callable[[], Any], type[Exception], str, str]


def with_layer(layer: Any) -> list[Any]:
    return [HIDDEN[0], layer, HIDDEN[2]]


def jagged() -> Tensor:
    return torch.nested.nested_tensor([HIDDEN[0, 0], HIDDEN[0, 1, :3]], layout=torch.jagged)


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def call_with_dtensor(function: str, *, stacked: bool) -> object:
    with process_group():
        sharded = distribute_tensor(HIDDEN if stacked else HIDDEN[1], init_device_mesh("cpu", (1,)))
        return call(function, sharded if stacked else with_layer(sharded))


TENSOR_OR_LIST = "must be a tensor [L, B, T, D] or a list of L tensors [B, T, D]"
ONE_LAYER = "must be a tensor [B, T, D]"
FLOATS = "must be one of float16, bfloat16, float32, float64"
DENSE = "must be a dense tensor"
UNSTACKED = "Pass a list of [B, T, D] tensors if the layers are not stacked"

AS_A_WHOLE: list[Row] = [
    ("one layer", lambda: HIDDEN[0], ValueError, "[2, 6, 4]", "pass [hidden_states] or hidden_states[None]"),
    ("a matrix", lambda: HIDDEN[0, 0], ValueError, "[6, 4]", UNSTACKED),
    ("rank 5", lambda: HIDDEN[None], ValueError, "[1, 3, 2, 6, 4]", UNSTACKED),
    ("a dict", lambda: dict(enumerate(HIDDEN)), TypeError, "a dict", "Pass the layers in order"),
    ("a dict's values", lambda: dict(enumerate(HIDDEN)).values(), TypeError, "dict_values", "Pass list(hidden_states)"),
    ("a generator", lambda: (layer for layer in HIDDEN), TypeError, "generator", "Pass list(hidden_states)"),
    ("an array", lambda: HIDDEN.numpy(), TypeError, "ndarray", TENSOR_OR_LIST),
    ("a string", lambda: "hidden", TypeError, "str", TENSOR_OR_LIST),
    ("None", lambda: None, TypeError, "NoneType", TENSOR_OR_LIST),
    ("an empty list", list, ValueError, "none", "must hold at least one layer"),
    ("an empty stack", lambda: HIDDEN[:0], ValueError, "none", "must hold at least one layer"),
    ("a sparse stack", lambda: HIDDEN.to_sparse(), TypeError, "sparse_coo", DENSE),
]
THE_FIRST: list[Row] = [
    ("what blocks return", lambda: [(layer, None) for layer in HIDDEN], TypeError, "tuple", "Pass output[0]"),
    ("a list of sequences", lambda: [HIDDEN[0, 0]], ValueError, "[6, 4]", "must be [B, T, D]"),
    ("a list of stacks", lambda: [HIDDEN], ValueError, "[3, 2, 6, 4]", "must be [B, T, D]"),
    ("no width", lambda: HIDDEN[..., :0], ValueError, "[2, 6, 0]", "must be at least 1"),
    ("integers", lambda: HIDDEN.long(), TypeError, "torch.int64", FLOATS),
    ("layers of integers", lambda: [layer.int() for layer in HIDDEN], TypeError, "torch.int32", FLOATS),
    ("booleans", lambda: HIDDEN.bool(), TypeError, "torch.bool", FLOATS),
    ("complex numbers", lambda: HIDDEN.cfloat(), TypeError, "torch.complex64", FLOATS),
    ("fp8", lambda: HIDDEN.to(torch.float8_e4m3fn), TypeError, "torch.float8_e4m3fn", FLOATS),
    ("a nested tensor", lambda: [jagged()], TypeError, "nested", DENSE),
]
THE_SECOND: list[Row] = [
    ("a missing layer", lambda: with_layer(None), TypeError, "NoneType", ONE_LAYER),
    ("an array for a layer", lambda: with_layer(HIDDEN[1].numpy()), TypeError, "ndarray", ONE_LAYER),
    ("mixed widths", lambda: with_layer(HIDDEN[1, :, :, :3]), ValueError, "[2, 6, 3]", "Pass the block outputs only"),
    ("mixed lengths", lambda: with_layer(HIDDEN[1, :, :5]), ValueError, "[2, 5, 4]", "must have one shape"),
    ("mixed batches", lambda: with_layer(HIDDEN[1, :1]), ValueError, "[1, 6, 4]", "must have one shape"),
    ("mixed dtypes", lambda: with_layer(HIDDEN[1].half()), TypeError, "torch.float16", "Convert them with .to(dtype)"),
    ("mixed devices", lambda: with_layer(HIDDEN[1].to("meta")), ValueError, "on meta", "Move them with .to('cpu')"),
    ("a layer of integers", lambda: with_layer(HIDDEN[1].long()), TypeError, "torch.int64", FLOATS),
    ("a sparse layer", lambda: with_layer(HIDDEN[1].to_sparse()), TypeError, "sparse_coo", DENSE),
]

HIDDEN_STATES = [
    *(
        Bad(f"{function}: {id}", lambda f=function, make=make: call(f, make()), error, argument, got, way_out)
        for function in FUNCTIONS
        for argument, rows in (
            ("hidden_states", AS_A_WHOLE),
            ("hidden_states[0]", THE_FIRST),
            ("hidden_states[1]", THE_SECOND),
        )
        for id, make, error, got, way_out in rows
    ),
    *(
        Bad(
            f"{function}: {argument} is a DTensor",
            lambda f=function, stacked=stacked: call_with_dtensor(f, stacked=stacked),
            TypeError,
            argument,
            "DTensor",
            "Pass the local part with .to_local()",
        )
        for function in FUNCTIONS
        for argument, stacked in (("hidden_states", True), ("hidden_states[1]", False))
    ),
]
