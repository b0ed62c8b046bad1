"""A loop in plain PyTorch: the lines marked CARMA are the swap-in.

Run it: `python examples/plain_loop.py`
"""

import rich
import torch
from torch.utils.data import DataLoader
from toy import build_model, build_tokenizer, pick_device, tokenized
from transformers import DataCollatorForLanguageModeling

import carma_kernels as ck
from carma_kernels.integrations.transformers import CarmaCollator, HiddenStateTap

device = pick_device()
tokenizer = build_tokenizer()
collator = CarmaCollator(DataCollatorForLanguageModeling(tokenizer, mlm=False), tokenizer)  # CARMA: adds the words
loader = DataLoader(tokenized(tokenizer), batch_size=16, shuffle=True, collate_fn=collator)

model = build_model().to(device)
tap = HiddenStateTap(model)  # CARMA: keeps what each block returns
config = ck.CarmaConfig()  # gamma 0.5, eta 0.2, lambda 0.3, tau 0.1
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

for step, batch in enumerate(loader):
    spans = batch.pop("spans").to(device, non_blocking=True)
    batch = {name: value.to(device) for name, value in batch.items()}
    task_loss = model(**batch).loss

    carma = tap.carma_loss(spans, config)  # CARMA
    loss = ck.total_loss(task_loss, carma.loss, config.carma_weight)  # CARMA

    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 5 == 0:
        rich.print(f"step {step}: task {task_loss:.3f}, MI {carma.mi:.3f}, stability {carma.stability:.4f}")
