"""What would be another number, or none, is refused by name, when the trainer is made or before."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trl
from accelerate.parallelism_config import ParallelismConfig
from datasets import Dataset
from transformers import Trainer

from carma_kernels.integrations.transformers import CarmaTrainerMixin
from carma_kernels.integrations.transformers.unsupported import refuse_settings
from tests.integration.trainer.test_sft import sft
from tests.integration.trainer.toys import CarmaTrainer, arguments, trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),
    # TRL's own, of packing without the attention for it
    pytest.mark.filterwarnings("ignore:.*will be removed in v2.0.0:FutureWarning"),
]


@pytest.mark.parametrize(
    ("bases", "right"),
    [
        ((Trainer, CarmaTrainerMixin), "CarmaTrainerMixin, Trainer"),
        ((trl.SFTTrainer, CarmaTrainerMixin), "CarmaTrainerMixin, SFTTrainer"),
        ((trl.SFTTrainer, CarmaTrainer), "CarmaTrainer, SFTTrainer"),
    ],
)
def test_a_mixin_after_the_trainer(bases: tuple[type, ...], right: str) -> None:
    """It would train without CARMA, and not say so."""
    with pytest.raises(TypeError, match=rf"must come before the trainer.*class Late\({right}\)"):
        type("Late", bases, {})


class LossOfTheirs:
    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(*args, **kwargs)  # type: ignore[misc]


@pytest.mark.parametrize("bases", [(LossOfTheirs, CarmaTrainerMixin, Trainer), (CarmaTrainer, trl.SFTTrainer)])
def test_what_may_come_before_it(bases: tuple[type, ...]) -> None:
    assert issubclass(type("Fine", bases, {}), CarmaTrainerMixin)


@pytest.mark.parametrize("name", [name for name in dir(trl) if name.endswith("Trainer") and name != "SFTTrainer"])
def test_trainers_whose_examples_are_no_texts(name: str) -> None:
    """Before it reads a model or data."""
    kind: Any = type("Own", (CarmaTrainerMixin, getattr(trl, name)), {})
    with pytest.raises(ValueError, match=f"Own is a {name}, which is not supported. Preference data.*no input_ids"):
        kind("a model")


def test_a_trainer_that_makes_its_texts() -> None:
    """As TRL's GKDTrainer, though it is an `SFTTrainer`."""
    theirs = type("GKDTrainer", (trl.SFTTrainer,), {"__module__": "trl.experimental.gkd.gkd_trainer"})
    kind: Any = type("Own", (CarmaTrainerMixin, theirs), {})
    with pytest.raises(ValueError, match="Own is a GKDTrainer, which is not supported"):
        kind("a model")


@pytest.mark.parametrize("columns", [("chosen", "rejected"), ("prompt_ids", "chosen_ids"), ("input_ids_rejected",)])
def test_preference_data_in_a_trainer_of_ones_own(columns: tuple[str, ...], tmp_path: Path) -> None:
    data = Dataset.from_dict({column: [[1]] for column in columns})
    with pytest.raises(ValueError, match=f"InOrder got a data set with the columns .*{columns[0]}.*no input_ids"):
        trainer(tmp_path, train_dataset=data)


@pytest.mark.parametrize(
    "options",
    [
        {"packing": True, "max_length": 32, "per_device_train_batch_size": 1},
        {"packing": True, "max_length": 32, "packing_strategy": "wrapped"},
        {"packing": True, "max_length": 32, "packing_strategy": "bfd_split"},
        {"padding_free": True},
        {"eval_packing": True, "max_length": 32},
    ],
    ids=str,
)
def test_packed_batches(options: dict[str, Any], tmp_path: Path) -> None:
    """Of one row too, which is as many rows as examples."""
    option = next(iter(options))
    with pytest.raises(ValueError, match=f"got {option}=True.*not supported yet.*Set {option}=False"):
        sft(tmp_path, **options)


def test_data_parallel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its replicas run without hooks."""
    monkeypatch.setattr(type(arguments(tmp_path)), "n_gpu", 2)
    with pytest.raises(ValueError, match=r"nn\.DataParallel.*torchrun"):
        trainer(tmp_path)


@pytest.mark.parametrize(("option", "kind"), [("cp_size", "context"), ("sp_size", "sequence"), ("tp_size", "tensor")])
def test_hidden_states_in_parts(option: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However Accelerate was told: in the arguments, or by variables of the environment."""
    parallel = ParallelismConfig(**{option: 2})
    told = SimpleNamespace(n_gpu=1, parallelism_config=parallel)
    with pytest.raises(ValueError, match=f"Own does not support {kind} parallelism, got {option}=2"):
        refuse_settings("Own", told, SimpleNamespace())
    refuse_settings("Own", SimpleNamespace(n_gpu=1, parallelism_config=ParallelismConfig()), SimpleNamespace())

    def created(self: Trainer) -> None:  # no such run is possible in one process
        create(self)
        self.accelerator.state.parallelism_config = parallel

    create = Trainer.create_accelerator_and_postprocess
    monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", created)
    with pytest.raises(ValueError, match=f"does not support {kind} parallelism, got {option}=2"):
        trainer(tmp_path)
