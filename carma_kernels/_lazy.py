"""For the commands alone, names that are imported when the first is asked for: `--help` does not wait for torch.

To anybody else `import carma_kernels` brings them at once, and with them what torch is told of, operators and the
classes that `torch.load` may make.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from pathlib import Path


def is_command() -> bool:
    """Whether Python is about to run `python -m carma_kernels` or `carma-kernels`."""
    program = (getattr(sys, "argv", None) or [""])[0]  # "-m" as long as Python looks for the module
    return program == "-m" or Path(program).stem == "carma-kernels"


def importer(package: str, places: Mapping[str, str]) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """The `__getattr__` and the `__dir__` of a package (PEP 562).

    The first name brings all of them, which are then attributes like any other's: nothing that reads one later, in a
    compiled function for one, meets an import.

    Args:
        package: its name.
        places: for each name that it has, the module in it and the name there, `module.name`.
    """

    def load(name: str) -> object:
        if name not in places:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        found = {}
        for public, place in places.items():
            module, _, inner = place.rpartition(".")
            found[public] = getattr(importlib.import_module(f"{package}.{module}"), inner)
        vars(sys.modules[package]).update(found)
        return found[name]

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *places})

    return load, names
