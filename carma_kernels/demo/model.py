"""A small GPT-2 with random weights, and the block outputs that the CARMA losses work on."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from carma_kernels.demo.text import MAX_TOKENS, Batch


def build_gpt2(*, vocab_size: int, layers: int, width: int, heads: int, seed: int) -> GPT2LMHeadModel:
    """GPT-2 with weights drawn from `seed`; without dropout, so that two runs differ by their loss alone."""
    torch.manual_seed(seed)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocab_size,
            n_positions=MAX_TOKENS,
            n_layer=layers,
            n_embd=width,
            n_head=heads,
            activation_function="gelu_pytorch_tanh",  # GPT-2's own, in one operation instead of eight
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            resid_pdrop=0.0,
            bos_token_id=None,
            eos_token_id=None,
            use_cache=False,
        )
    )


class BlockOutputs:
    """Stand-in for the package's tap on a model's hidden states, to be replaced by it.

    A hook on each block keeps a reference to what the block returned: `output_hidden_states=True` would put the
    embeddings first and a normalised state last, neither of which belongs in a loss between layers.
    """

    def __init__(self, model: GPT2LMHeadModel) -> None:
        """Watch the blocks of `model`."""
        self._states: list[Tensor] = []
        for block in model.transformer.h:
            block.register_forward_hook(self._keep)

    def _keep(self, _block: nn.Module, _inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
        self._states.append(output[0] if isinstance(output, tuple) else output)

    def take(self) -> list[Tensor]:
        """The block outputs of the forward pass since the last call, L times `[B, T, D]`; they are let go of here."""
        states, self._states = self._states, []
        return states


def word_logits(model: GPT2LMHeadModel, batch: Batch) -> Tensor:
    """Logits of the token after each prompt, `[B, V]`."""
    hidden = model.transformer(batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state  # [B, T, D]
    rows = torch.arange(len(hidden), device=hidden.device)
    logits: Tensor = model.lm_head(hidden[rows, batch.last_token])
    return logits
