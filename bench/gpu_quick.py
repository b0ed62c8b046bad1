"""The kernels on a GPU in one go of under nine minutes: `python -m bench.gpu_quick [--seconds 520] [--out FOLDER]`.

Three shapes in bf16, forward and backward of both losses:

- the implementations in turns: this package's and plain PyTorch, eager and compiled, each against fp64 first;
- each kernel alone: time, GB/s and TFLOP/s, registers, spills and shared memory as loaded;
- a few candidates for the launch table (`bench.tune` measures them all);
- what the device does for a step, as its profiler counts it.

Each part has a limit; what fails or lasts too long is a line, and what was found until then is printed and saved.
`--rehearse` goes the same way without a GPU, on tiny tensors, with every launch left out: its times say nothing.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
import torch._dynamo

from bench import candidates, check, quick_tables, saved, tune
from bench.floor import Rates, costs, kernel_cost
from bench.host_time import launches_left_out
from bench.launches import Launch, Resources, recorded
from bench.on_gpu import Gpu, Spread
from bench.providers import EAGER, PROVIDERS, Loss, compiled_peer
from bench.session import OutOfTime, Session, reason
from bench.workloads import Case, Workload
from carma_kernels.kernels import launch
from carma_kernels.measure import environment, peak_memory, synchronize

DTYPE = torch.bfloat16

SHORT = Workload("short", L=12, B=16, T=58, D=768, words="dense")
WIDE = Workload("wide", L=28, B=8, T=1024, D=3072, words="dense")
LONG = Workload("long", L=16, B=1, T=8192, D=2048, words="dense")
TINY = {
    SHORT: Workload("short", L=2, B=1, T=12, D=16, words="dense"),
    WIDE: Workload("wide", L=2, B=2, T=130, D=16, words="dense"),
    LONG: Workload("long", L=2, B=1, T=140, D=16, words="dense"),
}
"""What stands for them in a rehearsal; the words are as dense, the sequences short and long."""

Step = Callable[[], check.Result]

TRITON, GRAPH, TORCH, PLAIN = "triton", "triton, CUDA graph", "torch", "eager Gram"
COMPILED, REDUCED = "torch.compile", "reduce-overhead"
LONG_PATHS = ("tiles", "kept", "dense")
"""How the kernels may take long sequences: values of `launch.LONG_PATH`, where that is there."""


def _with_provider(name: str) -> Callable[[Gpu, Case], Step]:
    (provider,) = (provider for provider in PROVIDERS if provider.name == name)
    return lambda _gpu, case: _step(provider.prepare(case), case)


def _path_name(path: str) -> str:
    return f"{TRITON}, {path}"


def _is_usual(name: str) -> bool:
    """Whether it takes long sequences in tiles, as the costs of kernels are counted."""
    _, _, path = name.partition(", ")
    return (path or getattr(launch, "LONG_PATH", "tiles")) == "tiles"


def _step(loss: Loss, case: Case) -> Step:
    return lambda: check.run(loss, case.hidden_states, backward=True)


def _captured(gpu: Gpu, case: Case) -> Step:
    return gpu.captured(IMPLEMENTATIONS[TRITON](gpu, case))


def _compiled(mode: str | None, gpu: Gpu, case: Case) -> Step:
    return _step(compiled_peer(*gpu.how_to_compile(mode))(case), case)


def _on_path(path: str, gpu: Gpu, case: Case) -> Step:
    step = IMPLEMENTATIONS[TRITON](gpu, case)

    def on_path() -> check.Result:
        with patch.object(launch, "LONG_PATH", path):
            return step()

    return on_path


IMPLEMENTATIONS: dict[str, Callable[[Gpu, Case], Step]] = {
    TRITON: _with_provider("triton: carma_loss"),
    GRAPH: _captured,
    **{_path_name(path): partial(_on_path, path) for path in LONG_PATHS},
    TORCH: _with_provider("torch: carma_loss"),
    PLAIN: _with_provider(EAGER),
    COMPILED: partial(_compiled, None),
    REDUCED: partial(_compiled, "reduce-overhead"),
}


class Rehearsal(Gpu):
    """No GPU."""

    rounds = 2

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.name = "a rehearsal without a GPU"

    def seconds(self, step: Callable[[], object]) -> float:
        start = time.perf_counter()
        step()
        return time.perf_counter() - start

    def host_seconds(self, step: Callable[[], object]) -> float:
        return self.seconds(step)

    def kernel_seconds(self, launch: Callable[[], object]) -> Spread:
        return (self.seconds(launch),) * 3

    def captured(self, step: Callable[[], Any]) -> Callable[[], Any]:
        return step

    def how_to_compile(self, _mode: str | None) -> tuple[str | None, str]:
        return None, "eager"

    def reserved_bytes(self) -> int:
        return 0

    def operations(self, step: Callable[[], object]) -> dict[str, int]:
        step()
        return {"a kernel": 1}

    def rates(self, _dtype: torch.dtype) -> Rates:
        return Rates(1e12, 1e14)


@contextmanager
def _rehearsed() -> Iterator[None]:
    """Results are whatever was in memory, so nothing is compared with them."""
    with ExitStack() as stack:
        stack.enter_context(launches_left_out())
        stack.enter_context(patch.object(check, "assert_close", lambda *_: None))
        stack.enter_context(patch.object(tune.Tuner, "_disagreement", lambda *_: None))
        yield


class Quick:
    """The parts."""

    def __init__(self, session: Session, gpu: Gpu, workloads: dict[Workload, Workload]) -> None:
        """Take what stands for each of the workloads."""
        self._session, self._gpu, self._workloads = session, gpu, workloads

    def parts(self) -> list[tuple[str, int, Callable[[], None]]]:
        """Name, seconds at most, and what to do; what matters most comes first."""
        paths = [_path_name(path) for path in self._other_paths()]
        own = (TRITON, *paths, GRAPH, TORCH, PLAIN)
        return [
            ("rates", 20, self._rates),
            ("kernels, short", 30, partial(self._kernels, SHORT, TRITON)),
            ("kernels, long", 45, partial(self._kernels, LONG, TRITON)),
            ("kernels, wide", 30, partial(self._kernels, WIDE, TRITON)),
            *((f"kernels, long, {name}", 30, partial(self._kernels, LONG, name)) for name in paths),
            ("eager, short", 30, partial(self._compare, SHORT, (TRITON, GRAPH, TORCH, PLAIN))),
            ("eager, long", 45, partial(self._compare, LONG, own)),
            ("eager, wide", 45, partial(self._compare, WIDE, own)),
            ("compiled, short", 75, partial(self._compare, SHORT, (COMPILED,))),
            ("reduce-overhead, short", 60, partial(self._compare, SHORT, (REDUCED,))),
            ("candidates, short_backward", 30, partial(self._candidates, "short_backward", SHORT)),
            ("candidates, mi_scores, long", 50, partial(self._candidates, "mi_scores", LONG)),
            ("candidates, mi_weights, long", 60, partial(self._candidates, "mi_weights", LONG)),
            ("candidates, mi_gradient, long", 50, partial(self._candidates, "mi_gradient", LONG)),
            *(
                (f"candidates, {kernel}, wide", 20, partial(self._candidates, kernel, WIDE))
                for kernel in candidates.QUICK
                if kernel != "short_backward"
            ),
            ("compiled, long", 80, partial(self._compare, LONG, (COMPILED,))),
            ("compiled, wide", 120, partial(self._compare, WIDE, (COMPILED,))),
            ("reduce-overhead, long", 60, partial(self._compare, LONG, (REDUCED,))),
            ("reduce-overhead, wide", 90, partial(self._compare, WIDE, (REDUCED,))),
            ("operations, short", 30, partial(self._operations, SHORT)),
        ]

    def _other_paths(self) -> list[str]:
        own = getattr(launch, "LONG_PATH", None)
        if own is None:
            self._session.say(f"launch.LONG_PATH is not there: {', '.join(LONG_PATHS)} are not compared")
            return []
        return [path for path in LONG_PATHS if path != own]

    def _rates(self) -> None:
        rates = asdict(self._gpu.rates(DTYPE))
        self._session.results["machine_info"]["rates"] = rates
        self._session.say(", ".join(f"{name} {rate:.4g}" for name, rate in rates.items()))

    def _case(self, workload: Workload) -> tuple[dict[str, Any], Case]:
        """What records have of it, and its tensors."""
        actual = self._workloads[workload]
        return {"workload": asdict(actual)}, actual.build_there(self._gpu.device, DTYPE)

    def _kernels(self, workload: Workload, name: str) -> None:
        """Of the Triton backend, or of one of its paths for long sequences."""
        where, case = self._case(workload)
        where |= {"implementation": name}
        step = IMPLEMENTATIONS[name](self._gpu, case)
        start = time.perf_counter()
        step()
        synchronize(self._gpu.device)
        self._session.say(f"the first step: {time.perf_counter() - start:.1f} s")
        with recorded() as launches:
            result = step()  # kept: the launches write there again
        for kernel in dict.fromkeys(made.name for made in launches):
            own = [made for made in launches if made.name == kernel]
            # on another path, kernels of the same name do less
            cost = kernel_cost(kernel, self._workloads[workload], DTYPE.itemsize) if _is_usual(name) else None
            self._session.found("kernels", where | self._kernel(own) | {"cost": cost and asdict(cost)})
        del result

    def _kernel(self, own: list[Launch]) -> dict[str, Any]:
        last = own[-1]
        record = {"kernel": last.name, "launches": len(own), "grid": last.grid, "options": _sizes(last.constants)}
        try:
            resources = Resources.of(last())
            seconds = self._gpu.kernel_seconds(lambda: [made() for made in own])
        except Exception as error:
            return record | {"error": reason(error)}
        return record | resources._asdict() | {"seconds": seconds}

    def _compare(self, workload: Workload, names: Sequence[str]) -> None:
        """In turns with the Triton backend, whose own row is kept where it is named."""
        where, case = self._case(workload)
        where |= {
            "hidden_bytes": case.nbytes,
            "floor": [asdict(cost) for cost in costs(self._workloads[workload], DTYPE.itemsize, "forward+backward")],
        }
        in_fp64 = [h.detach().double().requires_grad_() for h in case.hidden_states]
        expected = check.exact_by_layer(case._replace(hidden_states=in_fp64))
        del in_fp64
        steps: dict[str, Step] = {}
        records: dict[str, dict[str, Any]] = {}
        for name in dict.fromkeys((TRITON, *names)):
            records[name] = where | {"implementation": name}
            try:
                steps[name], prepared = self._prepared(name, case, expected)
                records[name] |= prepared
            except Exception as error:
                records[name]["error"] = reason(error)
                self._session.say(f"{name}: {records[name]['error']}")
            except OutOfTime:
                self._session.found("implementations", records[name] | {"error": "was not ready in time"})
                raise
        del expected
        try:
            self._take_turns(steps, records)
        finally:
            for name in names:
                if name in records:
                    self._session.found("implementations", records[name])

    def _prepared(self, name: str, case: Case, expected: check.Result) -> tuple[Step, dict[str, Any]]:
        """A step that was compiled and found right, and what it takes besides time."""
        before, start = self._gpu.reserved_bytes(), time.perf_counter()
        step = IMPLEMENTATIONS[name](self._gpu, case)
        result = step()
        synchronize(self._gpu.device)
        first = time.perf_counter() - start
        check.assert_close(result, expected, check.TOLERANCE[DTYPE])
        del result
        for _ in range(3):  # some make a graph of the second or third
            step()
        record = {
            "first_seconds": first,
            "held_bytes": max(0, self._gpu.reserved_bytes() - before),
            "peak_bytes": peak_memory(step, self._gpu.device),
            "host_seconds": median(self._gpu.host_seconds(step) for _ in range(7)),
        }
        self._session.say(f"{name}: ready after {first:.1f} s")
        return step, record

    def _take_turns(self, steps: dict[str, Step], records: dict[str, dict[str, Any]]) -> None:
        """Add the seconds of each round to the records, and what multiple of the Triton backend's they are."""
        for _ in range(self._gpu.rounds):
            if self._session.is_short:
                break
            for name, step in list(steps.items()):
                try:
                    seconds = self._gpu.seconds(step)
                except Exception as error:
                    records[name]["error"] = reason(error)
                    del steps[name]
                    continue
                records[name].setdefault("seconds", []).append(seconds)
                if TRITON in steps:
                    records[name].setdefault("ratios", []).append(seconds / records[TRITON]["seconds"][-1])

    def _candidates(self, kernel: str, workload: Workload) -> None:
        where, case = self._case(workload)
        tuner = tune.Tuner(kernel, case)
        own = tuner.measure(None, self._gpu.kernel_seconds)
        self._session.found("candidates", where | _candidate(kernel, own, is_own=True, pieces=None))
        if isinstance(own, str):
            return
        for configuration in candidates.quick(kernel, own.configuration):
            for pieces in (1, 2) if kernel == "short_backward" else (None,):
                if pieces is None and configuration.options == own.configuration.options:
                    continue
                measured = tuner.measure(configuration, self._gpu.kernel_seconds, _with_pieces(pieces))
                record = _candidate(kernel, measured, options=configuration.options, pieces=pieces)
                self._session.found("candidates", where | record)

    def _operations(self, workload: Workload) -> None:
        """Of the implementations that were measured before."""
        where, case = self._case(workload)
        rows = self._session.results.get("implementations", [])
        measured = [row["implementation"] for row in rows if row["workload"] == where["workload"] and "seconds" in row]
        for name in measured:
            step = IMPLEMENTATIONS[name](self._gpu, case)
            for _ in range(4):
                step()
            record = {"implementation": name, "operations": self._gpu.operations(step)}
            self._session.found("operations", where | record)


