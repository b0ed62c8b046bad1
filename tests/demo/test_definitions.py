"""The user's own file: what is tolerated, and how each fault is reported."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from carma_kernels.demo.definitions import Definition, read_definitions, shipped_file, split_definitions
from tests.demo.conftest import TINY

GOOD = '{"definition": "a small domesticated cat", "word": "kitten"}'


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"definition": "a cat", "word": "cat"', "not JSON (Expecting ',' delimiter at column 38)"),
        (b"kitten", "not JSON (Expecting value at column 1)"),
        (b'["a cat", "cat"]', "must be an object with 'definition' and 'word', not a list"),
        (b'"cat"', "must be an object with 'definition' and 'word', not a string"),
        (b"7", "must be an object with 'definition' and 'word', not a number"),
        (b"true", "must be an object with 'definition' and 'word', not a boolean"),
        (b'{"definition": "a cat"}', "'word' is missing"),
        (b'{"word": "cat"}', "'definition' is missing"),
        (b'{"definition": "  ", "word": "cat"}', "'definition' is empty"),
        (b'{"definition": "a cat", "word": ""}', "'word' is empty"),
        (b'{"definition": ["a cat"], "word": "cat"}', "'definition' must be a string, not a list"),
        (b'{"definition": "a cat", "word": null}', "'word' must be a string, not null"),
        (b'{"definition": "a cat", "word": "\\ud83d"}', "'word' holds half a surrogate pair, which is no character"),
        (b'{"definition": "un caf\xe9", "word": "bar"}', "not UTF-8 (byte 23 of the line is 0xe9)"),
        (b"[" * 200_000, "not usable JSON (nested too deeply)"),
    ],
)
def test_broken_line_is_named_with_its_number_and_the_reason(
    line: bytes, reason: str, demo: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_bytes(b"\n".join([GOOD.encode()] * 20 + [b"", line, GOOD.encode()]))
    assert demo(*TINY.split(), "--data", path, "--out", tmp_path / "out") == 2
    assert capsys.readouterr().err == f"{path}:22: {reason}\n"
    assert not (tmp_path / "out").exists()


def test_all_broken_lines_are_reported_up_to_ten(
    demo: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join([GOOD, *["oops"] * 13]))
    assert demo(*TINY.split(), "--data", path) == 2
    *named, rest = capsys.readouterr().err.splitlines()
    assert [line.partition(": ")[0] for line in named] == [f"{path}:{number}" for number in range(2, 12)]
    assert rest == "... and 3 more broken lines"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\xef\xbb\xbf\r\n \r\n", "is empty"),
        (
            "\n".join([GOOD] * 8).encode(),
            "has 8 definitions, 1 of them held out for the test; the other 7 do not fill a batch of 8. "
            "Add lines, or lower --batch-size.",
        ),
    ],
)
def test_too_small_a_file(
    content: bytes, message: str, demo: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_bytes(content)
    assert demo(*TINY.split(), "--data", path) == 2
    assert capsys.readouterr().err.startswith(f"{path}: {message}")


@pytest.mark.parametrize(("name", "reason"), [("absent.jsonl", "No such file or directory"), ("", "Is a directory")])
def test_file_that_cannot_be_read(
    name: str, reason: str, demo: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / name
    assert demo(*TINY.split(), "--data", path) == 2
    assert capsys.readouterr().err.startswith(f"{path}: {reason}. --data takes a JSON Lines file")


def test_marks_of_other_systems_are_tolerated(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_bytes(
        b"\xef\xbb\xbf" + f'{GOOD}\r\n\r\n{{"word": " été ", "definition": "summer\\nin French"}}'.encode()
    )
    assert read_definitions(path) == [
        Definition("a small domesticated cat", "kitten"),
        Definition("summer\nin French", "été"),
    ]


def test_split_keeps_every_definition_once_and_follows_the_seed() -> None:
    definitions = read_definitions(shipped_file())
    split = split_definitions(definitions, 32, 0, shipped_file())
    assert len(split.held_out) == 320
    assert sorted(split.training + split.held_out) == sorted(definitions)
    assert split == split_definitions(definitions, 32, 0, shipped_file())
    assert split.held_out != split_definitions(definitions, 32, 1, shipped_file()).held_out


def test_shipped_file_is_whole() -> None:
    lines = shipped_file().read_text(encoding="utf-8").splitlines()
    assert len(read_definitions(shipped_file())) == len(lines) == 4000
    assert all(set(json.loads(line)) == {"definition", "word", "pos"} for line in lines)
