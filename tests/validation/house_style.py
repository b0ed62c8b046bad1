"""How an error has to read: it names the argument, says what it got and what is allowed, and shows the way out."""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable
from typing import NamedTuple

import pytest


class Bad(NamedTuple):
    """A call that must be refused."""

    id: str
    call: Callable[[], object]
    error: type[Exception]
    argument: str
    """as the message names it"""
    got: str
    """what was passed, as far as the message has to show it"""
    way_out: str
    """what is allowed, or what to do"""


def refusal(bad: Bad) -> Exception:
    """The exception of the call, which must be of that very type."""
    with pytest.raises(bad.error) as refused:
        bad.call()
    assert refused.type is bad.error
    return refused.value


def assert_house_style(bad: Bad) -> None:
    message = str(refusal(bad))
    assert bad.argument
    assert re.search(rf"(?<!\w){re.escape(bad.argument)}(?!\w)", message), f"does not name {bad.argument}: {message}"
    assert bad.got
    assert bad.got in message, f"does not say that it got {bad.got}: {message}"
    assert bad.way_out
    assert bad.way_out in message, f"does not say {bad.way_out!r}: {message}"
    assert re.search(r"\b(must|half-open|[A-Z][a-z]+|drop|pass|sample|make|use|split) \S", message), "says no way out"
    assert message.endswith("."), message
    assert "\n" not in message
    assert len(message) < 350


def raised_at(bad: Bad) -> tuple[str, int]:
    """File and line of the `raise`."""
    frame = traceback.extract_tb(refusal(bad).__traceback__)[-1]
    assert frame.lineno is not None
    return frame.filename, frame.lineno
