"""What the arguments of the commands are made of, and how a command that cannot run says so."""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

FAILED, REFUSED, INTERRUPTED = 1, 2, 130
"""Exit statuses: it cannot run, a bad argument or file, Ctrl-C."""

_NOW = "<date>-<time>"
_LIBRARIES = ("transformers", "tokenizers", "rich", "matplotlib")


class UsageError(ValueError):
    """Arguments that do not go together, or that this machine cannot serve; the message says the way out."""


def stop(status: int, message: str) -> int:
    """Say why on standard error; the exit status comes back."""
    sys.stderr.write(message + "\n")
    return status


def missing_libraries(command: str) -> str | None:
    """What to tell somebody who lacks a library that the command needs; None if all are there."""
    missing = [name for name in _LIBRARIES if importlib.util.find_spec(name) is None]
    return f"{command} needs {' and '.join(missing)}: pip install 'carma-kernels[demo]'" if missing else None


def add_machine_options(parser: argparse.ArgumentParser, command: str) -> argparse._ArgumentGroup:
    """--device and --out, which is runs/<command>-<date>-<time> if left out; the group, for more."""
    machine = parser.add_argument_group("machine and output")
    machine.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ...; auto: a GPU when there is one")
    machine.add_argument(
        "--out",
        type=Path,
        default=Path("runs") / f"{command}-{_NOW}",
        metavar="FOLDER",
        help="where the results go",
    )
    return machine


def pick_device(name: str) -> torch.device:
    """Of --device; `auto` is a GPU when there is one.

    Raises:
        UsageError: a device that cannot be used here.
    """
    import torch  # takes seconds, which `--help` does not wait for

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # a device may be known to torch and still hold no values here
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise UsageError(f"--device {name} cannot be used here: {reason}. Leave it out, or take cpu.") from error
    return device


@contextmanager
def results_folder(out: Path) -> Iterator[Path]:
    """Of --out: made, with today's date and the time in it; and, if nothing was written into it, removed again.

    Raises:
        UsageError: it cannot be made.
    """
    folder = Path(str(out).replace(_NOW, f"{datetime.datetime.now():%Y%m%d-%H%M%S}"))
    new = [part for part in (folder, *folder.parents) if not part.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {folder} cannot be made ({error.strerror}); take another folder.") from error
    try:
        yield folder
    finally:
        for part in new:  # the innermost first
            if any(part.iterdir()):
                break
            part.rmdir()


def integer(smallest: int) -> Callable[[str], int]:
    """The type of an argument that is a whole number."""

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


positive = _number("> 0", lambda value: value > 0)
non_negative = _number(">= 0", lambda value: value >= 0)
share = _number("from 0 to 1", lambda value: 0 <= value <= 1)
