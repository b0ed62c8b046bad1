"""The checkout's Python, as syntax trees."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

import carma_kernels

ROOT = Path(carma_kernels.__file__).resolve().parent.parent


@dataclass(frozen=True)
class Import:
    """One name that a file imports, with dots."""

    name: str
    line: int
    lazy: bool
    """within a function"""

    @property
    def root(self) -> str:
        return self.name.split(".")[0]


def python_files(*folders: str) -> list[Path]:
    files = [file for folder in folders for file in sorted((ROOT / folder).rglob("*.py"))]
    assert files
    return files


@cache
def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(), str(file))


def module_name(file: Path) -> str:
    """`carma_kernels.eager.mi`; a package by its own name."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(file: Path) -> Iterator[Import]:
    """Statements, and `import_module` of a name written out; `from a import b` as `a.b`."""
    in_functions = {id(inner) for node in functions(file) for inner in ast.walk(node)}
    for node in ast.walk(tree(file)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{_absolute(node, file)}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and _called(node) == "import_module":
            names = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
        yield from (Import(name, node.lineno, id(node) in in_functions) for name in names)


def _absolute(node: ast.ImportFrom, file: Path) -> str:
    if not node.level:
        return node.module or ""
    package = file.relative_to(ROOT).parts[: -node.level]
    return ".".join((*package, *([node.module] if node.module else [])))


def functions(file: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def calls(file: Path) -> Iterator[tuple[str, int]]:
    """Name and line of each call: `item` for `x.item()`, `print` for `print()`."""
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Call) and (name := _called(node)):
            yield name, node.lineno


def _called(node: ast.Call) -> str | None:
    if isinstance(node.func, ast.Attribute):
        return node.func.attr
    return node.func.id if isinstance(node.func, ast.Name) else None


def versioned_files() -> list[Path]:
    """What is committed, or added to be; skips outside of a checkout."""
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "-z"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    files = [ROOT / name for name in listed.split("\0") if name]
    return [file for file in files if file.is_file()]
