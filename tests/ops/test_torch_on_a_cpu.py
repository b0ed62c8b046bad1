"""The torch backend on a CPU: whichever way a problem's size makes it go, it computes the same.

The cases are small enough for the shortest way: all layers read together, every key multiplied with every key, and the
similarities kept for the backward. The others are taken here by moving the sizes at which they begin.
"""

from __future__ import annotations

import gc
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import carma_kernels as ck
from carma_kernels.eager import carma, layers, mi
from tests.cases import FP32, MI_CASES, STABILITY_CASES, TORCH, Case, make_batch
from tests.ops import test_carma
from tests.ops import test_mi as test_mi_loss
from tests.ops import test_stability as test_stability_loss

NOTHING = sys.maxsize
WAYS: dict[str, dict[Any, dict[str, int]]] = {
    "as it is": {},
    "anchors with keys": {mi: {"_FEW_KEYS": 0}},
    "layer by layer": {layers: {"_AT_ONCE_ON_CPU": 0}},
    "layer by layer, anchors with keys": {layers: {"_AT_ONCE_ON_CPU": 0}, mi: {"_FEW_KEYS": 0}},
    "some layers kept": {carma: {"_KEPT": 10}},
    "nothing kept": {carma: {"_KEPT": NOTHING}},
    "nothing kept, layer by layer, anchors with keys": {
        carma: {"_KEPT": NOTHING},
        layers: {"_AT_ONCE_ON_CPU": 0},
        mi: {"_FEW_KEYS": 0},
    },
    "anchors in pieces": {layers: {"_AT_ONCE_ON_CPU": 0, "_TILE_ON_CPU": 0}},
    "products in pieces": {layers: {"_ROWS": 1}},
}


BY_LAYER = [way for way in WAYS if "layer by layer" in way or way == "anchors in pieces"]


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    for module, sizes in WAYS[request.param].items():
        for name, size in sizes.items():
            monkeypatch.setattr(module, name, size)
    return str(request.param)


def each_once(cases: list[Case]) -> list[Case]:
    """In fp64, which takes every branch, and in halves, which are read as fp32."""
    return [case for case in cases if case.dtype != FP32]


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("way", list(WAYS)[1:], indirect=True)
@pytest.mark.parametrize("case", each_once(MI_CASES), ids=str)
def test_mi(case: Case) -> None:
    test_mi_loss.compare(TORCH, case)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("way", ["layer by layer"], indirect=True)
@pytest.mark.parametrize("case", each_once(STABILITY_CASES), ids=str)
def test_stability(case: Case) -> None:
    test_stability_loss.test_values_and_gradients(TORCH, case)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("way", BY_LAYER, indirect=True)
@pytest.mark.parametrize(("mi_layers", "stability_layers"), test_carma.RANGES)
@pytest.mark.parametrize("case", each_once(test_carma.CASES), ids=str)
def test_both(case: Case, mi_layers: tuple[int, int] | None, stability_layers: tuple[int, int] | None) -> None:
    test_carma.test_values_and_gradients(TORCH, case, mi_layers, stability_layers)


TAKEN = {
    "as it is": {"whole matrix", "one tile", "kept", "together"},
    "anchors with keys": {"one tile", "kept", "together"},
    "layer by layer": {"whole matrix", "one tile", "kept"},
    "layer by layer, anchors with keys": {"one tile", "kept"},
    "some layers kept": {"whole matrix", "one tile", "kept", "not kept", "together"},
    "nothing kept": {"whole matrix", "one tile", "not kept", "together"},
    "nothing kept, layer by layer, anchors with keys": {"one tile", "not kept"},
    "anchors in pieces": {"pieces", "not kept"},
    "products in pieces": {"whole matrix", "one tile", "kept", "together", "many products"},
}


def test_each_way_is_taken(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = set()
    weigh, read, multiply = mi.ContrastRun.weigh, layers.LayerRows._rows, torch.bmm
    number_of_products = 0

    def watched_weigh(run: mi.ContrastRun, *arguments: Any) -> None:
        weigh(run, *arguments)
        taken.add("one tile" if run._one_tile else "pieces")
        taken.add("not kept" if run._kept is None else "kept")
        if run._both_ways:
            taken.add("whole matrix")

    def watched_read(rows: layers.LayerRows, some: range) -> Tensor:
        if len(some) > 1:
            taken.add("together")
        return read(rows, some)

    def watched_multiply(*arguments: Any, **options: Any) -> Tensor:
        nonlocal number_of_products
        number_of_products += 1
        return multiply(*arguments, **options)

    monkeypatch.setattr(mi.ContrastRun, "weigh", watched_weigh)
    monkeypatch.setattr(layers.LayerRows, "_rows", watched_read)
    monkeypatch.setattr(torch, "bmm", watched_multiply)
    D = 6 if way == "anchors in pieces" else 64
    batch = make_batch(Case(drawing="dense", D=D, L=4, negatives="batch"))  # tiles of 10 x 16
    hidden = batch.hidden.requires_grad_()
    ck.mi_loss(hidden, batch.spans, negatives="batch", backend="torch").backward()
    if "together" in taken and number_of_products > 10:
        taken.add("many products")
    assert taken == TAKEN[way]


def test_what_is_made_of_words_serves_later_calls() -> None:
    """Also where nobody could have asked for a gradient the first time."""
    batch = make_batch(Case(dtype=FP32))
    hidden = batch.hidden.float()
    with torch.inference_mode():
        first = ck.mi_loss(hidden, batch.spans, backend="torch")
    loss = ck.mi_loss(hidden.requires_grad_(), batch.spans, backend="torch")
    loss.backward()
    assert loss.equal(first.clone())
    assert hidden.grad is not None
    assert hidden.grad.isfinite().all()


def test_what_is_made_of_words_goes_with_them() -> None:
    gc.collect()
    before = len(mi._MADE)
    batch = make_batch(Case(dtype=FP32))
    for _ in range(2):
        ck.mi_loss(batch.hidden.float(), batch.spans, backend="torch")
    assert len(mi._MADE) == before + 1
    del batch
    gc.collect()
    assert len(mi._MADE) == before
