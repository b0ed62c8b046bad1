"""Measure the launch table anew on a GPU, and print the rows that would be better.

    python -m bench.tune [--only mi_scores short_forward] [--dtypes bfloat16 float32] [--rehearse]

Of each kernel, at each size, every candidate is launched as a loss launches it, on the same tensors. What it leads to
must agree with what the table's own choice leads to; then its launches are timed alone, each with a cold L2 cache:
median and the 20th and 80th percentile. A candidate replaces the table's choice if even its slower percentile is below
the faster one of that. The rows printed at the end go into `carma_kernels/kernels/launch.py`; run
`python -m carma_kernels.ops.compile` on them before anything else. Takes a GPU half an hour to an hour, most of it
compilation.

`--rehearse` goes the same way on tiny tensors on a CPU, in Triton's interpreter: its times say nothing.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from unittest.mock import patch

import torch
from torch import Tensor

import carma_kernels as ck
from bench.candidates import CANDIDATES
from bench.launches import Launch, Resources, recorded
from bench.on_gpu import Spread, kernel_seconds
from bench.workloads import Case, Workload, token_spans
from carma_kernels import _runtime
from carma_kernels.kernels import launch
from carma_kernels.kernels.launch import Configuration

AGREE = {torch.bfloat16: 2**-6, torch.float16: 2**-9, torch.float32: 1e-4}
"""How far two candidates may be apart, relative to the largest number: they round in other places."""

Loss = Callable[[list[Tensor], ck.TokenSpans], Tensor]


def _carma(hidden: list[Tensor], spans: ck.TokenSpans) -> Tensor:
    return ck.carma_loss(hidden, spans, backend="triton").loss


def _stability(hidden: list[Tensor], _spans: ck.TokenSpans) -> Tensor:
    return ck.stability_loss(hidden, backend="triton")


def _listed(hidden: list[Tensor], spans: ck.TokenSpans) -> Tensor:
    generator = torch.Generator(spans.device).manual_seed(0)
    return ck.mi_loss(hidden, spans.sample_pairs(5, generator), backend="triton")


def _similarity(hidden: list[Tensor], _spans: ck.TokenSpans) -> Tensor:
    return ck.pairwise_similarity(hidden, backend="triton").square().mean()


@dataclass(frozen=True)
class Subject:
    """A kernel of the launch table, and on what it is measured."""

    loss: Loss
    workloads: tuple[Workload, ...]
    size: str  # of a workload, that decides in the launch table
    kernels: tuple[str, ...] = ()  # that are launched with it, if not the one of its name


_GROUPS = tuple(Workload("groups", 12, 16, T, 768, "dense") for T in (16, 32, 64, 124))
_LONG = (Workload("long", 12, 8, 1024, 768, "dense"), Workload("long", 4, 1, 8192, 2048, "dense"))
_WIDE = tuple(Workload("wide", 8, 8, 512, D, "dense") for D in (512, 768, 2048, 4096))

SUBJECTS = {
    "stability_forward": Subject(_stability, _WIDE, "D"),
    "stability_backward": Subject(_stability, _WIDE, "D"),
    "short_forward": Subject(_carma, _GROUPS, "T"),
    "short_backward": Subject(_carma, _GROUPS, "T"),
    "mi_scores": Subject(_carma, _LONG, "T"),
    "mi_weights": Subject(_carma, _LONG, "T"),
    "mi_gradient": Subject(_carma, _LONG, "T"),
    "similarity_tiles": Subject(
        _similarity, (*_GROUPS[2:], _LONG[0]), "T", ("similarity_forward", "similarity_projection")
    ),
    "similarity_backward": Subject(_similarity, (*_GROUPS[2:], _LONG[0]), "T"),
    "pairs_forward": Subject(_listed, _WIDE, "D"),
    "pairs_backward": Subject(_listed, _WIDE, "D"),
}
"""By their names in the launch table, as `CANDIDATES`"""

TINY = Workload("tiny", 2, 1, 12, 16, "dense")


@dataclass(frozen=True)
class Measured:
    """A candidate's time."""

    configuration: Configuration
    seconds: Spread
    resources: Resources

    def beats(self, other: Measured) -> bool:
        """Beyond the spread of both."""
        return self.seconds[2] < other.seconds[0]


Timer = Callable[[Callable[[], object]], Spread]


def in_rehearsal(repeated: Callable[[], object]) -> Spread:
    """Of the interpreter, which says nothing of a GPU."""
    start = time.perf_counter()
    repeated()
    return (time.perf_counter() - start,) * 3


