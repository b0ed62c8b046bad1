"""The checks in order, a line of a table for each, and what came of them."""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from carma_kernels import choose_backend
from carma_kernels._backend import BACKENDS
from carma_kernels._runtime import INTERPRET
from carma_kernels.doctor.findings import devices, one_line
from carma_kernels.verify.errors import TOLERANCE, Outcome, compare
from carma_kernels.verify.problems import CHECKS, Check, random_problem
from carma_kernels.verify.progress import Progress

_INTERPRETED_CASES = 3
"""Random problems for each check in Triton's interpreter, a thousand times slower: one for each dtype"""


class _Table(NamedTuple):
    """Of one backend on one device."""

    device: torch.device
    backend: str
    cases: int
    rows: list[tuple[Check, torch.dtype, range]]
    """what is checked, and the numbers of the problems"""

    @property
    def title(self) -> str:
        """What is checked, and how."""
        interpreted = _is_interpreted(self.backend, self.device)
        how = f", in Triton's interpreter, {self.cases} for all dtypes together" if interpreted else f": {self.cases}"
        return f"{self.backend} backend on {self.device}, random problems a check{how}; errors are relative"


def run(args: argparse.Namespace) -> int:
    """Check and print a table; returns 0 if every check is within its tolerance, 1 if not, 2 for a bad device."""
    try:
        import csrc_ref  # the reference: this is the one place of the package that may
    except ModuleNotFoundError:
        _say("verify needs csrc_ref, the reference, which comes in the same wheel:")
        _say("pip install --force-reinstall carma-kernels")
        return 1
    try:
        chosen = devices() if args.device == "all" else [_usable(args.device)]
    except Exception as error:
        _say(f"--device {args.device}: {one_line(error)}. Devices that torch can use here: {_listed(devices())}.")
        return 2
    with _interpreter(chosen, args.backend):
        return _check_devices(csrc_ref, chosen, args)


@contextmanager
def _interpreter(devices: list[torch.device], backend: str) -> Iterator[None]:
    """Have Triton interpret its kernels, unless a GPU is to run them: one process cannot do both."""
    if backend == "torch" or _has_gpu(devices) or INTERPRET in os.environ or "triton" in sys.modules:
        yield
        return
    os.environ[INTERPRET] = "1"  # read when Triton is imported, which torch may do at any time
    try:
        yield
    finally:
        del os.environ[INTERPRET]


def _check_devices(reference: Any, devices: list[torch.device], args: argparse.Namespace) -> int:
    started = time.perf_counter()
    tables, skipped = _tables(devices, args)
    within: list[bool] = []
    with Progress(sum(len(table.rows) for table in tables)) as progress:
        for table in tables:
            within += _check_all(reference, table, args, progress)
    for line in skipped:
        _say(line)
    if not within:
        _say("Nothing was checked.")
        return 1
    _say(f"{sum(within)} of {len(within)} checks within tolerance, in {time.perf_counter() - started:.0f} s.")
    if not all(within):
        _say("MISS: this installation does not compute what the reference does. Please report it with the output of")
        _say("`carma-kernels doctor` and `carma-kernels verify --verbose`.")
    return 0 if all(within) else 1


def _tables(devices: list[torch.device], args: argparse.Namespace) -> tuple[list[_Table], list[str]]:
    """What there is to check, and in words what cannot be."""
    tables: list[_Table] = []
    skipped: list[str] = []
    for device, backend in itertools.product(devices, BACKENDS if args.backend == "all" else (args.backend,)):
        if args.backend == "all" and backend == "triton" and device.type == "cpu" and _has_gpu(devices):
            continue  # runs on that
        try:
            choose_backend(backend, device)
        except (NotImplementedError, RuntimeError, ValueError) as error:
            skipped.append(f"Not checked: {backend} backend on {device}. {one_line(error)}")
            continue
        interpreted = _is_interpreted(backend, device)
        cases = min(args.cases, _INTERPRETED_CASES) if interpreted else args.cases
        no_fp64 = backend == "triton" or device.type == "mps"
        dtypes = [dtype for dtype in TOLERANCE if not (no_fp64 and dtype == torch.float64)]
        rows = [
            # what is slow has problems of its own for each dtype, where all others repeat theirs in every dtype
            (check, dtype, range(at, max(cases, at + 1), len(dtypes)) if interpreted or check.long else range(cases))
            for check in CHECKS
            for at, dtype in enumerate(dtypes)
        ]
        tables.append(_Table(device, backend, cases, rows))
    return tables, skipped


def _check_all(reference: Any, table: _Table, args: argparse.Namespace, progress: Progress) -> Iterator[bool]:
    """Print a table; yields for each of its rows whether it is within tolerance."""
    progress.say(table.title)
    progress.say(
        _row("function", "negatives", "metric", "dtype", "worst at", "value", "allowed", "gradients", "allowed", "")
    )
    for check, dtype, numbers in table.rows:
        outcomes = {}
        progress.next_step()
        for done, number in enumerate(numbers, start=1):
            progress.detail(f"{check.function}, {_name(dtype)}, problem {done} of {len(numbers)}")
            problem = random_problem(check, dtype, args.seed, number)
            outcomes[number] = compare(reference, problem, dtype, table.device, table.backend)
        for line in _report(check, dtype, outcomes, args.verbose):
            progress.say(line)
        yield all(outcome.excess <= 1 for outcome in outcomes.values())


def _report(check: Check, dtype: torch.dtype, outcomes: dict[int, Outcome], verbose: bool) -> Iterator[str]:
    worst = max(outcomes.values(), key=lambda outcome: outcome.excess)
    value_tolerance, gradient_tolerance = TOLERANCE[dtype]
    yield _row(
        check.function,
        check.negatives,
        check.metric,
        _name(dtype),
        worst.problem.shape,
        f"{max(outcome.value_error for outcome in outcomes.values()):.1e}",
        f"{value_tolerance:.1e}",
        f"{max(outcome.gradient_error for outcome in outcomes.values()):.1e}",
        f"{gradient_tolerance:.1e}",
        "MISS" if worst.excess > 1 else "ok",
    )
    for number, outcome in outcomes.items():
        if verbose or (outcome is worst and outcome.excess > 1):
            errors = outcome.failure or f"value {outcome.value_error:.1e}, gradients {outcome.gradient_error:.1e}"
            yield f"    problem {number}: {outcome.problem}: {errors}"


def _row(*cells: str) -> str:
    widths = (19, 9, 6, 8, 13, 7, 7, 9, 7, 4)
    return "  ".join(f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=True)).rstrip()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _is_interpreted(backend: str, device: torch.device) -> bool:
    return backend == "triton" and device.type == "cpu"


def _has_gpu(devices: list[torch.device]) -> bool:
    return any(device.type == "cuda" for device in devices)


def _usable(name: str) -> torch.device:
    device = torch.device(name)
    torch.empty(1, device=device).cpu()
    return device


def _listed(items: list[Any]) -> str:
    return ", ".join(map(str, items))


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
