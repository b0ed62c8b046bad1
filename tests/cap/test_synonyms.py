"""Synonym replacement, and the synonyms that are shipped."""

from __future__ import annotations

import json
import re

import pytest

from carma_kernels.cap import read_synonyms, replace_synonyms
from carma_kernels.demo.definitions import DataError, read_definitions, shipped_file

SYNONYMS = {"big": ["large", "great"], "house": ["home", "place of abode"], "red": ["crimson"], "old": ["aged"]}
TEXT = "Big houses and a big old house, with a red-brown door that isn't old"


def words(text: str) -> list[str]:
    return re.findall(r"[a-z']+", text.lower())


@pytest.mark.parametrize(("share", "number"), [(0.0, 0), (1e-9, 1), (0.15, 2), (0.21, 3), (1.0, 4)])
def test_how_many_words(share, number):
    assert len(words(TEXT)) == 15
    replaced = replace_synonyms(TEXT, SYNONYMS, share)
    gone = set(words(TEXT)) - set(words(replaced))
    assert len(gone) == number
    assert gone <= set(SYNONYMS)
    assert "houses" in words(replaced)
    assert "isn't" in words(replaced)


def test_every_place_of_a_word_and_its_capital():
    replaced = replace_synonyms(TEXT, {"big": ["large"]}, 1)
    assert replaced == TEXT.replace("Big", "Large").replace("big", "large")


def test_a_larger_share_replaces_more():
    for seed in range(20):
        gone = [
            set(words(TEXT)) - set(words(replace_synonyms(TEXT, SYNONYMS, s, seed=seed))) for s in (0.1, 0.15, 0.25, 1)
        ]
        assert gone[0] < gone[1] < gone[2] < gone[3]


def test_the_seed_and_the_text_decide():
    variants = {replace_synonyms(TEXT, SYNONYMS, 0.15, seed=seed) for seed in range(30)}
    assert len(variants) > 5
    assert replace_synonyms(TEXT, SYNONYMS, 0.15, seed=3) == replace_synonyms(TEXT, SYNONYMS, 0.15, seed=3)
    # fixed for ever, in every process and on every platform
    assert replace_synonyms("a big red house", SYNONYMS, 0.5, seed=7) == "a large red place of abode"


def test_the_answer_is_not_given_away():
    for seed in range(20):
        assert "abode" not in replace_synonyms("a house", SYNONYMS, 1, seed=seed, avoid=["Abode"])
    assert replace_synonyms("something red", SYNONYMS, 1, avoid=["crimson"]) == "something red"


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_share_out_of_range(share):
    with pytest.raises(ValueError, match="share must be a number from 0 to 1"):
        replace_synonyms(TEXT, SYNONYMS, share)


def test_shipped():
    synonyms = read_synonyms()
    definitions = read_definitions(shipped_file())
    used = {word for entry in definitions for word in words(entry.definition)}
    assert len(synonyms) > 3000
    assert set(synonyms) <= used
    for word, others in synonyms.items():
        assert word == word.lower()
        assert 1 <= len(others) == len(set(others)) <= 5
        assert word not in others
    changed = [replace_synonyms(e.definition, synonyms, 0.1, avoid=[e.word]) != e.definition for e in definitions[:500]]
    assert sum(changed) / len(changed) > 0.95


def test_own_file(tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_text(json.dumps({"word": "café", "synonyms": ["bar"]}), encoding="utf-8")
    assert replace_synonyms("a Café", read_synonyms(file), 1) == "a Bar"


@pytest.mark.parametrize("line", ["[1]", "{", '{"word": "a"}', '{"word": "a", "synonyms": "b"}', "3"])
def test_broken_file(tmp_path, line):
    file = tmp_path / "mine.jsonl"
    file.write_text('{"word": "big", "synonyms": ["large"]}\n' + line, encoding="utf-8")
    with pytest.raises(DataError, match=r"mine\.jsonl:2: must be an object like"):
        read_synonyms(file)


def test_no_file(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        read_synonyms(tmp_path / "none.jsonl")
