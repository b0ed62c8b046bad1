"""The subcommand `evaluate`: its arguments, and the whole evaluation in order."""

from __future__ import annotations

import argparse
from pathlib import Path

from carma_kernels.demo.arguments import (
    FAILED,
    INTERRUPTED,
    REFUSED,
    UsageError,
    add_machine_options,
    integer,
    missing_libraries,
    pick_device,
    results_folder,
    share,
    stop,
)
from carma_kernels.demo.definitions import DataError, read_definitions, shipped_file, split_definitions

_DEMO_FOLDERS = {"task_only": "task-only", "carma": "with-carma"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Everything that can be changed about the evaluation."""
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    models = parser.add_argument_group(
        "checkpoints",
        "folders with a causal language model and its fast tokenizer, as save_pretrained writes them; without any, "
        "those of the newest demo under runs/",
    )
    models.add_argument("--task-only", type=Path, metavar="FOLDER", help="trained on the task loss alone")
    models.add_argument("--carma", type=Path, metavar="FOLDER", help="trained with CARMA")

    pooling = parser.add_argument_group("constituent-aware pooling")
    pooling.add_argument(
        "--protocol",
        nargs="+",
        choices=("mean", "max", "sum"),
        default=["mean", "max", "sum"],
        help="what a word's tokens are pooled to",
    )
    pooling.add_argument(
        "--start-layer",
        nargs="+",
        type=integer(0),
        metavar="I",
        help="pool from this block on; every block if left out",
    )
    pooling.add_argument(
        "--positions",
        choices=("sequential", "first"),
        default="sequential",
        help="rotary positions of the words: one after the other, or each that of its first token",
    )
    pooling.add_argument(
        "--synonyms",
        nargs="*",
        type=share,
        default=[0.1, 0.25, 0.4],
        metavar="SHARE",
        help="also without pooling, but with this share of a definition's words replaced by WordNet synonyms",
    )

    text = parser.add_argument_group("text")
    text.add_argument(
        "--data",
        type=Path,
        default=shipped_file(),
        metavar="FILE.jsonl",
        help='one {"definition": "...", "word": "..."} a line; a tenth is held out',
    )
    text.add_argument("--seed", type=integer(0), default=0, metavar="N", help="of the held-out tenth, as in the demo")
    text.add_argument("--all", action="store_true", help="evaluate on every line of --data, not on a tenth of them")
    text.add_argument("--batch-size", type=integer(1), default=32, metavar="B", help="definitions in a batch")

    add_machine_options(parser, "evaluate")


def run(args: argparse.Namespace) -> int:
    """Evaluate.

    Returns:
        The exit status: 0, 1 if it cannot run, 2 for a bad argument or file, 130 on Ctrl-C.
    """
    if missing := missing_libraries("evaluate"):
        return stop(FAILED, missing)
    try:
        folders = _checkpoints(args)
        device = pick_device(args.device)
        definitions = read_definitions(args.data)
        if not args.all:
            definitions = split_definitions(definitions, 1, args.seed, args.data).held_out
        with results_folder(args.out) as args.out:
            # loads transformers and matplotlib, which takes seconds: after the checks
            from carma_kernels.cap.evaluation import CheckpointError
            from carma_kernels.cap.experiment import run_experiment

            try:
                run_experiment(args, folders, definitions, device)
            except CheckpointError as error:
                raise UsageError(str(error)) from error
    except (DataError, UsageError) as error:
        return stop(REFUSED, str(error))
    except KeyboardInterrupt:
        return stop(INTERRUPTED, "stopped; no results were written.")
    return 0


def _checkpoints(args: argparse.Namespace) -> dict[str, Path]:
    """Of `task_only` and `carma` those that were given, or the newest demo's."""
    given = {name: folder for name in _DEMO_FOLDERS if (folder := getattr(args, name)) is not None}
    if given:
        return given
    for demo in sorted(Path("runs").glob("demo-*"), reverse=True):  # named by date and time
        folders = {name: demo / folder for name, folder in _DEMO_FOLDERS.items()}
        if all((folder / "config.json").is_file() for folder in folders.values()):
            return folders
    raise UsageError(
        "no checkpoint was given, and there is no demo's under runs/. Make one with `python -m carma_kernels demo`, or "
        "pass --task-only FOLDER --carma FOLDER."
    )
