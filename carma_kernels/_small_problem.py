"""A small problem like a call's: large enough to keep a device busy, and launching the kernels that the call would.

What is constant in a compiled kernel is the call's: dtype, width, options, one tensor or a list, which block sizes the
length of its sequences picks. What is not, the numbers, is fixed, and drawn without touching torch's own generators.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from carma_kernels._terms import MITerm, Similarity, StabilityTerm
from carma_kernels.pairs import PairIndex
from carma_kernels.spans import ContrastTable, TokenSpans

HiddenStates = Tensor | Sequence[Tensor]
Compute = Callable[[Any, HiddenStates, float | Tensor], tuple[Tensor, ...]]

_LAYERS = 3
_NUMBERS = 2**22
"""In the hidden states, or a little more where two sequences already have them"""
_SEQUENCES = 256
_LENGTHS = (8, 160)
"""Of sequences: the shorter ones take the block sizes of 8 tokens; those longer than 160, the path of 160"""
_NEGATIVES = 33
"""A pair's, at most: the kernels take them in blocks of up to 16"""
_TEMPERATURES = (1e-3, 1e3)
_LEARNED = 0.1
"""Stands for a temperature that is a tensor, whose value is not looked at"""
_TOPICS = 8
_DOT_SCORE = 5.0
"""Of two tokens of a topic, by the dot product: moderate at any temperature"""


