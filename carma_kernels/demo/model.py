"""A small GPT-2 with random weights."""

from __future__ import annotations

import torch
from torch import Tensor
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


def word_logits(model: GPT2LMHeadModel, batch: Batch) -> Tensor:
    """Logits of the token after each prompt, `[B, V]`."""
    hidden = model.transformer(batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state  # [B, T, D]
    rows = torch.arange(len(hidden), device=hidden.device)
    logits: Tensor = model.lm_head(hidden[rows, batch.last_token])
    return logits
