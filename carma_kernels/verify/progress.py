"""What is being done just now, on a terminal: a line that is written over, and gone when it is done."""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType

_WIDTH = 79  # a line that wraps cannot be written over
_SECONDS = 0.2  # between two looks at the clock


class Progress:
    """Says which step of how many is under way, and for how long; into a file or a pipe nothing.

    Only spaces and carriage returns, which every terminal knows. A thread of its own keeps the seconds going: a step
    of Triton's interpreter takes several.
    """

    def __init__(self, steps: int) -> None:
        """For so many steps."""
        self._steps = steps
        self._step = 0
        self._doing = ""
        self._since = time.monotonic()
        self._shown = sys.stdout.isatty()
        self._done = threading.Event()
        self._writing = threading.Lock()
        self._clock = threading.Thread(target=self._tick, daemon=True)

    def __enter__(self) -> Progress:
        """Start the clock."""
        if self._shown:
            self._clock.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Stop it, and leave no trace."""
        self._done.set()
        if self._shown:
            self._clock.join()

    def next_step(self) -> None:
        """The one before is done."""
        self._step += 1
        self._since = time.monotonic()

    def detail(self, doing: str) -> None:
        """What is done within the step."""
        self._doing = doing
        self._draw()

    def say(self, line: str) -> None:
        """A line that stays."""
        with self._writing:
            self._wipe()
            sys.stdout.write(f"{line}\n")
            sys.stdout.flush()

    def _tick(self) -> None:
        while not self._done.wait(_SECONDS):
            self._draw()
        with self._writing:
            self._wipe()
            sys.stdout.flush()

    def _draw(self) -> None:
        if not self._shown or not self._step:
            return
        seconds = time.monotonic() - self._since
        text = f"check {self._step} of {self._steps}: {self._doing}, {seconds:.0f} s"
        with self._writing:
            sys.stdout.write(f"\r{text[:_WIDTH]:<{_WIDTH}}")
            sys.stdout.flush()

    def _wipe(self) -> None:
        if self._shown:
            sys.stdout.write(f"\r{'':<{_WIDTH}}\r")
