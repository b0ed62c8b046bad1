"""The pages about the kernels say what the kernels are."""

from __future__ import annotations

import importlib.util
import re
from types import ModuleType

import pytest

from carma_kernels import _runtime
from carma_kernels.kernels import launch
from tests.architecture.sources import ROOT

DOCS = ROOT / "docs"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_kernel_is_explained() -> None:
    page = (DOCS / "kernels.md").read_text()
    kernels = {
        name
        for file in (ROOT / "carma_kernels" / "kernels").glob("*.py")
        for name in re.findall(r"^def _(\w+)_kernel\(", file.read_text(), re.MULTILINE)
    }
    assert len(kernels) > 10
    assert not {name for name in kernels if f"`{name}`" not in page}


def test_the_computed_bytes_are_those_of_the_launch_table() -> None:
    """Red? `python docs/kernel_bytes.py` prints what belongs there."""
    assert "\n".join(script("kernel_bytes").page()).strip() in (DOCS / "kernels.md").read_text()


def test_every_picture_is_there() -> None:
    pytest.importorskip("matplotlib")
    page = (DOCS / "kernels.md").read_text()
    for draw in script("draw_kernels").DRAWINGS:
        assert (DOCS / "pictures" / f"{draw.__name__}.svg").exists()
        assert f"pictures/{draw.__name__}.svg" in page


def test_every_configuration_has_been_compiled() -> None:
    """Red? `python -m carma_kernels.ops.compile --markdown > docs/compile_table.md`."""
    page = (DOCS / "compile_table.md").read_text()
    assert re.search(r"^\d+ compilations, 0 faults\.$", page, re.MULTILINE)
    assert all(target in page for target in _runtime.TARGETS)
    for kernel, configurations in launch.TABLE.items():
        for configuration in configurations:
            blocks = " ".join(f"{name}={value}" for name, value in configuration.options.items())
            assert f"{blocks} |" in page, f"{kernel}: {blocks}"
