"""The published training loop with swapped imports: after 20 steps on WordNet, the same history of losses.

The loop restated here always runs. With the environment variable `CARMA_PUBLISHED_CODE` set to a checkout of
github.com/nura-j/CARMA (commit 0106af6), so does its own `fine_tune_transformer`: `make published`.
"""

from __future__ import annotations

import importlib
import os
import random
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import get_scheduler

from carma_kernels.integrations import upstream
from tests.integration.upstream import published
from tests.integration.upstream.training_data import LAYERS, STEPS, Batches, small_model

CHECKOUT = os.environ.get("CARMA_PUBLISHED_CODE")
COLUMNS = ("train_loss", "train_task_loss", "train_stability_loss", "train_mi_loss")
MI_LAYERS, STABILITY_LAYERS = (0, LAYERS - 2), (1, LAYERS - 1)  # first and last
STABILITY_WEIGHT, MI_WEIGHT, CARMA_WEIGHT = 0.2, 0.5, 0.3
LEARNING_RATE, WARMUP = 1e-3, 2

Losses = Any
"""What offers `MILoss` and `StabilityLoss`."""


class LoopsMI:
    """The oracle in the shape of the published class."""

    def __init__(self, start_layer: int, end_layer: int, model_type: str) -> None:  # noqa: ARG002
        self.layers = slice(start_layer, end_layer + 1)

    def calculate_mi_loss(self, cache: dict[str, Any], token_spans: list[list[published.Span]]) -> Tensor:
        words = [[(span.start_idx, span.end_idx) for span in sample] for sample in token_spans]
        return published.mi_loss(states(cache)[self.layers], words)


class LoopsStability:
    """Likewise."""

    def __init__(self, start_layer: int, end_layer: int, model_type: str) -> None:  # noqa: ARG002
        self.layers = slice(start_layer, end_layer + 1)

    def calculate_loss(self, cache: dict[str, Any]) -> Tensor | float:
        return published.stability_loss(states(cache)[self.layers])


LOOPS = SimpleNamespace(MILoss=LoopsMI, StabilityLoss=LoopsStability)


def states(cache: dict[str, Any]) -> list[Tensor]:
    return [output[0] if isinstance(output, tuple) else output for output in cache.values()]


