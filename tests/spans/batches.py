"""Random batches of words, and in plain Python what `TokenSpans` makes of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from carma_kernels import TokenSpans

Words = list[list[tuple[int, int]]]


@dataclass(frozen=True)
class Batch:
    """Word ids of each token, None for a token in no word, and which tokens are valid."""

    ids: list[list[int | None]]
    valid: list[list[bool]]

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.ids), len(self.ids[0]) if self.ids else 0

    @property
    def mask(self) -> Tensor:
        return torch.tensor(self.valid, dtype=torch.bool).reshape(self.shape)

    @property
    def spans(self) -> TokenSpans:
        return TokenSpans.from_word_ids(self.ids, self.mask)

    @property
    def words(self) -> Words:
        """`(start, end)` of each run of equal ids."""
        return [list(_runs(row)) for row in self.ids]

    def word_of_token(self) -> list[list[int]]:
        """A number for each word and each token in no word, counted over the batch; -1 for padding."""
        number = -1
        numbers: list[list[int]] = []
        for row, valid in zip(self.ids, self.valid, strict=True):
            numbers.append([])
            for t, word in enumerate(row):
                if not valid[t]:
                    numbers[-1].append(-1)
                    continue
                if t == 0 or word is None or row[t - 1] != word:
                    number += 1
                numbers[-1].append(number)
        return numbers


def _runs(row: list[int | None]) -> Iterator[tuple[int, int]]:
    start = 0
    for end in range(1, len(row) + 1):
        if end == len(row) or row[end] != row[start]:
            if row[start] is not None:
                yield start, end
            start = end


@st.composite
def batches(draw: st.DrawFn, max_sequences: int = 4, max_tokens: int = 8) -> Batch:
    """Also without sequences or tokens, and with padding anywhere, in the middle too."""
    B, T = draw(st.integers(0, max_sequences)), draw(st.integers(0, max_tokens))
    token = st.sampled_from(["padding", "no word", 0, 0, 1, 1, 2])  # adjacent equal ids are what makes words long
    rows = draw(st.lists(st.lists(token, min_size=T, max_size=T), min_size=B, max_size=B))
    return Batch(
        [[word if isinstance(word, int) else None for word in row] for row in rows],
        [[word != "padding" for word in row] for row in rows],
    )


EXAMPLE = Batch(
    # two words side by side, padding on the right; a token in no word; padding on the left, a word of one token
    ids=[[4, 4, 4, 7, 7, None], [None, 0, 0, 0, None, None], [None, None, 5, 5, None, 9]],
    valid=[[True] * 5 + [False], [True] * 6, [False] * 2 + [True] * 4],
)
EXAMPLE_WORDS: Words = [[(0, 3), (3, 5)], [(1, 4)], [(2, 4), (5, 6)]]
