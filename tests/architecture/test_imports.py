"""Who may import whom: from the bottom up, and nothing the other way round."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.architecture.sources import ROOT, Import, imports, module_name, python_files


class Room(NamedTuple):
    """What a module or subpackage may import, itself and the standard library aside."""

    rooms: set[str]
    libraries: set[str]


INTERFACE = {"_backend", "config", "functional", "modules", "pairs", "spans"}
ROOMS = {
    "_lazy": Room(set(), set()),
    # what a batch's words and pairs are
    "_encodings": Room(set(), set()),
    "_ranks": Room(set(), {"numpy", "torch"}),
    "_span_inputs": Room(set(), {"numpy", "torch"}),
    "_tables": Room({"_ranks", "_span_inputs"}, {"numpy", "torch"}),
    "pairs": Room(set(), {"torch"}),
    "_sampling": Room({"pairs"}, {"numpy", "torch"}),
    "spans": Room({"_encodings", "_ranks", "_sampling", "_span_inputs", "_tables", "pairs"}, {"numpy", "torch"}),
    # what the ranks of a process group have together
    "distributed": Room({"pairs", "spans"}, {"numpy", "torch"}),
    # the backends
    "_runtime": Room(set(), {"torch"}),
    "_terms": Room({"pairs", "spans"}, {"torch"}),
    "_operators": Room({"_terms", "pairs", "spans"}, {"torch"}),
    "_autograd": Room({"_operators", "_terms"}, {"torch"}),
    "kernels": Room({"_runtime"}, {"triton"}),
    "ops": Room(
        {"_autograd", "_operators", "_ranks", "_runtime", "_terms", "distributed", "kernels", "pairs", "spans"},
        {"numpy", "rich", "torch", "triton"},
    ),
    "eager": Room({"_autograd", "_operators", "_runtime", "_terms", "distributed", "pairs", "spans"}, {"torch"}),
    # the public interface
    "_small_problem": Room({"_terms", "pairs", "spans"}, {"torch"}),
    "_self_check": Room({"_small_problem", "eager"}, {"torch"}),
    "_triton_here": Room({"_runtime", "_self_check", "ops"}, {"torch"}),
    "_backend": Room(
        {"_runtime", "_self_check", "_small_problem", "_terms", "_triton_here", "eager", "ops"}, {"torch"}
    ),
    "_validate": Room({"pairs", "spans"}, {"torch"}),
    "config": Room({"_validate"}, {"torch"}),
    "functional": Room({"_backend", "_terms", "_validate", "config", "distributed", "pairs", "spans"}, {"torch"}),
    "modules": Room({"_terms", "config", "functional", "pairs", "spans"}, {"torch"}),
    "_by_layer": Room({"_backend", "_terms", "config", "functional", "pairs", "spans"}, {"torch"}),
    "carma_kernels": Room({"_lazy", *INTERFACE}, set()),
    # in other people's code
    "integrations": Room(
        {
            "_by_layer",
            "_encodings",
            "_span_inputs",
            "_terms",
            "_validate",
            "carma_kernels",
            "distributed",
            "eager",
            *INTERFACE,
        },
        {"numpy", "torch", "transformers"},
    ),
    # the commands
    "measure": Room(set(), {"torch", "triton"}),  # for its version
    "demo": Room(
        {"carma_kernels", "integrations", "measure"}, {"matplotlib", "rich", "tokenizers", "torch", "transformers"}
    ),
    "cap": Room(
        {"_lazy", "carma_kernels", "demo", "integrations", "measure"},
        {"matplotlib", "numpy", "rich", "torch", "transformers"},
    ),
    "doctor": Room(
        {"_backend", "_runtime", "_self_check", "_triton_here", "carma_kernels", "measure", "ops"}, {"torch"}
    ),
    "verify": Room({"_backend", "_runtime", "_terms", "carma_kernels", "doctor"}, {"csrc_ref", "torch"}),
    "__main__": Room({"carma_kernels"}, set()),
}
"""From the bottom up."""


def room(name: str) -> str:
    """Of a dotted name: its module or subpackage; the package itself for a name that it exports."""
    _, _, inner = name.partition(".")
    first = inner.split(".")[0]
    return first if first in ROOMS else "carma_kernels"


def where(file: Path, imported: Import) -> str:
    return f"{file.relative_to(ROOT)}:{imported.line} imports {imported.name}"


def test_every_module_has_a_room():
    for file in python_files("carma_kernels"):
        name = module_name(file)
        assert name == "carma_kernels" or name.split(".")[1] in ROOMS, f"{name}: put it into ROOMS"


def test_rooms_look_down_only():
    below: set[str] = set()
    for name, (rooms, _) in ROOMS.items():
        assert rooms <= below, f"{name} looks up to {rooms - below}"
        below.add(name)


@pytest.mark.parametrize("file", python_files("carma_kernels"), ids=module_name)
def test_imports(file: Path):
    own = room(module_name(file))
    allowed = ROOMS[own]
    for imported in imports(file):
        if imported.root == "carma_kernels":
            assert room(imported.name) in {own, *allowed.rooms}, where(file, imported)
        elif imported.root not in sys.stdlib_module_names:
            assert imported.root in allowed.libraries, where(file, imported)


def test_what_is_optional_is_loaded_where_it_is_needed():
    """The reference by `verify` when it runs, what `demo` draws with once its arguments are checked, and Triton."""
    for file in python_files("carma_kernels"):
        for imported in imports(file):
            if imported.root in {"csrc_ref", "triton"} and room(module_name(file)) not in {"kernels", "ops"}:
                assert imported.lazy, where(file, imported)
            if imported.root == "rich" and room(module_name(file)) == "ops":  # the compile tool's progress
                assert imported.lazy, where(file, imported)
            if module_name(file) == "carma_kernels.demo.cli" and imported.root != "carma_kernels":
                optional = imported.root in {"matplotlib", "rich", "tokenizers", "transformers"}
                assert imported.lazy or not optional, where(file, imported)


@pytest.mark.parametrize(
    ("folder", "strangers"),
    [
        ("csrc_ref", {"carma_kernels", "tests", "bench", "numpy", "triton", "pytest"}),
        ("carma_kernels", {"tests", "bench", "pytest", "hypothesis"}),
        ("tests", {"bench"}),
        ("bench", {"tests"}),
    ],
)
def test_strangers(folder: str, strangers: set[str]):
    for file in python_files(folder):
        for imported in imports(file):
            assert imported.root not in strangers, where(file, imported)
