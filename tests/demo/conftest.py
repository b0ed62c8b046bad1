from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from carma_kernels.demo import cli
from carma_kernels.demo.definitions import read_definitions, shipped_file

TINY = "--layers 2 --width 16 --heads 2 --vocab-size 500 --batch-size 8 --steps 20 --learning-rate 0.01 --device cpu"


@pytest.fixture(autouse=True, scope="package")
def _one_thread() -> Iterator[None]:
    """Tensors this small are faster so, all the more where the tests run in parallel."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def demo() -> Callable[..., int]:
    """Runs the demo with these command line arguments; returns its exit status."""

    def run(*arguments: object) -> int:
        parser = argparse.ArgumentParser()
        cli.add_arguments(parser)
        return cli.run(parser.parse_args([str(argument) for argument in arguments]))

    return run


@pytest.fixture(scope="session")
def tiny_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first 120 of the shipped definitions, as a user's own file."""
    path = tmp_path_factory.mktemp("data") / "mine.jsonl"
    lines = [json.dumps(entry._asdict()) for entry in read_definitions(shipped_file())[:120]]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path