class Tuner:
    """Measures the candidates of one kernel on one workload."""

    def __init__(self, name: str, case: Case) -> None:
        """Take a name in the launch table."""
        self._name, self._subject, self._case = name, SUBJECTS[name], case
        self._spans = token_spans(case)
        self._wanted = self._results()

    def measure(
        self, configuration: Configuration | None, timer: Timer, change: Callable[[Launch], Launch] = lambda own: own
    ) -> Measured | str:
        """A candidate's time, or why it has none.

        Args:
            configuration: None for the table's own choice.
            timer: of the launches.
            change: what to launch instead of what would be.
        """
        chosen: list[Configuration] = []
        choose = launch.choose

        def forced(kernel: str, target: _runtime.Target, size: int, element_bytes: int) -> Configuration | None:
            found = choose(kernel, target, size, element_bytes)
            if kernel == self._name:
                found = configuration or found
                chosen.extend([found] if found is not None else [])
            return found

        kernels = self._subject.kernels or (self._name,)
        try:
            with patch.object(launch, "choose", forced), recorded(kernels, change) as launches:
                results = self._results()
            if not chosen or not any(chosen[-1].options.items() <= made.constants.items() for made in launches):
                return "is not what was launched"
            if (reason := self._disagreement(results)) is not None:
                return reason
            resources = [Resources.of(made()) for made in launches]
            seconds = timer(lambda: [made() for made in launches])
        except Exception as error:  # a candidate that does not compile or fit is a finding
            return f"fails: {type(error).__name__}: {' '.join(str(error).split())[:120]}"
        return Measured(chosen[-1], seconds, max(resources, key=lambda needs: needs.shared_memory or 0))

    def _disagreement(self, results: list[Tensor]) -> str | None:
        for wanted, found in zip(self._wanted, results, strict=True):
            error = (wanted.float() - found.float()).abs().max() / wanted.float().abs().max()
            if not error <= AGREE[self._case.hidden_states[0].dtype]:  # also if it is no number
                return f"is wrong: off by {error:.1e} of the largest number"
        return None

    def _results(self) -> list[Tensor]:
        loss = self._subject.loss(self._case.hidden_states, self._spans)
        return [loss.detach(), *torch.autograd.grad(loss, self._case.hidden_states)]


def entry(measured: Measured, size: int, element_bytes: int) -> str:
    """A row of the launch table."""
    configuration = replace(
        measured.configuration, max_size=size, min_bytes=element_bytes, max_bytes=element_bytes, shared_memory=0
    )
    arguments = [repr(dict(configuration.constants))]
    for name in ("num_warps", "num_stages", "max_size", "min_bytes", "max_bytes", "max_registers"):
        value = getattr(configuration, name)
        if value is not None:
            arguments.append(f"{name}={value}")
    return f"Configuration({', '.join(arguments)}, shared_memory={measured.resources.shared_memory or 0}),"


def tune(names: Sequence[str], dtypes: Sequence[torch.dtype], rehearse: bool, write: Callable[[str], object]) -> None:
    """Measure, and write a line for each candidate, then the rows."""
    timer, device = (in_rehearsal, "cpu") if rehearse else (kernel_seconds, "cuda")
    rows: dict[str, list[str]] = {}
    for name, dtype in itertools.product(names, dtypes):
        subject = SUBJECTS[name]
        for workload in (TINY,) if rehearse else subject.workloads:
            tuner = Tuner(name, workload.build_there(device, dtype))
            size = getattr(workload, subject.size)
            write(f"{name}, {workload}, {str(dtype).removeprefix('torch.')}: us, 20th percentile and 80th")
            shipped = tuner.measure(None, timer)
            write(f"  {_line(shipped)}  <- the table's")
            if isinstance(shipped, str):
                continue
            best = shipped
            fitting = (candidate for candidate in CANDIDATES[name]() if candidate.max_size >= size)
            for candidate in itertools.islice(fitting, 2 if rehearse else None):
                measured = tuner.measure(candidate, timer)
                write(f"  {_line(measured, candidate)}")
                if isinstance(measured, Measured) and measured.seconds[1] < best.seconds[1]:
                    best = measured
            if best.beats(shipped):
                rows.setdefault(name, []).append(entry(best, size, dtype.itemsize))
    write("\nRows for carma_kernels/kernels/launch.py" + " (rehearsed: NOT measured on a GPU)" * rehearse + ":")
    for name, lines in rows.items():
        write(f'"{name}": [\n    ' + "\n    ".join(lines))
    if not rows:
        write("none: nothing beats the table by more than the spread")


def _line(measured: Measured | str, configuration: Configuration | None = None) -> str:
    if isinstance(measured, Measured):
        configuration = measured.configuration
    options = (
        "" if configuration is None else ", ".join(f"{name}={value}" for name, value in configuration.options.items())
    )
    if isinstance(measured, str):
        return f"{options} {measured}"
    fast, middle, slow = (1e6 * seconds for seconds in measured.seconds)
    return f"{middle:10.1f} ({fast:.1f} to {slow:.1f})  {options}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.tune", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=SUBJECTS, default=list(SUBJECTS), metavar="KERNEL")
    parser.add_argument("--dtypes", nargs="+", choices=[str(d).removeprefix("torch.") for d in AGREE])
    parser.add_argument(
        "--rehearse", action="store_true", help="on a CPU, in Triton's interpreter, two candidates each"
    )
    asked = parser.parse_args(arguments)
    if asked.rehearse:
        if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
            parser.error(
                "--rehearse needs Triton's interpreter, but Triton is imported already: set TRITON_INTERPRET=1."
            )
        os.environ["TRITON_INTERPRET"] = "1"
    elif not torch.cuda.is_available():
        parser.error("there is no GPU to measure on (torch.cuda.is_available() is False). --rehearse runs without one.")
    elif os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("Triton's interpreter is on, whose times say nothing: unset TRITON_INTERPRET.")
    dtypes = [getattr(torch, name) for name in asked.dtypes or ("bfloat16", "float32")]

    def write(line: str) -> None:
        sys.stdout.write(line + "\n")
        sys.stdout.flush()

    if not asked.rehearse:
        properties = torch.cuda.get_device_properties(0)
        write(f"{properties.name}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}")
    tune(asked.only, dtypes, asked.rehearse, write)
    return 0


if __name__ == "__main__":
    sys.exit(main())
