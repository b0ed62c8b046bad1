"""Words that are read from tokens are those of the text's encoding, whatever the tokenizer, or refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from carma_kernels import TokenSpans
from carma_kernels.integrations.transformers import CarmaCollator
from carma_kernels.integrations.transformers.spelling import Spelling, UnknownWordsError
from carma_kernels.integrations.transformers.words import WordReader
from tests.integration.trainer.kinds_of_tokenizers import KINDS, of_kind
from tests.integration.trainer.toys import texts

SIDES = ("left", "right")
ENGLISH = [
    "the keeper's bees aren't busy: they're asleep, and \"snoring\" (quietly)",
    "In 1984, 1,234,567 of 12345678 people said: don't! WE'LL SEE...",
    "CamelCase e-mail, well-known u.s.a. naming/ordering; 50% off",
]
HARD = [
    "a   b    c  \n\n\n d \t\t e \r\n ",
    "   blanks before",
    "def f(x):\n    return x\n\n\tif x: pass",
    "'sclera 'tis 'd 'LL x'r x'v",
    "\u6f22\u5b57\u3068\u4eee\u540d\u3001\u30ab\u30bf\u30ab\u30ca\u3002 a\u6f22b",
    "smile \U0001f600\U0001f600 \U0001f469\u200d\U0001f469\u200d\U0001f467 family\u2603 a\u2603b",
    "nai\u0308ve caf\u00e9 \u00bd\u00b2 \ufb01ne \uff21\uff22 Stra\u00dfe \u0130stanbul",
    "<unk> is <s> not [UNK] ##x x##y <|endoftext|>x</w>y <|im_start|>user\nx<|im_end|>",
    "1 12 123 1234 12345 \u00b2\u00b3 \u0661\u0662\u0663\u0664",
    "",
]


def truncated(tokenizer: Any, text: str, step: int = 1) -> Iterator[Any]:
    """The text truncated to every length, or to each of so many."""
    shortest = tokenizer.num_special_tokens_to_add() + 1
    for end in range(shortest, len(tokenizer(text)["input_ids"]) + 1, step):
        yield tokenizer(text, truncation=True, max_length=end)


def outcome(reader: WordReader, encoding: Any) -> str:
    """Of one text; the numbers of the words are compared, as a token in no word is one of its own to every loss."""
    ids = list(encoding["input_ids"])
    try:
        read = reader(ids)
    except UnknownWordsError:
        return "refused"
    assert TokenSpans.from_word_ids([read]).word.tolist() == TokenSpans.from_encoding(encoding).word.tolist(), ids
    return "the same"


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", KINDS)
def test_truncated_at_every_length(name: str, side: str) -> None:
    tokenizer = of_kind(name, side)
    reader = WordReader(tokenizer)
    step = 5 if side == "left" else 2
    seen = Counter(outcome(reader, one) for text in [*ENGLISH, *HARD] for one in truncated(tokenizer, text, step))
    assert seen["the same"] > 10


@pytest.mark.parametrize("name", KINDS)
def test_english_is_not_refused(name: str) -> None:
    """Truncated at its end, as tokenizers do unless they are told otherwise."""
    tokenizer = of_kind(name)
    reader = WordReader(tokenizer)
    seen = Counter(outcome(reader, one) for text in texts(8) for one in truncated(tokenizer, text))
    assert seen["the same"] > 50
    assert not seen["refused"]


PIECES = st.sampled_from(
    [
        *" \n\t\r'.,-(\"a1sdtASL2\u00e9\u6f22\u3001\u2603\u00b2\u0301\u200d\xa0\U0001f600",
        "  ",
        "the",
        "LL",
        "re",
        "<unk>",
        "##",
    ]
)


@pytest.mark.parametrize("name", KINDS)
@settings(max_examples=15)
@example(text="a  b", side="right", cut=2)
@example(text="x'sclera", side="left", cut=3)
@given(st.lists(PIECES, max_size=14).map("".join), st.sampled_from(SIDES), st.integers(1, 30))
def test_any_text(name: str, text: str, side: str, cut: int) -> None:
    tokenizer = of_kind(name, side)
    specials = tokenizer.num_special_tokens_to_add()
    outcome(WordReader(tokenizer), tokenizer(text, truncation=True, max_length=specials + cut))


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("GPT-2", "two  blanks", ["two", " ", " blanks"]),
        ("GPT-2", "caf\u00e9", ["caf\u00e9"]),
        ("Llama 3", "a 12345", ["a", " ", "123", "45"]),
        ("BERT", "bees \u2603 b", ["bees", "b"]),
        ("Gemma", "a  bee", ["a", " ", " bee"]),
    ],
)
def test_some_words_by_hand(name: str, text: str, words: list[str]) -> None:
    tokenizer = of_kind(name)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    [spans] = TokenSpans.from_word_ids([WordReader(tokenizer)(ids)]).to_lists()
    assert [tokenizer.decode(ids[start:end]) for start, end in spans] == words


def test_a_character_that_is_cut() -> None:
    """Of what its first byte tells: all that begin with this one are letters; with that one, some are digits."""
    tokenizer = of_kind("GPT-2")
    reader = WordReader(tokenizer)
    letters = tokenizer("b\u6f22")["input_ids"]
    assert [reader(letters[:end]) for end in range(1, 5)] == [[0] * end for end in range(1, 5)]
    smile = tokenizer("b\U0001f600")["input_ids"]
    with pytest.raises(UnknownWordsError, match="which was cut off"):
        reader(smile[:2])


def fast(model: Any, pre: Any = None) -> PreTrainedTokenizerFast:
    one = Tokenizer(model)
    one.pre_tokenizer = pre
    return PreTrainedTokenizerFast(tokenizer_object=one, unk_token="<unk>", pad_token="<unk>")


LETTERS = {"<unk>": 0, "a": 1, "b": 2, "ab": 3}


@pytest.mark.parametrize(
    "tokenizer",
    [
        pytest.param(fast(models.BPE(LETTERS, [("a", "b")]), pre_tokenizers.Whitespace()), id="blanks are lost"),
        pytest.param(fast(models.BPE(LETTERS, []), pre_tokenizers.ByteLevel()), id="bytes are lost"),
        pytest.param(fast(models.BPE(LETTERS, [])), id="no words"),
        pytest.param(
            fast(models.WordPiece({**LETTERS, "##a": 4}, unk_token="<unk>"), pre_tokenizers.WhitespaceSplit()),
            id="marks that a text may hold",
        ),
        pytest.param(
            fast(
                models.Unigram([("<unk>", 0.0), ("\u2581", -1.0), ("a", -1.0)], unk_id=0),
                pre_tokenizers.Sequence(
                    [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="never")]
                ),
            ),
            id="blanks are lost before they are marked",
        ),
    ],
)
def test_tokenizers_whose_tokens_never_tell(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UnknownWordsError, match="do not say where words begin"):
        WordReader(tokenizer)
    way_out = (
        r"example 0 do not tell its words.*column 'word_spans'.*TokenSpans.from_encoding\(encoding\).to_lists\(\)\[0\]"
    )
    with pytest.raises(ValueError, match=way_out):
        CarmaCollator(tokenizer.pad, tokenizer)([{"input_ids": [1, 2]}])


def test_words_with_unknown_characters() -> None:
    """`<unk>` is a character of a word, or, where the text holds it, none at all; Llama's never is one."""
    tokenizer = of_kind("T5")
    ids = tokenizer.convert_tokens_to_ids(["\u2581of", "<unk>", "a"])
    with pytest.raises(UnknownWordsError, match="<unk> may be a word or characters of one"):
        WordReader(tokenizer)(ids)
    tokenizer = of_kind("Llama 2")
    assert WordReader(tokenizer)(tokenizer.convert_tokens_to_ids(["a", "<unk>", "a"])) == [0, None, 2]


