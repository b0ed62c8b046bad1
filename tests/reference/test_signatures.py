"""The reference is called as the package is, less `backend` and `group`, and depends on nothing of it."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import sys
from pathlib import Path

import pytest

import carma_kernels
import csrc_ref

FUNCTIONS = [name for name in csrc_ref.__all__ if inspect.isfunction(getattr(csrc_ref, name))]


def parameters(function: object) -> list[tuple[str, object, object]]:
    """Name, kind and default of each; a config's default as its fields."""
    signature = inspect.signature(function)  # type: ignore[arg-type]
    return [
        (p.name, p.kind, dataclasses.asdict(p.default) if dataclasses.is_dataclass(p.default) else p.default)
        for p in signature.parameters.values()
        if p.name not in ("backend", "group")
    ]


def test_the_functions_are_the_four_of_the_design() -> None:
    assert sorted(FUNCTIONS) == ["carma_loss", "mi_loss", "pairwise_similarity", "stability_loss"]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_same_parameters(name: str) -> None:
    assert parameters(getattr(csrc_ref, name)) == parameters(getattr(carma_kernels, name))
    ours = inspect.signature(getattr(carma_kernels, name)).parameters
    assert "backend" in ours
    assert ("group" in ours) == name.endswith("_loss")


def test_same_config() -> None:
    ours, theirs = (
        [(field.name, field.default) for field in dataclasses.fields(package.CarmaConfig)]
        for package in (csrc_ref, carma_kernels)
    )
    assert ours == theirs


def test_same_output() -> None:
    assert csrc_ref.CarmaOutput._fields == carma_kernels.CarmaOutput._fields


def test_the_reference_imports_torch_and_nothing_else() -> None:
    files = sorted(Path(csrc_ref.__file__).parent.glob("*.py"))
    assert len(files) > 4
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            imported = (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
            roots = {name.split(".")[0] for name in imported}
            assert roots <= {"torch", "csrc_ref"} | sys.stdlib_module_names, f"{file.name} imports {roots}"
