"""What the recipes share, and none of it is CARMA: texts, a tokenizer that splits words, and a small Llama."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from carma_kernels.demo.definitions import read_definitions, shipped_file
from carma_kernels.demo.text import prompt, train_tokenizer

DEFINITIONS = read_definitions(shipped_file())[:256]

FOR_A_TOY = {
    "output_dir": "runs/recipe",
    "max_steps": 10,
    "logging_steps": 5,
    "learning_rate": 1e-2,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "bf16": False,
    "use_cpu": not torch.cuda.is_available(),
    "dataloader_pin_memory": torch.cuda.is_available(),
}
"""Of a trainer's arguments, those that make it short and quiet."""


def texts() -> list[str]:
    """Definitions with the words that they define."""
    return [f'{prompt(definition)}{word}"' for definition, word in DEFINITIONS]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE with 500 pieces, so that many words have several."""
    tokenizer = train_tokenizer(DEFINITIONS, vocab_size=500)
    tokenizer.eos_token, tokenizer.truncation_side = tokenizer.pad_token, "right"
    return tokenizer


def tokenized(tokenizer: PreTrainedTokenizerFast) -> list[dict[str, list[int]]]:
    """The texts as a data set of `input_ids`."""
    return [{"input_ids": tokenizer(text)["input_ids"]} for text in texts()]


def build_model(vocab_size: int = 500) -> LlamaForCausalLM:
    """Four layers of width 32, the same random weights every time."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=128,
            use_cache=False,
        )
    )


def pick_device() -> torch.device:
    """A GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
