"""Other people's libraries, offline, and as they are in a user's process."""

from __future__ import annotations

import pytest
import transformers


@pytest.fixture(autouse=True)
def users_torch(users_defaults: None) -> None:
    """Deterministic mode is for our own operators."""


@pytest.fixture(autouse=True)
def quiet_and_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    transformers.logging.set_verbosity_error()
