"""A terminal shows what `verify` is at; a file or a pipe gets plain lines."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from carma_kernels.verify import progress
from carma_kernels.verify.progress import Progress
from tests.cli import processes


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    def lines(self) -> list[str]:
        """What has stayed on the screen."""
        shown = []
        for line in self.getvalue().split("\n"):
            text = ""
            for part in line.split("\r"):
                text = part + text[len(part) :]
            shown.append(text.rstrip())
        return shown


@pytest.fixture
def terminal(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(progress, "sys", SimpleNamespace(stdout=terminal))  # pytest sets sys.stdout itself
    monkeypatch.setattr(progress, "_SECONDS", 0.01)
    return terminal


def test_a_step_and_its_details(terminal: Terminal):
    with Progress(91) as shown:
        shown.next_step()
        shown.detail("mi_loss, problem 1 of 5")
        assert "check 1 of 91: mi_loss, problem 1 of 5, 0 s" in terminal.getvalue()
        shown.say("mi_loss ok")
        shown.next_step()
        shown.detail("a name that does not fit on the line " * 3)
    assert terminal.lines() == ["mi_loss ok", ""]
    assert all(len(part) < 80 for part in re.split("[\r\n]", terminal.getvalue()))


def test_it_moves_by_itself(terminal: Terminal):
    with Progress(1) as shown:
        shown.next_step()
        shown.detail("a kernel")
        shown._since -= 61
        limit = time.monotonic() + 10
        while "61 s" not in terminal.getvalue() and time.monotonic() < limit:
            time.sleep(0.01)
        assert "check 1 of 1: a kernel, 61 s" in terminal.getvalue()


def stop() -> str:
    raise KeyboardInterrupt


def test_nothing_is_left_of_it_after_an_error(terminal: Terminal):
    shown = Progress(1)
    shown.next_step()
    with pytest.raises(KeyboardInterrupt), shown:
        shown.detail(stop())
    assert terminal.lines() == [""]


def test_a_pipe_gets_the_lines_alone(capsys):
    with Progress(1) as shown:
        shown.next_step()
        shown.detail("a kernel")
        shown.say("a line")
    assert capsys.readouterr().out == "a line\n"


CODE = """
import sys
from carma_kernels.__main__ import main
from carma_kernels.verify import table
table.CHECKS = table.CHECKS[:1]
sys.exit(main(["verify", "--backend", "torch"]))
"""


def test_on_a_real_terminal():
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", CODE], stdout=follower, cwd=processes.ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    os.close(follower)
    output = b""
    try:
        while part := os.read(leader, 4096):
            output += part
    except OSError:  # how a terminal says that nobody writes to it any more
        pass
    os.close(leader)
    assert process.wait(timeout=120) == 0
    text = output.decode()
    assert "check 4 of 4: pairwise_similarity, float16, problem 5 of 5" in text
    assert "\x1b" not in text
    assert "4 of 4 checks within tolerance" in text.splitlines()[-1]


def test_in_a_real_pipe():
    result = processes.run(code=CODE)
    assert result.returncode == 0, result.stderr
    assert not re.search("[\r\x1b]", result.stdout)
    assert "problem" not in result.stdout.splitlines()[2]
