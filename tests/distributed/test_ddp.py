"""Data parallelism when a rank has no words: no rank waits for another, and the gradients are the mean."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from time import monotonic

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

import carma_kernels as ck
from tests.cases import BACKENDS, Backend

TIMEOUT = 120  # s; a few suffice, most of them to start two processes
WIDTH, TOKENS = 8, 6
WORDS = [[[(0, 2), (3, 6)], [(1, 4)]], [[], []]]  # of each rank


class Blocks(nn.Module):
    """Three layers whose outputs are the hidden states."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(3)])

    def forward(self, x: Tensor) -> list[Tensor]:
        states = []
        for layer in self.layers:
            x = x + layer(x).tanh()
            states.append(x)
        return states


def loss_of(kind: str, states: list[Tensor], words: list[list[tuple[int, int]]], backend: str) -> Tensor:
    spans = ck.TokenSpans.from_lists(words, seq_len=TOKENS)
    if kind == "mi":  # nothing else to hold the ranks together
        return ck.mi_loss(states, spans, backend=backend)
    if kind == "mi of sampled pairs":
        return ck.mi_loss(states, spans.sample_pairs(generator=torch.Generator().manual_seed(0)), backend=backend)
    if kind == "mi over all ranks":  # DDP takes the mean over 2 ranks: half of the pairs of both, for each
        return ck.mi_loss(states, spans, num_pairs=count_pairs() / 2, backend=backend)
    return ck.carma_loss(states, spans, backend=backend).loss


def count_pairs() -> int:
    return sum(ck.TokenSpans.from_lists(words, seq_len=TOKENS).num_pairs for words in WORDS)


def inputs(rank: int) -> Tensor:
    return torch.randn(2, TOKENS, WIDTH, generator=torch.Generator().manual_seed(rank))


def gradients(model: nn.Module) -> list[Tensor]:
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


KINDS = ["mi", "mi of sampled pairs", "mi over all ranks", "carma"]


def work(rank: int, folder: str, backend: str) -> None:
    """What each rank does: a backward for each kind of loss."""
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=timedelta(seconds=TIMEOUT)
    )
    for kind in KINDS:
        model = Blocks()
        parallel = DistributedDataParallel(model)
        loss_of(kind, parallel(inputs(rank)), WORDS[rank], backend).backward()
        torch.save(gradients(model), Path(folder, f"{kind}-{rank}.pt"))
    dist.destroy_process_group()


@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if backend.device == "cpu"], ids=str)
def test_a_rank_without_words(backend: Backend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    context = spawn(work, (str(tmp_path), backend.name), nprocs=2, join=False)
    deadline = monotonic() + TIMEOUT
    try:
        while not context.join(timeout=max(0.0, deadline - monotonic())):  # true when both are done
            assert monotonic() < deadline, f"a rank still waits after {TIMEOUT} s"
    finally:
        for process in context.processes:
            process.kill()

    for kind in KINDS:
        model = Blocks()
        losses = [loss_of(kind, model(inputs(rank)), WORDS[rank], backend.name) for rank in range(2)]
        (sum(losses) / 2).backward()
        for rank in range(2):
            actual = torch.load(tmp_path / f"{kind}-{rank}.pt")
            assert len(actual) == len(gradients(model)) == 6
            for ours, expected in zip(actual, gradients(model), strict=True):
                torch.testing.assert_close(ours, expected, msg=lambda text, kind=kind: f"{kind}: {text}")
        assert any((gradient != 0).any() for gradient in gradients(model))
