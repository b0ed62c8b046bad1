"""What a trainer can be, or be set to, in which the CARMA losses would be another number, or none: refused by name."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from carma_kernels.config import CarmaConfig

_NO_TEXTS = (
    "Preference data (chosen and rejected answers), and answers that are generated in training, have no input_ids in "
    "the examples, of which CARMA takes the words. Train on one text an example; of TRL's trainers, with SFTTrainer."
)


def refuse_order(kind: type, mixin: type) -> None:
    """A class in which a trainer comes before the mixin, whose methods are then not called, or within the trainer's.

    Raises:
        TypeError: a `transformers.Trainer` without the mixin precedes it among the bases of `kind`.
    """
    before = kind.__mro__[: kind.__mro__.index(mixin)]
    if not any(_is_trainer(base) and not issubclass(base, mixin) for base in before):
        return
    bases = sorted(kind.__bases__, key=lambda base: not issubclass(base, mixin))  # stable
    statement = f"class {kind.__name__}({', '.join(base.__name__ for base in bases)})"
    raise TypeError(
        f"{mixin.__name__} must come before the trainer, whose methods it extends; after it, it does nothing. Write "
        f"{statement}."
    )


def refuse_trainer(kind: type) -> None:
    """A trainer of TRL whose examples are not texts to learn.

    Raises:
        ValueError: it is not TRL's `SFTTrainer`, nor built on that.
    """
    of_trl = next((base for base in kind.__mro__ if base.__module__.partition(".")[0] == "trl"), None)
    if of_trl is not None and of_trl.__name__ != "SFTTrainer":
        raise ValueError(f"{kind.__name__} is a {of_trl.__name__}, which is not supported. {_NO_TEXTS}")


def refuse_examples(name: str, examples: Any) -> None:
    """Preference data, in whoever's trainer.

    Args:
        name: of the trainer's class.
        examples: its data set; looked into only if it knows its columns, as those of `datasets` do.

    Raises:
        ValueError: there are chosen or rejected answers and no `input_ids`.
    """
    columns: list[str] = getattr(examples, "column_names", None) or []
    if "input_ids" not in columns and any("chosen" in column or "rejected" in column for column in columns):
        raise ValueError(f"{name} got a data set with the columns {columns}, which is not supported. {_NO_TEXTS}")


def refuse_settings(name: str, args: Any, accelerator: Any) -> None:
    """Settings in which a row of the batch is not one text, or a rank has not all of it.

    Args:
        name: of the trainer's class.
        args: its `TrainingArguments`, or TRL's `SFTConfig`.
        accelerator: its `Accelerator`.

    Raises:
        ValueError: `nn.DataParallel`, packed or padding-free batches, or context, sequence or tensor parallelism.
    """
    if args.n_gpu > 1:
        raise ValueError(
            f"{name} does not support nn.DataParallel, which Trainer uses for the {args.n_gpu} GPUs it sees. Start one "
            "process a GPU with torchrun or accelerate launch, or set CUDA_VISIBLE_DEVICES."
        )
    for option in ("packing", "eval_packing", "padding_free"):
        if getattr(args, option, False):
            raise ValueError(
                f"{name} got {option}=True: packed and padding-free batches are not supported yet, since texts would "
                f"take each other's tokens for negatives. Set {option}=False."
            )
    for parallelism in (getattr(accelerator, "parallelism_config", None), getattr(args, "parallelism_config", None)):
        for option, kind in (("cp_size", "context"), ("sp_size", "sequence"), ("tp_size", "tensor")):
            size = getattr(parallelism, option, None) or 1
            if size > 1:
                raise ValueError(
                    f"{name} does not support {kind} parallelism, got {option}={size}: each process has to have the "
                    f"whole hidden states of its texts. Set {option}=1, and use data parallelism (DDP, FSDP, ZeRO)."
                )


def refuse_unlearned(
    config: CarmaConfig, model: nn.Module, optimizer: Any = None, wrapped: nn.Module | None = None
) -> None:
    """A temperature that is to be learned, and that nothing would learn or keep.

    Args:
        config: whose temperature it is.
        model: that is trained.
        optimizer: that trains it, if there is one yet whose parameters are the model's.
        wrapped: the model within DDP, if it is.

    Raises:
        ValueError: it is no parameter of the model or none of the optimizer's, or is frozen; the model is peft's, which
            freezes it and leaves it out of checkpoints; or DDP's, which takes it for one that is not used.
    """
    tau = config.temperature
    if not isinstance(tau, Tensor) or not (tau.requires_grad or isinstance(tau, nn.Parameter)):
        return
    if any(hasattr(type(part), "active_peft_config") for part in model.modules()):
        raise ValueError(
            "carma.temperature cannot be learned with a peft model, which freezes all parameters but its adapters' and "
            "leaves them out of checkpoints. Pass a number."
        )
    if not tau.requires_grad:
        raise ValueError(
            "carma.temperature is a parameter that is frozen. Call requires_grad_(True) on it, or pass a number."
        )
    if not any(parameter is tau for parameter in model.parameters()):
        raise ValueError(
            f"carma.temperature requires a gradient and is no parameter of the {type(model).__name__} that is trained: "
            "no optimizer would learn it, and no checkpoint keep it. Register it with the model, "
            "model.carma_temperature = nn.Parameter(torch.tensor(0.1)), and pass "
            "CarmaConfig(temperature=model.carma_temperature). A model_init has to register the same parameter with "
            "each model that it makes."
        )
    groups = getattr(optimizer, "param_groups", None)
    if groups is not None and not any(parameter is tau for group in groups for parameter in group["params"]):
        raise ValueError(
            "carma.temperature requires a gradient and is not among the parameters of the optimizer, which would not "
            "learn it. Add it there, or pass a number."
        )
    if getattr(wrapped, "find_unused_parameters", False):
        raise ValueError(
            "carma.temperature is no part of the model's outputs, and DDP, which looks there for the parameters that "
            "are used, takes it for an unused one. Set ddp_find_unused_parameters=False in the training arguments."
        )


def _is_trainer(kind: type) -> bool:
    """Whether it is a `transformers.Trainer`, which need not be installed."""
    return any((base.__module__, base.__name__) == ("transformers.trainer", "Trainer") for base in kind.__mro__)
