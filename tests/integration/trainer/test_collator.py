"""The words that the batch gains are those of the texts, whatever pads the batch and whoever moves it."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.utils import send_to_device
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, normalizers, trainers
from torch.utils.data import DataLoader
from transformers import (
    BatchEncoding,
    DataCollatorForLanguageModeling,
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
    default_data_collator,
)
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling as TRLCollator

from carma_kernels import TokenSpans
from carma_kernels.integrations.transformers import CarmaCollator
from tests.integration.trainer.toys import examples, texts, tokenizer, trainer

COUNT = 5


def on_side(side: str) -> PreTrainedTokenizerFast:
    one = PreTrainedTokenizerFast(tokenizer_object=tokenizer().backend_tokenizer, pad_token="<pad>", padding_side=side)
    assert one("a word").keys() == tokenizer()("a word").keys()
    return one


def with_words(count: int = COUNT) -> list[dict[str, Any]]:
    return [{"input_ids": (one := tokenizer()(text))["input_ids"], "word_ids": one.word_ids()} for text in texts(count)]


COLLATORS: dict[str, Callable[[PreTrainedTokenizerFast], Any]] = {
    "language modeling": lambda own: DataCollatorForLanguageModeling(own, mlm=False),
    "padding": DataCollatorWithPadding,
    "padding to a multiple": lambda own: DataCollatorWithPadding(own, pad_to_multiple_of=16),
    "TRL": lambda own: TRLCollator(pad_token_id=own.pad_token_id),
}


@pytest.mark.parametrize("known", ["column", "encodings", "tokenizer"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", COLLATORS)
def test_words_are_those_of_the_texts(name: str, side: str, known: str) -> None:
    own = on_side(side)
    chosen: list[Any] = {
        "column": with_words(),
        "encodings": [own(text) for text in texts(COUNT)],
        "tokenizer": examples(COUNT),
    }[known]
    inner = COLLATORS[name](own)
    batch = CarmaCollator(inner, own if known == "tokenizer" else None)(chosen)
    mask = batch["attention_mask"].bool()
    assert mask.shape[1] > min(len(e["input_ids"]) for e in chosen), "something is padded"
    assert torch.equal(batch["spans"].attention_mask, mask)
    for row, text, words, valid in zip(batch["input_ids"], texts(COUNT), batch["spans"].to_lists(), mask, strict=True):
        pieces = [own.decode(row[start:end]) for start, end in words]
        assert pieces == words_of(text)
        assert sum(end - start for start, end in words) == valid.sum()
    plain = inner([{"input_ids": list(e["input_ids"])} for e in chosen])
    assert all(torch.equal(batch[entry], plain[entry]) for entry in plain)
    assert batch.keys() == plain.keys() | {"spans"}


def words_of(text: str) -> list[str]:
    """As the tokenizer splits a text before it looks for pieces."""
    return [text[start:end] for _, (start, end) in tokenizer().backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)]


def test_collator_that_tokenizes() -> None:
    def tokenize(chosen: list[str]) -> BatchEncoding:
        return tokenizer()(chosen, padding=True, return_tensors="pt")

    batch = CarmaCollator(tokenize)(texts(COUNT))
    expected = TokenSpans.from_encoding(tokenize(texts(COUNT)))
    assert batch["spans"].to_lists() == expected.to_lists()


def test_rows_padded_already() -> None:
    """`default_data_collator` stacks what the tokenizer has padded, on the left here; it has no padding to add."""
    padded = on_side("left")(texts(COUNT), padding=True)
    rows = [{"input_ids": ids, "attention_mask": mask} for ids, mask in zip(*padded.values(), strict=True)]
    for chosen, own in (
        (rows, tokenizer()),
        ([row | {"word_ids": padded.word_ids(b)} for b, row in enumerate(rows)], None),
    ):
        batch = CarmaCollator(default_data_collator, own, key="words")(chosen)
        assert batch["words"].to_lists() == TokenSpans.from_encoding(padded).to_lists()


def test_masked_language_modeling_changes_no_word() -> None:
    """The words are read before tokens are masked."""
    own = on_side("right")
    own.add_special_tokens({"mask_token": "<mask>"})
    torch.manual_seed(0)
    batch = CarmaCollator(DataCollatorForLanguageModeling(own, mlm_probability=0.9), own)(examples(COUNT))
    assert (batch["input_ids"] == own.mask_token_id).sum() > 20
    expected = TokenSpans.from_encoding(own(texts(COUNT), padding=True))
    assert batch["spans"].to_lists() == expected.to_lists()


@pytest.mark.parametrize("cut", [slice(0, -3), slice(3, None), slice(2, -2)])
def test_truncation_through_a_word(cut: slice) -> None:
    whole = with_words(20)
    cut_short = [{name: values[cut] for name, values in example.items()} for example in whole]
    inner = COLLATORS["padding"](on_side("right"))
    by_column = CarmaCollator(inner)(cut_short)["spans"]
    by_text = CarmaCollator(inner, tokenizer())([{"input_ids": e["input_ids"]} for e in cut_short])["spans"]
    assert by_text.to_lists() == by_column.to_lists()


def test_tokens_that_the_tokenizer_would_have_chosen_otherwise() -> None:
    """Letters, and the bytes of one, where it has pieces: a token is in the word of the letter that it ends with."""
    text = "the café of unquestionably old cats"
    letters = [piece.ids for piece in tokenizer().backend_tokenizer.encode_batch(list(text))]
    assert [len(ids) for ids in letters].count(2) == 1, "é"
    assert len(tokenizer()(text)["input_ids"]) < len(text)
    ids = [token for letter in letters for token in letter]
    [words] = CarmaCollator(COLLATORS["padding"](tokenizer()), tokenizer())([{"input_ids": ids}])["spans"].to_lists()
    assert [tokenizer().decode(ids[start:end]) for start, end in words] == words_of(text)


def test_special_tokens_are_in_no_word() -> None:
    own = on_side("right")
    own.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    ids = [own.bos_token_id, *own("unquestionably a cat")["input_ids"], own.eos_token_id]
    [words] = CarmaCollator(COLLATORS["padding"](own), own)([{"input_ids": ids}])["spans"].to_lists()
    assert ["".join(own.decode(ids[start:end])) for start, end in words] == ["unquestionably", " a", " cat"]


def test_tokenizer_that_holds_a_text_for_one_word() -> None:
    """Gemma's: spaces become part of the pieces, and nothing splits the text before."""
    pieces = Tokenizer(models.BPE())
    pieces.normalizer = normalizers.Replace(" ", "\u2581")
    pieces.decoder = decoders.Replace("\u2581", " ")
    pieces.train_from_iterator(
        (word for text in texts(40) for word in text.replace(" ", "| ").split("|")),
        trainers.BpeTrainer(vocab_size=300, special_tokens=["<pad>"], show_progress=False),
    )
    own = PreTrainedTokenizerFast(tokenizer_object=pieces, pad_token="<pad>")
    encoding = own(texts(1)[0])
    assert set(encoding.word_ids()) == {0}
    for chosen, given in ((encoding, None), ({"input_ids": encoding["input_ids"]}, own)):
        [words] = CarmaCollator(COLLATORS["padding"](own), given)([chosen])["spans"].to_lists()
        assert [own.decode(encoding["input_ids"][start:end]).strip() for start, end in words] == texts(1)[0].split()
        assert any(end - start > 1 for start, end in words)


