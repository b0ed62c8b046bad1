"""Markdown tables of result files.

python -m bench.report RESULT.json...                              everything measured
python -m bench.report RESULT.json... --page docs/performance.md   the same and the pictures, into a page
python -m bench.report RESULT.json --update README.md              a summary, into a page
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from bench.floor import Cost, Rates
from bench.markdown import milliseconds, provenance, table, workload_of
from bench.providers import BASELINE, COMPILED, HEADLINE, OURS, PEERS
from bench.quick_tables import quick
from bench.workloads import GROWTH

PASSES = ("forward+backward", "forward")
SIZES = ("T", "B", "L", "D")
"""Those of which a power can be told."""

HOST_PASSES = ("forward", "backward", "both")

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"

Benchmark = dict[str, Any]
"""One entry of `benchmarks` in pytest-benchmark's JSON."""


def details(benchmarks: list[Benchmark], machine: dict[str, Any]) -> str:
    """Everything measured, with its spread: a row for each workload, implementation and pass."""
    rates = Rates(**machine["rates"]) if "rates" in machine else None  # files of before 2026-11-22 have none
    parts = []
    for passes in PASSES:
        chosen = _losses(benchmarks, passes)
        columns: dict[str, Callable[[Benchmark], str]] = {
            "workload": _workload,
            "implementation": lambda b: b["extra_info"]["provider"],
            "median ms": lambda b: milliseconds(b["stats"]["median"]),
            "min to max (rounds)": _spread,
            "as a CUDA graph": _graph_milliseconds,
            "against published": partial(_speedup, medians=_medians(chosen, BASELINE)),
            "against compiled": partial(_speedup, medians=_medians(chosen, COMPILED)),
            "extra MB": _megabytes,
            "of the hidden states": _share_of_hidden,
            "must move MB": _must_move,
            "of the floor": partial(_share_of_floor, rates=rates),
            "compiled in s": _compile_seconds,
        }
        cells = {name: [cell(b) for b in chosen] for name, cell in columns.items()}
        filled = {name: column for name, column in cells.items() if any(column)}
        if chosen:
            rows = [list(row) for row in zip(*filled.values(), strict=True)]
            parts.append(f"Both losses, {passes}:\n\n{table(list(filled), rows)}")
    return "\n\n".join([*parts, *_lost(benchmarks), *_growth(benchmarks), *_packing(benchmarks), provenance(machine)])


def summary(benchmarks: list[Benchmark], machine: dict[str, Any]) -> str:
    """Forward + backward in two tables, time and memory: a row for each workload, a column for each implementation.

    The variants of an implementation, and the workloads on which one size grows, are left to `details`.
    """
    losses = [b for b in _losses(benchmarks, "forward+backward") if b["extra_info"]["workload"]["name"] != "growth"]
    chosen = [b for b in losses if b["extra_info"]["provider"] in HEADLINE]
    published = _medians(chosen, BASELINE)
    time = _pivot(chosen, lambda b: " ".join([f"{milliseconds(b['stats']['median'])} ms", _speedup(b, published)]))
    memory = _pivot(chosen, lambda b: f"{_megabytes(b)} MB {_share_of_hidden(b)}")
    return "\n\n".join(
        [
            f"Median time of both losses, forward + backward, and how often it fits into the published one:\n\n{time}",
            f"Peak extra memory, and what multiple of the hidden states' size it is:\n\n{memory}",
            *_packing(benchmarks),
            provenance(machine),
        ]
    )


def steps(runs: list[dict[str, Any]]) -> str:
    """Whole training steps, each against the same without CARMA."""
    rows = []
    for run in runs:
        same = ("model", "B", "T", "words", "checkpointing", "dtype")
        plain = next((r for r in runs if r["losses"] == "none" and all(r[key] == run[key] for key in same)), run)
        middle = median(run["seconds"])
        more_time = middle / median(plain["seconds"]) - 1
        more_memory = run["peak_bytes"] / plain["peak_bytes"] - 1
        rows.append(
            [
                f"{run['model']}, {run['dtype']}{', checkpointing' if run['checkpointing'] else ''}",
                f"B={run['B']}, T={run['T']}, {run['words']}",
                run["losses"],
                milliseconds(middle),
                f"{milliseconds(min(run['seconds']))} to {milliseconds(max(run['seconds']))} ({len(run['seconds'])})",
                "" if run is plain else f"{100 * more_time:+.1f} %",
                f"{run['B'] * run['T'] / middle:.4g}",
                f"{run['peak_bytes'] / 1e6:.4g}",
                "" if run is plain else f"{100 * more_memory:+.2f} %",
            ]
        )
    header = ["model", "batch", "CARMA by", "median ms", "min to max (steps)", "time", "tokens/s", "peak MB", "memory"]
    return f"Whole training steps, and what CARMA adds to them:\n\n{table(header, rows)}"


