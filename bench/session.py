"""A run that is over in time, whatever happens: parts that fail or last too long, with what is found saved at once."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench import saved

FOR_THE_END = 8.0
"""Seconds that no part gets: what there is has to be printed."""
_LEAST = 2.0
"""Seconds with which no part is begun."""


class OutOfTime(BaseException):
    """A part has lasted too long. No `Exception`: nothing that handles those may keep it."""


class Session:
    """Parts, one after the other, until a deadline."""

    def __init__(self, seconds: float, path: Path, results: dict[str, Any], tables: Callable[[], str]) -> None:
        """Start the clock.

        Args:
            seconds: until the process ends, if need be in the middle of something.
            path: where the results are saved.
            results: what is found goes into its lists.
            tables: what is printed at the end.
        """
        self.results, self._path, self._tables = results, path, tables
        self._begin = time.monotonic()
        self._end = self._part_end = self._begin + seconds
        self._lock = threading.RLock()
        self._watch = threading.Timer(seconds, self._give_up)
        self._watch.daemon = True
        self._watch.start()

    def say(self, text: str) -> None:
        """A line about how far it is."""
        sys.stdout.write(f"[{time.monotonic() - self._begin:4.0f} s] {text}\n")
        sys.stdout.flush()

    def found(self, kind: str, record: dict[str, Any]) -> None:
        """Keep something, and save all there is."""
        with self._lock:
            self.results.setdefault(kind, []).append(record)
            saved.write(self._path, self.results)

    @property
    def is_short(self) -> bool:
        """Whether the part has to come to an end."""
        return self._part_end - time.monotonic() < _LEAST

    def part(self, name: str, seconds: float, run: Callable[[], None]) -> None:
        """Run a part for so many seconds at most, or fewer if there are not as many left. Its failure is a finding."""
        begin = time.monotonic()
        allowed = min(seconds, self._end - FOR_THE_END - begin)
        error = f"left out: {max(0, self._end - begin):.0f} s are left of the run"
        if allowed >= _LEAST:
            self._part_end = begin + allowed
            self.say(f"{name}: up to {allowed:.0f} s")
            error = self._tried(run, allowed)
        if error:
            self.say(f"{name}: {error}")
        spent = round(time.monotonic() - begin, 1)
        self.found("parts", {"name": name, "seconds": spent, "at_most": seconds, "error": error})

    def close(self) -> int:
        """Print what there is; the exit code: 1 if something is missing."""
        with self._lock:
            self._watch.cancel()
            sys.stdout.write(f"\n{self._tables()}\n\nwritten to {self._path}\n")
            sys.stdout.flush()
            return int(any(part["error"] for part in self.results.get("parts", [])))

    def _tried(self, run: Callable[[], None], seconds: float) -> str:
        """What went wrong; nothing if nothing did."""
        try:
            with _at_most(seconds):
                run()
        except OutOfTime:
            return f"ended after {seconds:.0f} s"
        except Exception as error:
            return reason(error)
        return ""

    def _give_up(self) -> None:
        """From another thread: the part hangs where no signal is seen."""
        with self._lock:
            self.found("parts", {"name": "the last one", "seconds": 0, "at_most": 0, "error": "it hung: the run ended"})
            self.close()
            os._exit(1)


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Raise `OutOfTime` within, again and again if that is kept from coming out."""

    def stop(*_: object) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, 3)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def reason(error: BaseException) -> str:
    """An error in a line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
