"""Between a call and its gradient nothing waits for the device, and nothing is printed."""

from __future__ import annotations

import re

import pytest
import torch

import carma_kernels as ck
from carma_kernels import CarmaConfig, TokenSpans
from tests.architecture.sources import ROOT, calls, versioned_files

READS = {"item", "tolist", "cpu", "numpy", "synchronize", "nonzero", "argwhere", "unique", "masked_select", "print"}
HOT = re.compile(r"carma_kernels/((eager|ops|kernels)/.*|_autograd|_operators|_terms|_validate|functional)\.py")

SPANS = TokenSpans.from_lists([[(0, 3), (3, 5)], []], seq_len=6, attention_mask=[[1] * 6, [0] + [1] * 5])


def test_no_call_reads_device_memory():
    hot = [file for file in versioned_files() if HOT.fullmatch(str(file.relative_to(ROOT)))]
    assert len(hot) > 8
    found = [f"{file.relative_to(ROOT)}:{line} {name}()" for file in hot for name, line in calls(file) if name in READS]
    assert not found


@pytest.mark.parametrize("pairs", ["sequence", "batch", "listed", "listed by layer"])
def test_no_check_looks_at_a_number(pairs: str):
    """Tensors on meta have shapes and no numbers. (What the backends do with theirs, tests/contracts watches.)"""
    hidden = torch.empty(3, 2, 6, 4, device="meta", requires_grad=True)
    temperature = torch.tensor(0.1, device="meta", requires_grad=True)
    spans = SPANS.to("meta")
    mask, num_pairs = spans.attention_mask, torch.tensor(9, device="meta")
    if listed := pairs.startswith("listed"):
        spans_or_pairs = SPANS.sample_pairs(2, num_layers=3 if pairs.endswith("layer") else None).to("meta")
    else:
        spans_or_pairs = spans
    negatives, match_negatives = ("sequence", None) if listed else (pairs, 5)
    config = CarmaConfig(temperature=temperature, negatives=negatives, match_negatives=match_negatives)

    for output in (
        ck.carma_loss(hidden, spans_or_pairs, config, mask=mask, num_pairs=num_pairs).loss,
        ck.mi_loss(list(hidden), spans_or_pairs, negatives=negatives, temperature=temperature, reduction="none"),
        ck.stability_loss(hidden, mask=mask),
        ck.pairwise_similarity(list(hidden), temperature=temperature, mask=mask),
    ):
        [gradient] = torch.autograd.grad(output.sum(), hidden)
        assert gradient.shape == hidden.shape


def test_meta_does_catch_a_look():
    for look in (bool, float, torch.Tensor.tolist, torch.Tensor.nonzero):
        with pytest.raises((RuntimeError, NotImplementedError)):
            look(torch.ones((), device="meta"))
