"""Where results are kept: a file of its own for each run, in a folder for each device."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def new_file(device: str, part: str | None = None, folder: Path | None = None) -> Path:
    """A file that is not there yet: `<device>/<date>-<part>.json`, numbered where that day has had one.

    Args:
        device: its name, as people write it.
        part: what was measured; None for everything.
        folder: instead of the device's own in `RESULTS`.
    """
    folder = folder or RESULTS / re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    name = "-".join(filter(None, [str(datetime.now(UTC).date()), part]))
    numbered = (folder / f"{name}{f'-{number}' if number > 1 else ''}.json" for number in count(1))
    return next(path for path in numbered if not path.exists())


def write(path: Path, results: dict[str, Any]) -> None:
    """Whole or not at all: a run may be ended at any time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(results, indent=1) + "\n")
    unfinished.replace(path)
