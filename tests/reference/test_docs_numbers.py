"""The worked examples of docs/: every printed number, and the code blocks, with the reference and with the package."""

from __future__ import annotations

import math
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor

import carma_kernels
import csrc_ref
from carma_kernels.spans import PairIndex, TokenSpans
from csrc_ref.mi import softplus

from .docs_page import printed, run_code, table_numbers

REFERENCE = SimpleNamespace(
    **{name: getattr(csrc_ref, name) for name in csrc_ref.__all__}, TokenSpans=TokenSpans, PairIndex=PairIndex
)


def fp64(values: list[object]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("package", [REFERENCE, carma_kernels], ids=["reference", "package"])
@pytest.mark.parametrize("page", ["mi_loss.md", "stability_loss.md", "similarity.md"])
def test_code_gives_the_numbers_in_its_comments(page: str, package: ModuleType | SimpleNamespace) -> None:
    results = run_code(page, package)
    assert len(results) >= 2
    for name, (claimed, computed) in results.items():
        assert computed == pytest.approx(claimed, abs=1e-6), name  # the sixth decimal is printed, fp32 adds 1e-7


def test_mi_example() -> None:
    h = fp64([[[[2, 0], [4, 3], [3, 4], [0, 5]]]])
    tau = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    spans = TokenSpans.from_lists([[(0, 2), (2, 4)]], seq_len=4)
    loss = csrc_ref.mi_loss(h, spans, temperature=tau)
    loss.backward()
    assert h.grad is not None
    assert tau.grad is not None
    assert h.grad[0, 0, 0, 0].abs() < 1e-15

    # the steps in between, from the similarities alone
    s = csrc_ref.pairwise_similarity(h, temperature=0.1, out_dtype=torch.float64).detach()[0, 0].requires_grad_()
    z_0, z_2 = s[0, 2:].logsumexp(0), s[2, :2].logsumexp(0)
    cost_01, cost_23 = softplus(z_0 - s[0, 1]), softplus(z_2 - s[2, 3])
    (g,) = torch.autograd.grad((cost_01 + cost_23) / 2, s)
    expected = {
        **{f"s_{i}{j}": s[i, j] for i, j in ((0, 1), (0, 2), (0, 3), (1, 2), (2, 3))},
        "z_0": z_0,
        "z_2": z_2,
        "cost_01": cost_01,
        "cost_23": cost_23,
        "L_MI": loss,
        "p_01": -2 * g[0, 1],
        "p_23": -2 * g[2, 3],
        **{f"g_{i}{j}": g[i, j] for i, j in ((0, 1), (0, 2), (0, 3), (2, 0), (2, 1), (2, 3))},
        "dL/dh_0[1]": h.grad[0, 0, 0, 1],
        "dL/dtau": tau.grad,
    }
    assert table_numbers("mi_loss.md") == printed(expected)


def test_mi_example_on_a_pocket_calculator() -> None:
    """The same numbers without a line of the project's code."""
    page = {name: float(value) for name, value in table_numbers("mi_loss.md").items()}
    z_0, z_2 = math.log(math.exp(6) + 1), math.log(math.exp(6) + math.exp(9.6))
    costs = math.log(1 + math.exp(z_0 - 8)), math.log(1 + math.exp(z_2 - 8))
    assert page["z_0"] == pytest.approx(z_0, abs=5e-7)
    assert page["z_2"] == pytest.approx(z_2, abs=5e-7)
    assert (page["cost_01"], page["cost_23"]) == pytest.approx(costs, abs=5e-7)
    assert page["L_MI"] == pytest.approx(sum(costs) / 2, abs=5e-7)
    assert page["L_MI"] == 0.966802


def test_stability_example() -> None:
    h = fp64([[[[1, 1], [2, 0]]], [[[1, 3], [2, 0]]], [[[3, 1], [0, 2]]]])
    terms = csrc_ref.stability_loss(h, reduction="none")
    masked = csrc_ref.stability_loss(h, mask=torch.tensor([[1, 0]]), reduction="none")
    by_term = [torch.autograd.grad(term, h, retain_graph=True)[0][1, 0, 0, 0] for term in terms]
    expected = {
        "change_0": (h[1] - h[0]).square().mean(),
        "change_1": (h[2] - h[1]).square().mean(),
        **{f"size_{layer}": h[layer].square().mean() for layer in range(3)},
        "term_0": terms[0],
        "term_1": terms[1],
        "L_Stability": csrc_ref.stability_loss(h),
        "masked_0": masked[0],
        "masked_1": masked[1],
        "d term_0": by_term[0],
        "d term_1": by_term[1],
        "dL/dh_1[0]": by_term[0] + by_term[1],
    }
    assert table_numbers("stability_loss.md") == printed(expected)
    assert terms[0].item() == pytest.approx(1 / 5, abs=1e-8)  # eps is 1e-8
    assert terms[1].item() == pytest.approx(4 / 7, abs=1e-8)


def test_similarity_example() -> None:
    h = fp64([[[[3, 4], [4, 3], [0, 0], [math.nan, math.inf]]]])
    tau = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[1, 1, 1, 0]])
    cosine, dot = (
        csrc_ref.pairwise_similarity(h, metric=metric, temperature=tau, mask=mask, out_dtype=torch.float64)[0, 0]
        for metric in ("cosine", "dot")
    )
    grad_h, grad_tau = torch.autograd.grad(cosine[0, 1], (h, tau))
    expected = {
        **{f"cos_{i}{j}": cosine[i, j] for i, j in ((0, 0), (0, 1), (0, 2), (2, 2), (0, 3))},
        **{f"dot_{i}{j}": dot[i, j] for i, j in ((0, 0), (0, 1), (0, 2))},
        "dcos_01/dh_0[0]": grad_h[0, 0, 0, 0],
        "dcos_01/dh_0[1]": grad_h[0, 0, 0, 1],
        "dcos_01/dtau": grad_tau,
    }
    assert table_numbers("similarity.md") == printed(expected)
    assert cosine.detach().tolist() == [
        pytest.approx(row, abs=1e-15) for row in ([2, 1.92, 0, 0], [1.92, 2, 0, 0], [0] * 4, [0] * 4)
    ]
    assert dot.detach().tolist() == [[50, 48, 0, 0], [48, 50, 0, 0], [0] * 4, [0] * 4]
