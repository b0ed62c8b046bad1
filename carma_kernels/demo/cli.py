"""The subcommand `demo`: its arguments, and their checks before any work starts."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import carma_kernels
from carma_kernels.demo.arguments import (
    FAILED,
    INTERRUPTED,
    REFUSED,
    UsageError,
    add_machine_options,
    integer,
    missing_libraries,
    non_negative,
    pick_device,
    positive,
    results_folder,
    share,
    stop,
)
from carma_kernels.demo.definitions import DataError, read_definitions, shipped_file, split_definitions

if TYPE_CHECKING:
    import torch

_SMALLEST_VOCABULARY = 257  # every byte, and padding


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Everything that can be changed about the demo."""
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter

    text = parser.add_argument_group("text")
    text.add_argument(
        "--data",
        type=Path,
        default=shipped_file(),
        metavar="FILE.jsonl",
        help='your own text, one {"definition": "...", "word": "..."} a line',
    )
    text.add_argument(
        "--vocab-size",
        type=integer(_SMALLEST_VOCABULARY),
        default=1000,
        metavar="V",
        help="tokens that the byte-level BPE may have; the fewer, the more words are split",
    )

    training = parser.add_argument_group("model and training")
    training.add_argument("--layers", type=integer(2), default=4, metavar="L", help="blocks of the GPT-2")
    training.add_argument("--width", type=integer(1), default=128, metavar="D", help="width of the hidden states")
    training.add_argument("--heads", type=integer(1), default=4, metavar="H", help="attention heads, dividing --width")
    training.add_argument("--steps", type=integer(1), default=150, metavar="N", help="training steps of each run")
    training.add_argument("--batch-size", type=integer(1), default=32, metavar="B", help="definitions in a batch")
    training.add_argument("--learning-rate", type=positive, default=1e-3, metavar="X", help="peak rate of AdamW")
    training.add_argument("--seed", type=integer(0), default=0, metavar="N", help="of weights, batches and negatives")

    loss = parser.add_argument_group("loss: (1 - lambda) L_task + lambda (gamma L_MI + eta L_Stability)")
    loss.add_argument("--carma-weight", type=share, default=0.3, metavar="X", help="lambda")
    loss.add_argument(
        "--mi-weight",
        type=non_negative,
        default=0.5,
        metavar="X",
        help="gamma, of the MI loss, which keeps the tokens of a word together",
    )
    loss.add_argument(
        "--stability-weight",
        type=non_negative,
        default=0.2,
        metavar="X",
        help="eta, of the stability loss, which keeps consecutive layers close",
    )
    loss.add_argument(
        "--temperature",
        type=positive,
        default=0.1,
        metavar="X",
        help="tau, by which the MI loss divides similarities",
    )
    loss.add_argument(
        "--negatives",
        choices=("sequence", "batch", "sampled"),
        default="sequence",
        help="what the MI loss holds a word against: all other tokens of its definition, all of the batch, or K drawn "
        "from its definition",
    )
    loss.add_argument("--num-negatives", type=integer(1), default=5, metavar="K", help="for --negatives sampled")

    machine = add_machine_options(parser, "demo")
    machine.add_argument(
        "--threads",
        type=integer(1),
        default=1,
        metavar="N",
        help="of torch on a CPU; more pay for wider models only, and hardly where something else is running",
    )
    machine.add_argument(
        "--backend", choices=("auto", "torch", "triton"), default="auto", help="what computes the CARMA losses"
    )


def run(args: argparse.Namespace) -> int:
    """Run the demo.

    Returns:
        The exit status: 0, 1 if it cannot run or the training diverges, 2 for a bad argument or file, 130 on Ctrl-C.
    """
    if missing := missing_libraries("the demo"):
        return stop(FAILED, missing)
    try:
        if args.width % args.heads:
            raise UsageError(f"--width {args.width} cannot be shared by --heads {args.heads}; take a multiple of it.")
        device = pick_device(args.device)
        backend = None if args.backend == "auto" else args.backend
        _check_backend(backend, device)
        split = split_definitions(read_definitions(args.data), args.batch_size, args.seed, args.data)
        with results_folder(args.out) as args.out:
            # loads transformers and matplotlib, which takes seconds: after the checks
            from carma_kernels.demo.experiment import run_experiment

            run_experiment(args, split, device, backend)
    except (DataError, UsageError) as error:
        return stop(REFUSED, str(error))
    except FloatingPointError as error:
        return stop(FAILED, str(error))
    except KeyboardInterrupt:
        return stop(INTERRUPTED, "stopped; no results were written.")
    return 0


def _check_backend(backend: str | None, device: torch.device) -> None:
    try:
        carma_kernels.choose_backend(backend, device)
    except (ValueError, NotImplementedError) as error:
        raise UsageError(f"--backend {backend or 'auto'} cannot be used here: {error}") from error
