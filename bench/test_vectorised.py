"""A peer whose kernels need a GPU, with its arithmetic done by PyTorch."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from bench import vectorised
from bench.check import assert_close, run
from bench.workloads import Workload

pytestmark = pytest.mark.smoke


def _cal_flash_loss(query, key, labels, *, head_dim):
    assert query.shape[1] % head_dim == 0
    return torch.nn.functional.cross_entropy(query @ key.T, labels, reduction="none")


@pytest.mark.parametrize("words", ["dense", "wordnet"])
def test_inf_cl_leaves_out_the_own_word(monkeypatch, words):
    monkeypatch.setitem(sys.modules, "inf_cl", SimpleNamespace(cal_flash_loss=_cal_flash_loss))
    case = Workload("one", L=2, B=1, T=58, D=96, words=words).build()
    index = vectorised.index_anchors(case)
    exact = run(lambda h: vectorised.exact_carma_loss(h, index), case.hidden_states, backward=True)
    result = run(vectorised.inf_cl_carma_loss(case), case.hidden_states, backward=True)
    assert_close(result, exact, 2e-3)  # it takes a word of near 1 from a sum of the same size
