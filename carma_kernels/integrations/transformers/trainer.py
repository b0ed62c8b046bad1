"""CARMA in a `transformers.Trainer` or TRL's `SFTTrainer`: the task loss is theirs, the CARMA losses come beside it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from carma_kernels.config import CarmaConfig, checked
from carma_kernels.functional import total_loss
from carma_kernels.integrations.transformers.blocks import Blocks, find_blocks, given_blocks
from carma_kernels.integrations.transformers.collator import COLUMNS, CarmaCollator
from carma_kernels.integrations.transformers.logs import LossSums, named_losses
from carma_kernels.integrations.transformers.tap import HiddenStateTap
from carma_kernels.integrations.transformers.unsupported import (
    refuse_examples,
    refuse_order,
    refuse_settings,
    refuse_trainer,
    refuse_unlearned,
)
from carma_kernels.integrations.transformers.window import CarmaWindow
from carma_kernels.pairs import PairIndex
from carma_kernels.spans import TokenSpans

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object  # whichever trainer comes next in the class statement


class CarmaTrainerMixin(_Trainer):
    """Trains on `(1 - lambda) L_task + lambda (gamma L_MI + eta L_Stability)`.

        class CarmaTrainer(CarmaTrainerMixin, Trainer): ...

        trainer = CarmaTrainer(model, args, train_dataset=..., processing_class=tokenizer, carma=CarmaConfig())

    The task loss is the trainer's own, with its own scaling (label smoothing, `compute_loss_func`,
    `average_tokens_across_devices`). The gradient of the CARMA losses is that of a `CarmaWindow`, however many steps
    are accumulated on however many ranks. `docs/training.md` says who divides by what.

    Logged beside `loss`, and after an evaluation beside `eval_loss` (both the total): `task_loss`, `mi_loss`,
    `stability_loss`, and by layer `mi_loss/layer_3`, `stability_loss/layer_3_to_4`. They are summed on the device and
    read when they are logged. An evaluation batch without spans counts for its task loss alone.

    Args (beside those of the trainer):
        carma: the options of the losses. A temperature that is to be learned must be a parameter of the model.
        carma_blocks: the blocks whose outputs are the hidden states, where they are not found in the model, as in one
            with an encoder and a decoder: the path of their list ("model.decoder.layers"), which holds in every model
            that `model_init` makes, or the modules.
        carma_log_layers: log each layer's losses beside the totals.
        sampled_negatives: k, to hold each pair against k tokens drawn from its sequence instead of all of them. The
            random stream is this rank's own; checkpoints keep it.

    Raises:
        TypeError: `carma` is no `CarmaConfig`; or, by the class statement, the mixin comes after the trainer.
        ValueError: a trainer, or a setting of it, that `docs/training.md` lists as not supported; blocks that are not
            found; a temperature that would not be learned; or a training batch without spans.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Look at the order of the class statement."""
        super().__init_subclass__(**kwargs)
        refuse_order(cls, CarmaTrainerMixin)

    def __init__(
        self,
        *args: Any,
        carma: CarmaConfig = CarmaConfig(),  # noqa: B008 (frozen)
        carma_blocks: str | Sequence[nn.Module] | None = None,
        carma_log_layers: bool = True,
        sampled_negatives: int | None = None,
        **kwargs: Any,
    ) -> None:
        """Set the trainer up, and wrap its collator where that is no `CarmaCollator` yet."""
        refuse_trainer(type(self))
        self.carma = checked(carma)
        self.carma_blocks, self.carma_log_layers = carma_blocks, carma_log_layers
        self.sampled_negatives = sampled_negatives
        super().__init__(*args, **kwargs)
        refuse_settings(type(self).__name__, self.args, self.accelerator)
        refuse_examples(type(self).__name__, self.train_dataset)
        model: Any = self.model
        refuse_unlearned(self.carma, model, self.optimizer)
        self._find_blocks()  # or raise, now
        if not isinstance(self.data_collator, CarmaCollator):
            tokenizer = getattr(self.processing_class, "tokenizer", self.processing_class)  # a processor has one
            self.data_collator = CarmaCollator(
                self.data_collator, tokenizer if getattr(tokenizer, "is_fast", False) else None
            )
        self._tap: HiddenStateTap | None = None
        self._tapped_model: Any = None
        self._window: CarmaWindow | None = None
        self._training_losses, self._evaluation_losses = LossSums(), LossSums()
        self._steps_since_log = 0
        self._evaluation_spans: TokenSpans | None = None
        self._negatives, self._evaluation_negatives = self._new_generator(), self._new_generator()

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Tensor | int | None]:
        """As the trainer, whose batches up to the next optimizer step these are; counts their pairs over all ranks."""
        batches, num_items = super().get_batch_samples(*args, **kwargs)
        self._window = CarmaWindow.of(batches, self.accelerator, self._key)
        self._steps_since_log += 1
        return batches, num_items

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The trainer's loss, and the CARMA losses of the hidden states on the way to it."""
        inputs = dict(inputs)
        spans = inputs.pop(self._key, self._evaluation_spans)
        tap = self._tap_of_model()
        tap.no_grad = not model.training
        computed: Any = super().compute_loss(
            model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
        )
        total = task = computed[0] if return_outputs else computed
        if spans is not None:
            spans = spans.to(self.args.device, non_blocking=True)
            add_carma = self._add_to_training_loss if model.training else self._add_to_evaluation_loss
            total = add_carma(task, tap, spans, num_items_in_batch)
        elif model.training:
            raise ValueError(
                f"the training batch has no {self._key!r}: its DataLoader does not use the trainer's data_collator. "
                "Have it use CarmaCollator(collator, tokenizer)."
            )
        tap.clear()  # or the hidden states would live until the next forward
        return (total, *computed[1:]) if return_outputs else total

    def _add_to_training_loss(self, task: Tensor, tap: HiddenStateTap, spans: TokenSpans, num_items: Any) -> Tensor:
        window = self._window or CarmaWindow.of([{self._key: spans}], self.accelerator, self._key)
        pairs = self._pairs(spans, self._negatives)
        carma = window.carma_loss(tap, pairs, self.carma)
        # Trainer divides what it gets, unless it takes the task loss to be divided already; the CARMA part always is.
        divisor = self.current_gradient_accumulation_steps if self._divides_loss(num_items) else 1
        self._training_losses.add(
            task=task / divisor, mi=carma.mi_per_layer, stability=carma.stability_per_layer / window.num_batches
        )
        return total_loss(task, carma.loss * divisor, self.carma.carma_weight)

    def _add_to_evaluation_loss(self, task: Tensor, tap: HiddenStateTap, spans: TokenSpans, _: Any) -> Tensor:
        pairs = self._pairs(spans, self._evaluation_negatives)
        carma = tap.carma_loss(pairs, self.carma)
        num_sequences = spans.shape[0]
        self._evaluation_losses.add(
            task=task * num_sequences,
            mi=carma.mi_per_layer * pairs.num_pairs,
            stability=carma.stability_per_layer * num_sequences,
            num_pairs=torch.tensor(pairs.num_pairs),
            num_sequences=torch.tensor(num_sequences),
        )
        return total_loss(task, carma.loss, self.carma.carma_weight)

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> Any:
        """As the trainer, which hands a batch without labels to the model as it is: the spans must not be in it."""
        inputs = dict(inputs)
        self._evaluation_spans = inputs.pop(self._key, None)
        try:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        finally:
            self._evaluation_spans = None

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """As the trainer, with the losses among the metrics."""
        self._evaluation_negatives = self._new_generator()  # the same negatives in every evaluation
        output: Any = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        )
        sums = self._evaluation_losses.take(self.accelerator, "sum")
        if sums:
            [sequences], [pairs] = sums["num_sequences"], sums["num_pairs"]
            losses = named_losses(
                self.carma,
                sums["task"][0] / sequences,
                [loss / max(pairs, 1) for loss in sums["mi"]],
                [loss / sequences for loss in sums["stability"]],
                self.carma_log_layers,
            )
            output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in losses.items()})
        return output

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As the trainer; beside the training loss stand its parts, means over the steps since the last time."""
        if "loss" in logs and (sums := self._training_losses.take(self.accelerator, "mean")):
            means = {name: [loss / self._steps_since_log for loss in losses] for name, losses in sums.items()}
            logs.update(
                named_losses(self.carma, means["task"][0], means["mi"], means["stability"], self.carma_log_layers)
            )
            self._steps_since_log = 0
        super().log(logs, *args, **kwargs)

    @property
    def _key(self) -> str:
        collator = self.data_collator
        return collator.key if isinstance(collator, CarmaCollator) else "spans"

    def _tap_of_model(self) -> HiddenStateTap:
        """Set at the first step, after which the model stays as it is: a hyperparameter search makes new ones."""
        model: Any = self.model
        if self._tap is None or self._tapped_model is not model:
            if self._tap is not None:
                self._tap.remove()
            optimizer = None if self.is_deepspeed_enabled else self.optimizer  # which holds other tensors there
            refuse_unlearned(self.carma, model, optimizer, self.model_wrapped)
            self._tap, self._tapped_model = HiddenStateTap(model, blocks=self._find_blocks().modules), model
        return self._tap

    def _find_blocks(self) -> Blocks:
        model: Any = self.model
        if self.carma_blocks is None:
            return find_blocks(model, "carma_blocks")
        return given_blocks(model, self.carma_blocks, "carma_blocks")

    def _divides_loss(self, num_items: Any) -> bool:
        """Whether `Trainer.training_step` is going to divide the loss by the number of accumulated batches."""
        scaled = getattr(self, "loss_is_scaled_for_ga", None)  # since transformers 5.19
        if scaled is None:
            scaled = self.compute_loss_func is not None or (self.model_accepts_loss_kwargs and num_items is not None)
        return not scaled

    def _pairs(self, spans: TokenSpans, generator: torch.Generator) -> TokenSpans | PairIndex:
        return spans if self.sampled_negatives is None else spans.sample_pairs(self.sampled_negatives, generator)

    def _new_generator(self) -> torch.Generator:
        return torch.Generator(self.args.device).manual_seed(self.args.seed + self.args.process_index)

    def _negatives_file(self, checkpoint: str) -> Path:
        return Path(checkpoint, f"carma_negatives_{self.args.process_index}.pth")

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self.sampled_negatives is not None:
            torch.save(self._negatives.get_state(), self._negatives_file(output_dir))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if self.sampled_negatives is None or checkpoint is None:
            return
        file = self._negatives_file(checkpoint)
        if file.is_file():
            self._negatives.set_state(torch.load(file, weights_only=True))
        else:
            warnings.warn(f"{file} is missing: the negatives are drawn from the seed again.", stacklevel=2)

    def _set_signature_columns_if_needed(self) -> None:
        """The columns that `remove_unused_columns` leaves to the collator."""
        super()._set_signature_columns_if_needed()
        columns: Any = self._signature_columns
        columns += [column for column in COLUMNS if column not in columns]
