"""The words of tokens that are bytes of a text: GPT-2's kind of tokenizer.

The bytes spell the text, and the tokenizer's own patterns split it. They may look at what stood before and after, which
truncation has cut off: where some continuation would split the text in another way between two tokens, nothing is said.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import accumulate, chain
from typing import Any


class UnknownWordsError(ValueError):
    """The tokens do not tell their words."""


def _byte_alphabet() -> dict[str, int]:
    """The byte for each character that byte-level tokenizers write: it is its own where it is visible in Latin-1."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + number): byte for number, byte in enumerate(others)}


BYTE_OF = _byte_alphabet()
_CHAR_OF = {byte: char for char, byte in BYTE_OF.items()}
_SPACE = _CHAR_OF[ord(" ")]

# What may stand beside the tokens: nothing, or a character of each kind that patterns tell apart,
_BEFORE = ("", "a", "A", "1", "11", " ", "\n", ".", "\u4e00", "\u0301", "\u2603", "\u200d")
_AFTER = (
    "",
    "a",
    "A",
    "1",
    " ",
    " a",
    "\n",
    "\r",
    "\t",
    ".",
    "'",
    "/",
    "\u4e00",
    "\u0301",
    "\u2603",
    "\u200d",
    "\u00a0",
)
# or what makes a contraction with them. All its letters are known: has the tokenizer these tokens for it?
_APOSTROPHE = ("'",)
_ENDINGS = tuple(chain.from_iterable((end, end.upper()) for end in ("s", "t", "m", "d", "re", "ve", "ll", "e", "l")))

_WINDOW = 12  # bytes at either end, and on to the next blank: what stands beside them has no bearing on the others


class Spelling:
    """Of each of a text's tokens, whether it begins a word.

    Args:
        backend: the `tokenizers.Tokenizer`, of a byte-level kind.
        cuts_left: whether texts are truncated at their beginning, possibly within a contraction: `'d` has words of its
            own, `directed` has not. Many texts begin like the rest of one, so this is not asked without need.
    """

    def __init__(self, backend: Any, cuts_left: bool) -> None:
        """Keep what splits and what encodes a word."""
        self._split = backend.pre_tokenizer.pre_tokenize_str
        self._tokenize = backend.model.tokenize
        self._beginnings = _BEFORE + _APOSTROPHE if cuts_left else _BEFORE
        # how texts begin and end: many do alike
        self._sure_cuts = lru_cache(maxsize=4096)(self._find_sure_cuts)

    def __call__(self, tokens: list[str]) -> list[bool]:
        """For the tokens of one text, or of a part of it.

        Raises:
            UnknownWordsError: it depends on the rest of the text, or these are no tokens of a text.
        """
        if len(tokens) == 1:
            return [True]
        text = _Text(tokens)
        cuts = self._inner_cuts(text)
        blanks = [place for place, at in enumerate(text.begins) if at in cuts and tokens[place].startswith(_SPACE)]
        first = next((place for place in blanks[1:] if text.begins[place] >= _WINDOW), None)
        last = next((place for place in reversed(blanks) if text.begins[place] <= text.size - _WINDOW), None)
        if first is None or last is None or last < first:
            cuts = set(self._sure_cuts(tuple(tokens)))
        else:
            begin, end = text.begins[first], text.begins[last]
            at_left = self._sure_cuts(tuple(tokens[:first]), goes_on=True)
            if max(at_left) != max(at for at in cuts if at < begin):
                raise UnknownWordsError("what stood before them decides on the words of too many tokens")
            at_right = {end + at for at in self._sure_cuts(tuple(tokens[last:]), follows=True)}
            cuts = {*at_left} | {at for at in cuts if begin <= at <= end} | at_right
        if not cuts <= set(text.begins):
            raise UnknownWordsError("a token reaches from one word into the next")
        return [at == 0 or at in cuts for at in text.begins]

    def _inner_cuts(self, text: _Text) -> set[int]:
        words = self._words(text, text.before[0] if text.before else "", text.after[0] if text.after else "")
        return {begin for begin, _, _ in words if 0 < begin < text.size}

    def _find_sure_cuts(self, tokens: tuple[str, ...], follows: bool = False, goes_on: bool = False) -> frozenset[int]:
        """Where the text is cut into words whatever stands beside it; a text that follows or goes on is whole there."""
        text = _Text(tokens)
        before = ("",) if follows else text.before or self._beginnings
        after = ("",) if goes_on else text.after or _AFTER + _ENDINGS
        possible = {one: cuts for one in before if (cuts := self._cuts(text, one, after[0])) is not None}
        if not possible:
            raise UnknownWordsError("a token reaches from one word into the next")
        beside = next(iter(possible))
        others = {cuts for one in after[1:] if (cuts := self._cuts(text, beside, one)) is not None}
        if len({*possible.values(), *others}) > 1:
            raise UnknownWordsError("they depend on the text before or after, which was cut off")
        return possible[beside]

    def _cuts(self, text: _Text, before: str, after: str) -> frozenset[int] | None:
        """Where the text is cut into words between these two; None if its tokens would be others there."""
        cuts = set()
        for begin, end, word in self._words(text, before, after):
            if begin < 0 and not before:
                return None  # a blank would have been put before the text, and would be in its first token
            if 0 < begin < text.size:
                cuts.add(begin)
            contracted = (before in _APOSTROPHE and begin < 0 < end) or (after in _ENDINGS and begin < text.size < end)
            if contracted and not self._has(text, begin, end, word):
                return None
        return frozenset(cuts) if cuts <= text.begins_set else None

    def _has(self, text: _Text, begin: int, end: int, word: str) -> bool:
        """Whether the tokens in this word, and some beyond the text, are those that the tokenizer has for it."""
        ours = [token for at, token in zip(text.begins, text.tokens, strict=True) if begin <= at < end]
        theirs = [token.value for token in self._tokenize(word)]
        return ours == (theirs[-len(ours) :] if begin < 0 else theirs[: len(ours)])

    def _words(self, text: _Text, before: str, after: str) -> Iterator[tuple[int, int, str]]:
        """As the tokenizer splits and writes them, each with where it begins and ends, in bytes of the tokens."""
        whole = before + text.body + after
        words = [word for word, _ in self._split(whole)]
        at = len(text.head) - len(before.encode())
        written, spelled = "".join(words), "".join(_CHAR_OF[byte] for byte in whole.encode())
        if written == _SPACE + spelled:
            at -= 1
        elif written != spelled:
            raise UnknownWordsError("the tokenizer changes the text that it splits")
        for word in words:
            yield at, at + len(word), word
            at += len(word)


