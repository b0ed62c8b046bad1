"""Rows of several texts are refused, whatever packs them and whatever tells it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import DataCollatorWithFlattening, DataCollatorWithPadding
from trl.data_utils import pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from carma_kernels.integrations.transformers import CarmaCollator
from tests.integration.trainer.toys import examples, tokenizer

PAD = tokenizer().pad_token_id


def packed(strategy: str) -> list[dict[str, Any]]:
    """Rows of 64 tokens at most, those of several texts first."""
    columns = {"input_ids": [one["input_ids"] for one in examples(12)]}
    rows = pack_dataset(Dataset.from_dict(columns), seq_length=64, strategy=strategy)
    return sorted(rows, key=lambda row: -len(row["seq_lengths"]))


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("padding_free", [False, True])
@pytest.mark.parametrize("strategy", ["bfd", "bfd_split"])
def test_packed_by_trl(strategy: str, padding_free: bool, batch_size: int) -> None:
    rows = packed(strategy)
    assert len(rows[0]["seq_lengths"]) > 1
    collator = CarmaCollator(DataCollatorForLanguageModeling(PAD, padding_free=padding_free), tokenizer())
    with pytest.raises(ValueError, match=r"example 0 holds \d+ texts \(its seq_lengths\).*packing=False"):
        collator(rows[:batch_size])


@pytest.mark.parametrize("batch_size", [1, 2])
def test_packed_by_trl_and_stripped_of_a_column(batch_size: int) -> None:
    """Where only what the inner collator makes of it is left."""

    def inner(chosen: list[dict[str, Any]]) -> Any:
        assert len(chosen) == batch_size
        return DataCollatorForLanguageModeling(PAD, padding_free=True)(packed("bfd")[:batch_size])

    rows = [{"input_ids": row["input_ids"]} for row in packed("bfd")[:batch_size]]
    with pytest.raises(ValueError, match=r"texts in 1 sequence|several texts|1 sequence\(s\) of 2 examples"):
        CarmaCollator(inner, tokenizer())(rows)


@pytest.mark.parametrize(
    "collator", [DataCollatorForLanguageModeling(PAD, padding_free=True), DataCollatorWithFlattening()]
)
def test_flattened(collator: Any) -> None:
    """Of one text there is nothing to refuse."""
    rows = [one | {"labels": one["input_ids"]} for one in examples(2)]
    with pytest.raises(ValueError, match=r"1 sequence\(s\) of 2 examples.*padding_free=False, no DataCollatorWithFl"):
        CarmaCollator(collator, tokenizer())(rows)
    assert CarmaCollator(collator, tokenizer())(rows[:1])["spans"].num_pairs


def test_examples_with_positions_that_start_again() -> None:
    [one] = examples(1)
    positions = [*range(4), *range(len(one["input_ids"]) - 4)]
    with pytest.raises(ValueError, match=r"example 0 holds several texts .its position_ids"):
        CarmaCollator(DataCollatorWithPadding(tokenizer()), tokenizer())([one | {"position_ids": positions}])


def batch_with(**entries: Any) -> Any:
    """Three tokens padded on the left to five, and four on the right."""
    mask = [[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]]
    inner = {"input_ids": np.ones((2, 5), int), "attention_mask": mask, **entries}
    ones = [{"input_ids": [1] * 3, "word_ids": [0, 0, 1]}, {"input_ids": [1] * 4, "word_ids": [0, 0, 1, 1]}]
    tensors = {name: torch.as_tensor(value) for name, value in inner.items()}
    return CarmaCollator(lambda _: tensors)(ones)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"position_ids": [[1, 1, 0, 1, 2], [0, 1, 0, 1, 1]]}, "sequence 1 .* .its position_ids"),
        ({"position_ids": [[1, 1, 2, 0, 1], [0, 1, 2, 3, 0]]}, "sequence 0 .* .its position_ids"),
        ({"seq_idx": [[0, 0, 0, 0, 0], [0, 0, 1, 1, 1]]}, "sequence 1 .* .its seq_idx"),
        ({"attention_mask": [[0, 0, 1, 1, 1], [1, 1, 2, 2, 0]]}, "sequence 1 .* .its attention_mask"),
        ({"cu_seq_lens_q": [0, 3, 5, 7]}, "cu_seq_lens_q says that the batch holds 3 texts in 2 sequence"),
        ({"cu_seq_lens_k": [0, 3, 5, 7]}, "cu_seq_lens_k says that the batch holds 3 texts in 2 sequence"),
        ({"seq_lengths": [[1, 2], [4, 0]]}, "seq_lengths says that the batch holds 4 texts in 2 sequence"),
    ],
)
def test_batches_that_tell(entries: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"{message}.*each other's tokens for negatives"):
        batch_with(**entries)


@pytest.mark.parametrize(
    "entries",
    [
        {"position_ids": [[1, 1, 0, 1, 2], [0, 1, 2, 3, 1]]},  # padding counts for 1 in transformers,
        {"position_ids": [[0, 0, 0, 1, 2], [0, 1, 2, 3, 0]]},  # for 0 in TRL
        {"position_ids": [[0, 1, 2, 3, 4]]},
        {"position_ids": torch.zeros(3, 2, 5)},  # of a vision-language model: time, height, width
        {"cu_seq_lens_q": [0, 3, 7], "seq_idx": [[0] * 5, [1] * 5]},
        {"seq_lengths": [[3], [4]]},
    ],
)
def test_batches_of_one_text_a_row(entries: dict[str, Any]) -> None:
    assert batch_with(**entries)["spans"].to_lists() == [[(2, 4), (4, 5)], [(0, 2), (2, 4)]]
