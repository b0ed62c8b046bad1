"""What the losses are tested on: the backends, and a grid of small cases with the batch of each."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from itertools import groupby
from typing import Any

import pytest
import torch
from torch import Tensor

from carma_kernels import PairIndex, TokenSpans

FP64, FP32, FP16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16


@dataclass(frozen=True, eq=False)
class Backend:
    """A row of `BACKENDS`: what every test of the losses runs on."""

    name: str  # as in `backend=`
    tolerance: Mapping[torch.dtype, float]
    """The dtypes it takes, and the error of its computation in each, relative to the largest number of a tensor, before
    the one rounding to the tensor's dtype."""
    device: str = "cpu"
    max_elements: int | None = None  # of the hidden states; None for no limit
    reads_strided: bool = True  # layers that are not contiguous
    interpret: bool = False  # Triton's interpreter, whose memory and speed say nothing about the kernels

    def __str__(self) -> str:
        return self.name + "-interpret" * self.interpret

    @property
    def sharpest(self) -> torch.dtype:
        """Its dtype with the smallest error."""
        return min(self.tolerance, key=self.tolerance.__getitem__)

    def runs(self, case: Case) -> bool:
        elements = case.L * case.D * sum(map(len, DRAWINGS[case.drawing]))
        return case.dtype in self.tolerance and (self.max_elements is None or elements <= self.max_elements)


TORCH = Backend("torch", tolerance={FP64: 1e-9, FP32: 1e-5, FP16: 1e-5, BF16: 1e-5})  # halves: computed in fp32
# halves: the derivative by a similarity is rounded to the dtype of the tokens that it is multiplied with
TRITON = Backend("triton", tolerance={FP32: 1e-5, FP16: 2**-11, BF16: 2**-8}, reads_strided=False)


def _backends() -> list[Backend]:
    """On the device that `CARMA_KERNELS_TEST_DEVICE` names, both.

    On a CPU the torch backend; or, in a process that was started with `TRITON_INTERPRET=1`, the Triton kernels.
    """
    if device := os.environ.get("CARMA_KERNELS_TEST_DEVICE"):
        return [replace(TORCH, device=device), replace(TRITON, device=device)]
    if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None:
        return [replace(TRITON, interpret=True, max_elements=2**14)]
    return [TORCH]


BACKENDS = _backends()


# One line a sequence, one character a token: equal letters are a word, "." is in no word, "_" is padding.
DRAWINGS = {
    # every kind of sequence at once
    "mixed": (
        "__________",  # nothing valid: token 0, which a slip in an index reads, is padding
        "aabb.cdddd",  # words side by side, a token in no word, a word of one token, a longer one
        "aab.cc____",  # padding
        "aaaaaaa___",  # a word that covers its sequence: it has negatives elsewhere only
        "..........",  # no word: foreign to the other sequences, but among the negatives of a batch
    ),
    # every token valid and every sequence with a word: the hidden states can be used as they lie
    "dense": ("aaabbccc", "aabbbbcc"),
    # every token valid, but sequences without a word: as they lie for a batch, gathered for sequences
    "sparse": ("........", "..aa....", "........"),
    # words longer than a power of two, in a sequence of odd length
    "long": ("." * 3 + "a" * 17 + "b" * 33,),
    # nothing has negatives, in the sequence
    "covered": ("aaa", "aaa"),
    # nothing has pairs
    "wordless": ("....", ".a.b"),
    "one token": ("a", "."),
    "nothing valid": ("____", "____"),
}


@dataclass(frozen=True)
class Case:
    """One problem; its id names what differs from the defaults."""

    drawing: str = "mixed"
    pad: str = "right"  # "left", "both"
    L: int = 2
    D: int = 6
    dtype: torch.dtype = FP64
    stacked: bool = True
    layers: tuple[int, int] | None = None
    metric: str = "cosine"
    temperature: float = 0.1
    number: bool = False  # the temperature is a number, not a tensor with a gradient
    negatives: str = "sequence"  # "batch"; "listed" and "listed by layer" for a PairIndex
    match_negatives: float | None = None
    reduction: str | None = None  # None: the loss's own default
    num_pairs: str | None = None  # "int", "tensor"
    masked: bool = False  # for the losses that take `mask=`
    zero_vectors: bool = False
    scale: float = 1.0  # of the hidden states

    def __str__(self) -> str:
        shown = {"drawing": "{}", "pad": "pad {}", "D": "D{}", "L": "L{}", "dtype": "{}", "metric": "{}"}
        shown |= {"negatives": "{}", "reduction": "{}", "stacked": "list", "masked": "masked"}
        parts = [
            shown.get(field.name, field.name + "={}").format(getattr(self, field.name))
            for field in fields(self)
            if getattr(self, field.name) != field.default
        ]
        return ", ".join(parts).replace("torch.", "") or "default"

    @property
    def num_layers(self) -> int:
        """Layers in the loss."""
        return self.L if self.layers is None else self.layers[1] - self.layers[0] + 1


