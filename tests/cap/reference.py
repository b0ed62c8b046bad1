"""Constituent-aware pooling of one sequence at a time, in Python loops and without a hook in sight."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tests.integration.tap.models import FAMILIES, blocks_of

REDUCE = {
    "mean": lambda tokens: sum(tokens) / len(tokens),
    "sum": lambda tokens: sum(tokens),
    "max": lambda tokens: torch.stack(tokens).max(dim=0).values,
}


class Inject(nn.Module):
    """A first block that gives the next one something else."""

    attention_type = "full_attention"

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden

    def forward(self, *_arguments: Any, **_options: Any) -> Tensor:
        return self.hidden


def all_words(words: list[tuple[int, int]], valid: Tensor) -> list[tuple[int, int]]:
    """With the valid tokens in no word as words of their own, in order."""
    inside = {t for start, end in words for t in range(start, end)}
    alone = [(t, t + 1) for t in valid.nonzero().flatten().tolist() if t not in inside]
    return sorted([*words, *alone])


@torch.no_grad()
def pooled_logits(
    model: PreTrainedModel,
    family: str,
    tokens: Tensor,
    valid: Tensor,
    words: list[tuple[int, int]],
    *,
    start_layer: int,
    protocol: str,
    positions: str = "sequential",
) -> Tensor:
    """The logits of each word of one sequence `[T]`, `[W, V]`."""
    place = valid.nonzero().flatten()  # [valid T]
    alone = {"input_ids": tokens[None, place], "position_ids": place[None], "use_cache": False}
    if family == "opt":  # counts its positions from the mask
        del alone["position_ids"]
    states = model(**alone, output_hidden_states=True).hidden_states
    before = states[start_layer][0]  # [valid T, D], the input of block start_layer

    spans = all_words(words, valid)
    first = int(place[0])
    pooled = torch.stack([REDUCE[protocol]([before[t - first] for t in range(*span)]) for span in spans])  # [W, D]
    where = torch.arange(len(spans)) if positions == "sequential" else torch.tensor([start for start, _ in spans])

    rest = copy.deepcopy(model)
    path, blocks = FAMILIES[family][0], blocks_of(model, family)
    rest.set_submodule(path, nn.ModuleList([Inject(pooled[None]), *blocks[start_layer:]]))
    rest.config.num_hidden_layers = 1 + len(blocks) - start_layer
    if getattr(rest.config, "layer_types", None):
        rest.config.layer_types = [rest.config.layer_types[0], *rest.config.layer_types[start_layer:]]
    ones = torch.ones(1, len(spans), dtype=torch.long)
    # without a mask, positions that jump would be taken for several sequences in one
    logits: Tensor = rest(
        input_ids=ones,
        attention_mask=ones,
        use_cache=False,
        **({} if family == "opt" else {"position_ids": where[None]}),
    ).logits
    return logits[0]
