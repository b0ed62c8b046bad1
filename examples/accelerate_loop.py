"""An Accelerate loop with gradient accumulation, on one process or several: the lines marked CARMA are the swap-in.

Run it: `accelerate launch examples/accelerate_loop.py`
"""

import contextlib
import itertools

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from toy import build_model, build_tokenizer, tokenized
from transformers import DataCollatorForLanguageModeling

import carma_kernels as ck
from carma_kernels.integrations.transformers import CarmaCollator, CarmaWindow, HiddenStateTap

ACCUMULATED = 3  # batches an optimizer step; Accelerator(gradient_accumulation_steps=) stays 1: we divide ourselves

accelerator = Accelerator()
tokenizer = build_tokenizer()
collator = CarmaCollator(DataCollatorForLanguageModeling(tokenizer, mlm=False), tokenizer)  # CARMA: adds the words
loader = DataLoader(tokenized(tokenizer), batch_size=8, shuffle=True, collate_fn=collator)

model = build_model()
tap = HiddenStateTap(model)  # CARMA: keeps what each block returns
config = ck.CarmaConfig()  # gamma 0.5, eta 0.2, lambda 0.3, tau 0.1
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

remaining = iter(loader)
for step in itertools.count():
    batches = list(itertools.islice(remaining, ACCUMULATED))  # the last window of an epoch may be shorter
    if not batches:
        break
    window = CarmaWindow.of(batches, accelerator)  # CARMA: counts the window's pairs, over all processes
    for batch in batches:
        spans = batch.pop("spans")
        with accelerator.no_sync(model) if batch is not batches[-1] else contextlib.nullcontext():
            task_loss = model(**batch).loss / len(batches)

            carma = window.carma_loss(tap, spans, config)  # CARMA
            loss = ck.total_loss(task_loss, carma.loss, config.carma_weight)  # CARMA

            accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    if step % 5 == 0:
        accelerator.print(f"step {step}: task {task_loss * len(batches):.3f}, stability {carma.stability:.4f}")
