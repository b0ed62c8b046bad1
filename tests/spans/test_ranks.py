"""The tables in rank space, against the definitions."""

from __future__ import annotations

import pytest
from hypothesis import given

from carma_kernels._ranks import RANK_ALIGNMENT
from tests.spans.batches import Batch, batches
from tests.spans.test_contrast_table import relations_by_definition


@pytest.mark.parametrize("negatives", ["sequence", "batch"])
@given(batch=batches())
def test_tables(negatives: str, batch: Batch) -> None:
    B, T = batch.shape
    spans = batch.spans
    table = spans.contrast_table(negatives)
    ranks = table.ranks
    assert ranks is not None
    assert table.word is not None
    S = 1 if negatives == "batch" else B
    N = B * T // S if S else 0
    pairs, others = relations_by_definition(batch, negatives)
    word = spans.word.flatten().tolist()
    anchors = sorted({anchor for anchor, _ in pairs})
    numbers = {pair: number for number, pair in enumerate(sorted(pairs))}
    assert ranks.num_pairs == len(pairs)
    assert all(table.shape[0] == S for table in ranks[:5])
    assert ranks.token.shape == ranks.word.shape
    assert ranks.token.shape[1] % RANK_ALIGNMENT == 0
    assert N <= ranks.token.shape[1] < N + RANK_ALIGNMENT
    for group in range(S):
        tokens = range(group * N, (group + 1) * N)
        ours = [token for token in tokens if token in anchors]
        compared = bool(ours) or negatives == "batch"  # without pairs a batch launches nothing
        valid = [token for token in tokens if compared and word[token] >= 0 and token not in anchors]
        padding = [token for token in tokens if not compared or word[token] < 0]
        order = [*ours, *valid, *padding]
        rest = ranks.token.shape[1] - N
        assert ranks.token[group].tolist() == [token - tokens.start for token in order] + [0] * rest
        words = [word[token] if compared else -1 for token in order]
        assert ranks.word[group].tolist() == words + [-1] * rest
        assert table.word.view(S, N)[group].tolist() == [word[token] if compared else -1 for token in tokens]
        assert ranks.size[group].tolist() == [len(ours), len(ours) + len(valid)]
        for rank, anchor in enumerate(ours):
            positives = sorted(j for i, j in pairs if i == anchor)
            first, end = ranks.first_pair[group, rank : rank + 2].tolist()
            assert list(range(first, end)) == [numbers[anchor, positive] for positive in positives]
            assert ranks.num_negatives[group, rank] == sum(i == anchor for i, _ in others)
        assert len(set(ranks.first_pair[group, len(ours) :].tolist())) == 1  # beyond the anchors: no pairs
