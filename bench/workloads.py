"""What is measured: hidden states of a shape, with words as dense as in a stress test or as in real text."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from carma_kernels import TokenSpans

Spans = list[list[tuple[int, int]]]

_WORDNET = Path(__file__).parent / "data" / "gpt2_wordnet_spans.jsonl"


class Case(NamedTuple):
    """The tensors of a workload."""

    hidden_states: list[Tensor]
    """L leaves `[B, T, D]` that want a gradient, as the blocks of a model put them out"""
    spans: Spans
    """for each sequence all its words, those of one token included"""
    attention_mask: Tensor
    """`[B, T]` bool, True for a valid token"""

    @property
    def num_pairs(self) -> int:
        """`P`."""
        return sum(_num_pairs(words) for words in self.spans)

    @property
    def nbytes(self) -> int:
        """Size of the hidden states."""
        return sum(h.nbytes for h in self.hidden_states)


def token_spans(case: Case) -> TokenSpans:
    """A case's words as the package takes them, on its device."""
    _, T = case.attention_mask.shape
    spans = TokenSpans.from_lists(case.spans, seq_len=T, attention_mask=case.attention_mask.cpu())
    return spans.to(case.attention_mask.device)


@dataclass(frozen=True)
class Workload:
    """A shape and the density of its words.

    Attributes:
        name: starts the id.
        words: "dense", 30 % of the tokens in words of two to four tokens (about 18 pairs a sequence at T = 58), no
            padding; a number, that share instead; "wordnet", the words of real prompts (`data/README.md`), padded on
            the right to T.
    """

    name: str
    L: int
    B: int
    T: int
    D: int
    words: Literal["dense", "wordnet"] | float

    def __str__(self) -> str:
        return f"{self.name}-L{self.L}-B{self.B}-T{self.T}-D{self.D}-{self.words}"

    def build(
        self,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        values: torch.dtype = torch.float32,
    ) -> Case:
        """The same values in every run and on every device; hidden states drift from layer to layer like a model's.

        Args:
            dtype: of the hidden states.
            device: where they and the mask lie.
            values: the dtype to whose precision the values are rounded first, so that an fp64 case can hold exactly
                what a bfloat16 one does.
        """
        layers = [h.to(values).to(device, dtype, copy=True) for h in self._drifting(torch.device("cpu"))]
        return self._case(layers)

    def build_there(self, device: torch.device | str, dtype: torch.dtype) -> Case:
        """The same drawn on the device, at once: other values than `build`'s, and other ones on another device."""
        return self._case([h.to(dtype, copy=True) for h in self._drifting(torch.device(device))])

    def _drifting(self, device: torch.device) -> Iterator[Tensor]:
        """L times `[B, T, D]` fp32, one at a time."""
        generator = torch.Generator(device).manual_seed(0)
        h = torch.zeros(self.B, self.T, self.D, device=device)
        for _ in range(self.L):
            h = h + torch.randn(self.B, self.T, self.D, generator=generator, device=device)  # [B, T, D]
            yield h

    def _case(self, layers: list[Tensor]) -> Case:
        spans = self.spans()
        lengths = torch.tensor([words[-1][1] for words in spans])  # [B]
        mask = (torch.arange(self.T) < lengths[:, None]).to(layers[0].device)
        return Case([h.requires_grad_() for h in layers], spans, mask)

    def spans(self) -> Spans:
        """The words, without the cost of hidden states."""
        rng = random.Random(0)
        if self.words == "wordnet":
            return _typical_batch(_wordnet_prompts(self.T), self.B, rng)
        share = 0.3 if self.words == "dense" else self.words
        return [_tiling_words(self.T, share, rng) for _ in range(self.B)]


def _tiling_words(T: int, share: float, rng: random.Random) -> list[tuple[int, int]]:
    """Words that tile T tokens, a share of which lies in words of two to four.

    The last is of one token, because the published loss leaves the last word out.
    """
    target = min(round(share * T), T - 1)
    sizes: list[int] = []
    while (missing := target - sum(sizes)) >= 2:
        sizes.append(min(rng.choice((2, 3, 4)), missing))
    sizes += [1] * (T - 1 - sum(sizes))
    rng.shuffle(sizes)
    sizes.append(1)
    ends = [sum(sizes[: n + 1]) for n in range(len(sizes))]
    return [(end - size, end) for size, end in zip(sizes, ends, strict=True)]


