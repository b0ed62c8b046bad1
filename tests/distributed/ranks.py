"""Processes that stay from test to test, each a rank, and run the functions they are sent."""

from __future__ import annotations

import pickle
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import multiprocessing

SIZES = (1, 2, 4)
TIMEOUT = 120  # s; a function takes well under one, starting the processes some ten


class Rank(NamedTuple):
    """What a function that runs on the ranks of a group is given first."""

    rank: int
    group: dist.ProcessGroup


class Ranks:
    """As many processes as the largest of `SIZES`; smaller groups are the first of them."""

    def __init__(self) -> None:
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def run(self, size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What `function(Rank, *arguments)` returns on each rank of a group of that size.

        Raises:
            AssertionError: it raised on a rank, or a rank still waits after `TIMEOUT`.
        """
        if not self._processes:
            self._start()
        pipes = self._pipes[:size]
        for pipe in pipes:
            pipe.send_bytes(pickle.dumps((function, size, arguments)))
        try:
            return self._answers(pipes)
        except BaseException:  # the others may wait for one that will never come
            self.stop()
            raise

    @staticmethod
    def _answers(pipes: list[Connection]) -> list[Any]:
        deadline = monotonic() + TIMEOUT
        answers: dict[int, Any] = {}
        while len(answers) < len(pipes):
            for rank, pipe in enumerate(pipes):
                if rank not in answers and pipe.poll(0.001):
                    done, answer = pickle.loads(pipe.recv_bytes())
                    assert done, f"rank {rank}:\n{answer}"
                    answers[rank] = answer
            waiting = sorted(set(range(len(pipes))) - answers.keys())
            assert monotonic() < deadline or not waiting, f"ranks {waiting} still wait after {TIMEOUT} s"
        return [answers[rank] for rank in range(len(pipes))]

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._folder = TemporaryDirectory()
        for rank in range(max(SIZES)):
            pipe, its_end = context.Pipe()
            process = context.Process(target=_serve, args=(rank, Path(self._folder.name, "meet"), its_end), daemon=True)
            process.start()
            its_end.close()  # else no rank would see this process end
            self._processes.append(process)
            self._pipes.append(pipe)

    def stop(self) -> None:
        if not self._processes:
            return
        for process in self._processes:
            process.kill()
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes = [], []
        self._folder.cleanup()


def _serve(rank: int, meet: Path, pipe: Connection) -> None:
    warnings.simplefilter("error")
    for category in (DeprecationWarning, FutureWarning):  # as in pyproject.toml
        warnings.filterwarnings("ignore", category=category, module="torch.*")
    torch.set_num_threads(1)
    torch.set_deterministic_debug_mode("error")  # and new memory is full of NaN
    dist.init_process_group(
        "gloo",
        init_method=f"file://{meet}",
        rank=rank,
        world_size=max(SIZES),
        timeout=timedelta(seconds=TIMEOUT),
    )
    groups = {size: dist.new_group(list(range(size))) for size in SIZES}
    while True:
        try:
            sent = pipe.recv_bytes()
        except EOFError:
            return
        try:
            function, size, arguments = pickle.loads(sent)
            answer = True, function(Rank(rank, groups[size]), *arguments)
        except Exception:
            answer = False, traceback.format_exc()
        pipe.send_bytes(pickle.dumps(answer))
