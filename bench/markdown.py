"""Pieces of the reports, in Markdown."""

from __future__ import annotations

from typing import Any

from bench.floor import Rates


def table(header: list[str], rows: list[list[str]]) -> str:
    """Numbers, which is every cell that starts with one, to the right."""
    columns = list(zip(header, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    is_number = [all(cell[:1] in "+-0123456789" for cell in column[1:]) for column in columns]
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


def milliseconds(seconds: float) -> str:
    """With three digits."""
    return f"{seconds * 1e3:.0f}" if seconds >= 1 else f"{seconds * 1e3:.3g}"


def workload_of(w: dict[str, Any]) -> str:
    """The sizes of a workload, as results have it, and how dense its words are."""
    return f"B={w['B']}, T={w['T']}, L={w['L']}, D={w['D']}, {w['words']}"


def provenance(machine: dict[str, Any]) -> str:
    """Where results come from."""
    commit = "unknown" if machine["commit"] is None else machine["commit"][:10]
    said = [
        f"{machine['device']}, {machine['torch_threads']} thread(s) of {machine['cpu_cores']} cores, "
        f"load average before the run {machine['load_at_start']}"
    ]
    if "rates" in machine:
        rates = Rates(**machine["rates"])
        copies, products = _in_billions(rates.bytes_per_second, 3), _in_billions(rates.flops_per_second, 4)
        said.append(f"copies {copies}B/s, multiplies {products}FLOP/s")
    if "timer" in machine:
        said.append(machine["timer"])
    versions = [f"torch {machine['torch']}", f"python {machine['python']}"]
    versions += [f"{name} {machine[name]}" for name in ("triton", "gpu_driver") if machine.get(name)]
    changes = " with changes" if machine["dirty"] else ""
    command = [f"`{machine['command']}`"] if "command" in machine else []
    return "; ".join([*said, ", ".join(versions), *command, f"commit {commit}{changes}."])


def _in_billions(number: float, digits: int) -> str:
    """`19.2 G`, or `4.31 T` of what a GPU has."""
    return f"{number / 1e9:.{digits}g} G" if number < 1e12 else f"{number / 1e12:.{digits}g} T"