def on_backends(cases: Iterable[Case]) -> list[Any]:
    """The parameters `backend, case` of a test: every case on every backend that runs it."""
    return [
        pytest.param(backend, case, id=f"{backend}: {case}")
        for case in cases
        for backend in BACKENDS
        if backend.runs(case)
    ]


def thinned(always: Iterable[Any], thorough: Iterable[Any]) -> list[Any]:
    """Parameters of a test: some, and more of the kind, for which the interpreter takes its time."""
    return [*always, *(pytest.param(value, marks=pytest.mark.thorough) for value in thorough)]


def in_dtypes(cases: Iterable[Case], *dtypes: torch.dtype) -> list[Case]:
    return [replace(case, dtype=dtype) for case in cases for dtype in dtypes]


@dataclass(frozen=True)
class Batch:
    """Hidden states on the CPU, and what is known about their tokens."""

    hidden: Tensor  # [L, B, T, D] fp64, of values that the case's dtype holds exactly
    valid: Tensor  # [B, T] bool
    spans: TokenSpans


def read(drawing: Iterable[str]) -> tuple[list[list[tuple[int, int]]], Tensor]:
    """The words of each sequence, those of one token included, and the valid tokens `[B, T]`."""
    words = []
    for row in drawing:
        runs, at = [], 0
        for letter, run in groupby(row):
            start, at = at, at + len(list(run))
            if letter.isalpha():
                runs.append((start, at))
        words.append(runs)
    return words, torch.tensor([[letter != "_" for letter in row] for row in drawing], dtype=torch.bool)


def padded(row: str, side: str) -> str:
    """The row with its padding moved to `side`."""
    tokens = row.rstrip("_")
    return {"right": tokens.ljust, "left": tokens.rjust, "both": tokens.center}[side](len(row), "_")


def make_batch(case: Case, *, poison: bool = False, seed: int = 0) -> Batch:
    """The case's batch.

    Args:
        case: which one.
        poison: put NaN and inf into the padding.
        seed: of the hidden states.
    """
    drawing = [padded(row, case.pad) for row in DRAWINGS[case.drawing]]
    words, valid = read(drawing)
    B, T = valid.shape
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(case.L, B, T, case.D, generator=generator, dtype=FP64)
    # a common part, so that neither similarities nor changes between layers are those of pure noise
    hidden = case.scale * (0.5 * hidden + torch.randn(1, B, 1, case.D, generator=generator, dtype=FP64))
    if case.zero_vectors:
        hidden[0, 1, [0, 3, 4]] = 0  # in "mixed": an anchor, a positive, a token in no word
        hidden[-1, 1, 1] = 1e-9 / case.D  # shorter than the shortest vector that has a direction
    hidden = hidden.to(case.dtype).to(FP64)
    if poison:
        hidden[:, ~valid] = torch.nan
        hidden[:, ~valid, ::2] = torch.inf
    return Batch(hidden, valid, TokenSpans.from_lists(words, seq_len=T, attention_mask=valid))


def list_pairs(batch: Batch, num_layers: int | None = None, seed: int = 1) -> PairIndex:
    """The batch's pairs with drawn negatives, and what a list may hold besides: empty slots, and tokens of any kind."""
    generator = torch.Generator().manual_seed(seed)
    drawn = batch.spans.sample_pairs(k=4, generator=generator, num_layers=num_layers)
    negatives = drawn.negatives.clone()  # [(L,) P, K]
    negatives[torch.rand(negatives.shape, generator=generator) < 0.2] = -1
    negatives[..., :1, :] = -1  # the first pair has none
    negatives[..., 1:2, 0] = drawn.positive[1:2]  # the second one's positive and anchor are among its negatives
    negatives[..., 1:2, 1] = drawn.anchor[1:2]
    negatives[..., 2:3, :] = batch.valid.flatten().nonzero()[-1:]  # one token of another sequence, four times
    return PairIndex(drawn.anchor, drawn.positive, negatives, drawn.shape)


