"""Synonym replacement: the same definition in other words."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from carma_kernels.demo.definitions import DataError, shipped_file

_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")

Synonyms = Mapping[str, Sequence[str]]
"""Of a lower-case word, what may stand in its place"""


def read_synonyms(path: Path | None = None) -> Synonyms:
    """A JSON Lines file with one `{"word": "...", "synonyms": ["...", ...]}` a line; None: WordNet's, as shipped.

    Raises:
        DataError: the file cannot be read, or a line of it.
    """
    path = path or shipped_file().with_name("synonyms_wordnet.jsonl")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}). It has to be a UTF-8 file of JSON Lines.") from error
    synonyms: dict[str, list[str]] = {}
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            if not isinstance(record["synonyms"], list):
                raise TypeError
            synonyms[record["word"]] = record["synonyms"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise DataError(
                f'{path}:{number}: must be an object like {{"word": "big", "synonyms": ["large"]}}, got {line[:60]!r}.'
            ) from error
    return synonyms


def replace_synonyms(text: str, synonyms: Synonyms, share: float, *, seed: int = 0, avoid: Collection[str] = ()) -> str:
    """`text` with a share of its words replaced by synonyms, each word that is chosen at all of its places.

    `max(1, int(share * words))` different words are replaced, or as many as have a synonym. Which, and by what, depends
    on `seed` and the text alone, and a larger share replaces what a smaller one does and more.

    Args:
        text: a definition.
        synonyms: for lower-case words; a word at the beginning of a sentence keeps its capital letter.
        share: of the words, 0 to 1; 0 replaces none.
        seed: of the choice.
        avoid: words that no synonym may contain, such as the answer.

    Raises:
        ValueError: a share outside of 0 to 1.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must be a number from 0 to 1, got {share!r}.")
    if not share:
        return text
    generator = random.Random(f"{seed} {text}")  # a string is hashed the same way in every process
    words = [word.lower() for word in _WORD.findall(text)]
    unwanted = {word.lower() for word in avoid}
    allowed = {
        word: [other for other in synonyms.get(word, ()) if unwanted.isdisjoint(_WORD.findall(other.lower()))]
        for word in sorted(set(words))
    }
    candidates = [word for word, others in allowed.items() if others]
    generator.shuffle(candidates)
    chosen = {word: generator.choice(allowed[word]) for word in candidates}
    replaced = set(candidates[: max(1, int(share * len(words)))])

    def replacement(match: re.Match[str]) -> str:
        word = match.group()
        if word.lower() not in replaced:
            return word
        other = chosen[word.lower()]
        return other[0].upper() + other[1:] if word[0].isupper() else other

    return _WORD.sub(replacement, text)
