"""Spans and pairs on their way through a data loader to a device; and that nobody can change them on it."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader
from torch.utils.data._utils.pin_memory import pin_memory as pin_as_a_data_loader_does

from carma_kernels import PairIndex, TokenSpans
from tests.spans.batches import EXAMPLE, EXAMPLE_WORDS

META = torch.device("meta")


@pytest.fixture
def spans() -> TokenSpans:
    return EXAMPLE.spans


@pytest.fixture
def pairs(spans: TokenSpans) -> PairIndex:
    return spans.sample_pairs(3, torch.Generator().manual_seed(0), num_layers=2)


def assert_same_spans(one: TokenSpans, other: TokenSpans) -> None:
    assert (one.shape, one.num_pairs, one.num_anchors) == (other.shape, other.num_pairs, other.num_anchors)
    assert one.to_lists() == other.to_lists()
    assert torch.equal(one.word, other.word)
    for negatives in ("sequence", "batch"):
        ours, theirs = one.contrast_table(negatives), other.contrast_table(negatives)
        assert all(torch.equal(a, b) for a, b in zip(ours[:4], theirs[:4], strict=True))
        assert ours.covers_batch == theirs.covers_batch


def assert_same_pairs(one: PairIndex, other: PairIndex) -> None:
    assert one.shape == other.shape
    for name in ("anchor", "positive", "negatives"):
        assert torch.equal(getattr(one, name), getattr(other, name))
    assert (one.attention_mask is None) == (other.attention_mask is None)
    if one.attention_mask is not None:
        assert torch.equal(one.attention_mask, other.attention_mask)


def test_spans_move_and_their_counts_stay_on_the_host(spans):
    moved = spans.to("meta", non_blocking=True)
    assert moved.device == META
    assert {moved.word.device, moved.attention_mask.device, *(t.device for t in moved.contrast_table("batch")[:4])} == {
        META
    }
    assert (moved.shape, moved.num_pairs, moved.num_anchors) == (spans.shape, spans.num_pairs, spans.num_anchors)
    assert moved.is_padded
    assert moved.to_lists() == EXAMPLE_WORDS  # nothing can be read from the device
    assert spans.device == torch.device("cpu")


def test_spans_move_in_one_copy(spans, monkeypatch):
    copies = []
    to = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *args, **kwargs: copies.append(1) or to(self, *args, **kwargs))
    moved = spans.to("meta")
    moved.contrast_table("sequence"), moved.contrast_table("batch"), moved.word, moved.attention_mask
    assert len(copies) == 1


class Operations(TorchDispatchMode):
    """By name, those that torch runs."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_the_mask_lies_in_the_packed_tensor(spans):
    """So that a device has nothing to compute for it."""
    moved = spans.to("meta")
    with Operations() as seen:
        mask = moved.attention_mask
        assert moved.is_padded
    assert (mask.shape, mask.dtype, mask.device) == (spans.shape, torch.bool, META)
    assert set(seen.names) <= {"view", "slice", "detach"}
    here = spans.attention_mask.untyped_storage(), spans.word.untyped_storage()
    assert here[0].data_ptr() == here[1].data_ptr()


def test_moving_to_where_they_are_is_free(spans):
    assert spans.to("cpu") is spans
    assert spans.to(torch.device("cpu"), non_blocking=True) is spans


def test_pairs_move(pairs):
    moved = pairs.to("meta", non_blocking=True)
    assert moved.attention_mask is not None
    tensors = (moved, moved.anchor, moved.positive, moved.negatives, moved.attention_mask)
    assert {one.device for one in tensors} == {META}
    assert moved.shape == pairs.shape
    assert moved.negatives.shape == pairs.negatives.shape
    assert moved.num_pairs == pairs.num_pairs
    assert pairs.device == torch.device("cpu")


@pytest.mark.parametrize("what", ["spans", "pairs"])
def test_a_data_loader_pins_them(what, spans, pairs, monkeypatch):
    """Without a GPU there is no memory to pin: a copy stands for it."""
    pinned = []

    def pin(tensor, *_):
        pinned.append(tensor.clone())
        return pinned[-1]

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    batch = {"spans": spans, "pairs": pairs}[what]
    result = pin_as_a_data_loader_does({"batch": batch, "other": "text"})["batch"]
    assert type(result) is type(batch)
    assert result is not batch
    if isinstance(batch, TokenSpans):
        assert_same_spans(result, batch)
        assert len(pinned) == 1
        assert result.word.untyped_storage().data_ptr() == pinned[0].untyped_storage().data_ptr()
    else:
        assert_same_pairs(result, batch)
        assert [t.data_ptr() for t in pinned] == [
            t.data_ptr() for t in (result.anchor, result.positive, result.negatives, result.attention_mask)
        ]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA/ROCm device")
def test_from_a_data_loader_through_pinned_memory_to_a_gpu():
    [(spans, pairs)] = DataLoader([0], batch_size=1, collate_fn=collate, pin_memory=True)
    assert spans.word.is_pinned()
    assert pairs.negatives.is_pinned()
    on_gpu = spans.to("cuda", non_blocking=True)
    assert on_gpu.device.type == "cuda"
    assert_same_spans(on_gpu.to("cpu"), EXAMPLE.spans)
    assert on_gpu.sample_pairs(3, torch.Generator("cuda").manual_seed(0)).negatives.device.type == "cuda"


def collate(samples: list[int]) -> tuple[TokenSpans, PairIndex]:
    """As in a worker: built there, sent here."""
    spans = TokenSpans.from_lists(
        [EXAMPLE_WORDS[sample] for sample in samples],
        seq_len=6,
        attention_mask=[EXAMPLE.valid[sample] for sample in samples],
    )
    return spans, spans.sample_pairs(3, torch.Generator().manual_seed(0))


def test_from_the_workers_of_a_data_loader():
    loader = DataLoader([0, 1, 2, 0], batch_size=2, collate_fn=collate, num_workers=2, multiprocessing_context="fork")
    received = list(loader)
    for (spans, pairs), samples in zip(received, ([0, 1], [2, 0]), strict=True):
        expected_spans, expected_pairs = collate(samples)
        assert_same_spans(spans, expected_spans)
        assert_same_pairs(pairs, expected_pairs)


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_and_pickles(duplicate, spans, pairs):
    assert_same_spans(duplicate(spans), spans)
    assert_same_pairs(duplicate(pairs), pairs)


@pytest.mark.parametrize("name", ["shape", "num_pairs", "num_anchors", "word", "device", "anything"])
def test_spans_cannot_be_changed(spans, name):
    with pytest.raises((dataclasses.FrozenInstanceError, AttributeError)):
        setattr(spans, name, 3)
    assert_same_spans(spans, EXAMPLE.spans)


@pytest.mark.parametrize("name", ["anchor", "positive", "negatives", "shape", "num_pairs", "attention_mask"])
def test_pairs_cannot_be_changed(pairs, name):
    with pytest.raises((dataclasses.FrozenInstanceError, AttributeError)):
        setattr(pairs, name, None)
