"""Two ranks: the gradient that DDP averages is that of the window over both."""

from __future__ import annotations

import gc
import os
import socket
from pathlib import Path
from time import monotonic

import pytest
import torch
import transformers
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from tests.integration.trainer.test_scaling import windows
from tests.integration.trainer.toys import CARMA_ALONE, Gradients, assert_same, trainer, window_gradients

TIMEOUT = 180  # s; some twenty suffice, most of them to start
RANKS, COUNT = 2, 12
SETTINGS = [(steps, average) for steps in (1, 2) for average in (True, False)]


def work(rank: int, folder: str, port: int) -> None:
    """What each rank does: a training run for each setting."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(RANKS),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    for steps, average in SETTINGS:
        torch.save(_train(Path(folder), steps, average), Path(folder, f"{steps}-{average}-{rank}.pt"))
    gc.collect()  # a DDP model that outlives the group ends it while it holds the GIL, for which gloo's thread may wait
    torch.distributed.destroy_process_group()


def _train(folder: Path, steps: int, average: bool) -> tuple[list[dict[str, Tensor]], list[dict[str, float]]]:
    """The gradient of each optimizer step, and what was logged."""
    seen = Gradients()
    one = trainer(
        folder,
        COUNT,
        callbacks=[seen],
        gradient_accumulation_steps=steps,
        average_tokens_across_devices=average,
        ddp_backend="gloo",
    )
    assert one.args.world_size == RANKS
    one.train()
    return seen.steps, one.state.log_history


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = spawn(work, (str(folder), port), nprocs=RANKS, join=False)
    deadline = monotonic() + TIMEOUT
    try:
        while not context.join(timeout=max(0.0, deadline - monotonic())):  # true when both are done
            assert monotonic() < deadline, f"a rank still waits after {TIMEOUT} s"
    finally:
        for process in context.processes:
            process.kill()
    return folder


@pytest.mark.parametrize(("steps", "average"), SETTINGS)
def test_gradient_is_that_of_the_window_over_all_ranks(steps: int, average: bool, results: Path) -> None:
    expected = [
        window_gradients([batch for window in of_ranks for batch in window], CARMA_ALONE)
        for of_ranks in _by_window(steps)
    ]
    for rank in range(RANKS):
        seen, _ = torch.load(results / f"{steps}-{average}-{rank}.pt")
        assert len(seen) == len(expected)
        for actual, gradient in zip(seen, expected, strict=True):
            # DDP puts the module's name under another
            assert_same({name.removeprefix("module."): value for name, value in actual.items()}, gradient)


def _by_window(steps: int) -> list[list[list[list[dict[str, object]]]]]:
    """Of each optimizer step its batches; each rank takes every second one."""
    every = windows(COUNT, RANKS * steps)
    return [[batches] for batches in every]


def test_logs_are_those_of_all_ranks(results: Path) -> None:
    logs = [torch.load(results / f"2-True-{rank}.pt")[1] for rank in range(RANKS)]
    for one, other in zip(*logs, strict=True):
        for name in one:
            if "mi_loss" in name or "stability_loss" in name or name == "task_loss":
                assert one[name] == other[name]
