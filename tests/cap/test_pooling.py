"""Words as rows: the pooling itself, against Python loops."""

from __future__ import annotations

import pytest
import torch

from carma_kernels import TokenSpans
from carma_kernels.cap.pooling import PROTOCOLS, WordRows, pool, spread
from tests.cap.batches import DRAWINGS, batch
from tests.cap.reference import REDUCE, all_words

FP64, FP32, FP16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("drawing", DRAWINGS)
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_against_loops(protocol, drawing, side):
    words, valid, spans = (batch(drawing, side)[i] for i in (2, 1, 3))
    hidden = torch.randn(*valid.shape, 5, dtype=FP64, generator=torch.Generator().manual_seed(0))
    rows = WordRows.of(spans)
    pooled = pool(hidden, rows, protocol)
    tokens = spread(pooled, rows)
    assert pooled.shape[1] == max(len(all_words(*row)) for row in zip(words, valid, strict=True))
    for b in range(len(words)):
        for w, (start, end) in enumerate(all_words(words[b], valid[b])):
            expected = REDUCE[protocol]([hidden[b, t] for t in range(start, end)])
            torch.testing.assert_close(pooled[b, w], expected, rtol=1e-12, atol=1e-12)
            if end - start == 1:
                assert torch.equal(pooled[b, w], hidden[b, start])
            assert all(torch.equal(tokens[b, t], pooled[b, w]) for t in range(start, end))
    assert (tokens[~valid] == 0).all()


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_padding_is_not_read(protocol):
    valid, spans = (batch()[i] for i in (1, 3))
    hidden = torch.randn(*valid.shape, 4).masked_fill(~valid[:, :, None], torch.nan)
    rows = WordRows.of(spans)
    pooled = pool(hidden, rows, protocol)
    assert pooled.isfinite().all()
    assert spread(pooled * torch.nan, rows)[~valid].eq(0).all()


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_halves_are_rounded_once(protocol, dtype):
    spans = TokenSpans.from_lists([[(0, 300), (300, 302)]], seq_len=302)
    hidden = torch.randn(1, 302, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    rows = WordRows.of(spans)
    pooled = pool(hidden, rows, protocol)
    assert pooled.dtype == dtype
    exact = pool(hidden.double(), rows, protocol)
    torch.testing.assert_close(pooled.double(), exact, rtol=torch.finfo(dtype).eps, atol=2e-5)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_gradient(protocol):
    spans = TokenSpans.from_lists([[(0, 2), (3, 6)], [(1, 3)]], seq_len=6, attention_mask=[[1] * 6, [1] * 4 + [0] * 2])
    rows = WordRows.of(spans)
    hidden = torch.randn(2, 6, 2, dtype=FP64, requires_grad=True, generator=torch.Generator().manual_seed(0))
    assert torch.autograd.gradcheck(lambda x: spread(pool(x, rows, protocol), rows), hidden)


def test_nothing_to_pool():
    assert WordRows.of(TokenSpans.from_lists([[(0, 1), (1, 2)], []], seq_len=3)) is None


@pytest.mark.parametrize(
    ("positions", "source"), [("sequential", [[2, 3, 4], [0, 1, 2]]), ("first", [[2, 4, 5], [0, 3, 4]])]
)
def test_positions(positions, source):
    words, valid = [[(2, 4)], [(0, 3)]], [[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]]
    spans = TokenSpans.from_lists(words, seq_len=6, attention_mask=valid)
    rows = WordRows.of(spans, positions)
    assert rows.source.tolist() == source
    assert rows.valid_row.all()
