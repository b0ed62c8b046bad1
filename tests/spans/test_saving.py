"""Spans and pairs in files: loaded safely, in any process, and small."""

from __future__ import annotations

import io
import pickle
import subprocess
import sys
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from carma_kernels import PairIndex, TokenSpans
from tests.spans.batches import EXAMPLE
from tests.spans.test_moving import assert_same_pairs

SPANS = EXAMPLE.spans
PAIRS = SPANS.sample_pairs(3, torch.Generator().manual_seed(0), num_layers=2)


def saved(value: Any, **options: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True, **options)


@pytest.mark.parametrize("spans", [SPANS, SPANS[:0], SPANS[1], TokenSpans.from_word_ids([[0, 0]])], ids=repr)
def test_spans(spans: TokenSpans):
    assert saved(spans) == spans
    assert saved(spans).contrast_table("batch").word.tolist() == spans.word.tolist()


@pytest.mark.parametrize("pairs", [PAIRS, SPANS[1].sample_pairs()], ids=["padded", "not padded"])
def test_pairs(pairs: PairIndex):
    assert_same_pairs(saved(pairs), pairs)


def test_data_sets_that_hold_them():
    examples = [{"input_ids": torch.arange(6), "spans": one, "pairs": [PAIRS]} for one in SPANS]
    loaded = saved({"train": examples, "whole": SPANS})
    assert TokenSpans.cat(example["spans"] for example in loaded["train"]) == loaded["whole"] == SPANS
    assert_same_pairs(loaded["train"][0]["pairs"][0], PAIRS)


def test_in_a_fresh_process(tmp_path: Path):
    """The import of the package is all that is needed."""
    torch.save([SPANS, PAIRS], tmp_path / "both.pt")
    code = (
        "import torch, carma_kernels\n"
        f"spans, pairs = torch.load({str(tmp_path / 'both.pt')!r}, weights_only=True)\n"
        "print(spans.to_lists(), pairs.negatives.tolist(), pairs.attention_mask.tolist())"
    )
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert printed.split("\n")[0] == f"{SPANS.to_lists()} {PAIRS.negatives.tolist()} {EXAMPLE.valid}"


@pytest.mark.parametrize("other", [Path("data"), np.random.default_rng(0), ForkingPickler])
def test_a_file_that_names_anything_else_is_refused(other: Any):
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        saved([SPANS, PAIRS, other])


def test_a_file_is_checked_like_any_input():
    class Forged(TokenSpans):
        def __getstate__(self) -> dict[str, torch.Tensor]:
            return super().__getstate__() | {"attention_mask": torch.zeros(3, 6, dtype=torch.bool)}

        def __reduce_ex__(self, _: Any) -> Any:
            return TokenSpans.__new__, (TokenSpans,), self.__getstate__()

    forged = Forged(*(getattr(SPANS, name) for name in TokenSpans.__dataclass_fields__))
    with pytest.raises(ValueError, match="attention_mask marks as padding"):
        pickle.loads(pickle.dumps(forged))


def test_map_location_says_where_they_come_to_lie():
    """As for tensors."""
    assert saved(SPANS.to("meta")).device.type == "meta"
    assert saved(SPANS.to("meta")) == SPANS
    assert saved(SPANS, map_location="cpu").device.type == "cpu"
    assert_same_pairs(saved(PAIRS, map_location="cpu"), PAIRS)


def test_files_hold_words_and_not_tables():
    """Of which there are ten times as many numbers; and a version that has others can read the file."""
    spans = TokenSpans.from_lists([[(t, t + 2) for t in range(0, 1000, 2)]] * 8, seq_len=1000)
    file = io.BytesIO()
    torch.save(spans, file)
    assert len(file.getvalue()) < 8 * 1000 * 6  # bytes
    padded = TokenSpans.from_lists([[(0, 2)]] * 8, seq_len=1000, attention_mask=torch.arange(1000).expand(8, -1) < 9)
    file = io.BytesIO()
    torch.save(padded.sample_pairs(), file)
    assert len(file.getvalue()) < 8 * 1000 + 4000


def test_workers_send_tables_which_nobody_builds_again(monkeypatch: pytest.MonkeyPatch):
    sent = ForkingPickler.dumps(SPANS)
    monkeypatch.setattr(TokenSpans, "_pack", None)
    received = pickle.loads(sent)
    assert received == SPANS
    assert torch.equal(received.word, SPANS.word)
