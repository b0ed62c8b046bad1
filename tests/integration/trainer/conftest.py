from __future__ import annotations

from collections.abc import Iterator

import pytest
from accelerate.state import AcceleratorState, GradientState


@pytest.fixture(autouse=True)
def own_accelerate() -> Iterator[None]:
    """Accelerate keeps its settings, mixed precision among them, for a process; each test is a user's own."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