@dataclass(frozen=True)
class SmallProblem:
    """Something for every backend to compute, and to differentiate."""

    loss: str
    """the public function"""
    kernels: str
    """which of the Triton backend's, in words"""
    results: tuple[str, ...]
    """what `compute` returns, in words"""
    compute: Compute
    """given a backend's module, the hidden states and the temperature"""
    hidden: tuple[Tensor, ...]
    """`[L, B, T, D]` alone, or L times `[B, T, D]`"""
    temperature: float | Tensor
    largest_score: float
    """about, of two tokens"""

    def __str__(self) -> str:
        """The loss, and its hidden states."""
        first = self.hidden[0]
        shape = list(first.shape) if len(self.hidden) == 1 else [len(self.hidden), *first.shape]
        return f"{self.loss} ({self.kernels}) of hidden states {shape} in {first.dtype} on {first.device}"

    @property
    def inputs(self) -> list[Tensor]:
        """What has a gradient: the hidden states, and the temperature if it is a tensor."""
        return [*self.hidden, *([self.temperature] if isinstance(self.temperature, Tensor) else [])]

    def outputs(self, backend: Any, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """What a backend makes of inputs like `inputs`."""
        count = len(self.hidden)
        temperature = inputs[count] if len(inputs) > count else self.temperature
        return self.compute(backend, inputs[0] if count == 1 else list(inputs[:count]), temperature)


def like_terms(kernels: str, hidden: HiddenStates, mi: MITerm | None, stability: StabilityTerm | None) -> SmallProblem:
    """Of the losses, like `carma_terms(hidden, mi, stability)` of a backend, which these kernels compute.

    A term that has nothing to add up is left out; the stability loss is not if it is alone.
    """
    mi = mi if mi is not None and _num_pairs(mi.pairs) else None
    is_batch = mi is not None and isinstance(mi.pairs, ContrastTable) and _num_groups(mi.pairs) < len(hidden[0])
    B, T, D = _sizes(hidden, is_batch)
    device = hidden[0].device
    spans = _spans(B, T)
    small_stability = None
    if mi is None or (stability is not None and len(stability.layers) > 1):
        is_masked = stability is not None and stability.mask is not None
        mask = spans.attention_mask.to(device) if is_masked else None
        small_stability = StabilityTerm(range(_LAYERS), mask, stability.eps if stability is not None else 1e-8)
    similarity = _small(mi.similarity if mi is not None else Similarity(cosine=True, temperature=1.0), device)
    small_mi = None
    if mi is not None:
        layers = range(_LAYERS if len(mi.layers) == len(hidden) else _LAYERS - 1)
        pairs = _pairs(mi.pairs, len(layers), spans, is_batch, device)
        small_mi = MITerm(layers, pairs, similarity, mi.match_negatives)

    def compute(backend: Any, hidden: HiddenStates, temperature: float | Tensor) -> tuple[Tensor, ...]:
        asked = None if small_mi is None else replace(small_mi, similarity=Similarity(similarity.cosine, temperature))
        sums, changes, _, _, total = backend.carma_terms(hidden, asked, small_stability)
        return (sums,) * (small_mi is not None) + (changes,) * (small_stability is not None) + (total,)

    terms = ("the MI loss",) * (small_mi is not None) + ("the stability loss",) * (small_stability is not None)
    results = (*terms, "their total")
    loss = "carma_loss" if len(terms) > 1 else "stability_loss" if small_mi is None else "mi_loss"
    numbers = _numbers((B, T, D), hidden, similarity)
    return SmallProblem(loss, kernels, results, compute, numbers, similarity.temperature, _largest_score(similarity))


def like_similarity(
    kernels: str,
    hidden: HiddenStates,
    layers: range,  # noqa: ARG001 (as a backend is called)
    similarity: Similarity,
    mask: Tensor | None,
    out_dtype: torch.dtype,
) -> SmallProblem:
    """Of the matrix, like `pairwise_similarity(hidden, layers, similarity, mask, out_dtype)` of a backend."""
    _, T, D = _sizes(hidden, is_batch=False)
    B = _between(_NUMBERS // (_LAYERS * T * max(T, D)), 2, _SEQUENCES)
    device = hidden[0].device
    small = _small(similarity, device)
    valid = None if mask is None else _spans(B, T).attention_mask.to(device)

    def compute(backend: Any, hidden: HiddenStates, temperature: float | Tensor) -> tuple[Tensor, ...]:
        asked = Similarity(small.cosine, temperature)
        return (backend.pairwise_similarity(hidden, range(_LAYERS), asked, valid, out_dtype),)

    numbers = _numbers((B, T, D), hidden, small)
    return SmallProblem(
        "pairwise_similarity",
        kernels,
        ("the matrix",),
        compute,
        numbers,
        small.temperature,
        _largest_score(small),
    )


def of_every_kind(dtype: torch.dtype, device: torch.device) -> Iterator[Callable[[], SmallProblem]]:
    """What makes one for each kind of kernels, with the paper's options, for hidden states of width 768."""
    cosine = Similarity(cosine=True, temperature=0.1)
    for kernels, T in (("short groups", 58), ("long groups", 1024), ("listed pairs", 58), ("stability alone", 58)):
        hidden = _any_layers(T, dtype, device)
        spans = _spans(len(hidden[0]), T)
        pairs = (
            spans.sample_pairs(5, torch.Generator()) if kernels == "listed pairs" else spans.contrast_table("sequence")
        )
        mi = None if kernels == "stability alone" else MITerm(range(len(hidden)), pairs, cosine, None)
        yield partial(like_terms, kernels, hidden, mi, StabilityTerm(range(len(hidden)), None, 1e-8))
    hidden = _any_layers(58, dtype, device)
    yield partial(like_similarity, "similarity", hidden, range(len(hidden)), cosine, None, torch.float32)


def _any_layers(T: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Of which nothing is read but the shape."""
    return [torch.empty(1, dtype=dtype, device=device).expand(16, T, 768)] * 12


def _num_pairs(pairs: ContrastTable | PairIndex) -> int:
    if isinstance(pairs, PairIndex):
        return pairs.num_pairs
    assert pairs.ranks is not None
    return pairs.ranks.num_pairs


def _num_groups(table: ContrastTable) -> int:
    assert table.ranks is not None
    return table.ranks.token.shape[0]


def _sizes(hidden: HiddenStates, is_batch: bool) -> tuple[int, int, int]:
    """B, T and D; a group that is the whole batch stays as short or as long as it is."""
    B, T, D = hidden[0].shape
    shortest, longest = _LENGTHS
    small_D = max(D, 2)  # with D = 1 a cosine is 1 or -1, and has no gradient
    if is_batch and longest >= B * T:
        return B, T, small_D
    small_T = _between(T, shortest, longest)
    fewest = longest // small_T + 1 if is_batch else 2
    return _between(_NUMBERS // (_LAYERS * small_T * small_D), fewest, _SEQUENCES), small_T, small_D


def _spans(B: int, T: int) -> TokenSpans:
    """Words of 2 to 5 tokens with one between them, and padding of up to a fifth, on either side."""
    words: list[list[tuple[int, int]]] = []
    mask = []
    for b in range(B):
        padding = b % 4 * T // 16
        first, stop = (padding, T) if b % 2 else (0, T - padding)
        mask.append([first <= t < stop for t in range(T)])
        at, length = first, 2 + b % 4
        words.append([])
        while at + length <= stop:
            words[-1].append((at, at + length))
            at, length = at + length + 1, 2 + (length + 1) % 4
    return TokenSpans.from_lists(words, seq_len=T, attention_mask=mask)


def _pairs(
    asked: ContrastTable | PairIndex, num_layers: int, spans: TokenSpans, is_batch: bool, device: torch.device
) -> ContrastTable | PairIndex:
    if isinstance(asked, ContrastTable):
        return spans.to(device).contrast_table("batch" if is_batch else "sequence")
    K = _between(asked.negatives.shape[-1], 1, _NEGATIVES)
    for_each_layer = num_layers if asked.negatives.dim() == 3 else None
    return spans.sample_pairs(K, torch.Generator().manual_seed(0), for_each_layer).to(device)


def _small(similarity: Similarity, device: torch.device) -> Similarity:
    """With a temperature at which fp32 says something, and none of the call's tensors."""
    temperature = similarity.temperature
    if isinstance(temperature, Tensor):
        learned = torch.full((), _LEARNED, dtype=temperature.dtype, device=device)
        return Similarity(similarity.cosine, learned.requires_grad_())
    lowest, highest = _TEMPERATURES
    return Similarity(similarity.cosine, min(max(temperature, lowest), highest))


def _largest_score(similarity: Similarity) -> float:
    return 1 / _value(similarity.temperature) if similarity.cosine else 2 * _DOT_SCORE


def _value(temperature: float | Tensor) -> float:
    return _LEARNED if isinstance(temperature, Tensor) else temperature


def _numbers(shape: tuple[int, int, int], like: HiddenStates, similarity: Similarity) -> tuple[Tensor, ...]:
    """Tokens of a few topics, so that scores differ."""
    B, T, D = shape
    dtype, device = like[0].dtype, like[0].device
    generator = torch.Generator(device).manual_seed(0)
    topic = torch.randn((_TOPICS, D), generator=generator, dtype=torch.float32, device=device)
    of_token = torch.randint(_TOPICS, (B, T), generator=generator, device=device)
    hidden = torch.randn((_LAYERS, B, T, D), generator=generator, dtype=torch.float32, device=device)
    hidden += topic[of_token]
    if not similarity.cosine:
        hidden *= math.sqrt(_DOT_SCORE * _value(similarity.temperature) / D)
    hidden = hidden.to(dtype)
    layers = (hidden,) if isinstance(like, Tensor) else tuple(layer.clone() for layer in hidden)
    return tuple(layer.requires_grad_() for layer in layers)


def _between(number: int, least: int, most: int) -> int:
    return min(max(number, least), most)