class _Text:
    """What the bytes of tokens spell; `before` and `after` are the characters that one cut at an end may have been."""

    def __init__(self, tokens: Sequence[str]) -> None:
        self.tokens = tokens
        self.begins = [0, *accumulate(map(len, tokens))][:-1]
        self.begins_set = set(self.begins)
        try:
            written = bytes(BYTE_OF[char] for token in tokens for char in token)
        except KeyError as error:
            raise UnknownWordsError(f"the tokenizer writes {error.args[0]!r} for no byte") from error
        self.size = len(written)
        head = next((at for at, byte in enumerate(written) if byte & 0xC0 != 0x80), self.size)
        lead = max((at for at, byte in enumerate(written) if byte >= 0xC0), default=0)
        tail = self.size if lead + _length(written[lead]) <= self.size else lead
        self.head, self.tail = written[:head], written[tail:]
        try:
            self.body = written[head:tail].decode()
        except UnicodeDecodeError as error:
            raise UnknownWordsError("their bytes are not those of a text") from error
        self.before = _endings_in(self.head) if self.head else ()
        self.after = _beginnings_with(self.tail) if self.tail else ()


def _length(lead: int) -> int:
    """Bytes of a character that begins with this one."""
    return 1 if lead < 0xC0 else 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4


@lru_cache(maxsize=256)
def _beginnings_with(head: bytes) -> tuple[str, ...]:
    """Characters whose UTF-8 begins with these bytes, one of each kind."""
    missing = _length(head[0]) - len(head)
    lead_bits = head[0] & (0x7F >> _length(head[0]))
    number = lead_bits
    for byte in head[1:]:
        number = number << 6 | byte & 0x3F
    return _of_each_kind(range(number << 6 * missing, number + 1 << 6 * missing), lambda char: char.startswith(head))


@lru_cache(maxsize=256)
def _endings_in(tail: bytes) -> tuple[str, ...]:
    """Characters whose UTF-8 ends with these bytes and has others before them, one of each kind."""
    number = 0
    for byte in tail:
        number = number << 6 | byte & 0x3F
    same = range(number, 0x110000, 1 << 6 * len(tail))
    return _of_each_kind(same, lambda char: char.endswith(tail) and len(char) > len(tail))


def _of_each_kind(codes: range, fits: Callable[[bytes], bool]) -> tuple[str, ...]:
    """By Unicode's category and the neighbourhood, as patterns name scripts and ranges, too."""
    kinds: dict[tuple[str, int], str] = {}
    for code in codes:
        if code < 0x110000 and not 0xD800 <= code < 0xE000 and fits(chr(code).encode()):
            kinds.setdefault((unicodedata.category(chr(code)), code >> 10), chr(code))
    if not kinds:
        raise UnknownWordsError("their bytes are not those of a text")
    return tuple(kinds.values())