def test_tokens_that_are_added_later() -> None:
    own = on_side("right")
    collator = CarmaCollator(COLLATORS["padding"](own), own)
    assert collator([{"input_ids": own("a cat")["input_ids"]}])["spans"].num_pairs
    own.add_tokens(["beekeeper"])
    ids = own("a beekeepers cat")["input_ids"]
    assert collator([{"input_ids": ids}])["spans"] == TokenSpans.from_encoding(own(["a beekeepers cat"]))


def test_encodings_of_other_tokens_are_refused() -> None:
    own = on_side("right")
    example = own("unquestionably a cat")
    example["input_ids"] = example["input_ids"][::-1]
    with pytest.raises(ValueError, match="is not what the tokenizer encoded"):
        CarmaCollator(COLLATORS["padding"](own))([example])


@pytest.mark.parametrize("workers", [0, 2])
def test_data_loader_with_workers(workers: int) -> None:
    collator = CarmaCollator(COLLATORS["padding"](on_side("right")), on_side("right"))
    loader = DataLoader(examples(4), 2, collate_fn=collator, num_workers=workers)  # type: ignore[arg-type]
    batches = list(loader)
    for batch, chosen in zip(batches, (examples(4)[:2], examples(4)[2:]), strict=True):
        assert batch["spans"].to_lists() == collator(chosen)["spans"].to_lists()


