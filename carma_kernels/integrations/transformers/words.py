"""The words of a text of which only the tokens are left: those of its encoding, or none.

Tokens do not always say. What was truncated may have gone on in several ways, an unknown token may be any character,
and not every tokenizer keeps where words begin. Where several answers are possible, none is given.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

from carma_kernels.integrations.transformers.spelling import BYTE_OF, Spelling, UnknownWordsError

_BLANK = "\u2581"  # SentencePiece's mark on a piece that begins with a blank
_Starts = Callable[[list[str]], list[bool]]  # of each token of a text: whether it begins a word


class WordReader:
    """Reads words as `TokenSpans.from_encoding` has them from the token ids of one fast tokenizer.

    Args:
        tokenizer: a fast one of `transformers`.

    Raises:
        UnknownWordsError: its tokens never tell.
    """

    def __init__(self, tokenizer: Any) -> None:
        """Look at how it is made."""
        backend = tokenizer.backend_tokenizer
        self._backend = backend
        self._starts = _starts_of(backend, tokenizer.truncation_side == "left")
        self._alone: set[int] = set()  # tokens that the tokenizer cuts out of a text before it looks for words
        self._unknown: set[int] = set()  # tokens that may stand for any characters
        unknown = {backend.token_to_id(name) for name in (tokenizer.unk_token, _unk_token(backend)) if name is not None}
        for id, added in backend.get_added_tokens_decoder().items():
            if id in unknown and not _is_complete(backend):
                self._unknown.add(id)
            elif not (added.content.startswith(_BLANK) and backend.model.token_to_id(added.content) == id):
                self._alone.add(id)  # but for runs of blanks, which Gemma's pieces are, too
        self._special = {id for id in self._alone if id in tokenizer.all_special_ids}

    def __call__(self, token_ids: Sequence[int]) -> list[int | None]:
        """The number of each token's word, None for a special token.

        Raises:
            UnknownWordsError: several texts with other words have these tokens.
        """
        number = -1
        numbers: list[int | None] = []
        for is_alone, group in groupby(token_ids, self._alone.__contains__):
            run = list(group)
            starts = [True] * len(run) if is_alone else self._starts(self._tokens(run))
            for id, is_start in zip(run, starts, strict=True):
                number += is_start
                numbers.append(None if id in self._special else number)
        return numbers

    def _tokens(self, ids: list[int]) -> list[str]:
        for id in ids:
            if id in self._unknown:
                name = self._backend.id_to_token(id)
                raise UnknownWordsError(f"{name} may be a word or characters of one")
        tokens = [self._backend.id_to_token(id) for id in ids]
        if None in tokens:
            raise UnknownWordsError(f"token {ids[tokens.index(None)]} is none of the tokenizer's")
        return tokens


def _starts_of(backend: Any, cuts_left: bool) -> _Starts:
    """How tokens of this tokenizer tell where words begin."""
    model, steps = backend.model, _pre_tokenizers(backend)
    kind = type(model).__name__
    if kind == "WordLevel":
        return lambda tokens: [True] * len(tokens)
    if kind == "WordPiece" and (prefix := model.continuing_subword_prefix) and not _may_write(backend, prefix):
        return lambda tokens: [place == 0 or not token.startswith(prefix) for place, token in enumerate(tokens)]
    suffix = getattr(model, "end_of_word_suffix", None)
    if suffix and _loses_nothing(backend) and not _may_write(backend, suffix):
        return lambda tokens: [place == 0 or tokens[place - 1].endswith(suffix) for place in range(len(tokens))]
    if kind in ("BPE", "Unigram") and not suffix:
        if _marks_blanks(backend, steps):
            return lambda tokens: [place == 0 or token.startswith(_BLANK) for place, token in enumerate(tokens)]
        if _keeps_bytes(steps) and _loses_nothing(backend):
            return Spelling(backend, cuts_left)
    raise UnknownWordsError("this tokenizer's tokens do not say where words begin")


def _pre_tokenizers(backend: Any) -> list[dict[str, Any]]:
    if backend.pre_tokenizer is None:
        return []
    state = json.loads(backend.pre_tokenizer.__getstate__())
    steps: list[dict[str, Any]] = state["pretokenizers"] if state["type"] == "Sequence" else [state]
    return steps


def _may_write(backend: Any, mark: str) -> bool:
    """Whether a word may hold, as its text, what marks where words begin or end."""
    text = f"x{mark}x"
    pieces = [text] if backend.pre_tokenizer is None else [s for s, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
    return any(mark in piece for piece in pieces)


def _marks_blanks(backend: Any, steps: list[dict[str, Any]]) -> bool:
    """Whether the first token of each word, and no other, begins with a blank's mark."""
    if backend.model.token_to_id(_BLANK) is None:
        return False
    kinds = [step["type"] for step in steps]
    if kinds == ["Split"]:  # Gemma's, which never finds a blank
        normalized = backend.normalizer is not None and " " not in backend.normalizer.normalize_str(" a  b ")
        return normalized and steps[0]["pattern"] == {"String": " "}
    if kinds and (kinds[-1] != "Metaspace" or steps[-1]["replacement"] != _BLANK):
        return False
    return kinds in ([], ["Metaspace"]) or (
        kinds == ["WhitespaceSplit", "Metaspace"] and steps[1]["prepend_scheme"] == "always"
    )


def _keeps_bytes(steps: list[dict[str, Any]]) -> bool:
    """Whether tokens are the bytes of the text, of which splitting into words loses none."""
    kinds = {step["type"] for step in steps}
    kept = all(step.get("behavior") != "Removed" for step in steps)
    return "ByteLevel" in kinds and kinds <= {"ByteLevel", "Split", "Digits", "Punctuation"} and kept


def _is_complete(backend: Any) -> bool:
    """Whether every text has tokens, so that unknown ones are never needed."""
    model = backend.model
    if type(model).__name__ in ("WordPiece", "WordLevel"):
        return True  # unknown is a whole word
    if not any(step["type"] == "ByteLevel" for step in _pre_tokenizers(backend)):
        pieces = (f"<0x{byte:02X}>" for byte in range(256))
        return bool(getattr(model, "byte_fallback", False)) and all(model.token_to_id(p) is not None for p in pieces)
    suffix = getattr(model, "end_of_word_suffix", None) or ""
    return all(model.token_to_id(char + end) is not None for char in BYTE_OF for end in {"", suffix})


def _loses_nothing(backend: Any) -> bool:
    """Characters without a token leave an unknown one."""
    return _is_complete(backend) or _unk_token(backend) is not None


def _unk_token(backend: Any) -> str | None:
    name: str | None = getattr(backend.model, "unk_token", None)
    return name
