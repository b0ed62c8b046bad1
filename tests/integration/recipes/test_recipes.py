"""The recipes in examples/ run as a user runs them, and train."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[3] / "examples"
TWO_PROCESSES = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
TIMEOUT = 300  # s; some ten suffice, most of them to import

RECIPES: dict[str, tuple[str, ...]] = {
    "plain_loop.py": (),
    "hf_trainer.py": (),
    "sft_lora.py": (),
    "accelerate_loop.py": (),
    "fsdp2.py": TWO_PROCESSES,
    "published_loop.py": (),
    "train_idm.py": (),
    "entities.py": (),
}
OPTIONS = {"train_idm.py": ("--steps", "11")}


def test_every_recipe_is_run() -> None:
    assert {file.name for file in EXAMPLES.glob("*.py")} == RECIPES.keys() | {"toy.py"}


@pytest.mark.parametrize("name", RECIPES)
def test_recipe(name: str, tmp_path: Path) -> None:
    # a thread each: they are small, and share the machine with other tests
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *RECIPES[name], str(EXAMPLES / name), *OPTIONS.get(name, ())]
    outcome = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=TIMEOUT, check=False
    )
    assert outcome.returncode == 0, outcome.stderr[-4000:]
    losses = {
        kind: [float(value) for value in re.findall(rf"\b(?:{kind})\W+([0-9.]+)", outcome.stdout)]
        for kind in ("task_loss|task", "mi_loss|MI", "stability_loss|stability")
    }
    task, mi, stability = losses.values()
    assert len(task) >= 2
    assert task[-1] < task[0]
    assert all(0 < value < float("inf") for value in (*task, *mi, *stability))
    assert len(stability) >= 2
    assert not mi or mi[-1] < mi[0]


def test_entities_are_those_of_the_characters(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    names = runpy.run_path(str(EXAMPLES / "entities.py"))
    assert "the first entity, tokens " in capsys.readouterr().out
    whole = 0
    for example, text in zip(names["data"], names["texts"](), strict=True):
        pieces = [names["tokenizer"].decode(example["input_ids"][s:e]).strip() for s, e in example["word_spans"]]
        entities = [text[start:end] for start, end in names["annotated"](text)]
        assert pieces == entities[: len(pieces)]
        whole += len(pieces)
    assert whole > 100


@pytest.mark.parametrize("name", RECIPES)
def test_its_swap_is_marked(name: str) -> None:
    lines = (EXAMPLES / name).read_text(encoding="utf-8").splitlines()
    assert 1 <= sum("# CARMA" in line or "# was:" in line for line in lines) <= 5


def test_toys_split_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the recipes show is about words of several tokens."""
    monkeypatch.syspath_prepend(EXAMPLES)
    import toy

    tokenizer = toy.build_tokenizer()
    words = [tokenizer(text).word_ids() for text in toy.texts()[:32]]
    assert sum(len(ids) - len(set(ids)) for ids in words) > 200
    parameters = [torch.cat([p.flatten() for p in toy.build_model().parameters()]) for _ in range(2)]
    assert torch.equal(*parameters)
