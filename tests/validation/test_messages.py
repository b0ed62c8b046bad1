"""Every bad input is refused, with an error that helps; and no error goes untested."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import carma_kernels
from tests.validation.bad_hidden_states import HIDDEN_STATES
from tests.validation.bad_options import BACKENDS, CONFIGS, OPTIONS, TOTALS
from tests.validation.bad_spans import SPANS_AND_PAIRS
from tests.validation.house_style import Bad, assert_house_style, raised_at

pytestmark = pytest.mark.usefixtures("no_interpreter")

BAD = [*HIDDEN_STATES, *OPTIONS, *BACKENDS, *CONFIGS, *TOTALS, *SPANS_AND_PAIRS]
PACKAGE = Path(carma_kernels.__file__).parent
CHECKING = (
    "_backend.py",
    "_span_inputs.py",
    "_validate.py",
    "config.py",
    "functional.py",
    "modules.py",
    "pairs.py",
    "spans.py",
)


@pytest.fixture(autouse=True)
def no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CARMA_KERNELS_BACKEND", raising=False)


@pytest.mark.parametrize("bad", [pytest.param(bad, id=bad.id) for bad in BAD])
def test_message(bad: Bad):
    assert_house_style(bad)


def raises(file: Path) -> Iterator[range]:
    """The lines of each `raise` of an exception of its own."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Raise) and node.exc is not None:
            assert node.end_lineno is not None
            yield range(node.lineno, node.end_lineno + 1)


def test_every_error_is_tested():
    reached = {raised_at(bad) for bad in BAD}
    statements = [(file, lines) for name in CHECKING for file in [PACKAGE / name] for lines in raises(file)]
    assert len(statements) > 40
    untested = [
        f"{file.name}:{lines.start}"
        for file, lines in statements
        if not any((str(file), line) in reached for line in lines)
    ]
    assert not untested


def test_errors_come_from_the_files_that_check():
    """Nothing half-checked reaches a backend, and `test_every_error_is_tested` looks where the errors are."""
    assert {Path(file).name for file, _ in map(raised_at, BAD)} <= set(CHECKING)