_MI = [
    Case(),
    # padding on the other sides, and the layers as a list
    Case(pad="left"),
    Case(pad="both", stacked=False),
    # the other negatives and metric, and both together
    Case(negatives="batch"),
    Case(metric="dot", temperature=2.0),
    Case(negatives="batch", metric="dot", temperature=2.0, pad="left"),
    # k below and above the number of negatives, a word without negatives included
    Case(match_negatives=5),
    Case(match_negatives=64.5, negatives="batch", metric="dot", temperature=2.0),
    # what the caller divides by and gets
    Case(reduction="sum"),
    Case(reduction="none", L=3),
    Case(reduction="none", num_pairs="tensor", negatives="batch"),
    Case(num_pairs="int"),
    Case(num_pairs="tensor", negatives="listed"),
    # which layers
    Case(L=1),
    Case(L=4, layers=(1, 2)),
    Case(L=4, layers=(3, 3), stacked=False, negatives="batch"),
    # explicit pairs
    Case(negatives="listed"),
    Case(negatives="listed", metric="dot", temperature=2.0, pad="left", stacked=False),
    Case(negatives="listed by layer", L=4, layers=(1, 3), reduction="none"),
    Case(negatives="listed", drawing="sparse", D=24),
    # shapes of batches: each of "sequence" and "batch" reads them in its own way
    *(
        Case(drawing=drawing, negatives=negatives, D=D)
        for drawing in ("dense", "sparse")
        for negatives in ("sequence", "batch")
        for D in (6, 24, 64)  # anchors in several pieces, in one, and in one with those of other layers
    ),
    Case(drawing="dense", metric="dot", temperature=2.0, stacked=False),
    Case(drawing="long", L=1),
    Case(drawing="long", D=40, negatives="batch"),
    *(Case(drawing="covered", negatives=negatives) for negatives in ("sequence", "batch", "listed")),
    *(
        Case(drawing=drawing, negatives=negatives, reduction="none")
        for drawing in ("wordless", "one token", "nothing valid")
        for negatives in ("sequence", "batch", "listed")
    ),
    # widths: a single number (whose cosine has no gradient), one above a power of two, and wide enough for all anchors
    # at once, and for those of several layers
    Case(D=1, metric="dot"),
    Case(D=16),
    Case(D=33),
    Case(D=64, pad="left", L=5, layers=(1, 3)),
    Case(D=64, negatives="batch", match_negatives=5),
    Case(D=72, negatives="batch", stacked=False),
    # vectors of no length, to which both metrics and every kind of negatives come
    *(Case(zero_vectors=True, negatives=negatives) for negatives in ("sequence", "batch", "listed")),
    Case(zero_vectors=True, metric="dot", temperature=2.0),
    # the sharpest temperature in use, whose similarities reach 100
    *(Case(temperature=0.01, negatives=negatives) for negatives in ("sequence", "batch", "listed")),
    # a number for a temperature
    Case(number=True),
    Case(number=True, negatives="listed", metric="dot", temperature=2.0),
]
MI_CASES = [
    *in_dtypes(_MI, FP64, FP32),
    # fp64 and fp32 take every branch; the halves differ by the cast on the way in and the rounding on the way out
    *in_dtypes(
        [Case(), Case(stacked=False, negatives="batch", pad="left"), Case(negatives="listed"), Case(D=64, number=True)],
        FP16,
        BF16,
    ),
    # dot products of a million, as real hidden states have: all or nothing for every softmax, and exact in fp32 if
    # similarities are first of all subtracted from each other
    *in_dtypes([Case(metric="dot", scale=100.0, negatives=n) for n in ("sequence", "batch")], FP64, FP32),
    Case(metric="dot", scale=100.0, negatives="listed"),
    # |x| = 300, whose squares fp16 cannot hold
    Case(scale=300.0, dtype=FP16),
    Case(scale=300.0, dtype=FP16, negatives="listed"),
]

_STABILITY = [
    Case(),
    Case(masked=True),
    # a stencil with inner layers, whole and in part, and its ends
    Case(L=5),
    Case(L=5, layers=(1, 3), masked=True, pad="left"),
    Case(L=5, layers=(1, 3), stacked=False),
    Case(L=4, layers=(2, 3), stacked=False, masked=True, pad="both"),
    # no step at all
    Case(L=1, reduction="none"),
    Case(L=3, layers=(1, 1)),
    Case(L=3, layers=(1, 1), reduction="mean", stacked=False),
    # reductions, the upstream gradient differing from step to step
    Case(L=4, reduction="none"),
    Case(L=4, reduction="none", masked=True),
    Case(L=4, reduction="mean"),
    # nothing in the means
    Case(drawing="nothing valid", L=3, masked=True),
    Case(drawing="one token", L=3, D=1),
    Case(zero_vectors=True, L=3),
    Case(D=33, L=3),
]
STABILITY_CASES = [
    *in_dtypes(_STABILITY, FP64, FP32),
    *in_dtypes([Case(L=3, reduction="none"), Case(L=3, stacked=False, masked=True)], FP16, BF16),
    Case(L=3, scale=300.0, dtype=FP16),
]

_SIMILARITY = [
    Case(),
    Case(masked=True),
    Case(masked=True, pad="left", metric="dot", temperature=2.0),
    Case(metric="dot", temperature=2.0, stacked=False),
    Case(L=4, layers=(1, 2), stacked=False, masked=True, pad="both"),
    Case(L=4, layers=(3, 3)),
    Case(number=True, masked=True),
    Case(drawing="dense", D=33),
    Case(drawing="one token", D=1, metric="dot"),
    Case(drawing="nothing valid", masked=True),
    Case(zero_vectors=True),
    Case(zero_vectors=True, masked=True, metric="dot"),
]
SIMILARITY_CASES = [
    *in_dtypes(_SIMILARITY, FP64, FP32),
    *in_dtypes([Case(), Case(masked=True, stacked=False)], FP16, BF16),
    Case(scale=300.0, dtype=FP16),
]