def host_times(runs: list[dict[str, Any]]) -> str:
    """What calls cost the host, and how often 100 small operations fit into that."""
    rows = []
    for run in runs:
        passes = [f"{1e6 * run[name]['min']:.0f} ({1e6 * run[name]['median']:.0f})" for name in HOST_PASSES]
        ratio = "{of_minima:.2f}x ({median:.2f}x)".format(**run["against_small"])
        call = f"{run['backend']}, {run['dtype']}"
        rows.append([workload_of(run["workload"]), call, *passes, ratio])
    header = ["workload", "backend", *HOST_PASSES, "of 100 small operations"]
    return (
        "The host's microseconds for a call of carma_loss and its backward, minimum and median of the rounds, without "
        "the launches where the backend is Triton's; the ratio of the minima, and the median of the rounds' ratios:"
        f"\n\n{table(header, rows)}"
    )


def update(page: Path, tables: str) -> None:
    """Put the tables between the page's markers.

    Raises:
        ValueError: the page does not have both markers, once each and in order.
    """
    text = page.read_text()
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in tail:
        raise ValueError(f"{page} must have one {BEGIN} and after it one {END}.")
    page.write_text(f"{head}{BEGIN}\n{tables}\n{END}{tail}")


def _losses(benchmarks: list[Benchmark], passes: str) -> list[Benchmark]:
    """Tiny workloads only if there is nothing else."""
    chosen = [b for b in benchmarks if b["extra_info"].get("passes") == passes]
    return [b for b in chosen if b["extra_info"]["workload"]["name"] != "tiny"] or chosen


def _medians(benchmarks: list[Benchmark], provider: str) -> dict[str, float]:
    """A provider's seconds by workload."""
    return {_workload(b): b["stats"]["median"] for b in benchmarks if b["extra_info"]["provider"] == provider}


def _lost(benchmarks: list[Benchmark]) -> list[str]:
    """Where a peer is faster than this package's best on the device; nothing if there is nothing to compare."""
    compared, rows = 0, []
    for passes in PASSES:
        chosen = _losses(benchmarks, passes)
        for workload in dict.fromkeys(map(_workload, chosen)):
            seconds = {b["extra_info"]["provider"]: b["stats"]["median"] for b in chosen if _workload(b) == workload}
            peers = {name: seconds[name] for name in PEERS if name in seconds}
            best = min((name for name in OURS if name in seconds), key=seconds.__getitem__, default=None)
            if best is None:
                continue
            compared += len(peers)
            own = seconds[best]
            rows += [
                [workload, passes, best, milliseconds(own), name, milliseconds(peer), f"{own / peer:.3g}x"]
                for name, peer in peers.items()
                if peer < own
            ]
    if not rows:
        return [f"No peer was faster in any of {compared} comparisons."] if compared else []
    header = ["workload", "pass", "this package", "median ms", "faster peer", "its median ms", "as long"]
    return [f"Cases lost, of {compared}: where a peer was faster.\n\n{table(header, rows)}"]


def _growth(benchmarks: list[Benchmark]) -> list[str]:
    """With which power of a size time and memory grow, fitted over its larger half: 1 is linear."""
    chosen = [b for b in benchmarks if b["extra_info"].get("workload", {}).get("name") == "growth"]
    rows = []
    for name in dict.fromkeys(b["extra_info"]["provider"] for b in chosen):
        own = [b for b in chosen if b["extra_info"]["provider"] == name]
        powers = [_powers(own, size) for size in SIZES]
        rows.append([name, *map(", ".join, powers)])
    if not rows:
        return []
    header = ["implementation", *(f"{size}: time, memory" for size in SIZES)]
    middle = workload_of(asdict(GROWTH[0]))
    return [
        "The power of a size with which time and extra memory grow, over the larger half of its values (1 is linear, "
        f"2 quadratic); the other sizes as in {middle}:\n\n{table(header, rows)}"
    ]


