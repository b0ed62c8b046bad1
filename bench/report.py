"""Markdown tables of a result file: `python -m bench.report RESULT.json [--update README.md]`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.providers import BASELINE

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"

Benchmark = dict[str, Any]
"""One entry of `benchmarks` in pytest-benchmark's JSON."""


def details(benchmarks: list[Benchmark], machine: dict[str, Any]) -> str:
    """Everything measured, with its spread: a row for each workload, implementation and pass."""
    header = [
        "workload",
        "implementation",
        "median ms",
        "min to max (rounds)",
        "against published",
        "extra MB",
        "of the hidden states",
    ]
    parts = []
    for passes in ("forward+backward", "forward"):
        chosen = _losses(benchmarks, passes)
        baselines = _baselines(chosen)
        rows = [
            [
                _workload(b),
                b["extra_info"]["provider"],
                _milliseconds(b["stats"]["median"]),
                _spread(b),
                _speedup(b, baselines),
                _megabytes(b),
                _share_of_hidden(b),
            ]
            for b in chosen
        ]
        if rows:
            parts.append(f"Both losses, {passes}:\n\n{_table(header, rows)}")
    return "\n\n".join([*parts, *_packing(benchmarks), _provenance(machine)])


def summary(benchmarks: list[Benchmark], machine: dict[str, Any]) -> str:
    """Forward + backward in two tables, time and memory: a row for each workload, a column for each implementation."""
    chosen = _losses(benchmarks, "forward+backward")
    baselines = _baselines(chosen)
    time = _pivot(chosen, lambda b: " ".join([f"{_milliseconds(b['stats']['median'])} ms", _speedup(b, baselines)]))
    memory = _pivot(chosen, lambda b: f"{_megabytes(b)} MB {_share_of_hidden(b)}")
    return "\n\n".join(
        [
            f"Median time of both losses, forward + backward, and how often it fits into the published one:\n\n{time}",
            f"Peak extra memory, and what multiple of the hidden states' size it is:\n\n{memory}",
            *_packing(benchmarks),
            _provenance(machine),
        ]
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


def _baselines(benchmarks: list[Benchmark]) -> dict[str, float]:
    return {_workload(b): b["stats"]["median"] for b in benchmarks if b["extra_info"]["provider"] == BASELINE}


def _packing(benchmarks: list[Benchmark]) -> list[str]:
    rows = [
        [f"{info['B']} x {info['T']} word ids", info["form"], _milliseconds(b["stats"]["median"]), _spread(b)]
        for b in benchmarks
        if "form" in (info := b["extra_info"])
    ]
    if not rows:
        return []
    return [f"Packing the words of a batch:\n\n{_table(['batch', 'as', 'median ms', 'min to max (rounds)'], rows)}"]


def _workload(benchmark: Benchmark) -> str:
    w = benchmark["extra_info"]["workload"]
    return f"B={w['B']}, T={w['T']}, L={w['L']}, D={w['D']}, {w['words']}"


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.0f}" if seconds >= 1 else f"{seconds * 1e3:.3g}"


def _spread(benchmark: Benchmark) -> str:
    stats = benchmark["stats"]
    return f"{_milliseconds(stats['min'])} to {_milliseconds(stats['max'])} ({stats['rounds']})"


def _speedup(benchmark: Benchmark, baselines: dict[str, float]) -> str:
    baseline = baselines.get(_workload(benchmark))
    return f"{baseline / benchmark['stats']['median']:.3g}x" if baseline else ""


def _megabytes(benchmark: Benchmark) -> str:
    return f"{benchmark['extra_info']['peak_bytes'] / 1e6:.4g}"


def _share_of_hidden(benchmark: Benchmark) -> str:
    info = benchmark["extra_info"]
    return f"{info['peak_bytes'] / info['hidden_bytes']:.2f}x"


def _pivot(benchmarks: list[Benchmark], cell: Callable[[Benchmark], str]) -> str:
    providers = list(dict.fromkeys(b["extra_info"]["provider"] for b in benchmarks))
    cells: dict[str, dict[str, str]] = {}
    for b in benchmarks:
        cells.setdefault(_workload(b), {})[b["extra_info"]["provider"]] = cell(b)
    rows = [[workload, *(row.get(provider, "") for provider in providers)] for workload, row in cells.items()]
    return _table(["workload", *providers], rows)


def _table(header: list[str], rows: list[list[str]]) -> str:
    """Numbers, which is every cell that starts with one, to the right."""
    columns = list(zip(header, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    is_number = [all(cell[:1].isdigit() or not cell for cell in column[1:]) for column in columns]
    is_number[0] = False
    rule = ["-" * (width - 1) + (":" if right else "-") for width, right in zip(widths, is_number, strict=True)]
    lines = [
        [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, is_number, strict=True)
        ]
        for row in (header, rule, *rows)
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _provenance(machine: dict[str, Any]) -> str:
    commit = "unknown" if machine["commit"] is None else machine["commit"][:10]
    return (
        f"{machine['device']}, {machine['torch_threads']} thread(s) of {machine['cpu_cores']} cores, "
        f"load average before the run {machine['load_at_start']}, {machine['timer']}; "
        f"torch {machine['torch']}, python {machine['python']}, "
        f"commit {commit}{' with changes' if machine['dirty'] else ''}."
    )


def main() -> None:
    """Print every table, or put the summary into a page."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description="Markdown tables of a saved run.")
    parser.add_argument("result", type=Path, help="bench/results/<device>/<date>.json")
    parser.add_argument(
        "--update", type=Path, metavar="PAGE", help=f"put a summary between {BEGIN} and {END} of this page instead"
    )
    arguments = parser.parse_args()
    stored = json.loads(arguments.result.read_text())
    if arguments.update:
        update(arguments.update, summary(stored["benchmarks"], stored["machine_info"]))
    else:
        sys.stdout.write(details(stored["benchmarks"], stored["machine_info"]) + "\n")


if __name__ == "__main__":
    main()
