"""Names of a package that are imported when the first of them is asked for: `--help` does not wait for torch."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping


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
