"""`python -m carma_kernels doctor | verify | demo | evaluate`, also installed as the command `carma-kernels`."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NamedTuple

from carma_kernels import __version__


class Command(NamedTuple):
    """A subcommand; its module, imported when it is asked for, has `add_arguments(parser)` and `run(args) -> int`.

    It imports torch in `run`: help, and what is wrong with the arguments, are not to wait for that.
    """

    module: str
    help: str


COMMANDS = {
    "doctor": Command("carma_kernels.doctor.cli", "versions, devices, and which backend would be picked, and why"),
    "verify": Command(
        "carma_kernels.verify.cli", "check this installation against its own fp64 reference, on random shapes"
    ),
    "demo": Command("carma_kernels.demo.cli", "train a small GPT-2 on word definitions, with and without CARMA"),
    "evaluate": Command(
        "carma_kernels.cap.cli", "what is left of a model's accuracy when the tokens of each word are pooled into one"
    ),
}
_INTERRUPTED, _BROKEN_PIPE = 130, 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand.

    Args:
        argv: the arguments, those of the process if None.

    Returns:
        The exit status: 0 if all is well, 1 if something is not. Wrong usage exits with 2.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    args = _parser(arguments).parse_args(arguments)
    try:
        status: int = args.run(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:  # nobody reads on, as in `carma-kernels verify | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE
    return status


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="carma-kernels", description="CARMA's losses (arXiv 2502.11066), fast: checks and a demonstration."
    )
    parser.add_argument("--version", action="version", version=f"carma_kernels {__version__}")
    commands = parser.add_subparsers(metavar="command", required=True)
    for name, command in COMMANDS.items():
        subparser = commands.add_parser(
            name,
            help=command.help,
            description=f"{command.help[0].upper()}{command.help[1:]}.",
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        if name in arguments:
            module = importlib.import_module(command.module)
            module.add_arguments(subparser)
            subparser.set_defaults(run=module.run)
    return parser


if __name__ == "__main__":
    sys.exit(main())
