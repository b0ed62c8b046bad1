"""TRL's `SFTTrainer` with LoRA and gradient checkpointing: the lines marked CARMA are the swap-in.

Run it: `python examples/sft_lora.py`
"""

from datasets import Dataset
from peft import LoraConfig
from toy import FOR_A_TOY, build_model, build_tokenizer, texts
from trl import SFTConfig, SFTTrainer

import carma_kernels as ck
from carma_kernels.integrations.transformers import CarmaTrainerMixin


class CarmaSFTTrainer(CarmaTrainerMixin, SFTTrainer):  # CARMA
    """It tokenizes, truncates and collates as `SFTTrainer` does; the words are read from its batches' tokens."""


trainer = CarmaSFTTrainer(
    model=build_model(),
    args=SFTConfig(per_device_train_batch_size=16, gradient_checkpointing=True, **FOR_A_TOY),
    train_dataset=Dataset.from_dict({"text": texts()}),
    processing_class=build_tokenizer(),
    peft_config=LoraConfig(target_modules="all-linear", r=8, task_type="CAUSAL_LM"),
    carma=ck.CarmaConfig(),  # CARMA: gamma 0.5, eta 0.2, lambda 0.3, tau 0.1
)
trainer.train()  # logs task_loss, mi_loss and stability_loss beside the loss, by layer too
