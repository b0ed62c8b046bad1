"""The kernels as the driver has loaded them need no more than the committed table of compilations says."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import triton

import carma_kernels as ck
from carma_kernels import _runtime
from carma_kernels.ops import compile
from tests.cli.processes import ROOT

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("users_defaults")]

TABLE = ROOT / "docs" / "compile_table" / f"triton-{triton.__version__}.tsv"
REMEDY = f"`python -m carma_kernels.ops.compile > {TABLE.relative_to(ROOT)}` makes it"

Key = tuple[str, str, frozenset[str]]  # kernel, dtype, its constants


class Loaded(NamedTuple):
    """What a launch returned."""

    key: Key
    registers: int
    spills: int
    shared_memory: int  # bytes


def read(table: Path, target: str) -> dict[Key, dict[str, str]]:
    """The rows of a target."""
    with table.open(newline="") as file:
        rows = [row for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE) if row["target"] == target]
    return {(row["kernel"], row["dtype"], constants_of(row["constants"].split(","))): row for row in rows}


def constants_of(assignments: Any) -> frozenset[str]:
    return frozenset(assignment.strip() for assignment in assignments if assignment.strip())


@contextmanager
def loaded(dtype: torch.dtype) -> Iterator[list[Loaded]]:
    """What is launched within."""
    launch, found = _runtime.launch, []

    def record(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> Any:
        kernel_as_loaded = launch(kernel, grid, *arguments, **options)
        name = kernel.__name__.strip("_").removesuffix("_kernel")
        key = (name, str(dtype).removeprefix("torch."), constants_of(compile.constants(options).split(",")))
        resources = (kernel_as_loaded.n_regs, kernel_as_loaded.n_spills, kernel_as_loaded.metadata.shared)
        found.append(Loaded(key, *resources))
        return kernel_as_loaded

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_runtime, "launch", record)
        yield found


@contextmanager
def on(device: str) -> Iterator[None]:
    """The compile tool's problems are made on the device, instead of being compiled for one."""
    there = {name: partial(getattr(torch, name), device=device) for name in ("zeros", "ones", "tensor")}
    from_lists = ck.TokenSpans.from_lists
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compile, "torch", SimpleNamespace(**{**vars(torch), **there}))
        patch.setattr(ck.TokenSpans, "from_lists", lambda *given, **named: from_lists(*given, **named).to(device))
        yield


def judge(found: list[Loaded], table: dict[Key, dict[str, str]]) -> list[str]:
    """What is wrong."""
    faults = []
    for kernel in dict.fromkeys(found):
        name, dtype, constants = kernel.key
        label = f"{name} {dtype} {' '.join(sorted(constants))}"
        row = table.get(kernel.key)
        if row is None:
            faults.append(f"not in {TABLE.name}: {label}: {REMEDY}")
            continue
        if not row["registers"].isdigit():
            faults.append(f"{row['faults']}, says {TABLE.name}: {label}")
            continue
        aligned = not any(c.startswith("ALIGNMENT=") for c in constants) or "ALIGNMENT=16" in constants
        if kernel.spills and aligned:  # layers at any address are loaded element by element: less is asked
            faults.append(f"spills {4 * kernel.spills} bytes: {label}")
        if kernel.registers > int(row["registers"]):
            faults.append(f"{kernel.registers} registers instead of {row['registers']}: {label}")
        if kernel.shared_memory > 1024 * (float(row["shared KiB"]) + 0.5):
            faults.append(f"{kernel.shared_memory} bytes of shared memory, not {row['shared KiB']} KiB: {label}")
    return faults


@pytest.fixture(scope="module")
def table() -> dict[Key, dict[str, str]]:
    target = _runtime.target(torch.device("cuda", 0))
    assert target is not None
    if target.name not in _runtime.TARGETS:
        pytest.skip(f"{target.name} is none of the targets that the kernels are compiled for")
    if not TABLE.exists():
        pytest.skip(f"no {TABLE.relative_to(ROOT)}: {REMEDY}")
    return read(TABLE, target.name)


@pytest.mark.parametrize("dtype", compile.DTYPES, ids=str)
@pytest.mark.parametrize("problem", compile.problems(subset=False))
def test_as_in_the_table(problem: str, dtype: torch.dtype, table: dict[Key, dict[str, str]]) -> None:
    run = compile.problems(subset=False)[problem]
    with on("cuda"), loaded(dtype) as found:
        run(dtype)
    assert found
    assert not (faults := judge(found, table)), "\n".join(faults)


@pytest.mark.parametrize("dtype", compile.DTYPES, ids=str)
@pytest.mark.parametrize("T", [58, 300])
def test_of_a_users_call(T: int, dtype: torch.dtype, table: dict[Key, dict[str, str]]) -> None:
    """As carma_loss is called by default: the kernels that matter are in the table."""
    spans = ck.TokenSpans.from_lists([[(at, at + 3) for at in range(0, T - 3, 8)]] * 2, seq_len=T).to("cuda")
    hidden = torch.randn(4, 2, T, 768, device="cuda", dtype=dtype, requires_grad=True)
    with loaded(dtype) as found:
        ck.carma_loss(hidden, spans, backend="triton").loss.backward()
    assert not (faults := judge(found, table)), "\n".join(faults)


def test_what_is_wrong_is_said() -> None:
    key = ("short_forward", "bfloat16", constants_of(["ALIGNMENT=16", "COSINE=True"]))
    odd = ("short_forward", "bfloat16", constants_of(["ALIGNMENT=2", "COSINE=True"]))
    row = {"registers": "128", "shared KiB": "24"}
    known = {key: row, odd: row}
    good = Loaded(key, registers=128, spills=0, shared_memory=24 * 1024 + 200)
    assert judge([good, good], known) == []
    assert judge([good._replace(key=odd, spills=3)], known) == []
    for wrong, said in (
        (good._replace(registers=129), "129 registers instead of 128"),
        (good._replace(spills=3), "spills 12 bytes"),
        (good._replace(shared_memory=25 * 1024), "25600 bytes of shared memory, not 24 KiB"),
        (good._replace(key=("mi_scores", *key[1:])), "not in triton-"),
    ):
        (fault,) = judge([wrong], known)
        assert said in fault
        assert "ALIGNMENT=16 COSINE=True" in fault
    (fault,) = judge([good], {key: {"registers": "", "faults": "does not compile: so"}})
    assert "does not compile: so, says triton-" in fault
