"""Entities or phrases instead of words: the tokens of each are kept together, against the other tokens of the text.

An annotation tool gives characters, `(start, end)`; the tokenizer says which tokens those are. The lines marked CARMA
are the swap-in. Run it: `python examples/entities.py`
"""

import re

import rich
import torch
from torch.utils.data import DataLoader
from toy import build_model, build_tokenizer, pick_device, texts
from transformers import DataCollatorForLanguageModeling

import carma_kernels as ck
from carma_kernels.integrations.transformers import CarmaCollator, HiddenStateTap


def annotated(text):
    """Stands for your own annotations: an article and the two words after it are an entity."""
    return [match.span() for match in re.finditer(r"\b(?:a|an|the) \w+ \w+", text)]


def with_entities(text):
    """The example, and the token range of each entity that truncation has left whole."""
    encoding = tokenizer(text, truncation=True, max_length=48)
    tokens = [(encoding.char_to_token(start), encoding.char_to_token(end - 1)) for start, end in annotated(text)]
    whole = [(first, last + 1) for first, last in tokens if first is not None and last is not None]
    return {"input_ids": encoding["input_ids"], "word_spans": whole}  # CARMA: a column for the collator


device = pick_device()
tokenizer = build_tokenizer()
data = [with_entities(text) for text in texts()]
collator = CarmaCollator(DataCollatorForLanguageModeling(tokenizer, mlm=False))  # CARMA: moves them with the padding
loader = DataLoader(data, batch_size=16, shuffle=True, collate_fn=collator)

model = build_model().to(device)
tap = HiddenStateTap(model)  # CARMA: keeps what each block returns
config = ck.CarmaConfig()
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

(start, end), text = data[0]["word_spans"][0], data[0]["input_ids"]
rich.print(f"the first entity, tokens {start} to {end - 1}: {tokenizer.decode(text[start:end])!r}")
