"""The host's time for both losses and their gradients, launches left out: `python -m bench.host_time [--save]`.

What a call costs before a GPU has anything to do: checks, tables, autograd, memory, and everything about a launch but
the launch. The device is pretended, so any machine with Triton will do; what is copied to a GPU is not copied. The
torch backend on one sequence is beside it, whole: there, too, most of the time is the host's.

As a ratio to 100 small operations of torch, timed in turns with the call, it can be held against another machine's.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any
from unittest.mock import patch

import torch

import carma_kernels as ck
from bench import report, saved
from bench.workloads import Case, Workload, token_spans
from carma_kernels import _backend, _runtime
from carma_kernels.measure import environment

SMALL_OPERATIONS = 100


@dataclass(frozen=True)
class Subject:
    """A call that is timed."""

    workload: Workload
    backend: str | None = "triton"
    """None for who does not ask for one: Triton, once it has agreed with the torch backend."""
    dtype: torch.dtype = torch.bfloat16


SUBJECTS = (
    Subject(Workload("short", L=12, B=16, T=58, D=768, words="dense")),
    Subject(Workload("short", L=12, B=16, T=58, D=768, words="dense"), None),
    Subject(Workload("short", L=28, B=16, T=58, D=768, words="dense")),
    Subject(Workload("long", L=12, B=8, T=256, D=768, words="dense")),
    Subject(Workload("one sequence", L=12, B=1, T=58, D=768, words="dense"), "torch", torch.float32),
)


class _Everything(set[Any]):
    def __contains__(self, _item: object) -> bool:
        return True


@contextmanager
def launches_left_out() -> Iterator[None]:
    """An H100 is pretended, where the backends have agreed, and no kernel runs: results are whatever was there."""
    with (
        patch.object(_runtime, "target", lambda _device: _runtime.TARGETS["sm_90"]),
        patch.object(_runtime, "launch", lambda *_arguments, **_options: None),
        patch.object(_backend, "_obstacles", {torch.device("cpu"): None}),
        patch.object(_backend, "_admitted", _Everything()),
    ):
        yield


def measure(subject: Subject, rounds: int, warm_up: int = 20) -> dict[str, Any]:
    """Minimum and median seconds of the passes and of both, and their ratio to the small operations in between."""
    case = subject.workload.build(dtype=subject.dtype)
    call = _call(case, subject.backend)
    with nullcontext() if subject.backend == "torch" else launches_left_out():
        for _ in range(warm_up):
            call()
        forward, backward, small = zip(*((*call(), _small_operations()) for _ in range(rounds)), strict=True)
    both = [sum(passes) for passes in zip(forward, backward, strict=True)]
    times = {"forward": forward, "backward": backward, "both": both}
    ratios = [of_round / operations for of_round, operations in zip(both, small, strict=True)]
    return {
        "backend": subject.backend or "triton by default",
        "dtype": str(subject.dtype).removeprefix("torch."),
        "workload": asdict(subject.workload),
        "rounds": rounds,
        **{name: {"min": min(seconds), "median": median(seconds)} for name, seconds in times.items()},
        "against_small": {"of_minima": min(both) / min(small), "median": median(ratios)},
    }


def _call(case: Case, backend: str | None) -> Callable[[], tuple[float, float]]:
    """A function that takes the seconds of forward and backward."""
    spans = token_spans(case)

    def call() -> tuple[float, float]:
        start = time.perf_counter()
        loss = ck.carma_loss(case.hidden_states, spans, backend=backend).loss
        between = time.perf_counter()
        loss.backward()
        end = time.perf_counter()
        for layer in case.hidden_states:
            layer.grad = None
        return between - start, end - between

    return call


def _small_operations() -> float:
    numbers = torch.ones(3)
    start = time.perf_counter()
    for _ in range(SMALL_OPERATIONS):
        numbers = numbers + 1
    return time.perf_counter() - start


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and save if asked."""
    parser = argparse.ArgumentParser(prog="python -m bench.host_time", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=400, help="default: %(default)s")
    parser.add_argument("--save", action="store_true", help="write bench/results/<device>/<date>-host-time.json")
    options = parser.parse_args(arguments)
    machine = environment() | {"torch_threads": 1, "load_at_start": round(os.getloadavg()[0], 2)}
    machine["device"] = machine["cpu"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        runs = [measure(subject, options.rounds) for subject in SUBJECTS]
    finally:
        torch.set_num_threads(threads)
    sys.stdout.write(report.host_times(runs) + "\n")
    if options.save:
        path = saved.new_file(machine["device"], "host-time")
        saved.write(path, {"machine_info": machine, "host_times": runs})
        sys.stdout.write(f"written to {path}\n")


if __name__ == "__main__":
    main()
