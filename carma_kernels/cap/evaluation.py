"""How well a checkpoint names what a definition defines: untouched, with words pooled, and with synonyms."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from carma_kernels import TokenSpans
from carma_kernels.cap.intervention import constituent_pooling
from carma_kernels.cap.pooling import Positions, Protocol
from carma_kernels.cap.synonyms import Synonyms, replace_synonyms
from carma_kernels.demo.definitions import Definition
from carma_kernels.demo.text import prompt
from carma_kernels.integrations.transformers.blocks import find_blocks

_TOP = 10


class CheckpointError(ValueError):
    """A folder that cannot be evaluated; the message says why and the way out."""


class Checkpoint(NamedTuple):
    """A language model and its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @property
    def num_layers(self) -> int:
        """L."""
        return len(find_blocks(self.model).modules)


class Score(NamedTuple):
    """Over all definitions."""

    top1: float
    """share of the words whose first token is the model's first choice"""
    top10: float
    """and among its first ten"""
    kept: float | None
    """of the definitions answered right (top 1) untouched, the share still answered right; None if there were none"""
    task_loss: float
    """mean cross-entropy of the words' first tokens"""


@dataclass
class Evaluation:
    """What there is to know about one checkpoint."""

    untouched: Score
    pooled: dict[Protocol, dict[int, Score]] = field(default_factory=dict)
    """by protocol and start layer"""
    synonyms: dict[float, Score] = field(default_factory=dict)
    """by the share of a definition's words that are replaced"""


@dataclass(frozen=True)
class Plan:
    """What to measure."""

    protocols: Sequence[Protocol]
    start_layers: Sequence[int]
    shares: Sequence[float]
    positions: Positions
    synonyms: Synonyms
    seed: int
    batch_size: int

    @property
    def num_runs(self) -> int:
        """Passes over the definitions for each checkpoint."""
        return 1 + len(self.protocols) * len(self.start_layers) + len(self.shares)


def load_checkpoint(folder: Path, device: torch.device) -> Checkpoint:
    """A model and a tokenizer that `save_pretrained` wrote into one folder, ready to evaluate.

    Raises:
        CheckpointError: no such folder, no model or tokenizer in it that transformers can load, or no fast tokenizer.
    """
    if not (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{folder} is no checkpoint: it has no config.json. Pass a folder into which model.save_pretrained and "
            "tokenizer.save_pretrained have written, as `python -m carma_kernels demo` makes them."
        )
    try:
        its_own = {"local_files_only": True, "trust_remote_code": False}  # nor ask whether to run a folder's code
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", **its_own)
        tokenizer = AutoTokenizer.from_pretrained(folder, **its_own)
    except Exception as error:  # of transformers, safetensors, tokenizers, and of code that comes with a model
        raise CheckpointError(f"{folder} cannot be loaded: {error}") from error
    if not tokenizer.is_fast:
        raise CheckpointError(
            f"{folder} has the slow tokenizer {type(tokenizer).__name__}, which cannot say what a word is. Save a fast "
            "one (tokenizer.json) beside the model."
        )
    tokenizer = copy.copy(tokenizer)
    tokenizer.padding_side = "right"
    tokenizer.truncation_side = "left"  # the question stands at the end
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise CheckpointError(f"{folder} has a tokenizer without pad_token and eos_token. Set one and save it.")
        tokenizer.pad_token = tokenizer.eos_token
    model.to(device)  # type: ignore[arg-type]  # transformers types it for its own wrapper only
    return Checkpoint(model.eval(), tokenizer)


def evaluate(
    checkpoint: Checkpoint, definitions: Sequence[Definition], plan: Plan, advance: Callable[[], None]
) -> Evaluation:
    """Everything in `plan`; `advance` is called after each of its `num_runs`."""
    batches = list(_batches(checkpoint, definitions, plan.batch_size))
    untouched, right = _score(checkpoint, batches, None)
    advance()
    result = Evaluation(untouched)
    for protocol in plan.protocols:
        scores = result.pooled[protocol] = {}
        for start_layer in plan.start_layers:
            pooling = _Pooling(start_layer, protocol, plan.positions)
            scores[start_layer], _ = _score(checkpoint, batches, pooling, right)
            advance()
    for share in plan.shares:
        reworded = [
            entry._replace(
                definition=replace_synonyms(entry.definition, plan.synonyms, share, seed=plan.seed, avoid=[entry.word])
            )
            for entry in definitions
        ]
        result.synonyms[share], _ = _score(checkpoint, _batches(checkpoint, reworded, plan.batch_size), None, right)
        advance()
    return result


class _Pooling(NamedTuple):
    start_layer: int
    protocol: Protocol
    positions: Positions


@dataclass(frozen=True)
class _Batch:
    input_ids: Tensor  # [B, T] int64
    attention_mask: Tensor  # [B, T] int64, padding on the right
    labels: Tensor  # [B] int64, first token of the defined word
    spans: TokenSpans


def _batches(checkpoint: Checkpoint, definitions: Sequence[Definition], batch_size: int) -> Iterator[_Batch]:
    """In order, so that answers can be compared between runs."""
    model, tokenizer = checkpoint
    for start in range(0, len(definitions), batch_size):
        entries = definitions[start : start + batch_size]
        encoding = tokenizer(
            [prompt(entry.definition) for entry in entries],
            padding=True,
            truncation=tokenizer.model_max_length < 10**6,  # beyond, it stands for unknown
            return_tensors="pt",
        )
        words = tokenizer([entry.word for entry in entries], add_special_tokens=False)["input_ids"]
        yield _Batch(
            encoding["input_ids"].to(model.device),
            encoding["attention_mask"].to(model.device),
            torch.tensor([tokens[0] for tokens in words], device=model.device),
            TokenSpans.from_encoding(encoding),
        )


@torch.no_grad()
def _score(
    checkpoint: Checkpoint,
    batches: Iterator[_Batch] | list[_Batch],
    pooling: _Pooling | None,
    right: Tensor | None = None,
) -> tuple[Score, Tensor]:
    """The score, and which definitions are answered right, `[definitions]` bool; `right`: which were, untouched."""
    hits, losses = [], []
    for batch in batches:
        logits = _answers(checkpoint.model, batch, pooling)  # [B, V]
        top = logits.topk(min(_TOP, logits.shape[1])).indices  # [B, 10]
        hits.append(top == batch.labels[:, None])
        losses.append(F.cross_entropy(logits, batch.labels, reduction="none"))
    hit = torch.cat(hits)  # [definitions, 10]
    first = hit[:, 0]
    right = first if right is None else right
    return (
        Score(
            top1=first.float().mean().item(),
            top10=hit.any(dim=1).float().mean().item(),
            kept=first[right].float().mean().item() if right.any() else None,
            task_loss=torch.cat(losses).mean().item(),
        ),
        first,
    )


def _answers(model: PreTrainedModel, batch: _Batch, pooling: _Pooling | None) -> Tensor:
    """Logits of the token after each prompt, `[B, V]`, in fp32."""
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}
    if pooling is None:
        logits = model(**inputs).logits
    else:
        with constituent_pooling(model, batch.spans, **pooling._asdict()):
            logits = model(**inputs).logits  # [B, T, V]
    rows = torch.arange(len(logits), device=logits.device)
    last: Tensor = logits[rows, batch.attention_mask.sum(dim=1) - 1]
    return last.float()
