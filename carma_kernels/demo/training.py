"""Two runs in step with each other, one on the task loss alone and one with CARMA, and what each of them costs."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast, get_scheduler

from carma_kernels import CarmaConfig, CarmaOutput, carma_loss, total_loss
from carma_kernels.demo.model import word_logits
from carma_kernels.demo.text import Batch
from carma_kernels.integrations.transformers import HiddenStateTap
from carma_kernels.measure import peak_memory, synchronize

_EVALUATIONS = 10
_WARM_UP_SHARE = 10  # one step in so many


class Accuracy(NamedTuple):
    """Share of the words whose first token was the model's first choice, and was among its first ten."""

    top1: float
    top10: float


class Evaluation(NamedTuple):
    """A model on the held-out definitions."""

    task_loss: float
    accuracy: Accuracy
    mi_per_layer: list[float]
    """weighted by each batch's pairs"""
    stability_per_layer: list[float]
    """of each layer with the next; weighted by each batch's tokens"""

    @property
    def mi(self) -> float:
        """L_MI, the mean over the layers."""
        return statistics.fmean(self.mi_per_layer)

    @property
    def stability(self) -> float:
        """L_Stability, the sum over the pairs of layers."""
        return sum(self.stability_per_layer)


@dataclass
class Record:
    """What a run left behind."""

    evaluations: dict[int, Evaluation] = field(default_factory=dict)
    """by the number of steps done"""
    task_losses: list[float] = field(default_factory=list)
    """of each step's training batch"""
    step_seconds: list[float] = field(default_factory=list)
    peak_memory: int | None = None
    """bytes that a training step allocates, above weights and optimizer state; None where it cannot be measured"""

    @property
    def first(self) -> Evaluation:
        """Before the first step."""
        return self.evaluations[0]

    @property
    def last(self) -> Evaluation:
        """After the last step."""
        return self.evaluations[len(self.task_losses)]

    @property
    def median_step_seconds(self) -> float:
        """Of a training step: forward, backward, optimizer."""
        return statistics.median(self.step_seconds)


@dataclass
class Comparison:
    """The same model, seed and batches without and with CARMA."""

    task_only: Record
    with_carma: Record
    carma_seconds: list[float]
    """of the CARMA losses alone, forward and backward, on hidden states cut off from the model"""
    baseline: Accuracy
    """of always answering with the most frequent tokens"""

    @property
    def median_carma_seconds(self) -> float:
        """Of `carma_seconds`."""
        return statistics.median(self.carma_seconds)

    @property
    def step_difference(self) -> float:
        """Seconds that CARMA adds to a step: the median over the batches, each of which both runs saw in turn."""
        pairs = zip(self.with_carma.step_seconds, self.task_only.step_seconds, strict=True)
        return statistics.median(with_carma - without for with_carma, without in pairs)


@dataclass(frozen=True)
class Recipe:
    """How to train."""

    steps: int
    learning_rate: float
    carma: CarmaConfig
    backend: str | None
    device: torch.device


