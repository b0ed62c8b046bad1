"""The whole evaluation in order: checkpoints, a progress bar, table, picture and figures."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers.utils import logging as transformers_logging

from carma_kernels.cap.evaluation import Checkpoint, CheckpointError, Plan, evaluate, load_checkpoint
from carma_kernels.cap.report import TASK_ONLY, WITH_CARMA, draw, summary_table, write_json
from carma_kernels.cap.synonyms import read_synonyms
from carma_kernels.demo.definitions import Definition
from carma_kernels.measure import environment

_NAMES = {"task_only": TASK_ONLY, "carma": WITH_CARMA}


def run_experiment(
    args: argparse.Namespace, folders: dict[str, Path], definitions: Sequence[Definition], device: torch.device
) -> None:
    """Evaluate the checkpoints in `folders` and write the results to `args.out`; the arguments are checked already.

    Raises:
        CheckpointError: one that cannot be loaded, two of different depths, or a start layer that they do not have.
    """
    console = Console()
    transformers_logging.disable_progress_bar()  # its bars for each checkpoint's weights
    checkpoints = {_NAMES[name]: load_checkpoint(folder, device) for name, folder in folders.items()}
    plan = Plan(
        protocols=args.protocol,
        start_layers=_start_layers(args.start_layer, checkpoints),
        shares=args.synonyms,
        positions=args.positions,
        synonyms=read_synonyms() if args.synonyms else {},
        seed=args.seed,
        batch_size=args.batch_size,
    )
    for name, folder in folders.items():
        console.print(f"{_NAMES[name]}: {folder}", soft_wrap=True)
    console.print(f"{len(definitions)} definitions from {args.data}, on {device}", soft_wrap=True)
    columns = (TextColumn("{task.description:14}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as progress:
        bars = {name: progress.add_task(name, total=plan.num_runs) for name in checkpoints}
        evaluations = {
            name: evaluate(checkpoint, definitions, plan, lambda bar=bars[name]: progress.advance(bar))  # type: ignore[misc]
            for name, checkpoint in checkpoints.items()
        }

    table = summary_table(evaluations, len(definitions))
    console.print(table)
    with (args.out / "table.txt").open("w", encoding="utf-8") as file:
        Console(file=file, width=100).print(table)
    draw(evaluations, len(definitions), args.out / "pooling.png")
    about = {
        "folders": {_NAMES[name]: str(folder) for name, folder in folders.items()},
        "data": {"file": str(args.data), "definitions": len(definitions), "held_out_by_seed": not args.all},
        "settings": {
            "protocols": list(plan.protocols),
            "start_layers": list(plan.start_layers),
            "positions": plan.positions,
            "synonyms": list(plan.shares),
            "seed": plan.seed,
            "batch_size": plan.batch_size,
            "device": str(device),
        },
        "machine": environment(),
    }
    write_json(evaluations, about, args.out / "pooling.json")
    console.print(f"The picture, the table and the figures: {args.out}/pooling.png, table.txt, pooling.json")


def _start_layers(wanted: Sequence[int] | None, checkpoints: dict[str, Checkpoint]) -> Sequence[int]:
    depths = {name: checkpoint.num_layers for name, checkpoint in checkpoints.items()}
    if len(set(depths.values())) > 1:
        raise CheckpointError(
            "the checkpoints have "
            + " and ".join(f"{depth} blocks ({name})" for name, depth in depths.items())
            + "; side by side they need the same number. Evaluate them one at a time."
        )
    depth = min(depths.values())
    if wanted and max(wanted) >= depth:
        raise CheckpointError(f"--start-layer {max(wanted)}: the model's blocks are 0 to {depth - 1}.")
    return sorted(set(wanted)) if wanted else range(depth)
