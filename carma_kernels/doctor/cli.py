"""The subcommand `doctor`: its argument, and what it prints. What looks is loaded once it runs, torch with it."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `doctor`."""
    parser.add_argument("--json", action="store_true", help="print the same as JSON, for a bug report or a script")


def run(args: argparse.Namespace) -> int:
    """Print the findings; returns 1 if any of them stops the losses from running, 0 otherwise."""
    from carma_kernels.doctor.findings import examine

    findings = examine()
    text = json.dumps(findings, indent=2) if args.json else "\n".join(_lines(findings))
    sys.stdout.write(f"{text}\n")
    return 1 if findings["problems"] else 0


def _lines(findings: dict[str, Any]) -> Iterator[str]:
    machine = findings["environment"]
    commit = machine.get("commit")
    changed = ", with changes" if machine.get("dirty") else ""
    yield f"carma_kernels {findings['version']}" + (f" (commit {commit[:12]}{changed})" if commit else "")
    if machine:
        yield ""
        yield from _table(
            {
                "python": f"{machine['python']} on {machine['platform']}",
                "torch": f"{machine['torch']}, {machine['torch_threads']} threads",
                "CUDA or ROCm": machine["cuda"] or "none in this torch",
                "triton": machine["triton"] or "not installed",
                "numpy": machine["numpy"],
                "CPU": f"{machine['cpu']}, {machine['cpu_cores']} cores",
                "GPUs": "; ".join(_gpu(gpu) for gpu in machine["gpus"]) or "none that torch can use",
                **({"GPU driver": machine["gpu_driver"]} if machine["gpu_driver"] else {}),
            }
        )
    yield ""
    yield f"Backend picked for tensors on each device (CARMA_KERNELS_BACKEND {_setting(findings['variable'])})"
    yield from _table(
        {device: f"{pick['backend'] or 'none'}: {pick['reason']}" for device, pick in findings["backends"].items()}
    )
    if findings["triton"]:
        yield ""
        yield "The Triton backend on each GPU, held against the torch backend there"
        yield from _table(
            {device: f"cannot be used: {why}" for device, why in findings["triton"].items() if why}
            | {
                f"{device} {dtype}": result
                for device, results in findings["self_check"].items()
                for dtype, result in results.items()
            }
        )
    yield ""
    yield "Optional packages"
    for extra, packages in findings["optional"].items():
        installed = [f"{name} {version}" for name, version in packages.items() if version]
        missing = [name for name, version in packages.items() if not version]
        parts = [", ".join(installed)] if installed else []
        if missing:
            parts.append(f"missing {', '.join(missing)}: pip install 'carma-kernels[{extra}]'")
        yield from _table({extra: "; ".join(parts)})
    yield ""
    yield from (f"Note: {note}" for note in findings["notes"])
    yield from (f"PROBLEM: {problem}" for problem in findings["problems"])
    yield f"{len(findings['problems']) or 'no'} problem{'' if len(findings['problems']) == 1 else 's'} found."


def _table(rows: dict[str, str]) -> Iterator[str]:
    width = max(12, *map(len, rows))
    yield from (f"  {name:<{width}}  {value}" for name, value in rows.items())


def _gpu(gpu: dict[str, Any]) -> str:
    return f"{gpu['name']} (capability {gpu['capability']}, {gpu['memory'] / 2**30:.0f} GiB)"


def _setting(value: str | None) -> str:
    return "is not set" if value is None else f"is {value!r}"