class Run:
    """A model, its optimizer, and the loss it is trained on."""

    def __init__(self, name: str, model: GPT2LMHeadModel, recipe: Recipe, *, with_carma: bool) -> None:
        """Take `model` to the device and set its optimizer up; `with_carma=False` trains on the task loss alone."""
        self.name = name
        self.record = Record()
        self._model = model
        self._model.to(recipe.device)  # type: ignore[arg-type]  # in place; transformers types it for its own wrapper only
        self._tap = HiddenStateTap(model, no_grad=True)  # evaluations too
        self._recipe = recipe
        self._with_carma = with_carma
        self._optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate)
        self._scheduler = get_scheduler(
            "linear",
            self._optimizer,
            num_warmup_steps=recipe.steps // _WARM_UP_SHARE,
            num_training_steps=recipe.steps + 1,  # the memory measurement takes one more
        )

    @property
    def num_parameters(self) -> int:
        """Weights of the model."""
        return sum(parameter.numel() for parameter in self._model.parameters())

    def train_on(self, batch: Batch) -> None:
        """One timed step, recorded."""
        losses: list[Tensor] = []
        seconds = _seconds(lambda: losses.append(self._step(batch)), self._recipe.device)
        self.record.step_seconds.append(seconds)
        self.record.task_losses.append(losses[0].item())

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch]) -> None:
        """Measure everything on held-out definitions, the CARMA losses too where they are not trained on.

        Raises:
            FloatingPointError: the task loss is no longer finite.
        """
        task_loss = mi = stability = torch.zeros((), device=self._recipe.device)
        hits: list[Tensor] = []
        for batch in batches:
            logits = word_logits(self._model, batch)  # [B, V]
            carma = self._carma(batch, self._tap.hidden_states)
            task_loss = task_loss + F.cross_entropy(logits, batch.labels, reduction="sum")
            hits.append(logits.topk(10).indices == batch.labels[:, None])  # [B, 10]
            mi = mi + carma.mi_per_layer * batch.spans.num_pairs
            stability = stability + carma.stability_per_layer * batch.attention_mask.sum()
        hit = torch.cat(hits).float()  # [definitions, 10]
        pairs = sum(batch.spans.num_pairs for batch in batches)
        tokens = sum(batch.attention_mask.sum() for batch in batches)
        self._tap.clear()
        step = len(self.record.task_losses)
        if not task_loss.isfinite():
            raise FloatingPointError(
                f"the run '{self.name}' diverged: its task loss is {task_loss.item()} after {step} steps. "
                "Lower --learning-rate, or raise --temperature."
            )
        self.record.evaluations[step] = Evaluation(
            task_loss=task_loss.item() / len(hit),
            accuracy=Accuracy(hit[:, 0].mean().item(), hit.sum(dim=1).mean().item()),
            mi_per_layer=(mi / max(pairs, 1)).tolist(),
            stability_per_layer=(stability / tokens).tolist(),
        )

    def save(self, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
        """Write the model with its tokenizer, as `from_pretrained` reads them."""
        self._model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    def measure_peak_memory(self, batch: Batch) -> None:
        """Record what one more training step allocates; it changes the weights, so it comes last."""
        if self._recipe.device.type in ("cpu", "cuda"):
            self._optimizer.zero_grad()
            self.record.peak_memory = peak_memory(lambda: self._step(batch), self._recipe.device)

    def carma_seconds(self, batch: Batch) -> float:
        """Seconds for the CARMA losses alone, forward and backward, on this model's hidden states."""
        with torch.no_grad():
            word_logits(self._model, batch)
        states = [state.requires_grad_() for state in self._tap.hidden_states]  # leaves: the backward ends here
        self._tap.clear()
        return _seconds(lambda: self._carma(batch, states).loss.backward(), self._recipe.device)

    def _step(self, batch: Batch) -> Tensor:
        self._optimizer.zero_grad()
        loss = task_loss = F.cross_entropy(word_logits(self._model, batch), batch.labels)
        if self._with_carma:
            carma = self._carma(batch, self._tap.hidden_states)
            loss = total_loss(task_loss, carma.loss, self._recipe.carma.carma_weight)
        self._tap.clear()  # or the hidden states would live on into the optimizer's step
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        self._optimizer.step()
        self._scheduler.step()
        return task_loss.detach()

    def _carma(self, batch: Batch, states: list[Tensor]) -> CarmaOutput:
        recipe = self._recipe
        return carma_loss(states, batch.spans, recipe.carma, mask=batch.attention_mask, backend=recipe.backend)


def train(
    task_only: Run,
    with_carma: Run,
    batches: Iterable[Batch],
    held_out: Sequence[Batch],
    recipe: Recipe,
    after_step: Callable[[Run], None],
) -> Comparison:
    """Train both runs on the same batches, taking turns, so that whatever slows the machine down slows both."""
    runs = (task_only, with_carma)
    evaluate_at = {round(recipe.steps * part / _EVALUATIONS) for part in range(_EVALUATIONS + 1)}
    on_device = (batch.to(recipe.device) for batch in batches)
    labels: list[Tensor] = []
    for run in runs:
        run.evaluate(held_out)
    for step, batch in zip(range(1, recipe.steps + 1), on_device, strict=False):
        labels.append(batch.labels)
        for run in runs:
            run.train_on(batch)
            if step in evaluate_at:
                run.evaluate(held_out)
            after_step(run)
    carma_seconds = [with_carma.carma_seconds(batch) for batch in held_out]
    for run in runs:
        run.measure_peak_memory(held_out[0])
    return Comparison(
        task_only.record,
        with_carma.record,
        carma_seconds,
        _most_frequent(torch.cat(labels), torch.cat([batch.labels for batch in held_out])),
    )


def _most_frequent(seen: Tensor, held_out: Tensor) -> Accuracy:
    ranking = [label for label, _ in Counter(seen.tolist()).most_common(10)]
    answers = held_out.tolist()
    return Accuracy(*(sum(label in ranking[:k] for label in answers) / len(answers) for k in (1, 10)))


def _seconds(fn: Callable[[], object], device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    fn()
    synchronize(device)
    return time.perf_counter() - start
