"""`transformers.Trainer`, with gradient accumulation and an evaluation: the lines marked CARMA are the swap-in.

Run it: `python examples/hf_trainer.py`
"""

import rich
from toy import FOR_A_TOY, build_model, build_tokenizer, tokenized
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

import carma_kernels as ck
from carma_kernels.integrations.transformers import CarmaTrainerMixin


class CarmaTrainer(CarmaTrainerMixin, Trainer):  # CARMA
    """A trainer like any other; subclass your own in the same way."""


tokenizer = build_tokenizer()
examples = tokenized(tokenizer)
trainer = CarmaTrainer(
    model=build_model(),
    args=TrainingArguments(per_device_train_batch_size=8, gradient_accumulation_steps=2, **FOR_A_TOY),
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    train_dataset=examples[:192],
    eval_dataset=examples[192:],
    processing_class=tokenizer,
    carma=ck.CarmaConfig(),  # CARMA: gamma 0.5, eta 0.2, lambda 0.3, tau 0.1
)
trainer.train()  # logs task_loss, mi_loss and stability_loss beside the loss, by layer too
metrics = trainer.evaluate()
rich.print({name: metrics[name] for name in ("eval_loss", "eval_task_loss", "eval_mi_loss", "eval_stability_loss")})