def _with_pieces(pieces: int | None) -> Callable[[Launch], Launch]:
    return lambda own: own if pieces is None else own.with_pieces(pieces)


def _sizes(constants: dict[str, Any]) -> dict[str, int]:
    """Of a launch's constants those of the launch table."""
    named = ("NUM_BUFFERS", "PIECES", "num_warps", "num_stages", "maxnreg")
    return {name: value for name, value in constants.items() if name.startswith("BLOCK_") or name in named}


def _candidate(kernel: str, measured: tune.Measured | str, **rest: Any) -> dict[str, Any]:
    if isinstance(measured, str):
        return {"kernel": kernel, "error": measured, **rest}
    found = {"options": measured.configuration.options, "seconds": measured.seconds}
    return {"kernel": kernel, **rest, **found, **measured.resources._asdict()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and save; the exit code is 1 if a part is missing."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_quick", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seconds", type=float, default=520, help="until the process ends (default: %(default)s)")
    parser.add_argument("--only", nargs="+", default=[""], metavar="TEXT", help="parts with one of these in their name")
    parser.add_argument("--out", type=Path, help="the folder for results (default: the device's in bench/results)")
    parser.add_argument("--commit", help="of these sources, where they are a copy without git")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU, nothing launched")
    given = list(sys.argv[1:] if arguments is None else arguments)
    asked = parser.parse_args(given, argparse.Namespace(given=given))
    if asked.rehearse:
        with _rehearsed(), tempfile.TemporaryDirectory() as folder:
            return _run(asked, Rehearsal(), TINY, asked.out or Path(folder))
    if not torch.cuda.is_available():
        parser.error("there is no GPU to measure on (torch.cuda.is_available() is False). --rehearse runs without one.")
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("Triton's interpreter is on, whose times say nothing: unset TRITON_INTERPRET.")
    return _run(asked, Gpu(), {workload: workload for workload in TINY}, asked.out)


def _run(asked: argparse.Namespace, gpu: Gpu, workloads: dict[Workload, Workload], folder: Path | None) -> int:
    machine = environment() | {"device": gpu.name, "load_at_start": round(os.getloadavg()[0], 2)}
    machine["command"] = shlex.join(["python", "-m", "bench.gpu_quick", *asked.given])
    machine["commit"] = asked.commit or machine["commit"]
    results: dict[str, Any] = {"machine_info": machine, "parts": []}
    session = Session(
        asked.seconds, saved.new_file(gpu.name, "quick", folder), results, lambda: quick_tables.quick(results)
    )
    session.say(f"{gpu.name}, {asked.seconds:.0f} s")
    try:
        # what is compiled for more shapes and modes than dynamo thinks sensible would run uncompiled
        with torch._dynamo.config.patch(recompile_limit=64):
            for name, seconds, run in Quick(session, gpu, workloads).parts():
                if any(text in name for text in asked.only):
                    session.part(name, seconds, run)
    finally:
        code = session.close()
    return code


if __name__ == "__main__":
    sys.exit(main())
