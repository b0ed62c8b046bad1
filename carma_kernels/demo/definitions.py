"""Definitions and the words they define: read from JSON Lines, checked, split into training and held-out."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

_HELD_OUT_SHARE = 10  # one definition in so many
_MAX_HELD_OUT = 320
_MAX_REPORTED = 10


class Definition(NamedTuple):
    """One line of the data: what the model reads and the word it has to name."""

    definition: str
    word: str


class Split(NamedTuple):
    """Definitions to learn from, and others to be tested on."""

    training: list[Definition]
    held_out: list[Definition]


class DataError(ValueError):
    """The file cannot be used; the message says where and why."""


def shipped_file() -> Path:
    """The WordNet definitions that come with the package, or with its checkout."""
    package = Path(__file__).resolve().parent
    candidates = [package / "data", package.parents[1] / "examples" / "data"]
    return next((at for folder in candidates if (at := folder / "idm_wordnet.jsonl").exists()), candidates[0])


def read_definitions(path: Path) -> list[Definition]:
    """Every line of a JSON Lines file as a `Definition`; blank lines, a byte order mark and CRLF are fine.

    Raises:
        DataError: the file cannot be read, is empty, or has broken lines, named by their numbers and the reasons.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path}: {error.strerror}. --data takes a JSON Lines file with one object a line, "
            '{"definition": "...", "word": "..."}; without --data the demo uses its own WordNet definitions.'
        ) from error
    definitions: list[Definition] = []
    faults: list[str] = []
    for number, line in enumerate(raw.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            definitions.append(_parse(line))
        except ValueError as error:
            faults.append(f"{path}:{number}: {error}")
    if faults:
        more = [f"... and {len(faults) - _MAX_REPORTED} more broken lines"] if len(faults) > _MAX_REPORTED else []
        raise DataError("\n".join(faults[:_MAX_REPORTED] + more))
    if not definitions:
        raise DataError(f"{path}: is empty. Each line must be an object with the strings 'definition' and 'word'.")
    return definitions


def split_definitions(definitions: Sequence[Definition], batch_size: int, seed: int, source: Path) -> Split:
    """Shuffle with `seed` and hold a tenth out, 320 at most.

    Raises:
        DataError: fewer than a batch to learn from, or none to hold out.
    """
    num_held_out = min(max(len(definitions) // _HELD_OUT_SHARE, 1), _MAX_HELD_OUT)
    if len(definitions) - num_held_out < batch_size:
        raise DataError(
            f"{source}: has {len(definitions)} definitions, {num_held_out} of them held out for the test; the other "
            f"{len(definitions) - num_held_out} do not fill a batch of {batch_size}. Add lines, or lower --batch-size."
        )
    shuffled = random.Random(seed).sample(definitions, len(definitions))
    return Split(training=shuffled[num_held_out:], held_out=shuffled[:num_held_out])


def _parse(line: bytes) -> Definition:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(
            f"not UTF-8 (byte {error.start + 1} of the line is 0x{error.object[error.start]:02x})"
        ) from error
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at column {error.colno})") from error
    except RecursionError as error:
        raise ValueError("not usable JSON (nested too deeply)") from error
    if not isinstance(record, dict):
        raise ValueError(f"must be an object with 'definition' and 'word', not {_json_type(record)}")
    return Definition(_text(record, "definition"), _text(record, "word"))


def _text(record: dict[str, object], field: str) -> str:
    if field not in record:
        raise ValueError(f"'{field}' is missing")
    value = record[field]
    if not isinstance(value, str):
        raise ValueError(f"'{field}' must be a string, not {_json_type(value)}")
    if not value.strip():
        raise ValueError(f"'{field}' is empty")
    if any("\ud800" <= letter <= "\udfff" for letter in value):  # half of a \u escape pair: no text
        raise ValueError(f"'{field}' holds half a surrogate pair, which is no character")
    return value.strip()


def _json_type(value: object) -> str:
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    return names.get(type(value), "null")
