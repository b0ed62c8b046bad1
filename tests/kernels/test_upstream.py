"""The gradients that arrive for the layers reach the kernels as they lie: one for all or any stride, and a factor."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from carma_kernels import TokenSpans
from carma_kernels._terms import MITerm, Similarity, StabilityTerm

pytest.importorskip("triton")

L, D = 3, 24
GRAD = 0.75
FORMS: dict[str, Callable[[Tensor], tuple[Tensor, float]]] = {  # of one number for each layer, all the same
    "0-d": lambda grad: (grad[0].clone(), 1.0),
    "0-d, times a factor": lambda grad: (grad[0] / 4, 4.0),
    "expanded": lambda grad: (grad[0].expand_as(grad), 1.0),
    "every third": lambda grad: (torch.stack([-2 * grad, torch.full_like(grad, torch.nan), grad], 1)[:, 0], -0.5),
}


def gradients(device: str, T: int, mi: str) -> list[Tensor]:
    """Of three layers, both losses, or of the stability loss alone."""
    from carma_kernels import ops

    spans = TokenSpans.from_lists([[(at, at + 3) for at in range(0, T - 3, 4)]] * 2, seq_len=T).to(device)
    generator = torch.Generator().manual_seed(0)
    layers = [torch.randn(2, T, D, generator=generator).to(device).requires_grad_() for _ in range(L)]
    pairs = spans.sample_pairs(2, generator=torch.Generator().manual_seed(0)) if mi == "listed" else spans
    table = pairs if mi == "listed" else spans.contrast_table("sequence")
    term = MITerm(range(L), table, Similarity(True, 0.1), None) if mi else None
    sums, losses, *_ = ops.carma_terms(layers, term, StabilityTerm(range(L), None, 1e-8))
    outputs = [(out, torch.full_like(out, GRAD)) for out in (sums, losses) if len(out)]
    torch.autograd.backward(*zip(*outputs, strict=True))
    return [layer.grad for layer in layers]  # type: ignore[misc]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("T", "mi"), [(12, "all"), (130, "all"), (12, "listed"), (12, "")], ids=["short", "long", "listed", "stability"]
)
def test_any_form_gives_the_same_bits(device: str, T: int, mi: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from carma_kernels.ops.layers import Upstream

    written_out = gradients(device, T, mi)
    arguments = Upstream.arguments.fget  # type: ignore[attr-defined]

    def in_another_form(given: Upstream) -> tuple[Tensor, int, float]:
        grad, factor = FORMS[form](given.grad)
        return arguments(Upstream(grad, factor * given.factor))

    monkeypatch.setattr(Upstream, "arguments", property(in_another_form))
    for one, other in zip(written_out, gradients(device, T, mi), strict=True):
        assert torch.equal(one, other)
