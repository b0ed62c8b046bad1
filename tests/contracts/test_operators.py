"""The registered operators keep what they promise to torch: their schema, fake results, and gradients when traced."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, library
from torch._subclasses.fake_tensor import FakeTensorMode, is_fake
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import carma_kernels as ck
from tests.cases import Backend, Case
from tests.contracts.ops import OPS, Op, make_problem, same_bits


class Recorder(TorchDispatchMode):
    """Keeps the calls of the package's operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[Any, tuple[Any, ...]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func.namespace == "carma_kernels":
            assert not kwargs
            self.calls[func] = args
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("stacked", [True, False], ids=["stacked", "list"])
@pytest.mark.parametrize("op", [op for op in OPS if op.name in ("mi of listed pairs", "similarity", "carma")], ids=str)
def test_opcheck(backend: Backend, op: Op, stacked: bool) -> None:
    problem = make_problem(op, backend, Case(D=64, stacked=stacked))
    with Recorder() as recorder:
        problem.gradients()
    (forward, its_inputs), (backward, upstream_and_inputs) = recorder.calls.items()
    leaves = tree_map_only(Tensor, lambda x: x.detach().clone().requires_grad_(x.requires_grad), its_inputs)
    assert any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_leaves(leaves))
    library.opcheck(forward, leaves)
    # without requires_grad: the gradient of a gradient raises
    library.opcheck(backward, tree_map_only(Tensor, lambda x: x.detach().clone(), upstream_and_inputs))


@pytest.mark.parametrize("stacked", [True, False], ids=["stacked", "list"])
def test_the_same_bits_for_who_does_not_look(backend: Backend, op: Op, stacked: bool) -> None:
    """In eager mode no operator is called, which would cost the host several times as much."""
    problem = make_problem(op, backend, Case(D=64, stacked=stacked))
    with Recorder() as recorder:
        watched = problem.forward()
        gradients = problem.gradients(watched)
    assert len(recorder.calls) == 2
    plain = problem.forward()
    assert all(map(same_bits, plain, watched))
    assert all(map(same_bits, problem.gradients(plain), gradients))
    nodes, functions = [output.grad_fn for output in plain], set()
    while nodes:
        node = nodes.pop()
        functions.add(node.name())
        nodes += [before for before, _ in node.next_functions if before is not None]
    assert "_EagerBackward" in functions


def test_fake_words_give_a_fake_loss(backend: Backend) -> None:
    """Of real hidden states, too: no number is made of what a fake tensor holds."""
    spans = ck.TokenSpans.from_word_ids([[0, 0, 1, 1, 2, -1]] * 2)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = spans.to("meta").to(backend.device)
    hidden = torch.randn(3, 2, 6, 16, device=backend.device)
    assert is_fake(ck.carma_loss(hidden, fake, backend=backend.name).loss)
