"""Two ranks: the gradient that DDP averages is that of the window over both."""

from __future__ import annotations

import gc
import os
import socket
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from tests.integration.trainer.test_scaling import windows
from tests.integration.trainer.test_temperature import config, learning
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
        trained = _train(
            Path(folder), gradient_accumulation_steps=steps, average_tokens_across_devices=average, carma=CARMA_ALONE
        )
        torch.save(trained, Path(folder, f"{steps}-{average}-{rank}.pt"))
    own = learning()
    options = {"model": own, "carma": config(own), "gradient_accumulation_steps": 2}
    with pytest.raises(ValueError, match="Set ddp_find_unused_parameters=False"):
        _train(Path(folder), **options)
    torch.save(_train(Path(folder), ddp_find_unused_parameters=False, **options), Path(folder, f"learned-{rank}.pt"))
    gc.collect()  # a DDP model that outlives the group ends it while it holds the GIL, for which gloo's thread may wait
    torch.distributed.destroy_process_group()


def _train(folder: Path, **options: Any) -> tuple[list[dict[str, Tensor]], list[dict[str, float]]]:
    """The gradient of each optimizer step, and what was logged."""
    seen = Gradients()
    one = trainer(folder, COUNT, callbacks=[seen], ddp_backend="gloo", **options)
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
    # each rank takes every second batch
    _assert_same(
        results, f"{steps}-{average}", [window_gradients(batches) for batches in windows(COUNT, RANKS * steps)]
    )


def test_gradient_of_a_learned_temperature(results: Path) -> None:
    """Which lies outside of what DDP calls: its hook on the parameter averages it like the others."""
    expected = []
    for batches in windows(COUNT, RANKS * 2):
        own = learning()
        expected.append(window_gradients(batches, config(own), lambda own=own: own))
    assert all(gradient["carma_temperature"] for gradient in expected)
    _assert_same(results, "learned", expected)


def _assert_same(results: Path, name: str, expected: list[dict[str, Tensor]]) -> None:
    for rank in range(RANKS):
        seen, _ = torch.load(results / f"{name}-{rank}.pt")
        for actual, gradient in zip(seen, expected, strict=True):
            # DDP puts the module's name under another
            assert_same({name.removeprefix("module."): value for name, value in actual.items()}, gradient)


def test_logs_are_those_of_all_ranks(results: Path) -> None:
    logs = [torch.load(results / f"2-True-{rank}.pt")[1] for rank in range(RANKS)]
    for one, other in zip(*logs, strict=True):
        for name in one:
            if "mi_loss" in name or "stability_loss" in name or name == "task_loss":
                assert one[name] == other[name]
