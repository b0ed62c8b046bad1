"""What a page under docs/ claims: the numbers of its tables, and its code with the numbers in the comments."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from torch import Tensor

DOCS = Path(__file__).parents[2] / "docs"
_ROW = re.compile(r"^\| `(?P<name>[^`]+)` \|.*\| (?P<value>-?\d+\.\d{6}) \|$", re.MULTILINE)
_CODE = re.compile(r"^```python\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
_RESULT = re.compile(r"^(?P<name>\w+) = .*  # (?P<value>-?\d+\.\d{6})$", re.MULTILINE)


def table_numbers(page: str) -> dict[str, str]:
    """Name to number, as printed, of every table row that ends in a number of six decimals."""
    rows = _ROW.findall((DOCS / page).read_text())
    assert len(rows) == len(dict(rows)), f"{page} gives a name twice"
    return dict(rows)


def run_code(page: str, package: ModuleType | SimpleNamespace) -> dict[str, tuple[float, float]]:
    """Name to (number printed, number computed) of the page's code, run with `package` as `ck`."""
    (code,) = _CODE.findall((DOCS / page).read_text())
    names: dict[str, Any] = {"ck": package}
    exec(code.replace("import carma_kernels as ck\n", ""), names)
    return {name: (float(value), names[name].item()) for name, value in _RESULT.findall(code)}


def printed(numbers: dict[str, Tensor]) -> dict[str, str]:
    """Numbers as the tables print them."""
    return {name: f"{value.item():.6f}" for name, value in numbers.items()}
