"""Words, masks, pairs and draws that `TokenSpans` and `PairIndex` must refuse, and that the losses must."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from carma_kernels import PairIndex, TokenSpans
from tests.validation.calls import PAIRS, SPANS, WITH_PAIRS, B, T, call
from tests.validation.house_style import Bad

Row = tuple[str, Callable[[], object], type[Exception], str, str, str]


def encoding(num_tokens: int) -> SimpleNamespace:
    ones = [1] * num_tokens
    return SimpleNamespace(ids=ones, word_ids=ones, sequence_ids=ones, attention_mask=ones, tokens=["a"] * num_tokens)


def from_encodings(*encodings: object) -> TokenSpans:
    return TokenSpans.from_encoding(SimpleNamespace(encodings=list(encodings)))


class Encoded(dict[str, Any]):
    """A `BatchEncoding` of two sequences of three tokens, whose ids are all 1."""

    encodings = (encoding(3), encoding(3))


def changed(input_ids: Any) -> TokenSpans:
    return TokenSpans.from_encoding(Encoded(input_ids=input_ids))


def from_lists(*spans: Any, seq_len: Any = 6, mask: Any = None) -> TokenSpans:
    return TokenSpans.from_lists(list(spans), seq_len=seq_len, attention_mask=mask)


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int64)


ids = TokenSpans.from_word_ids

MASK = "attention_mask"
A_LIST = "must be the list of one sequence's (start, end) words"
RANGE = "0 <= start < end <= seq_len = 6"
PAIR = "must hold (start, end) pairs of ints"
SEQ_LEN = "must be the number of tokens of each sequence, an int >= 0"


FROM_LISTS: list[Row] = [
    ("end beyond", lambda: from_lists([(0, 7)]), ValueError, "spans[0]", "(0, 7)", RANGE),
    ("start before", lambda: from_lists([], [(0, 1), (-1, 2)]), ValueError, "spans[1]", "(-1, 2)", RANGE),
    ("empty span", lambda: from_lists([(2, 2)]), ValueError, "spans[0]", "(2, 2)", "Drop empty words"),
    ("reversed span", lambda: from_lists([(3, 2)]), ValueError, "spans[0]", "(3, 2)", RANGE),
    ("overlap", lambda: from_lists([], [(0, 3), (2, 4)]), ValueError, "spans[1]", "token 2", "Merge the spans"),
    ("span twice", lambda: from_lists([(0, 2), (0, 2)]), ValueError, "spans[0]", "token 0", "drop one"),
    ("span in a span", lambda: from_lists([(0, 5), (3, 4)]), ValueError, "spans[0]", "token 3", "Merge the spans"),
    ("triple", lambda: from_lists([(0, 1, 2)]), TypeError, "spans[0]", "(0, 1, 2)", PAIR),
    ("floats", lambda: from_lists([(0.0, 2.0)]), TypeError, "spans[0]", "(0.0, 2.0)", PAIR),
    ("booleans", lambda: from_lists([(False, True)]), TypeError, "spans[0]", "(False, True)", PAIR),
    ("no batch level", lambda: from_lists((0, 2), (3, 5)), TypeError, "spans[0]", "got 0", "pass [words]"),
    ("None for a sequence", lambda: from_lists(None), TypeError, "spans[0]", "None", A_LIST),
    ("text for a sequence", lambda: from_lists("ab"), TypeError, "spans[0]", "'ab'", A_LIST),
    ("dict", lambda: TokenSpans.from_lists({}, seq_len=6), TypeError, "spans", "dict", "must be a list"),
    ("text", lambda: TokenSpans.from_lists("ab", seq_len=6), TypeError, "spans", "str", "must be a list"),
    ("None", lambda: TokenSpans.from_lists(None, seq_len=6), TypeError, "spans", "NoneType", "must be a list"),
    ("seq_len < 0", lambda: from_lists([], seq_len=-1), ValueError, "seq_len", "-1", SEQ_LEN),
    ("seq_len text", lambda: from_lists([], seq_len="6"), ValueError, "seq_len", "'6'", SEQ_LEN),
    ("2^31 tokens", lambda: from_lists([], [], seq_len=2**30), ValueError, "a batch", "2 x 1073741824", "split it"),
    ("seq_len True", lambda: from_lists([], seq_len=True), ValueError, "seq_len", "True", SEQ_LEN),
]
FROM_WORD_IDS: list[Row] = [
    ("one sequence", lambda: ids([0, 0, 1]), TypeError, "word_ids", "list", "pass [word_ids]"),
    ("text", lambda: ids(["ab"]), TypeError, "word_ids", "str", "must hold ints, or None"),
    ("floats", lambda: ids([[0.0, 1.0]]), TypeError, "word_ids", "float", "must hold ints, or None"),
    ("float tensor", lambda: ids(torch.zeros(2, 3)), TypeError, "word_ids", "torch.float32", "Convert them"),
    ("bf16 tensor", lambda: ids(zeros(2, 3).bfloat16()), TypeError, "word_ids", "torch.bfloat16", "Convert them"),
    ("float array", lambda: ids(np.zeros((2, 3))), TypeError, "word_ids", "float64", "must be integers"),
    ("bool tensor", lambda: ids(zeros(2, 3).bool()), TypeError, "word_ids", "bool", "must be integers"),
    ("rank 1", lambda: ids(zeros(3)), ValueError, "word_ids", "[3]", "must be [B, T]"),
    ("rank 3", lambda: ids(zeros(1, 2, 3).numpy()), ValueError, "word_ids", "[1, 2, 3]", "must be [B, T]"),
    ("ragged", lambda: ids([[0, 1], [0]]), ValueError, "word_ids", "1 to 2 tokens", "Pad the rows with None"),
    ("None", lambda: ids(None), TypeError, "word_ids", "NoneType", "must be one list of word ids"),
    ("elsewhere", lambda: ids(zeros(2, 3).to("meta")), ValueError, "word_ids", "on meta", "Pass word_ids.cpu()"),
    ("2^31 tokens", lambda: ids(zeros(1).expand(2**16, 2**15)), ValueError, "a batch", "65536 x 32768", "split it"),
]
FROM_ENCODING: list[Row] = [
    ("dict", lambda: TokenSpans.from_encoding({}), TypeError, "batch", "dict", "before it is copied"),
    ("other tokens", lambda: changed(zeros(2, 3)), ValueError, "batch", "from row 0 on", "spans[order]"),
    ("other row", lambda: changed([[1, 1, 1], (1, 1, 2)]), ValueError, "batch", "from row 1 on", "spans[order]"),
    ("fewer rows", lambda: changed(np.ones((1, 3))), ValueError, "batch", "from row 1 on", "spans[order]"),
    ("one text of two", lambda: changed([1, 1, 1]), ValueError, "batch", "from row 1 on", "spans[order]"),
    ("more rows", lambda: changed(zeros(3, 3) + 1), ValueError, "batch", "from row 2 on", "spans[order]"),
    ("fewer tokens", lambda: changed([[1, 1]] * 2), ValueError, "batch", "from row 0 on", "Build the spans before"),
    ("no encodings", lambda: from_encodings(), TypeError, "batch", "SimpleNamespace", "TokenSpans.from_word_ids"),
    ("foreign encodings", lambda: from_encodings([1, 2]), TypeError, "batch", "without word ids", "use_fast=True"),
    ("unpadded", lambda: from_encodings(encoding(3), encoding(5)), ValueError, "batch", "3 to 5", "padding=True"),
]
MASKS: list[Row] = [
    ("word on padding", lambda: ids([[0, 0]], [[1, 0]]), ValueError, MASK, "token 1", "Give padding no word"),
    (
        "span on padding",
        lambda: from_lists([(0, 2)], mask=[[0] * 6]),
        ValueError,
        MASK,
        "token 0",
        "pass the attention",
    ),
    ("another length", lambda: ids([[0, 0]], [[1] * 3]), ValueError, MASK, "[1, 3]", "must be [B, T]"),
    ("one sequence", lambda: from_lists([], mask=[1] * 6), ValueError, MASK, "[6]", "must be [B, T]"),
    ("ragged", lambda: ids([[0], [0]], [[1], [1, 1]]), ValueError, MASK, "different lengths", "Pad them"),
    (
        "additive",
        lambda: ids([[0]], [[-np.inf]]),
        ValueError,
        MASK,
        "-inf for token 0 of sequence 0",
        "Pass (mask == 0)",
    ),
    ("weights", lambda: ids([[0, 0]], torch.tensor([[1, 0.5]])), ValueError, MASK, "0.5 for token 1", "(mask != 0)"),
    ("NaN", lambda: ids([[0]], np.full((1, 1), np.nan)), ValueError, MASK, "nan", "0 for padding and 1 alone"),
    ("bf16", lambda: ids([[0]], zeros(1, 1).bfloat16() - 9), ValueError, MASK, "-9", "0 for padding and 1 alone"),
    ("objects", lambda: ids([[0]], [[None]]), TypeError, MASK, "objects", "must hold numbers"),
    ("elsewhere", lambda: ids([[0]], zeros(1, 1).to("meta")), ValueError, MASK, "on meta", f"Pass {MASK}.cpu()"),
]


def sample(k: Any = 5, generator: Any = None, num_layers: Any = None) -> PairIndex:
    return SPANS.sample_pairs(k, generator, num_layers)


def sample_elsewhere() -> PairIndex:
    return SPANS.to("meta").sample_pairs(2, torch.Generator())


SAMPLING: list[Row] = [
    *(
        (f"{name} {value!r}", lambda n=name, v=value: sample(**{n: v}), ValueError, name, repr(value), "an int >= 1")
        for name in ("k", "num_layers")
        for value in (0, -1, 2.0, True, "5")
    ),
    ("a seed", lambda: sample(generator=0), TypeError, "generator", "0", "torch.Generator().manual_seed(seed)"),
    ("a generator elsewhere", sample_elsewhere, ValueError, "generator", "on cpu", "sample before .to()"),
    (
        "negatives",
        lambda: SPANS.contrast_table("all"),
        ValueError,
        "negatives",
        "'all'",
        "must be 'sequence' or 'batch'",
    ),
]


def cat(*spans: Any) -> TokenSpans:
    return TokenSpans.cat(list(spans))


AS_A_SEQUENCE: list[Row] = [
    ("beyond", lambda: SPANS[2], IndexError, "index", "2", "from -2 to 1"),
    ("a list beyond", lambda: SPANS[[0, -3]], IndexError, "index", "[0, -3]", "must name sequences of a batch of 2"),
    ("booleans of others", lambda: SPANS[[True] * 3], IndexError, "index", "[True, True, True]", "a batch of 2"),
    ("tokens", lambda: SPANS[0, 1:3], TypeError, "index", "(0, slice(1, 3", "build the spans of a shorter input"),
    ("a matrix", lambda: SPANS[zeros(1, 1)], TypeError, "index", "tensor([[0]])", "must be an int, a slice"),
    ("a float", lambda: SPANS[0.5], TypeError, "index", "0.5", "must be an int, a slice"),  # type: ignore[index]
    ("a boolean", lambda: SPANS[True], TypeError, "index", "True", "must be an int, a slice"),
    ("None", lambda: SPANS[None], TypeError, "index", "None", "must be an int, a slice"),  # type: ignore[index]
    ("an index elsewhere", lambda: SPANS[zeros(1).to("meta")], TypeError, "index", "on meta", "Pass index.cpu()"),
    ("nothing to join", cat, ValueError, "spans", "none", "must hold one TokenSpans"),
    ("lists to join", lambda: cat(SPANS, SPANS.to_lists()), TypeError, "spans", "list", "Pass [chosen, rejected]"),
    ("one number", lambda: TokenSpans.cat(3), TypeError, "spans", "int", "must be a list of"),  # type: ignore[arg-type]
    ("two lengths", lambda: cat(SPANS, ids([[0]])), ValueError, "spans", "1 and 6 tokens", "Pad the batches to one"),
    ("two devices", lambda: cat(SPANS, SPANS.to("meta")), ValueError, "spans", "cpu and meta", "TokenSpans.cat(spans)"),
    (
        "2^31 tokens joined",
        lambda: cat(*[ids(np.full((1, 2**20), -1))] * 2**11),
        ValueError,
        "a batch",
        "2048 x 1048576",
        "split it",
    ),
]


def pairs(**others: Any) -> PairIndex:
    good = {"anchor": [0, 1], "positive": [1, 2], "negatives": [[3, 4], [5, -1]]}
    tensors = {name: torch.tensor(value) for name, value in good.items()}
    return PairIndex(**{**tensors, "shape": (B, T), **others})


def index_rows() -> Iterator[Row]:
    for name, lowest, value in (
        ("anchor", 0, [0, 12]),
        ("anchor", 0, [-1, 0]),
        ("anchor", 0, [0, 2**32]),  # 0, were it cut to 32 bits
        ("positive", 0, [1, 99]),
        ("positive", 0, [-1, 1]),
        ("negatives", -1, [[3, 12], [0, 0]]),
        ("negatives", -1, [[3, -2], [0, 0]]),
        ("negatives", -1, [[3, 2**32], [0, 0]]),
    ):
        tensor = torch.tensor(value)
        got = f"values from {tensor.min()} to {tensor.max()}"
        way_out = f"must hold flat token indices in [{lowest}, 12)"
        yield f"{name} {value}", lambda n=name, v=tensor: pairs(**{n: v}), ValueError, name, got, way_out
    for name in ("anchor", "positive", "negatives"):
        for value, got in (
            ([0, 1], "list"),
            (np.zeros(2, int), "ndarray"),
            (torch.zeros(2), "torch.float32"),
            (torch.ones(2).bool(), "torch.bool"),
        ):
            way_out = "must be an int32 or int64 tensor of flat token indices"
            yield f"{name} {got}", lambda n=name, v=value: pairs(**{n: v}), TypeError, name, got, way_out


LISTED: list[Row] = [
    *index_rows(),
    ("matrix of anchors", lambda: pairs(anchor=zeros(1, 2)), ValueError, "anchor", "[1, 2]", "must both be [P]"),
    ("fewer positives", lambda: pairs(positive=zeros(1)), ValueError, "positive", "[1]", "must both be [P]"),
    ("fewer negatives", lambda: pairs(negatives=zeros(1, 2)), ValueError, "negatives", "[1, 2]", "with P = 2"),
    (
        "row of negatives",
        lambda: pairs(negatives=zeros(2)),
        ValueError,
        "negatives",
        "[2]",
        "must be [P, K] or [L, P, K]",
    ),
    ("mask as a list", lambda: pairs(attention_mask=[[1] * T] * B), TypeError, MASK, "list", "bool or integer tensor"),
    ("additive mask", lambda: pairs(attention_mask=zeros(B, T).float()), TypeError, MASK, "torch.float32", "0 for"),
    ("mask of others", lambda: pairs(attention_mask=zeros(T, B)), ValueError, MASK, "[6, 2]", "must be [B, T]"),
    ("mask elsewhere", lambda: pairs(attention_mask=zeros(B, T).to("meta")), ValueError, MASK, "meta", ".to('cpu')"),
    ("two places", lambda: pairs(anchor=zeros(2).to("meta")), ValueError, "anchor", "meta", "must be on one device"),
    ("one size", lambda: pairs(shape=(12,)), ValueError, "shape", "(12,)", "must be (B, T)"),
    ("four sizes", lambda: pairs(shape=(3, B, T, 4)), ValueError, "shape", "(3, 2, 6, 4)", "must be (B, T)"),
    ("float sizes", lambda: pairs(shape=(2.0, 6)), ValueError, "shape", "(2.0, 6)", "must be (B, T)"),
]


def for_losses(function: str) -> list[Row]:
    def of(spans: Any) -> Callable[[], object]:
        return lambda: call(function, spans=spans)

    argument, same_batch = "spans_or_pairs", "Build them from the same padded batch"
    move = ".to('cpu', non_blocking=True)"
    elsewhere = PairIndex(PAIRS.anchor, PAIRS.positive, PAIRS.negatives, (1, 12))
    return [
        ("lists", of(SPANS.to_lists()), TypeError, argument, "list", "TokenSpans.from_lists(spans, seq_len=T)"),
        ("word ids", of(SPANS.word), TypeError, argument, "Tensor", "TokenSpans.from_word_ids(word_ids)"),
        ("None", of(None), TypeError, argument, "NoneType", "must be TokenSpans or PairIndex"),
        ("a class", of(TokenSpans), TypeError, argument, "type", "must be TokenSpans or PairIndex"),
        ("another batch size", of(from_lists([(0, 2)])), ValueError, argument, "1 sequences of 6 tokens", same_batch),
        ("another length", of(from_lists([], [], seq_len=5)), ValueError, argument, "2 sequences of 5", same_batch),
        ("transposed", of(from_lists(*[[]] * T, seq_len=B)), ValueError, argument, "6 sequences of 2", same_batch),
        ("pairs of another batch", of(elsewhere), ValueError, argument, "1 sequences of 12 tokens", same_batch),
        ("spans elsewhere", of(SPANS.to("meta")), ValueError, argument, "on meta", move),
        ("pairs elsewhere", of(PAIRS.to("meta")), ValueError, argument, "on meta", move),
        ("other layers", of(sample(2, None, 2)), ValueError, argument, "2 layers", "Sample them with num_layers=3"),
    ]


SPANS_AND_PAIRS = [
    Bad(f"{label}: {id}", make, error, argument, got, way_out)
    for label, rows in (
        ("from_lists", FROM_LISTS),
        ("from_word_ids", FROM_WORD_IDS),
        ("from_encoding", FROM_ENCODING),
        ("attention_mask", MASKS),
        ("sample_pairs", SAMPLING),
        ("as a sequence", AS_A_SEQUENCE),
        ("PairIndex", LISTED),
        *((function, for_losses(function)) for function in WITH_PAIRS),
    )
    for id, make, error, argument, got, way_out in rows
]
