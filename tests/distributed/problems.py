"""What each rank computes, and the same on the joined batch in one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

import carma_kernels as ck
from tests.cases import FP64, read

D, L = 6, 4

# the sequences of four ranks, drawn as in tests/cases.py
SCENES: dict[str, tuple[tuple[str, ...], ...]] = {
    "alike": (("aab.cc", "ddddd_"), (".aabb_", "aaa..."), ("aa....", "bb.cc."), ("a.bbbb", "__aacc")),
    "B and T differ": (("aab.cc",), ("aabbb.ccc", "..aa_____", "_bbbccdd."), ("aaa", "b.b"), (".aabbb_", "a_____a")),
    "a rank without words": (("....", "a.b_"), ("aabb", "ccc."), ("aa..", "_bbb"), ("____", "____")),
    "one rank has all words": ((".....", "abc__"), ("aabbb", "ccdd."), (".....", ".abc_"), ("a____", "....a")),
    "no word anywhere": (("..a.", "a.b_"), ("..", "__"), ("abc",), (".....",)),
    "a rank without sequences": ((), ("aabb", "cc.."), ("aaa..b",), ()),
    "nothing valid": (("__",), (), ("____", "____"), ("_",)),
}


@dataclass(frozen=True)
class Given:
    """A rank's batch, or the joined one."""

    x: Tensor  # [B, T, D] the model's input
    spans: ck.TokenSpans
    pairs: ck.PairIndex
    valid: Tensor  # [B, T] bool
    tokens: Tensor | None  # [B, T] bool, the tokens that some rank has; None for all


def batch_of(scene: str, rank: int) -> Given:
    drawing = SCENES[scene][rank]
    words, valid = read(drawing) if drawing else ([], torch.ones(0, 3, dtype=torch.bool))
    generator = torch.Generator().manual_seed(rank)
    spans = ck.TokenSpans.from_lists(words, seq_len=valid.shape[1], attention_mask=valid)
    x = torch.randn(*valid.shape, D, generator=generator, dtype=FP64)
    return Given(x, spans, spans.sample_pairs(3, generator), valid, None)


def joined(batches: Sequence[Given]) -> Given:
    """All sequences in one batch, each as long as the longest."""
    B, T = sum(batch.spans.shape[0] for batch in batches), max(batch.spans.shape[1] for batch in batches)
    x = torch.zeros(B, T, D, dtype=FP64)
    valid, tokens = torch.zeros(2, B, T, dtype=torch.bool)
    words: list[list[tuple[int, int]]] = []
    lists: list[list[Tensor]] = [[], [], []]
    for batch in batches:
        start, (its_B, its_T) = len(words), batch.spans.shape
        rows, columns = slice(start, start + its_B), slice(its_T)
        x[rows, columns], valid[rows, columns], tokens[rows, columns] = batch.x, batch.valid, True
        words += batch.spans.to_lists()
        indices = (batch.pairs.anchor, batch.pairs.positive, batch.pairs.negatives)
        for index, all_of_them in zip(indices, lists, strict=True):
            there = (start + index // its_T) * T + index % its_T
            all_of_them.append(torch.where(index < 0, index, there))
    pairs = ck.PairIndex(*map(torch.cat, lists), (B, T))
    return Given(x, ck.TokenSpans.from_lists(words, seq_len=T, attention_mask=valid), pairs, valid, tokens)


class Block(nn.Module):
    """A layer, whose output is a hidden state."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.linear = nn.Linear(D, D, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x).tanh()


class Blocks(nn.Module):
    """Layers, and a temperature if the loss has one."""

    def __init__(self, learns_temperature: bool, dtype: torch.dtype = FP64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.layers = nn.ModuleList([Block(dtype) for _ in range(L)])
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=dtype))
        if learns_temperature:
            self.temperature = nn.Parameter(torch.tensor([0.3], dtype=dtype))  # FSDP does not shard a 0-d one

    def forward(self, x: Tensor) -> tuple[list[Tensor], Tensor | float]:
        """L times `[B, T, D]`, and tau."""
        states = []
        for layer in self.layers:
            x = layer(x)
            states.append(x)
        return states, self.temperature.sum() if hasattr(self, "temperature") else 0.3


Loss = Callable[..., Tensor]


def _mi(listed: bool = False, **options: Any) -> Loss:
    def loss(package: ModuleType, states: list[Tensor], tau: Tensor | float, given: Given, **extra: Any) -> Tensor:
        words = given.pairs if listed else given.spans
        return package.mi_loss(states, words, temperature=tau, **options, **extra)

    return loss


def _stability(masked: bool, **options: Any) -> Loss:
    def loss(package: ModuleType, states: list[Tensor], tau: Tensor | float, given: Given, **extra: Any) -> Tensor:
        return package.stability_loss(states, mask=given.valid if masked else given.tokens, **options, **extra)

    return loss


def _carma(**options: Any) -> Loss:
    def loss(package: ModuleType, states: list[Tensor], tau: Tensor | float, given: Given, **extra: Any) -> Tensor:
        config = package.CarmaConfig(temperature=tau, **options)
        out = package.carma_loss(states, given.spans, config, mask=given.valid, **extra)
        profile = torch.cat([out.mi_per_layer, out.stability_per_layer])
        return torch.cat([torch.stack([out.loss, out.mi, out.stability]), profile])

    return loss


LOSSES: dict[str, Loss] = {
    "mi": _mi(),
    "mi of the batch": _mi(negatives="batch"),
    "mi of the batch, matched, some layers": _mi(negatives="batch", match_negatives=5, metric="dot", layers=(1, 3)),
    "mi of listed pairs": _mi(listed=True),
    "mi of each layer": _mi(reduction="none"),
    "mi summed": _mi(reduction="sum", layers=(2, 3)),
    "mi of a part": _mi(num_pairs=50),
    "stability": _stability(masked=False),
    "stability of valid tokens, some layers": _stability(masked=True, layers=(1, 3)),
    "stability of each step": _stability(masked=True, reduction="none", eps=0.5),  # which empty ranks have no part in
    "stability of one layer": _stability(masked=False, layers=(3, 3)),
    "carma": _carma(mi_layers=(1, 3), stability_layers=(0, 2)),
    "carma of the batch": _carma(negatives="batch", mi_layers=(0, 2)),
}


def learns_temperature(name: str) -> bool:
    return not name.startswith("stability")


def weighted(outputs: Tensor) -> Tensor:
    """One number to differentiate, in which every output has another weight."""
    return (outputs * torch.arange(1.0, 1 + outputs.numel(), dtype=outputs.dtype).view_as(outputs)).sum()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Of every parameter, whole; each has one."""
    found = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        whole = parameter.grad.full_tensor() if hasattr(parameter.grad, "full_tensor") else parameter.grad
        found[name.removeprefix("module.")] = whole
    return found


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-9) -> None:
    """Up to the tolerance, relative to the largest number of all."""
    assert actual.keys() == expected.keys()
    unit = max((float(tensor.abs().max()) for tensor in expected.values()), default=0.0)
    for name, tensor in expected.items():
        torch.testing.assert_close(
            actual[name], tensor, rtol=0, atol=tolerance * unit, msg=lambda text, name=name: f"{name}: {text}"
        )