def restated_loop(name: str, losses: Losses) -> Tensor:
    """One step a batch, as published."""
    model, batches = small_model(name).train(), Batches()
    cache: dict[str, Any] = {}
    prefix = "transformer.h." if name == "gpt2" else "model.layers."
    for number in range(LAYERS):
        key = f"{prefix}{number}"
        model.get_submodule(key).register_forward_hook(lambda _m, _i, output, key=key: cache.update({key: output}))
    model_type = "GPT" if name == "gpt2" else "Llama"
    mi, stability = (
        losses.MILoss(*MI_LAYERS, model_type=model_type),
        losses.StabilityLoss(*STABILITY_LAYERS, model_type),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    schedule = get_scheduler("linear", optimizer, num_warmup_steps=WARMUP, num_training_steps=STEPS)
    history = []
    for _ in range(STEPS):
        [batch] = batches
        mask = batch["attention_mask"]
        logits = model(batch["input_ids"], attention_mask=mask).logits
        task = F.cross_entropy(logits[range(len(mask)), mask.sum(1) - 1], batch["labels"])
        of_stability = stability.calculate_loss(cache)
        of_mi = mi.calculate_mi_loss(cache, [sample["token_spans"] for sample in batch["annotations"]])
        total = (1 - CARMA_WEIGHT) * task + CARMA_WEIGHT * (STABILITY_WEIGHT * of_stability + MI_WEIGHT * of_mi)
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        cache.clear()
        history.append([value.item() for value in (total, task, of_stability, of_mi)])
    return torch.tensor(history, dtype=torch.float64)


def published_loop(name: str, training: ModuleType, folder: Path) -> Tensor:
    """The checkout's own, on the same batches."""
    history, *_ = training.fine_tune_transformer(
        small_model(name),
        tokenizer=None,
        train_dataloader=Batches(),
        val_dataloader=None,
        model_name=name,
        learning_rate=LEARNING_RATE,
        num_epochs=STEPS,
        warmup_steps=WARMUP,
        stability_weight=STABILITY_WEIGHT,
        mi_weight=MI_WEIGHT,
        carma_weight=CARMA_WEIGHT,
        stability_start_layer=STABILITY_LAYERS[0],
        stability_end_layer=STABILITY_LAYERS[1],
        mi_start_layer=MI_LAYERS[0],
        mi_end_layer=MI_LAYERS[1],
        save_path=str(folder / f"{name}.pt"),
    )
    return torch.tensor([history[column] for column in COLUMNS], dtype=torch.float64).T


def seeded(run: Callable[[], Tensor], seed: int = 0) -> tuple[Tensor, Any]:
    """The history, and the state of `random` afterwards."""
    random.seed(seed)
    return run(), random.getstate()


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_restated_loop(name: str):
    expected, end_state = seeded(lambda: restated_loop(name, LOOPS))
    history, state = seeded(lambda: restated_loop(name, upstream))
    assert state == end_state
    assert (history - expected).abs().max() <= 1e-5
    assert expected[-1, 0] < expected[0, 0] - 0.1, "nothing was learnt"
    others, _ = seeded(lambda: restated_loop(name, upstream), seed=1)
    assert (others - expected).abs().max() > 1e-3, "other draws make no difference"


IMPORT = "from src.optm_losses import StabilityLoss, MILoss\n"
SWAPPED = "from carma_kernels.integrations.upstream import StabilityLoss, MILoss\n"


@pytest.fixture
def training_modules(monkeypatch: pytest.MonkeyPatch) -> tuple[ModuleType, ModuleType]:
    """The checkout's `src.training`, as it is and with the swapped line.

    Stood in for are libraries that it imports for its data and its evaluation, which this run does not call, and
    TransformerLens, whose present release lacks the class that it asks its model for.
    """
    assert CHECKOUT
    stand_ins = {
        "sentence_transformers": {"SentenceTransformer": None},
        "spacy": {},
        "nltk": {},
        "nltk.corpus": {"wordnet": None, "stopwords": SimpleNamespace(words=lambda _: [])},
        "transformer_lens": {"HookedTransformer": type("HookedTransformer", (), {})},
    }
    for name, names in stand_ins.items():
        stand_in = ModuleType(name)
        stand_in.__spec__ = ModuleSpec(name, None)
        stand_in.__dict__.update(names)
        monkeypatch.setitem(sys.modules, name, stand_in)
    monkeypatch.syspath_prepend(CHECKOUT)
    for module in [module for module in sys.modules if module.split(".")[0] == "src"]:
        monkeypatch.delitem(sys.modules, module)
    original = importlib.import_module("src.training")
    source = Path(CHECKOUT, "src", "training.py").read_text()
    assert source.count(IMPORT) == 1
    swapped = ModuleType("swapped_training")
    exec(compile(source.replace(IMPORT, SWAPPED), "training.py with swapped imports", "exec"), swapped.__dict__)
    return original, swapped


if CHECKOUT:

    @pytest.mark.filterwarnings("ignore")  # theirs
    @pytest.mark.parametrize("name", ["gpt2", "llama"])
    def test_published_loop(name: str, training_modules: tuple[ModuleType, ModuleType], tmp_path: Path):
        original, swapped = training_modules
        assert swapped.MILoss is upstream.MILoss is not original.MILoss
        expected, end_state = seeded(lambda: published_loop(name, original, tmp_path))
        history, state = seeded(lambda: published_loop(name, swapped, tmp_path))
        assert expected.shape == (STEPS, len(COLUMNS))
        assert state == end_state
        assert (history - expected).abs().max() <= 1e-5
        restated, _ = seeded(lambda: restated_loop(name, upstream))
        assert (restated - expected).abs().max() <= 1e-5, "the loop above is not the published one"
