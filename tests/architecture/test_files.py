"""What a reader meets: sizes, documentation, the public names, and nothing of the machine it was written on."""

from __future__ import annotations

import ast
import inspect
import re
import tomllib
from pathlib import Path

import pytest

import carma_kernels
from tests.architecture.sources import ROOT, functions, versioned_files

LONGEST_FUNCTION, LONGEST_FILE = 80, 500


@pytest.fixture(scope="module")
def sources() -> list[Path]:
    return [file for file in versioned_files() if file.suffix == ".py"]


def test_files_are_short(sources: list[Path]):
    lengths = {str(file.relative_to(ROOT)): len(file.read_text().splitlines()) for file in sources}
    assert {name: lines for name, lines in lengths.items() if lines > LONGEST_FILE} == {}


def test_functions_are_short(sources: list[Path]):
    # statements, not lines: a line for each parameter of a kernel, with its shape, makes nothing harder to read
    long = [
        f"{file.relative_to(ROOT)}:{node.lineno} {node.name}: {statements} statements"
        for file in sources
        for node in functions(file)
        if (statements := sum(isinstance(part, ast.stmt) for part in ast.walk(node))) > LONGEST_FUNCTION
    ]
    assert not long


def test_public_names():
    assert carma_kernels.__all__ == [
        "CarmaConfig",
        "CarmaLoss",
        "CarmaOutput",
        "MILoss",
        "PairIndex",
        "StabilityLoss",
        "TokenSpans",
        "carma_loss",
        "choose_backend",
        "mi_loss",
        "pairwise_similarity",
        "stability_loss",
        "total_loss",
    ]
    assert all(hasattr(carma_kernels, name) for name in carma_kernels.__all__)


def public_members() -> list[tuple[str, object]]:
    found = [(name, getattr(carma_kernels, name)) for name in carma_kernels.__all__]
    return found + [
        (f"{name}.{attribute}", member)
        for name, value in found
        if inspect.isclass(value)
        for attribute, member in vars(value).items()
        if not attribute.startswith("_") and (callable(member) or isinstance(member, property | classmethod))
    ]


@pytest.mark.parametrize(("name", "member"), [pytest.param(*pair, id=pair[0]) for pair in public_members()])
def test_documented(name: str, member: object):
    text = inspect.getdoc(member)
    assert text
    assert not text.startswith(f"{name}("), "what Python writes for a class without a docstring"


@pytest.mark.parametrize("name", ["carma_loss", "mi_loss", "pairwise_similarity", "stability_loss", "total_loss"])
def test_every_argument_is_documented(name: str):
    function = getattr(carma_kernels, name)
    text = inspect.getdoc(function) or ""
    for section in ("Args:", "Raises:"):
        assert section in text
    for parameter in inspect.signature(function).parameters:
        assert re.search(rf"^ +{parameter}: ", text, re.MULTILINE), f"{name} does not say what {parameter} is"


def test_one_version():
    with open(ROOT / "pyproject.toml", "rb") as file:
        assert tomllib.load(file)["project"]["version"] == carma_kernels.__version__
    assert re.search(
        rf"^## \[?{re.escape(carma_kernels.__version__)}\b", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE
    )


def test_typed():
    for package in ("carma_kernels", "csrc_ref"):
        assert (ROOT / package / "py.typed").exists()


# put together here, or this file would name them itself
FOREIGN = re.compile("|".join(["/" + "work/", "/" + "root/", "/" + "home/", r"\.\./" + "shared", "issues" + " show"]))


def test_nothing_names_the_machine_it_was_written_on():
    files = versioned_files()
    named = []
    for file in files:
        try:
            text = file.read_text()
        except UnicodeDecodeError:
            continue  # a picture
        named += [f"{file.relative_to(ROOT)}: {match.group()}" for match in FOREIGN.finditer(text)]
    assert not named
