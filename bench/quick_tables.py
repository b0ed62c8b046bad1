"""What `bench.gpu_quick` has found, in tables that a terminal of 120 columns can show."""

from __future__ import annotations

from statistics import median
from typing import Any

from bench.floor import Cost, Rates
from bench.markdown import milliseconds, provenance, table, workload_of
from bench.on_gpu import spread

Record = dict[str, Any]

_NOT_SAID = ("num_warps", "num_stages", "maxnreg", "PIECES")
_FAILED = "failed"


def quick(results: dict[str, Any]) -> str:
    """Everything; what is looked at first comes last, where a terminal stops."""
    machine = results["machine_info"]
    rates = Rates(**machine["rates"]) if "rates" in machine else None
    parts = [
        _candidates(results.get("candidates", [])),
        _kernels(results.get("kernels", []), rates),
        *_implementations(results, rates),
        _missing(results.get("parts", [])),
        provenance(machine),
    ]
    return "\n\n".join(filter(None, parts))


def _implementations(results: dict[str, Any], rates: Rates | None) -> list[str]:
    """A table for each workload."""
    records = results.get("implementations", [])
    operations = {(workload_of(r["workload"]), r["implementation"]): r for r in results.get("operations", [])}
    parts = []
    for workload in dict.fromkeys(workload_of(record["workload"]) for record in records):
        own = [record for record in records if workload_of(record["workload"]) == workload]
        floor = sum(Cost(**cost).seconds(rates) for cost in own[0]["floor"]) if rates else None
        rows = [_implementation(r, operations.get((workload, r["implementation"])), floor) for r in own]
        header = [
            "implementation",
            "ms",
            "20 to 80 %",
            "of triton's",
            "of floor",
            "host us",
            "extra MB",
            "first s",
            "ops",
        ]
        hidden = f"{own[0]['hidden_bytes'] / 1e6:.4g} MB of hidden states"
        at_least = "" if floor is None else f", floor {milliseconds(floor)} ms"
        title = f"Both losses, forward + backward, {workload}; {hidden}{at_least}:"
        parts.append("\n\n".join([title, table(header, rows), *_failures(own, "implementation")]))
    return parts


def _implementation(record: Record, profiled: Record | None, floor: float | None) -> list[str]:
    if len(record.get("seconds", [])) < 2:
        return [record["implementation"], _FAILED, *[""] * 7]
    fast, middle, slow = spread(record["seconds"])
    return [
        record["implementation"],
        milliseconds(middle),
        f"{milliseconds(fast)} to {milliseconds(slow)}",
        f"{median(record['ratios']):.3g}x" if "ratios" in record else "",
        f"{100 * floor / middle:.3g} %" if floor else "",
        f"{1e6 * record['host_seconds']:.0f}",
        f"{(record['peak_bytes'] + record['held_bytes']) / 1e6:.4g}",
        f"{record['first_seconds']:.1f}",
        str(sum(profiled["operations"].values())) if profiled else "",
    ]


def _kernels(records: list[Record], rates: Rates | None) -> str:
    if not records:
        return ""
    header = ["kernel", "T", "runs", "us", "20 to 80 %", "GB/s", "of copy", "TFLOP/s", "of mm", *_RESOURCES]
    rows = [
        [_kernel(record), str(record["workload"]["T"]), str(record["launches"]), *_speed(record, rates)]
        for record in records
    ]
    return "\n\n".join(
        [
            f"Each kernel alone, its launches of a step; spills in bytes:\n\n{table(header, rows)}",
            *_failures(records, "kernel"),
        ]
    )


def _kernel(record: Record) -> str:
    """With the path for long sequences, if it is not the usual one."""
    _, _, path = record["implementation"].partition(", ")
    return f"{record['kernel']}, {path}" if path else str(record["kernel"])


def _speed(record: Record, rates: Rates | None) -> list[str]:
    if "seconds" not in record:
        return [_FAILED, *[""] * 8]
    cells = [*_microseconds(record), "", "", "", ""]
    if record["cost"]:
        cost, seconds = Cost(**record["cost"]), record["seconds"][1]
        moved, multiplied = cost.bytes / seconds, cost.flops / seconds
        cells[2], cells[4] = f"{moved / 1e9:.0f}", f"{multiplied / 1e12:.0f}" if cost.flops else ""
        if rates:
            cells[3] = f"{100 * moved / rates.bytes_per_second:.0f} %"
            cells[5] = f"{100 * multiplied / rates.flops_per_second:.0f} %" if cost.flops else ""
    return [*cells, *_needs(record)]


def _candidates(records: list[Record]) -> str:
    if not records:
        return ""
    rows = [
        [
            record["kernel"],
            str(record["workload"]["T"]),
            _options(record),
            *([*_microseconds(record), *_needs(record)] if "seconds" in record else [_FAILED, *[""] * 4]),
        ]
        for record in records
    ]
    title = (
        "Candidates, the launch table's marked *: blocks, warps, stages, registers at most, pieces; spills in bytes:"
    )
    header = ["kernel", "T", "candidate", "us", "20 to 80 %", *_RESOURCES]
    return "\n\n".join([f"{title}\n\n{table(header, rows)}", *_failures(records, "kernel")])


_RESOURCES = ("regs", "spills", "KiB")


def _needs(record: Record) -> list[str]:
    spills, shared = record["spills"], record["shared_memory"]
    numbers = (
        record["registers"],
        None if spills is None else 4 * spills,  # the driver counts registers
        None if shared is None else round(shared / 1024),
    )
    return ["" if number is None else str(number) for number in numbers]


def _microseconds(record: Record) -> list[str]:
    fast, middle, slow = (_three_digits(1e6 * seconds) for seconds in record["seconds"])
    return [middle, f"{fast} to {slow}"]


def _three_digits(number: float) -> str:
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"


def _options(record: Record) -> str:
    """`128x256x64 w8 s3 r128`: blocks in the order of the launch table."""
    options = record.get("options")
    if options is None:
        return "*"
    said = ["x".join(str(size) for name, size in options.items() if name not in _NOT_SAID)]
    said += [f"w{options['num_warps']}", f"s{options['num_stages']}"]
    if "maxnreg" in options:
        said.append(f"r{options['maxnreg']}")
    if record.get("pieces"):
        said.append(f"p{record['pieces']}")
    return " ".join(said) + " *" * record.get("is_own", False)


def _failures(records: list[Record], key: str) -> list[str]:
    lines = [f"- {record[key]}: {record['error']}" for record in records if "error" in record]
    return ["\n".join(lines)] if lines else []


def _missing(parts: list[Record]) -> str:
    return "\n".join(f"- {part['name']}: {part['error']}" for part in parts if part["error"])
