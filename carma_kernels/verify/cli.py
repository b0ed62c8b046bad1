"""The subcommand `verify`: its arguments. What computes is loaded once it runs, torch with it."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `verify`."""
    parser.add_argument(
        "--cases",
        type=_at_least_one,
        default=5,
        metavar="N",
        help="random problems for each check; slow ones share them out among the dtypes",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the random problems")
    parser.add_argument(
        "--device", default="all", help="cpu, cuda:0, ...; all for every device that torch can use here"
    )
    parser.add_argument(
        "--backend", choices=("all", "torch", "triton"), default="all", help="what to hold against the reference"
    )
    parser.add_argument("--verbose", action="store_true", help="a line for each problem, not only for each check")


def run(args: argparse.Namespace) -> int:
    """Check and print a table; returns 0 if every check is within its tolerance, 1 if not, 2 for a bad device."""
    from carma_kernels.verify import table

    return table.run(args)


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a number >= 1, got {text!r}")
    return int(text)