def test_tokens_that_are_not_of_a_text() -> None:
    tokenizer = of_kind("GPT-2")
    with pytest.raises(UnknownWordsError, match="token 99999 is none of the tokenizer's"):
        WordReader(tokenizer)([99999, 1])
    byte = tokenizer.convert_tokens_to_ids(["a", "\u0100", "a"])
    broken = tokenizer.convert_tokens_to_ids(["a", "\u0139", "a"])
    assert WordReader(tokenizer)(byte) == [0, 1, 2]
    with pytest.raises(UnknownWordsError, match="not those of a text"):
        WordReader(tokenizer)(broken)


def test_reading_takes_time_in_proportion_to_the_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding every beginning of a text, as was done once, took 376 ms for 2048 tokens."""
    split, characters = Spelling._words, 0

    def counted(self: Spelling, text: Any, before: str, after: str) -> Any:
        nonlocal characters
        characters += len(before + text.body + after)
        return split(self, text, before, after)

    monkeypatch.setattr(Spelling, "_words", counted)
    tokenizer = of_kind("GPT-2")
    ids = tokenizer(" ".join(ENGLISH * 100), add_special_tokens=False)["input_ids"]
    spent = []
    for T in (512, 1024, 2048):
        characters = 0
        WordReader(tokenizer)(ids[:T])
        spent.append(characters)
    assert 0 < spent[2] - spent[1] <= 2.1 * (spent[1] - spent[0])