def _wordnet_prompts(T: int) -> Spans:
    """The prompts of T tokens or fewer."""
    rows = [json.loads(line) for line in _WORDNET.read_text().splitlines()]
    return [[(start, end) for start, end in row["spans"]] for row in rows if row["n_tokens"] <= T]


def _typical_batch(prompts: Spans, B: int, rng: random.Random) -> Spans:
    """Of 100 random batches the one nearest to the mean number of pairs, and of tokens in words of several tokens.

    One prompt taken at random has no pair at all in 42 % of the cases, on which the published loss crashes.
    """

    def density(batch: Spans) -> tuple[float, float]:
        pairs, tokens = sum(map(_num_pairs, batch)), sum(map(_num_word_tokens, batch))
        return pairs / len(batch), tokens / len(batch)

    mean_pairs, mean_tokens = density(prompts)

    def deviation(batch: Spans) -> float:
        pairs, tokens = density(batch)
        return abs(pairs / mean_pairs - 1) + abs(tokens / mean_tokens - 1)

    return min((rng.sample(prompts, B) for _ in range(100)), key=deviation)


def _num_word_tokens(words: list[tuple[int, int]]) -> int:
    """Tokens in words of several tokens."""
    return sum(end - start for start, end in words if end - start > 1)


def _num_pairs(words: list[tuple[int, int]]) -> int:
    """Pairs `(i, j)` of tokens of one word."""
    return sum((end - start) * (end - start - 1) // 2 for start, end in words)


PAPER = (
    Workload("paper", L=12, B=1, T=58, D=768, words="dense"),
    Workload("paper", L=12, B=1, T=58, D=768, words="wordnet"),
    Workload("paper", L=12, B=1, T=124, D=768, words="dense"),
    Workload("paper", L=12, B=16, T=58, D=768, words="dense"),
    Workload("paper", L=12, B=16, T=58, D=768, words="wordnet"),
)
"""GPT-2 small at the paper's two sequence lengths; no WordNet prompt is longer than 58 tokens."""

SLOW = (Workload("paper", L=12, B=16, T=124, D=768, words="dense"),)
"""The published losses take minutes and 8 GB for it."""

TEXT = 0.18
"""The share of tokens in words of several that real text has under GPT-2's tokenizer (`data/README.md`)."""

_LAYERS_AND_WIDTHS = {
    "gpt2": (12, 768),
    "gpt2-large": (36, 1280),
    "gemma-2b": (18, 2048),
    "llama-3.2-1b": (16, 2048),
    "llama-3.2-3b": (28, 3072),
    "qwen2.5-0.5b": (24, 896),
    "qwen2.5-3b": (36, 2048),
}

MODELS = tuple(
    Workload(name, L, B, T, D, words)
    for B, T in ((16, 58), (16, 124), (8, 1024), (1, 8192))
    for name, (L, D) in _LAYERS_AND_WIDTHS.items()
    for words in ("dense", TEXT)
)
"""The hidden states of the paper's seven models, at its two batch shapes and at two of long sequences."""

_MIDDLE = Workload("growth", L=8, B=4, T=128, D=512, words="dense")

GROWTH = (
    _MIDDLE,
    *(replace(_MIDDLE, T=T) for T in (32, 64, 256, 512, 1024, 2048)),
    *(replace(_MIDDLE, B=B) for B in (1, 2, 8, 16, 32)),
    *(replace(_MIDDLE, L=L) for L in (2, 4, 16, 32)),
    *(replace(_MIDDLE, D=D) for D in (128, 256, 1024, 2048, 4096)),
    *(replace(_MIDDLE, words=share) for share in (0.05, 0.1, 0.2, 0.5, 0.8)),
)
"""One size at a time, so that what a cost grows with can be seen."""

TINY = (
    Workload("tiny", L=3, B=2, T=20, D=16, words="dense"),
    Workload("tiny", L=3, B=2, T=20, D=16, words="wordnet"),
)
"""For a quick look whether the benches still run."""
