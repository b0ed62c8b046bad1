"""Words as a fast Hugging Face tokenizer saw them."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

_SPACE = "\u2581"  # SentencePiece's mark on a piece that begins with a space


@runtime_checkable
class FastEncoding(Protocol):
    """What is read of one `tokenizers.Encoding`: an entry a token."""

    ids: list[int]
    word_ids: list[int | None]
    sequence_ids: list[int | None]
    tokens: list[str]
    attention_mask: list[int]


def words_of(encoding: FastEncoding) -> list[int | None]:
    """The word of each token, None for a token in no word.

    A piece that begins with a space begins a word: Gemma's and Llama 2's tokenizers hold a whole text for one. The
    texts of a pair, whose word ids both start at 0, share no word.
    """
    words: list[int | None] = []
    number, previous = -1, None
    for word, text, token in zip(encoding.word_ids, encoding.sequence_ids, encoding.tokens, strict=True):
        number += (word, text) != previous or token.startswith(_SPACE)
        previous = (word, text)
        words.append(None if word is None else number)
    return words
