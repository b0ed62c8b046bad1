"""Whatever a part does, the run is over in time, and says and keeps what it has."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench import session as session_of
from bench.session import Session

pytestmark = pytest.mark.smoke


@pytest.fixture
def results():
    return {"parts": []}


@pytest.fixture
def session(results, tmp_path, monkeypatch):
    monkeypatch.setattr(session_of, "FOR_THE_END", 1.0)
    monkeypatch.setattr(session_of, "_LEAST", 0.1)
    running = Session(60, tmp_path / "found.json", results, lambda: "the tables")
    yield running
    running._watch.cancel()


def fail():
    raise RuntimeError("no memory\nfor that")


def wait():
    time.sleep(30)


def wait_stubbornly():
    """As code that takes every exception for its own."""
    while True:
        try:
            time.sleep(30)
        except Exception:
            continue


def test_what_is_found_is_saved_at_once(session, tmp_path):
    session.found("numbers", {"is": 1})
    session.found("numbers", {"is": 2})
    assert json.loads((tmp_path / "found.json").read_text())["numbers"] == [{"is": 1}, {"is": 2}]


@pytest.mark.parametrize("run", [wait, wait_stubbornly])
def test_a_part_has_a_limit_and_the_next_one_runs(session, results, run):
    start = time.monotonic()
    session.part("slow", 0.3, run)
    session.part("next", 5, lambda: session.found("numbers", {"is": 1}))
    assert time.monotonic() - start < 10
    assert [part["error"] for part in results["parts"]] == ["ended after 0 s", ""]
    assert results["numbers"] == [{"is": 1}]
    assert session.close() == 1


def test_a_part_that_fails_is_said(session, results, capsys):
    session.part("broken", 5, fail)
    session.part("whole", 5, lambda: None)
    assert [part["error"] for part in results["parts"]] == ["RuntimeError: no memory for that", ""]
    assert session.close() == 1
    assert "broken: RuntimeError: no memory for that" in (text := capsys.readouterr().out)
    assert text.index("the tables") > text.index("broken")


def test_nothing_missing_is_success(session):
    session.part("whole", 5, lambda: None)
    assert session.close() == 0


def test_a_part_without_time_is_left_out(results, tmp_path):
    session = Session(5, tmp_path / "found.json", results, lambda: "")
    session.part("late", 5, fail)
    assert results["parts"][0]["error"] == "left out: 5 s are left of the run"
    assert session.close() == 1


HANGS = """
import signal, sys, time
from pathlib import Path
from bench import session as session_of

session_of.FOR_THE_END = 1
results = {"parts": []}
session = session_of.Session(6, Path(sys.argv[1]), results, lambda: f"found {results['numbers']}")

def hang():
    session.found("numbers", {"is": 1})
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])  # as in code that never comes back to Python
    time.sleep(60)

session.part("hangs", 60, hang)
"""


def test_a_run_that_hangs_ends(tmp_path: Path):
    path = tmp_path / "found.json"
    command = [sys.executable, "-c", HANGS, str(path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=40, check=False)
    assert result.returncode == 1, result.stderr
    assert "found [{'is': 1}]" in result.stdout
    found = json.loads(path.read_text())
    assert found["numbers"] == [{"is": 1}]
    assert "it hung" in found["parts"][0]["error"]
