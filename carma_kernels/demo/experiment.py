"""The whole demo in order: text, two runs with a progress bar each, and the report."""

from __future__ import annotations

import argparse
import dataclasses

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from carma_kernels import CarmaConfig, choose_backend
from carma_kernels.demo.definitions import Split
from carma_kernels.demo.model import build_gpt2
from carma_kernels.demo.report import TASK_ONLY, WITH_CARMA, draw, summary_table, write_json
from carma_kernels.demo.text import (
    MAX_TOKENS,
    Collator,
    TextStatistics,
    text_statistics,
    train_tokenizer,
    training_batches,
)
from carma_kernels.demo.training import Recipe, Run, train
from carma_kernels.measure import environment


def run_experiment(args: argparse.Namespace, split: Split, device: torch.device, backend: str | None) -> None:
    """Train, compare, and write the results to `args.out`; the arguments are checked already."""
    torch.set_num_threads(args.threads)
    console = Console()
    tokenizer = train_tokenizer(split.training, args.vocab_size)
    statistics = text_statistics(tokenizer, [*split.training, *split.held_out])
    _introduce(console, args, split, statistics)
    collator = Collator(
        tokenizer,
        num_negatives=args.num_negatives if args.negatives == "sampled" else None,
        generator=torch.Generator().manual_seed(args.seed),
    )
    size = args.batch_size
    held_out = [collator(split.held_out[at : at + size]).to(device) for at in range(0, len(split.held_out), size)]
    batches = training_batches(split.training, size, collator, args.seed)

    recipe = Recipe(args.steps, args.learning_rate, _carma_config(args), backend, device)
    model = {"layers": args.layers, "width": args.width, "heads": args.heads, "seed": args.seed}
    task_only, with_carma = (
        Run(name, build_gpt2(vocab_size=statistics.vocab_size, **model), recipe, with_carma=name == WITH_CARMA)
        for name in (TASK_ONLY, WITH_CARMA)
    )
    console.print(
        f"A GPT-2 with {task_only.num_parameters / 1e6:.1f} million weights, twice, on {device}; "
        f"CARMA by the {choose_backend(backend, device)[0]} backend."
    )
    columns = (TextColumn("{task.description:14}"), BarColumn(), MofNCompleteColumn())
    times = (TextColumn("{task.fields[loss]}"), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, *times, console=console) as progress:
        bars = {run.name: progress.add_task(run.name, total=args.steps, loss="") for run in (task_only, with_carma)}

        def advance(run: Run) -> None:
            progress.update(bars[run.name], advance=1, loss=f"task loss {run.record.task_losses[-1]:.2f}")
            if len(run.record.task_losses) == args.steps:
                run.save(tokenizer, args.out / _FOLDERS[run.name])

        comparison = train(task_only, with_carma, batches, held_out, recipe, advance)

    table = summary_table(comparison)
    console.print(table)
    with (args.out / "table.txt").open("w", encoding="utf-8") as file:
        Console(file=file, width=100).print(table)
    draw(comparison, args.out / "curves.png")
    about = {
        "settings": {name: getattr(args, name) for name in _SETTINGS} | {"device": str(device)},
        "data": {"file": str(args.data), "training": len(split.training), "held_out": len(split.held_out)},
        "text": {**dataclasses.asdict(statistics), "split_share": statistics.split_share},
        "machine": environment(),
    }
    write_json(comparison, about, args.out / "results.json")
    console.print(f"The picture, the table and the numbers: {args.out}/curves.png, table.txt, results.json")
    console.print(f"Both models: {args.out}/{_FOLDERS[TASK_ONLY]}, {_FOLDERS[WITH_CARMA]}")


_SETTINGS = (
    *("vocab_size", "layers", "width", "heads", "steps", "batch_size", "learning_rate", "seed"),
    *("carma_weight", "mi_weight", "stability_weight", "temperature", "negatives", "num_negatives", "backend"),
)


_FOLDERS = {TASK_ONLY: "task-only", WITH_CARMA: "with-carma"}


def _introduce(console: Console, args: argparse.Namespace, split: Split, statistics: TextStatistics) -> None:
    console.print(f"Learning to name what a definition defines, from {args.data}", soft_wrap=True)
    console.print(
        f"{len(split.training)} definitions to learn from, {len(split.held_out)} held out; a byte-level BPE of "
        f"{statistics.vocab_size} tokens splits {statistics.split_share:.0%} of their {statistics.words} words."
    )
    if statistics.truncated:
        console.print(
            f"{statistics.truncated} prompts are longer than {MAX_TOKENS} tokens (up to {statistics.longest}) and lose "
            "their beginning."
        )


def _carma_config(args: argparse.Namespace) -> CarmaConfig:
    return CarmaConfig(
        mi_weight=args.mi_weight,
        stability_weight=args.stability_weight,
        carma_weight=args.carma_weight,
        temperature=args.temperature,
        negatives="batch" if args.negatives == "batch" else "sequence",  # sampled pairs bring their own
    )
