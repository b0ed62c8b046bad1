"""What the arguments of the commands are made of, and how a command that cannot run says so."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch


class UsageError(ValueError):
    """Arguments that do not go together, or that this machine cannot serve; the message says the way out."""


def stop(status: int, message: str) -> int:
    """Say why on standard error; the exit status comes back."""
    sys.stderr.write(message + "\n")
    return status


def pick_device(name: str) -> torch.device:
    """Of --device; `auto` is a GPU when there is one.

    Raises:
        UsageError: a device that cannot be used here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # a device may be known to torch and still hold no values here
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise UsageError(f"--device {name} cannot be used here: {reason}. Leave it out, or take cpu.") from error
    return device


def make_folder(folder: Path) -> None:
    """Of --out.

    Raises:
        UsageError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {folder} cannot be made ({error.strerror}); take another folder.") from error


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