def test_spans_go_where_the_batch_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pickled by workers, pinned by `DataLoader(pin_memory=True)`, moved by Accelerate."""
    batch = CarmaCollator(COLLATORS["padding"](on_side("right")), on_side("right"))(examples(2))
    assert pickle.loads(pickle.dumps(batch))["spans"].to_lists() == batch["spans"].to_lists()
    moved = send_to_device(batch, torch.device("meta"), non_blocking=True)
    assert {value.device.type for value in moved.values()} == {"meta"}

    pinned: list[TokenSpans] = []
    monkeypatch.setattr(TokenSpans, "pin_memory", lambda self: (pinned.append(self), self)[1])
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    from torch.utils.data._utils.pin_memory import pin_memory

    assert pin_memory(batch)["spans"] is batch["spans"]
    assert pinned == [batch["spans"]]


PHRASES = [[(0, 3), (4, 6)], [(2, 7)], [], [(1, 2)]]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", COLLATORS)
def test_ranges_move_with_the_padding(name: str, side: str) -> None:
    own = on_side(side)
    chosen = [one | {"word_spans": ranges} for one, ranges in zip(examples(4), PHRASES, strict=True)]
    batch = CarmaCollator(COLLATORS[name](own))(chosen)
    assert batch.keys() == COLLATORS[name](own)(examples(4)).keys() | {"spans"}
    T = batch["input_ids"].shape[1]
    side_of_padding = "left" if side == "left" and name != "TRL" else "right"
    starts = [T - len(one["input_ids"]) if side_of_padding == "left" else 0 for one in chosen]
    expected = [[(s + start, e + start) for s, e in row] for start, row in zip(starts, PHRASES, strict=True)]
    assert batch["spans"].to_lists() == expected
    assert any(starts) == (side_of_padding == "left")


@pytest.mark.parametrize("as_given", [list, np.array, torch.tensor], ids=["list", "array", "tensor"])
def test_ranges_are_those_of_the_encoding(as_given: Callable[[Any], Any]) -> None:
    """The way that the errors show, for every tokenizer."""
    own = on_side("left")
    encodings = [own(text, truncation=True, max_length=9) for text in texts(COUNT)]
    ranges = [TokenSpans.from_encoding(encoding).to_lists()[0] for encoding in encodings]
    chosen = [{**encoding, "word_spans": as_given(row)} for encoding, row in zip(encodings, ranges, strict=True)]
    inner = COLLATORS["padding"](own)
    assert CarmaCollator(inner)(chosen)["spans"] == CarmaCollator(inner)(encodings)["spans"]


@pytest.mark.parametrize("column", ["word_ids", "word_spans"])
@pytest.mark.parametrize("kind", ["list", "datasets"])
def test_trainer_leaves_the_column_to_the_collator(kind: str, column: str, tmp_path: Path) -> None:
    """And drops the others; here no tokenizer could make good for it."""
    chosen = with_words(4)
    if column == "word_spans":
        chosen = [one | {"word_spans": ranges} for one, ranges in zip(examples(4), PHRASES, strict=True)]
    one = trainer(tmp_path)
    one.data_collator.tokenizer = None
    noted = [example | {"note": "for people"} for example in chosen]
    one.train_dataset = Dataset.from_list(noted) if kind == "datasets" else noted
    [batch, _] = one.get_train_dataloader()
    assert batch["spans"] == CarmaCollator(one.data_collator.collator)(chosen[:2])["spans"]
    assert batch.keys() == {"input_ids", "attention_mask", "labels", "spans"}


class Slow:
    is_fast = False


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        pytest.param(lambda: CarmaCollator(list, Slow()), TypeError, "must be a fast one.*Slow", id="slow tokenizer"),
        pytest.param(
            lambda: CarmaCollator(COLLATORS["padding"](tokenizer()))(examples(2)),
            ValueError,
            r"no tokenizer.*CarmaCollator\(collator, tokenizer\).*remove_unused_columns=False",
            id="words nobody knows",
        ),
        pytest.param(
            lambda: CarmaCollator(TRLCollator(pad_token_id=0, padding_free=True), tokenizer())(examples(2)),
            ValueError,
            r"1 sequence\(s\) of 2 examples.*padding_free=False",
            id="padding-free",
        ),
        pytest.param(
            lambda: CarmaCollator(lambda chosen: {"input_ids": torch.zeros(len(chosen), 3)}, tokenizer())(examples(2)),
            ValueError,
            "of 3 tokens, is not example 0, of .*Truncate before collating",
            id="a collator that truncates",
        ),
        pytest.param(
            lambda: CarmaCollator(COLLATORS["padding"](tokenizer()))([{"input_ids": [1, 2, 3], "word_ids": [0]}]),
            ValueError,
            "example 0 has 3 tokens and 1 word ids.*Truncate both",
            id="a column of another length",
        ),
        pytest.param(
            lambda: CarmaCollator(list)([{"input_ids": [1, 2], "word_ids": [0, 0], "word_spans": [(0, 2)]}]),
            ValueError,
            "example 0 has both columns, 'word_ids' and 'word_spans'.*Drop one",
            id="two columns",
        ),
        pytest.param(
            lambda: CarmaCollator(list)([{"input_ids": [1, 2, 3], "word_spans": [(0, 2), (2, 5)]}]),
            ValueError,
            r"word_spans of example 0, which has 3 tokens: .*holds \(2, 5\).*cut words where the text was truncated",
            id="ranges beyond a truncated text",
        ),
        pytest.param(
            lambda: CarmaCollator(list)([{"input_ids": [1, 2, 3], "word_spans": [(0, 2), (1, 3)]}]),
            ValueError,
            "word_spans of example 0.*overlap at token 1",
            id="overlapping ranges",
        ),
        pytest.param(
            lambda: CarmaCollator(list)([{"input_ids": [1, 2, 3], "word_spans": [0, 2]}]),
            TypeError,
            "word_spans of example 0.*pairs of ints, got 0",
            id="a range alone",
        ),
        pytest.param(
            lambda: CarmaCollator(lambda _: {"input_ids": torch.zeros(1, 2)})(
                [{"input_ids": [1, 2, 3], "word_spans": [(0, 2)]}]
            ),
            ValueError,
            "of 2 tokens, is not example 0, of 3.*Truncate before collating",
            id="ranges and a collator that truncates",
        ),
    ],
)
def test_errors_say_the_way_out(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
