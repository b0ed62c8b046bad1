"""FSDP2 (`fully_shard`) on two processes, on CPUs or GPUs: the lines marked CARMA are the swap-in.

Run it: `torchrun --nproc-per-node 2 examples/fsdp2.py`
"""

import os

import rich
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler
from toy import build_model, build_tokenizer, pick_device, tokenized
from transformers import DataCollatorForLanguageModeling

import carma_kernels as ck
from carma_kernels.integrations.transformers import CarmaCollator, HiddenStateTap

device = pick_device()
if device.type == "cuda":
    torch.cuda.set_device(device := torch.device("cuda", int(os.environ["LOCAL_RANK"])))
dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
mesh = init_device_mesh(device.type, (dist.get_world_size(),))

tokenizer = build_tokenizer()
examples = tokenized(tokenizer)
collator = CarmaCollator(DataCollatorForLanguageModeling(tokenizer, mlm=False), tokenizer)  # CARMA: adds the words
loader = DataLoader(examples, batch_size=8, sampler=DistributedSampler(examples), collate_fn=collator)

model = build_model().to(device)
tap = HiddenStateTap(model)  # CARMA: keeps what each block returns
for block in model.model.layers:
    fully_shard(block, mesh=mesh)
fully_shard(model, mesh=mesh)
config = ck.CarmaConfig()  # gamma 0.5, eta 0.2, lambda 0.3, tau 0.1
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

for step, batch in enumerate(loader):
    spans = batch.pop("spans").to(device, non_blocking=True)
    batch = {name: value.to(device) for name, value in batch.items()}
    task_loss = model(**batch).loss

    # CARMA: with group=, the loss of the ranks' batches joined into one
    carma = tap.carma_loss(spans, config, group=mesh.get_group())
    loss = ck.total_loss(task_loss, carma.loss, config.carma_weight)  # CARMA

    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 5 == 0 and dist.get_rank() == 0:
        rich.print(f"step {step}: task {task_loss:.3f}, MI {carma.mi:.3f}, stability {carma.stability:.4f}")

dist.destroy_process_group()
