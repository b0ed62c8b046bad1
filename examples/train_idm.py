"""Inverse dictionary modelling with CARMA, in a plain training loop: the lines marked CARMA are the swap-in.

    python examples/train_idm.py --steps 50

`python -m carma_kernels demo` does the same with and without CARMA and compares the two.
"""

import argparse

import rich
import torch
import torch.nn.functional as F
from rich.progress import track

import carma_kernels as ck
from carma_kernels.demo.definitions import read_definitions, shipped_file, split_definitions
from carma_kernels.demo.model import build_gpt2, word_logits
from carma_kernels.demo.text import Collator, train_tokenizer, training_batches
from carma_kernels.integrations.transformers import HiddenStateTap

BATCH_SIZE = 32
SEED = 0


def main() -> None:
    """Train a small GPT-2 to name what a definition defines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    steps = parser.parse_args().steps
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    definitions = split_definitions(read_definitions(shipped_file()), BATCH_SIZE, SEED, shipped_file()).training
    tokenizer = train_tokenizer(definitions, vocab_size=1000)
    batches = training_batches(definitions, BATCH_SIZE, Collator(tokenizer), SEED)  # the collator finds the word spans

    model = build_gpt2(vocab_size=len(tokenizer), layers=4, width=128, heads=4, seed=SEED).to(device)
    tap = HiddenStateTap(model)  # CARMA: keeps what each block returns
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    config = ck.CarmaConfig()  # gamma 0.5, eta 0.2, lambda 0.3, tau 0.1

    for step, batch in zip(track(range(steps), "training"), batches, strict=False):
        batch = batch.to(device)
        task_loss = F.cross_entropy(word_logits(model, batch), batch.labels)

        carma = tap.carma_loss(batch.spans, config)  # CARMA
        loss = ck.total_loss(task_loss, carma.loss, config.carma_weight)  # CARMA

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0 or step == steps - 1:
            rich.print(f"step {step}: task {task_loss:.3f}, MI {carma.mi:.3f}, stability {carma.stability:.4f}")


if __name__ == "__main__":
    main()
