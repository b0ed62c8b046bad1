"""The subcommand `demo`: its arguments, and their checks before any work starts."""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from carma_kernels import CarmaConfig, choose_backend
from carma_kernels.demo.definitions import DataError, read_definitions, shipped_file, split_definitions

_LIBRARIES = ("transformers", "tokenizers", "rich", "matplotlib")
_SMALLEST_VOCABULARY = 257  # every byte, and padding
_FAILED, _REFUSED, _INTERRUPTED = 1, 2, 130


class UsageError(ValueError):
    """Arguments that do not go together, or that this machine cannot serve; the message says the way out."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Everything that can be changed about the demo."""
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    carma = CarmaConfig()

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
        type=_integer(_SMALLEST_VOCABULARY),
        default=1000,
        metavar="V",
        help="tokens that the byte-level BPE may have; the fewer, the more words are split",
    )

    training = parser.add_argument_group("model and training")
    training.add_argument("--layers", type=_integer(2), default=4, metavar="L", help="blocks of the GPT-2")
    training.add_argument("--width", type=_integer(1), default=128, metavar="D", help="width of the hidden states")
    training.add_argument("--heads", type=_integer(1), default=4, metavar="H", help="attention heads, dividing --width")
    training.add_argument("--steps", type=_integer(1), default=150, metavar="N", help="training steps of each run")
    training.add_argument("--batch-size", type=_integer(1), default=32, metavar="B", help="definitions in a batch")
    training.add_argument("--learning-rate", type=_positive, default=1e-3, metavar="X", help="peak rate of AdamW")
    training.add_argument("--seed", type=_integer(0), default=0, metavar="N", help="of weights, batches and negatives")

    loss = parser.add_argument_group("loss: (1 - lambda) L_task + lambda (gamma L_MI + eta L_Stability)")
    loss.add_argument("--carma-weight", type=_share, default=carma.carma_weight, metavar="X", help="lambda")
    loss.add_argument(
        "--mi-weight",
        type=_non_negative,
        default=carma.mi_weight,
        metavar="X",
        help="gamma, of the MI loss, which keeps the tokens of a word together",
    )
    loss.add_argument(
        "--stability-weight",
        type=_non_negative,
        default=carma.stability_weight,
        metavar="X",
        help="eta, of the stability loss, which keeps consecutive layers close",
    )
    loss.add_argument(
        "--temperature",
        type=_positive,
        default=carma.temperature,
        metavar="X",
        help="tau, by which the MI loss divides similarities",
    )
    loss.add_argument(
        "--negatives",
        choices=("sequence", "batch", "sampled"),
        default=carma.negatives,
        help="what the MI loss holds a word against: all other tokens of its definition, all of the batch, or K drawn "
        "from its definition",
    )
    loss.add_argument("--num-negatives", type=_integer(1), default=5, metavar="K", help="for --negatives sampled")

    machine = parser.add_argument_group("machine and output")
    machine.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ...; auto: a GPU when there is one")
    machine.add_argument(
        "--backend", choices=("auto", "torch", "triton"), default="auto", help="what computes the CARMA losses"
    )
    machine.add_argument(
        "--out",
        type=Path,
        default=Path("runs") / f"demo-{datetime.datetime.now():%Y%m%d-%H%M%S}",
        metavar="FOLDER",
        help="where the results go",
    )


def run(args: argparse.Namespace) -> int:
    """Run the demo.

    Returns:
        The exit status: 0, 1 if it cannot run or the training diverges, 2 for a bad argument or file, 130 on Ctrl-C.
    """
    missing = [name for name in _LIBRARIES if importlib.util.find_spec(name) is None]
    if missing:
        return _stop(_FAILED, f"the demo needs {' and '.join(missing)}: pip install 'carma-kernels[demo]'")
    try:
        if args.width % args.heads:
            raise UsageError(f"--width {args.width} cannot be shared by --heads {args.heads}; take a multiple of it.")
        device = _device(args.device)
        backend = None if args.backend == "auto" else args.backend
        _check_backend(backend, device)
        split = split_definitions(read_definitions(args.data), args.batch_size, args.seed, args.data)
        _make_folder(args.out)

        # loads transformers and matplotlib, which takes seconds: after the checks
        from carma_kernels.demo.experiment import run_experiment

        run_experiment(args, split, device, backend)
    except (DataError, UsageError) as error:
        return _stop(_REFUSED, str(error))
    except FloatingPointError as error:
        return _stop(_FAILED, str(error))
    except KeyboardInterrupt:
        return _stop(_INTERRUPTED, "stopped; no results were written.")
    return 0


def _stop(status: int, message: str) -> int:
    sys.stderr.write(message + "\n")
    return status


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # a device may be known to torch and still hold no values here
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise UsageError(f"--device {name} cannot be used here: {reason}. Leave it out, or take cpu.") from error
    return device


def _check_backend(backend: str | None, device: torch.device) -> None:
    try:
        choose_backend(backend, device)
    except (ValueError, NotImplementedError) as error:
        raise UsageError(f"--backend {backend or 'auto'} cannot be used here: {error}") from error


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {folder} cannot be made ({error.strerror}); take another folder.") from error


def _integer(smallest: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = smallest - 1
        if not smallest <= value < 2**31:
            raise argparse.ArgumentTypeError(f"must be a whole number >= {smallest}, got {text!r}")
        return value

    return parse


def _number(allowed: str, is_allowed: Callable[[float], bool]) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and is_allowed(value)):
            raise argparse.ArgumentTypeError(f"must be a number {allowed}, got {text!r}")
        return value

    return parse


_positive = _number("> 0", lambda value: value > 0)
_non_negative = _number(">= 0", lambda value: value >= 0)
_share = _number("from 0 to 1", lambda value: 0 <= value <= 1)
