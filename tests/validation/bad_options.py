"""Options that the losses, the config and `total_loss` must refuse."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch.autograd import forward_ad

import carma_kernels as ck
from carma_kernels import CarmaConfig, _backend, _runtime, _triton_here
from tests.validation.calls import (
    FUNCTIONS,
    HIDDEN,
    PAIRS,
    SPANS,
    WITH_MASK,
    WITH_PAIRS,
    WITH_TEMPERATURE,
    B,
    L,
    T,
    call,
)
from tests.validation.house_style import Bad

Row = tuple[Any, type[Exception], str, str]
META = torch.device("meta")


def numbers(condition: str) -> list[Row]:
    """What is no finite number that is > 0, or >= 0."""
    return [
        (-0.1, ValueError, "-0.1", f"must be a finite number {condition}"),
        (float("nan"), ValueError, "nan", f"must be a finite number {condition}"),
        (float("inf"), ValueError, "inf", f"must be a finite number {condition}"),
        (True, TypeError, "bool", f"must be a number {condition}"),
        ("0.1", TypeError, "str", f"must be a number {condition}"),
        (0.1j, TypeError, "complex", f"must be a number {condition}"),
        ([0.1], TypeError, "list", f"must be a number {condition}"),
    ]


def words(values: Iterable[Any], allowed: str) -> list[Row]:
    return [(value, ValueError, repr(value), f"must be one of {allowed}") for value in values]


POSITIVE = [*numbers("> 0"), (0, ValueError, "0", "must be a finite number > 0")]
NOT_NONE: list[Row] = [(None, TypeError, "NoneType", "must be a number > 0")]
SHARES: list[Row] = [
    *((value, ValueError, str(value), "must be a number in [0, 1]") for value in (1.1, -0.1, float("nan"))),
    *((value, TypeError, type(value).__name__, "must be a number in [0, 1]") for value in (True, "0.3", None)),
    (torch.tensor(0.3), TypeError, "Tensor", "must be a number in [0, 1]"),
]
SCALAR = "must be a number > 0 or a 0-d floating tensor"
TEMPERATURES: list[Row] = [
    (torch.tensor([0.1]), TypeError, "torch.float32 [1]", SCALAR),
    (torch.tensor(1), TypeError, "torch.int64 []", SCALAR),
    (torch.tensor(True), TypeError, "torch.bool []", "torch.nn.Parameter(torch.tensor(0.1))"),
    (torch.tensor(0.1, device=META), ValueError, "on meta", "Move it with .to('cpu')"),
]
MASKS: list[Row] = [
    *(
        (torch.ones(shape), ValueError, str(list(shape)), f"must be [{B}, {T}]")
        for shape in ((B,), (T,), (T, B), (B, T, 1), (B, T + 1), (B - 1, T))
    ),
    ([[1] * T] * B, TypeError, "list", "must be a tensor [B, T]"),
    (np.ones((B, T)), TypeError, "ndarray", "must be a tensor [B, T]"),
    (SPANS, TypeError, "TokenSpans", "Pass the batch's attention_mask, or spans.attention_mask"),
    (torch.ones(B, T, device=META), ValueError, "on meta", "Move it with .to('cpu')"),
    *(
        (torch.zeros(B, T, dtype=dtype), TypeError, str(dtype), "Pass mask == 0")
        for dtype in (torch.float32, torch.half)
    ),
]
COUNTS: list[Row] = [
    *((value, ValueError, str(value), "must be the number of pairs of the whole") for value in (0, -1, float("nan"))),
    (float("inf"), ValueError, "inf", "must be the number of pairs of the whole"),
    *((value, TypeError, type(value).__name__, "must be a number or a 0-d tensor") for value in (True, "8", [8])),
    (torch.ones(L), ValueError, "[3]", "must be a number or a 0-d tensor"),
    (torch.tensor(8, device=META), ValueError, "on meta", "Move it with .to('cpu')"),
]
RANGES: list[Row] = [
    *(
        (bounds, ValueError, repr(bounds), "must satisfy 0 <= start <= end <= 2")
        for bounds in ((0, 3), (3, 3), (-1, 1), (2, 1))
    ),
    *(
        (bounds, TypeError, repr(bounds), "must be None or (start, end), two ints, both included")
        for bounds in (1, (1,), (0, 1, 2), (0.0, 1.0), (False, True), (None, 1), "01", slice(0, 2), {0, 1})
    ),
]
SAMPLED: list[Row] = [("sampled", ValueError, "'sampled'", "pass spans.sample_pairs(k=5) in place of the spans")]
DTYPES: list[Row] = [
    (value, TypeError, repr(value), "must be None (fp32, or fp64 for fp64 hidden states) or a floating dtype")
    for value in (torch.int32, torch.complex64, "float32", float)
]


def bad(functions: Iterable[str], argument: str, rows: Iterable[Row], **others: Any) -> Iterator[Bad]:
    """Each value for each function, beside other arguments."""
    for function in functions:
        for value, error, got, way_out in rows:
            yield Bad(
                f"{function}: {argument} {got}{''.join(f' with {name}' for name in others)}",
                lambda f=function, value=value: call(f, **{argument: value}, **others),
                error,
                argument,
                got,
                way_out,
            )


def bad_values(label: str, make: Callable[[Any], object], argument: str, rows: Iterable[Row]) -> Iterator[Bad]:
    """Each value for something else than a loss."""
    for value, error, got, way_out in rows:
        yield Bad(f"{label}: {argument} {got}", lambda value=value: make(value), error, argument, got, way_out)


WITH_GROUP = ("mi_loss", "stability_loss", "carma_loss")
GROUPS: list[Row] = [
    (0, TypeError, "0", "Pass torch.distributed.group.WORLD"),
    ("nccl", TypeError, "'nccl'", "Pass torch.distributed.group.WORLD"),
    (dist.GroupMember.NON_GROUP_MEMBER, TypeError, "-100", "call the loss with the group that it is in"),
]


def call_with_destroyed_group(function: str) -> object:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    group = dist.group.WORLD
    call(function, group=group)  # good as long as it is there
    dist.destroy_process_group()
    return call(function, group=group)


def call_without_distributed(function: str) -> object:
    with mock.patch.object(dist, "is_available", return_value=False):
        return call(function, group=0)


def call_with_tangents(function: str, argument: str, value: Any) -> object:
    with forward_ad.dual_level():
        return call(function, **{argument: forward_ad.make_dual(value, torch.ones_like(value))})


def call_with_jvp(function: str, argument: str, value: Any) -> object:
    return torch.func.jvp(lambda x: call(function, **{argument: x}), (value,), (torch.ones_like(value),))


def call_with_jacfwd(function: str, argument: str, value: Any) -> object:
    return torch.func.jacfwd(lambda x: call(function, **{argument: x}))(value)


FORWARD_MODE = (call_with_tangents, call_with_jvp, call_with_jacfwd)
WITH_TANGENTS = [
    *((function, "hidden", "hidden_states", torch.ones(L, B, T, 4)) for function in FUNCTIONS),
    *((function, "temperature", "temperature", torch.tensor(0.1)) for function in WITH_TEMPERATURE),
]

OPTIONS = [
    *(
        Bad(
            f"{function}: {argument} in {differentiate.__name__.removeprefix('call_with_')}",
            partial(differentiate, function, keyword, value),
            NotImplementedError,
            argument,
            "carries a tangent",
            "csrc_ref",
        )
        for function, keyword, argument, value in WITH_TANGENTS
        for differentiate in FORWARD_MODE
    ),
    *bad(WITH_TEMPERATURE, "metric", words(("Cosine", "l2", "", None, 1), "'cosine', 'dot'")),
    *bad(WITH_PAIRS, "negatives", [*words(("Batch", "all", None, 5), "'sequence', 'batch'"), *SAMPLED]),
    *bad(WITH_PAIRS, "negatives", SAMPLED, spans=PAIRS),
    *bad(WITH_PAIRS, "negatives", [("batch", ValueError, "'batch'", "Leave negatives out")], spans=PAIRS),
    *bad(["mi_loss", "stability_loss"], "reduction", words(("avg", "", None, 0), "'mean', 'sum', 'none'")),
    *bad(WITH_TEMPERATURE, "temperature", [*POSITIVE, *NOT_NONE, *TEMPERATURES]),
    *bad(["stability_loss", "carma_loss"], "eps", [*POSITIVE, *NOT_NONE]),
    *bad(WITH_PAIRS, "match_negatives", POSITIVE),
    *bad(WITH_PAIRS, "match_negatives", [(5, ValueError, "5", "Leave match_negatives out")], spans=PAIRS),
    *bad(WITH_PAIRS, "num_pairs", COUNTS),
    *bad(["mi_loss"], "num_pairs", [(8, ValueError, "reduction='sum'", "drop num_pairs")], reduction="sum"),
    *bad(WITH_MASK, "mask", MASKS),
    *bad(["carma_loss"], "mask", words(("All", ""), "'all'")),
    *bad(["pairwise_similarity", "stability_loss"], "mask", [("all", TypeError, "str", "must be a tensor [B, T]")]),
    *bad(["pairwise_similarity", "mi_loss", "stability_loss"], "layers", RANGES),
    *bad(["carma_loss"], "mi_layers", RANGES),
    *bad(["carma_loss"], "stability_layers", RANGES),
    *bad(["pairwise_similarity"], "out_dtype", DTYPES),
    *bad(WITH_GROUP, "group", GROUPS),
    *(
        Bad(f"{function}: group {what}", partial(refused, function), error, "group", got, way_out)
        for function in WITH_GROUP
        for what, refused, error, got, way_out in (
            ("destroyed", call_with_destroyed_group, ValueError, "destroyed", "init_process_group()"),
            ("without torch.distributed", call_without_distributed, TypeError, "int", "must be None"),
        )
    ),
]


def call_with_variable(function: str, value: str) -> object:
    before = os.environ.get("CARMA_KERNELS_BACKEND")
    os.environ["CARMA_KERNELS_BACKEND"] = value
    try:
        return call(function)
    finally:
        os.environ.pop("CARMA_KERNELS_BACKEND")
        if before is not None:
            os.environ["CARMA_KERNELS_BACKEND"] = before


def call_on_a_gpu(function: str, self_check: str) -> object:
    """With the variable that says whether Triton is compared with the torch backend first."""
    gpu = _runtime.TARGETS["sm_90"]
    before = {name: value for name, value in os.environ.items() if name != "CARMA_KERNELS_BACKEND"}
    with (
        mock.patch.object(_runtime, "target", return_value=gpu),
        mock.patch.object(_backend, "_obstacles", {HIDDEN.device: None}),
        mock.patch.object(_backend, "_admitted", set()),
        mock.patch.dict(os.environ, {**before, "CARMA_KERNELS_SELF_CHECK": self_check}, clear=True),
        mock.patch.dict(sys.modules, {"carma_kernels.ops": mock.Mock()}),
        mock.patch.object(ck, "ops", mock.Mock(), create=True),
    ):
        return call(function)


def in_an_interpreter_too_old(name: str) -> object:
    """For the numpy beside it."""
    versions = {"triton": "3.6.0", "numpy": "2.4.6"}
    with (
        mock.patch.object(_runtime, "target", return_value=_runtime.INTERPRETER),
        mock.patch.object(_triton_here, "_version", versions.get),
        mock.patch("importlib.util.find_spec"),
    ):
        return ck.choose_backend(name, "cpu")


def without_triton(name: str) -> object:
    with mock.patch("importlib.util.find_spec", return_value=None):
        return ck.choose_backend(name, "cuda")


ALLOWED = "must be 'torch' or 'triton' (or left out)"
NOT_HERE: list[Row] = [("triton", ValueError, "tensors on cpu", "use 'torch', which runs on every device")]
UNKNOWN: list[Row] = [(value, ValueError, repr(value), ALLOWED) for value in ("nonsense", "Torch")]
BACKENDS = [
    *bad(FUNCTIONS, "backend", [*UNKNOWN, *NOT_HERE, ("", ValueError, "''", ALLOWED), (1, ValueError, "1", ALLOWED)]),
    *(
        row
        for function in FUNCTIONS
        for row in bad_values(
            function,
            lambda value, f=function: call_with_variable(f, value),
            "CARMA_KERNELS_BACKEND",
            [*UNKNOWN, *NOT_HERE],
        )
    ),
    *bad_values("choose_backend", lambda name: ck.choose_backend(name, "cpu"), "backend", [*UNKNOWN, *NOT_HERE]),
    *bad_values(
        "choose_backend without Triton",
        without_triton,
        "backend",
        [("triton", RuntimeError, "Triton is not installed", "pip install triton")],
    ),
    *bad_values(
        "choose_backend in an interpreter that does not run",
        in_an_interpreter_too_old,
        "backend",
        [("triton", RuntimeError, "Triton 3.6.0 does not run with numpy 2.4.6", "use triton >= 3.7 or numpy < 2.4")],
    ),
    *(
        row
        for function in FUNCTIONS
        for row in bad_values(
            function,
            lambda value, f=function: call_on_a_gpu(f, value),
            "CARMA_KERNELS_SELF_CHECK",
            [(value, ValueError, repr(value), "must be 1 (or left out), or 0") for value in ("no", "2", "false")],
        )
    ),
]

NO_CONFIGS: list[Row] = [
    (value, TypeError, type(value).__name__, "Use CarmaConfig(mi_weight=...)")
    for value in ({"mi_weight": 0.5}, 0.5, "mean", CarmaConfig, torch.ones(B, T))
]
CONFIGS = [
    *bad_values("carma_loss", lambda config: ck.carma_loss(HIDDEN, SPANS, config), "config", NO_CONFIGS),
    *bad_values("CarmaLoss", ck.CarmaLoss, "config", NO_CONFIGS),
    *(
        row
        for name in ("mi_weight", "stability_weight")
        for row in bad_values("CarmaConfig", lambda value, n=name: CarmaConfig(**{n: value}), name, numbers(">= 0"))
    ),
    *bad_values("CarmaConfig", lambda value: CarmaConfig(carma_weight=value), "carma_weight", SHARES),
    # at once, and not only when the loss is computed
    *bad_values("CarmaConfig", lambda value: CarmaConfig(eps=value), "eps", POSITIVE),
    *bad_values("CarmaConfig", lambda value: CarmaConfig(temperature=value), "temperature", POSITIVE),
    *bad_values("CarmaConfig", lambda value: CarmaConfig(negatives=value), "negatives", SAMPLED),
    *bad_values("CarmaConfig", lambda value: CarmaConfig(metric=value), "metric", words(["l2"], "'cosine', 'dot'")),
]

ONE, OUTPUT = torch.ones(()), ck.carma_loss(HIDDEN, SPANS)
LOSSES: list[Row] = [
    (OUTPUT, TypeError, "CarmaOutput", "Pass the output's .loss"),
    ({"loss": ONE}, TypeError, "dict", "Pass the output's .loss"),
    (1.0, TypeError, "float", "must be a 0-d tensor"),
    (OUTPUT.mi_per_layer, ValueError, "[3]", "Reduce it first"),
    (torch.ones(B, T), ValueError, "[2, 6]", "Reduce it first"),
]
TOTALS = [
    *bad_values("total_loss", lambda loss: ck.total_loss(loss, ONE, 0.3), "task_loss", LOSSES),
    *bad_values("total_loss", lambda loss: ck.total_loss(ONE, loss, 0.3), "carma_loss", LOSSES),
    *bad_values("total_loss", lambda weight: ck.total_loss(ONE, ONE, weight), "weight", SHARES),
]
