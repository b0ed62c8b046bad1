"""The random problems, the same on every machine: what is called, with which numbers and options."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from carma_kernels import PairIndex, TokenSpans


class Check(NamedTuple):
    """A function with the options that lead to code of their own."""

    function: str
    negatives: str = "-"
    metric: str = "-"
    long: bool = False
    """sequences that the Triton kernels do not take in one tile"""


CHECKS = (
    *(Check("pairwise_similarity", metric=metric) for metric in ("cosine", "dot")),
    *itertools.starmap(Check, itertools.product(["mi_loss"], ["sequence", "batch", "sampled"], ["cosine", "dot"])),
    Check("stability_loss"),
    *(Check("carma_loss", negatives, "cosine") for negatives in ("sequence", "batch", "sampled")),
    Check("carma_loss", "sequence", "cosine", long=True),
)


@dataclass(frozen=True)
class Problem:
    """One random call: ragged batches with NaN in the padding, a zero vector, words up to a whole sequence."""

    check: Check
    hidden: tuple[Tensor, ...]
    """one `[L, B, T, D]`, or L times `[B, T, D]`"""
    pairs: TokenSpans | PairIndex
    mask: Tensor | None
    temperature: float | Tensor
    options: dict[str, Any]
    seed: int

    def __str__(self) -> str:
        """Shape, layout and options."""
        layout = "one tensor" if self.hidden[0].dim() == 4 else "a list"
        temperature = f"{float(self.temperature):.3g}" + (" (a tensor)" if isinstance(self.temperature, Tensor) else "")
        options = "".join(f", {name}={value}" for name, value in self.options.items())
        masked = ", masked" if self.mask is not None else ""
        return f"{self.shape} as {layout}{masked}, temperature={temperature}{options}"

    @property
    def shape(self) -> str:
        """L, B, T and D, readable."""
        first = self.hidden[0]
        L, B, T, D = first.shape if first.dim() == 4 else (len(self.hidden), *first.shape)
        return f"L{L} B{B} T{T} D{D}"


def random_problem(check: Check, dtype: torch.dtype, seed: int, case: int) -> Problem:
    """The problem with this number, the same on every machine.

    Sizes and numbers are drawn; the options take turns, so that a few problems have met them all.
    """
    rng = random.Random(f"{check} {seed} {case}")
    generator = torch.Generator().manual_seed(rng.getrandbits(60))
    L, B, T = rng.randint(2, 4), 3 if case == 0 else rng.randint(1, 3), rng.randint(3, 14)
    if check.long:
        L, B, T = rng.randint(2, 3), rng.randint(1, 2), rng.randint(130, 150)
    elif check.negatives == "sampled":
        T = rng.randint(4, 8)  # Triton's interpreter takes a second for every few pairs
    D = rng.choice((2, 3, 8, 17, 40))  # with D = 1 a cosine is 1 or -1, and has no gradient
    spans = _random_spans(rng, B, T)
    while not spans.num_pairs:  # or there would be nothing to check
        spans = _random_spans(rng, B, T)
    valid = spans.attention_mask  # [B, T]

    hidden = torch.randn(L, B, T, D, generator=generator, dtype=torch.float64)
    if check.metric == "dot":
        hidden /= math.sqrt(D)  # or exp(s) would be 0 or inf for all but one token
    hidden[rng.randrange(L), rng.randrange(B), rng.randrange(T)] = 0.0
    masked = check.function != "mi_loss" and case % 3 != 1
    if masked or check.function == "mi_loss":
        hidden[:, ~valid] = math.nan
    hidden = hidden.to(dtype)

    fewest = 2 if check.function == "stability_loss" else 1
    start = rng.randint(0, L - fewest)
    layers = (start, rng.randint(start + fewest - 1, L - 1)) if case % 3 else None
    temperature = torch.tensor(rng.uniform(0.1, 1.0))
    return Problem(
        check,
        hidden.unbind(0) if case // 2 % 2 else (hidden,),
        _random_pairs(spans, rng, generator, layers, L) if check.negatives == "sampled" else spans,
        valid if masked else None,
        float(temperature) if case % 2 else temperature,
        _options(check, dtype, case, layers),
        rng.getrandbits(60),
    )


def _random_spans(rng: random.Random, B: int, T: int) -> TokenSpans:
    """Words of 1 to 4 tokens among tokens in no word, or one word that fills its sequence; padding on either side."""
    words: list[list[tuple[int, int]]] = []
    mask = []
    for b in range(B):
        length = T if b == 0 or rng.random() < 0.3 else rng.randint(1, T)
        at = first = rng.choice((0, T - length))
        mask.append([first <= t < first + length for t in range(T)])
        longest = length if rng.random() < 0.1 else 4
        words.append([])
        while at < first + length:
            end = min(first + length, at + rng.randint(1, longest) if longest == 4 else at + longest)
            if rng.random() < 0.8:
                words[-1].append((at, end))
            at = end
    return TokenSpans.from_lists(words, seq_len=T, attention_mask=mask)


def _random_pairs(
    spans: TokenSpans, rng: random.Random, generator: torch.Generator, layers: tuple[int, int] | None, L: int
) -> PairIndex:
    """Sampled pairs with some slots empty."""
    num_layers = L if layers is None else layers[1] - layers[0] + 1
    pairs = spans.sample_pairs(rng.randint(1, 5), generator, rng.choice((None, num_layers)))
    negatives = pairs.negatives.clone()  # [P, K] or [L, P, K]
    negatives[torch.rand(negatives.shape, generator=generator) < 0.2] = -1
    return PairIndex(pairs.anchor, pairs.positive, negatives, pairs.shape, pairs.attention_mask)


def _options(check: Check, dtype: torch.dtype, case: int, layers: tuple[int, int] | None) -> dict[str, Any]:
    of_spans: dict[str, Any] = {}
    if check.negatives in ("sequence", "batch"):
        of_spans = {"negatives": check.negatives, "match_negatives": 5 if (case + 1) // 2 % 2 else None}
    reduction = ("mean", "sum", "none")[case % 3]
    if check.function == "pairwise_similarity":
        return {"metric": check.metric, "layers": layers, "out_dtype": torch.promote_types(dtype, torch.float32)}
    if check.function == "stability_loss":
        return {"layers": layers, "reduction": reduction}
    if check.function == "mi_loss":
        num_pairs = 7 if case % 3 == 2 else None
        return {"metric": check.metric, "layers": layers, "reduction": reduction, "num_pairs": num_pairs, **of_spans}
    return {"metric": check.metric, "mi_layers": layers, "mi_weight": 0.7, "stability_weight": 0.4, **of_spans}
