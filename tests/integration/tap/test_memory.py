"""What CARMA adds to the peak memory of a whole training step: with the pass-through, next to nothing."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import carma_kernels as ck
from carma_kernels.eager import layers
from carma_kernels.integrations.transformers import HiddenStateTap
from carma_kernels.measure import peak_memory

B, T, L, D, V = 4, 64, 24, 64, 256


@pytest.mark.parametrize("checkpointed", [False, True])
def test_peak_of_a_step(checkpointed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plain call's backward holds a gradient of every layer on top of the activations of the whole model."""
    for name in ("_TILE_ON_CPU", "_AT_ONCE_ON_CPU"):  # a few MB whatever the model, of which this one has not many more
        monkeypatch.setattr(layers, name, 0)
    config = GPT2Config(
        n_layer=L, n_embd=D, n_head=2, vocab_size=V, n_positions=T, bos_token_id=None, eos_token_id=None
    )
    model = GPT2LMHeadModel(config).train()
    if checkpointed:
        model.activation_checkpointing_enable({"use_reentrant": False})
    tokens = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(0))
    spans = ck.TokenSpans.from_lists([list(pairwise(range(0, T, 3)))] * B, seq_len=T)
    hidden = L * B * T * D * 4  # bytes

    def peak(pass_through: bool | None) -> int:
        tap = None if pass_through is None else HiddenStateTap(model, pass_through=pass_through)

        def step() -> None:
            task = model(input_ids=tokens, labels=tokens, use_cache=False).loss
            loss = task if tap is None else ck.total_loss(task, tap.carma_loss(spans).loss, 0.3)
            loss.backward()

        model.zero_grad()
        used = peak_memory(step, "cpu")
        if tap is not None:
            tap.remove()
        return used

    without, plain, passing = peak(None), peak(False), peak(True)
    assert plain - without > 0.9 * hidden
    assert passing - without < hidden / L
    assert passing < 1.01 * without
