"""A loop in the style of the published CARMA code, whose imports are swapped: the lines marked CARMA.

Run it: `python examples/published_loop.py`
"""

from dataclasses import dataclass

import rich
import torch
import torch.nn.functional as F
from toy import build_model, build_tokenizer, texts
from transformers import get_scheduler

from carma_kernels import TokenSpans

# was: from src.optm_losses import MILoss, StabilityLoss
from carma_kernels.integrations.upstream import MILoss, StabilityLoss  # CARMA

STABILITY_WEIGHT, MI_WEIGHT, CARMA_WEIGHT = 0.2, 0.5, 0.3
BATCH_SIZE, STEPS = 8, 10


@dataclass
class Span:
    """A word, as the published code's tokens carry it."""

    start_idx: int
    end_idx: int


tokenizer = build_tokenizer()
model = build_model()

cache: dict[str, torch.Tensor] = {}  # block outputs by the names of the blocks
for number, block in enumerate(model.model.layers):
    name = f"model.layers.{number}"
    block.register_forward_hook(lambda _block, _inputs, output, name=name: cache.update({name: output}))

mi_loss = MILoss(start_layer=0, end_layer=2, model_type="Llama")
stability_loss = StabilityLoss(start_layer=0, end_layer=3, model_type="Llama")
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
scheduler = get_scheduler("linear", optimizer, num_warmup_steps=2, num_training_steps=STEPS)

for step in range(STEPS):
    batch = tokenizer(texts()[step * BATCH_SIZE :][:BATCH_SIZE], padding=True, return_tensors="pt")
    words = TokenSpans.from_encoding(batch).to_lists()  # any span objects will do, yours too
    token_spans = [[Span(start, end) for start, end in of_text] for of_text in words]
    last = batch["attention_mask"].sum(dim=1) - 1
    rows = torch.arange(len(last))

    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    task_loss = F.cross_entropy(logits[rows, last - 1], batch["input_ids"][rows, last])
    mi = mi_loss.calculate_mi_loss(cache, token_spans)
    stability = stability_loss.calculate_loss(cache)
    loss = (1 - CARMA_WEIGHT) * task_loss + CARMA_WEIGHT * (STABILITY_WEIGHT * stability + MI_WEIGHT * mi)

    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    scheduler.step()
    if step % 3 == 0:
        rich.print(f"step {step}: task {task_loss:.3f}, MI {mi:.3f}, stability {stability:.4f}")