def _powers(own: list[Benchmark], size: str) -> list[str]:
    """Of time and of memory; none where fewer than three points are left."""
    middle = asdict(GROWTH[0])
    points = sorted(
        (w[size], b["stats"]["median"], b["extra_info"]["peak_bytes"])
        for b in own
        if all(
            (w := b["extra_info"]["workload"])[other] == middle[other]
            for other in ("L", "B", "T", "D", "words")
            if other != size
        )
    )
    points = points[len(points) // 2 - 1 :]
    if len(points) < 3:
        return []
    x, *ys = np.log(np.array(points, dtype=float)).T
    return [f"{np.polyfit(x, y, 1)[0]:.2f}" for y in ys]


def _packing(benchmarks: list[Benchmark]) -> list[str]:
    rows = [
        [f"{info['B']} x {info['T']} word ids", info["form"], milliseconds(b["stats"]["median"]), _spread(b)]
        for b in benchmarks
        if "form" in (info := b["extra_info"])
    ]
    if not rows:
        return []
    return [f"Packing the words of a batch:\n\n{table(['batch', 'as', 'median ms', 'min to max (rounds)'], rows)}"]


def _workload(benchmark: Benchmark) -> str:
    return workload_of(benchmark["extra_info"]["workload"])


def _spread(benchmark: Benchmark) -> str:
    stats = benchmark["stats"]
    return f"{milliseconds(stats['min'])} to {milliseconds(stats['max'])} ({stats['rounds']})"


def _graph_milliseconds(benchmark: Benchmark) -> str:
    seconds = benchmark["extra_info"].get("graph_seconds")
    return milliseconds(median(seconds)) if seconds else ""


def _speedup(benchmark: Benchmark, medians: dict[str, float]) -> str:
    other = medians.get(_workload(benchmark))
    return f"{other / benchmark['stats']['median']:.3g}x" if other else ""


def _megabytes(benchmark: Benchmark) -> str:
    return f"{benchmark['extra_info']['peak_bytes'] / 1e6:.4g}"


def _share_of_hidden(benchmark: Benchmark) -> str:
    info = benchmark["extra_info"]
    return f"{info['peak_bytes'] / info['hidden_bytes']:.2f}x"


def _must_move(benchmark: Benchmark) -> str:
    floor = benchmark["extra_info"].get("floor")
    return f"{sum(cost['bytes'] for cost in floor) / 1e6:.4g}" if floor else ""


def _share_of_floor(benchmark: Benchmark, rates: Rates | None) -> str:
    if rates is None:
        return ""
    floor = sum(Cost(**cost).seconds(rates) for cost in benchmark["extra_info"]["floor"])
    return f"{100 * floor / benchmark['stats']['median']:.3g} %"


def _compile_seconds(benchmark: Benchmark) -> str:
    seconds = benchmark["extra_info"].get("compile_seconds")
    return "" if seconds is None else f"{seconds:.3g}"


def _pivot(benchmarks: list[Benchmark], cell: Callable[[Benchmark], str]) -> str:
    providers = list(dict.fromkeys(b["extra_info"]["provider"] for b in benchmarks))
    cells: dict[str, dict[str, str]] = {}
    for b in benchmarks:
        cells.setdefault(_workload(b), {})[b["extra_info"]["provider"]] = cell(b)
    rows = [[workload, *(row.get(provider, "") for provider in providers)] for workload, row in cells.items()]
    return table(["workload", *providers], rows)


def main() -> None:
    """Print every table, or put tables into a page, with the pictures beside it."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description="Markdown tables of saved runs.")
    parser.add_argument("results", type=Path, nargs="+", help="bench/results/<device>/<date>.json, or a train_step's")
    parser.add_argument(
        "--update", type=Path, metavar="PAGE", help=f"put a summary between {BEGIN} and {END} of this page instead"
    )
    parser.add_argument(
        "--page", type=Path, metavar="PAGE", help="put every table there instead, and draw into pictures/ beside it"
    )
    arguments = parser.parse_args()
    stored = [json.loads(path.read_text()) for path in arguments.results]
    if arguments.update:
        update(arguments.update, "\n\n".join(_tables(result, summary) for result in stored))
        return
    tables = "\n\n".join(_tables(result, details) for result in stored)
    if arguments.page:
        from bench.pictures import draw

        names = [name for result in stored for name in draw(result, arguments.page.parent / "pictures")]
        update(arguments.page, "\n\n".join([*(f"![{name}](pictures/{name}.png)" for name in names), tables]))
    else:
        sys.stdout.write(tables + "\n")


def _tables(stored: dict[str, Any], losses: Callable[[list[Benchmark], dict[str, Any]], str]) -> str:
    if "steps" in stored:
        return f"{steps(stored['steps'])}\n\n{provenance(stored['machine_info'])}"
    if "parts" in stored:
        return quick(stored)
    if "host_times" in stored:
        return f"{host_times(stored['host_times'])}\n\n{provenance(stored['machine_info'])}"
    return losses(stored["benchmarks"], stored["machine_info"])


if __name__ == "__main__":
    main()
