"""One function launches kernels, one says what a device is: both are in `carma_kernels._runtime`."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.architecture.sources import module_name, python_files, tree

RUNTIME = "carma_kernels._runtime"
COMMANDS = {
    "carma_kernels.measure",
    "carma_kernels.doctor.findings",
    "carma_kernels.demo.arguments",
}  # list or pick devices
COMPILES = "carma_kernels.ops.compile"  # for devices that are not there
LAUNCH = re.compile(r"[\w.]*kernel(\[.*|\.run)", re.DOTALL)
ASK = re.compile(r"torch\.(cuda\.(is_available|device_count|get_device_\w+)|version\.\w+)|\bknobs\b|JITFunction")

FILES = {module_name(file): file for file in python_files("carma_kernels")}


def launches(file: Path) -> list[str]:
    """`kernel[grid](...)` and `kernel.run(...)`."""
    called = [ast.unparse(node.func) for node in ast.walk(tree(file)) if isinstance(node, ast.Call)]
    return [name for name in called if LAUNCH.fullmatch(name)]


def questions(file: Path) -> list[str]:
    """What asks which hardware or which Triton there is."""
    named = [ast.unparse(node) for node in ast.walk(tree(file)) if isinstance(node, ast.Attribute)]
    return [name for name in named if ASK.search(name)]


@pytest.mark.parametrize("module", sorted(FILES))
def test_one_launch(module: str):
    found = launches(FILES[module])
    assert found == {RUNTIME: ["kernel[grid]"], COMPILES: ["kernel.run"]}.get(module, [])


@pytest.mark.parametrize("module", sorted(FILES.keys() - COMMANDS))
def test_one_question(module: str):
    assert bool(questions(FILES[module])) == (module == RUNTIME)


@pytest.mark.parametrize("file", python_files("carma_kernels/kernels"), ids=lambda file: file.stem)
def test_kernels_take_nested_tuples_apart_one_by_one(file: Path):
    """Triton's search for what a kernel depends on fails on `a, (b, c) = d`, in a process's first launch alone."""
    targets = [target for node in ast.walk(tree(file)) if isinstance(node, ast.Assign) for target in node.targets]
    nested = [
        target.lineno
        for target in targets
        if isinstance(target, ast.Tuple) and any(isinstance(part, ast.Tuple | ast.List) for part in target.elts)
    ]
    assert not nested
