"""Models with two lists of blocks, trained in fp64: the losses are the oracle's, of what plain hooks on them see."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import carma_kernels as ck
import csrc_ref
from tests.integration.tap.models import (
    ENCODER_DECODERS,
    IMAGE_TOKEN,
    IMAGE_TOKENS,
    LAYERS,
    WITH_VISION,
    build_encoder_decoder,
    build_with_vision,
    hand_placed,
)
from tests.integration.trainer.toys import Gradients, assert_same, gradients, trainer

OPTIONS: dict[str, Any] = {"carma_weight": 0.3, "mi_layers": (0, 1), "stability_layers": (0, 1)}
TEXTS = [[(1, 3), (4, 7)], [(0, 2), (2, 5)], [(1, 3), (3, 5)], [(0, 3), (5, 8)]]
LENGTHS = [8, 6, 7, 8]
"""Words, and tokens, of texts of random tokens."""

Batch = dict[str, Tensor]
Extras = Callable[[Batch], Batch]


def examples(image: bool = False) -> list[dict[str, Any]]:
    """Each with an image before the text, if asked for."""
    generator = torch.Generator().manual_seed(0)
    before = IMAGE_TOKENS * image
    chosen = []
    for words, length in zip(TEXTS, LENGTHS, strict=True):
        ids = torch.randint(3, IMAGE_TOKEN - 1, (length,), generator=generator).tolist()
        word_ids: list[int | None] = [None] * length
        for word, (start, end) in enumerate(words):
            word_ids[start:end] = [word] * (end - start)
        chosen.append({"input_ids": [IMAGE_TOKEN] * before + ids, "word_ids": [None] * before + word_ids})
    return chosen


def collated(chosen: list[dict[str, Any]], extras: Extras) -> Batch:
    """With padding on the right, and what the model needs beside the text."""
    T = max(len(example["input_ids"]) for example in chosen)
    ids = torch.tensor([example["input_ids"] + [0] * (T - len(example["input_ids"])) for example in chosen])
    read = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    return {**read, "labels": ids.masked_fill((ids == 0) | (ids == IMAGE_TOKEN), -100), **extras(read)}


def losses(model: nn.Module, path: str, batch: Batch, before: int, rows: slice) -> tuple[Tensor, dict[str, float]]:
    """The total, and its parts."""
    config, seen = csrc_ref.CarmaConfig(**OPTIONS), hand_placed(model.get_submodule(path))
    task = model(**batch).loss
    states = [output[0] if isinstance(output, tuple) else output for output in seen]
    words = [[(start + before, end + before) for start, end in text] for text in TEXTS[rows]]
    mask = batch["attention_mask"]
    spans = ck.TokenSpans.from_lists(words, seq_len=mask.shape[1], attention_mask=mask)
    carma = csrc_ref.carma_loss(states, spans, config, mask=mask)
    total = (1 - config.carma_weight) * task + config.carma_weight * carma.loss
    named = {"loss": total, "task_loss": task, "mi_loss": carma.mi, "stability_loss": carma.stability}
    return total, {name: loss.item() for name, loss in named.items()}


def assert_trained(
    folder: Path, build: Callable[[], nn.Module], path: str, image: bool, extras: Extras, **options: Any
) -> None:
    """Two steps of two texts, each with the gradient and the losses of an own computation."""
    seen, every = Gradients(), examples(image)
    one = trainer(
        folder,
        model=build().double(),
        train_dataset=every,
        data_collator=partial(collated, extras=extras),
        carma=ck.CarmaConfig(**OPTIONS),
        callbacks=[seen],
        **options,
    )
    one.train()
    assert len(seen.steps) == 2
    for step, (actual, logs) in enumerate(zip(seen.steps, one.state.log_history, strict=False)):
        rows = slice(2 * step, 2 * step + 2)
        reference = build().double()
        total, expected = losses(reference, path, collated(every[rows], extras), IMAGE_TOKENS * image, rows)
        assert {name: logs[name] for name in expected} == pytest.approx(expected, rel=1e-6)  # logged in fp32
        total.backward()
        assert_same(actual, gradients(reference))


def nothing(_: Batch) -> Batch:
    return {}


def same_tokens(batch: Batch) -> Batch:
    """The decoder reads what the encoder reads, so that the words are those of both."""
    return {"decoder_input_ids": batch["input_ids"]}


@pytest.mark.parametrize("side", ["encoder", "decoder"])
@pytest.mark.parametrize("family", ["t5", "bart"])
def test_an_encoder_or_a_decoder(family: str, side: str, tmp_path: Path) -> None:
    path = ENCODER_DECODERS[family][side == "decoder"]
    build = partial(build_encoder_decoder, family, 3, 2)
    assert_trained(tmp_path, build, path, False, same_tokens, carma_blocks=path)


def pixels(batch: Batch) -> Batch:
    B = len(batch["input_ids"])
    return {"pixel_values": _noise(B, 3, 8, 8)}


def patches(batch: Batch) -> Batch:
    """Two by two of which are one token."""
    B, own = len(batch["input_ids"]), (1, 4, 4)  # in time, height and width
    grid = {"image_grid_thw": torch.tensor([own] * B), "mm_token_type_ids": _is_image(batch)}
    return {"pixel_values": _noise(B * 16, 3 * 2 * 4 * 4), **grid}


def _noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def _is_image(batch: Batch) -> Tensor:
    return (batch["input_ids"] == IMAGE_TOKEN).int()


IMAGES: dict[str, Extras] = {
    "llava": pixels,
    "gemma3": lambda batch: {**pixels(batch), "token_type_ids": _is_image(batch)},
    "qwen2_vl": patches,
}


@pytest.mark.parametrize("image", [False, True])
@pytest.mark.parametrize("family", WITH_VISION)
def test_a_model_that_sees(family: str, image: bool, tmp_path: Path) -> None:
    """The tokens of an image are valid ones in no word: negatives."""
    typed = (lambda batch: {"token_type_ids": _is_image(batch)}) if family == "gemma3" else nothing
    build = partial(build_with_vision, family, LAYERS)
    assert_trained(tmp_path, build, "model.language_model.layers", image, IMAGES[family] if image else typed)


def test_the_error_says_what_the_trainers_user_can_do(tmp_path: Path) -> None:
    """When the trainer is made."""
    model = build_encoder_decoder("bart", 4, 2)
    with pytest.raises(ValueError, match=r"carma_blocks='model.encoder.layers' or carma_blocks='model.decoder.layers'"):
        trainer(tmp_path, model=model)


def test_models_that_are_made_anew(tmp_path: Path) -> None:
    """As for each trial of a hyperparameter search: the path holds in each, modules in the first."""
    build = lambda: build_encoder_decoder("t5", 3, 2)  # noqa: E731 (Trainer counts the arguments)
    path = ENCODER_DECODERS["t5"][1]
    options: dict[str, Any] = {
        "model_init": build,
        "train_dataset": examples(),
        "data_collator": partial(collated, extras=same_tokens),
        "carma": ck.CarmaConfig(**OPTIONS),
    }
    one = trainer(tmp_path, carma_blocks=path, **options)
    one.train()
    first = one.model
    one.train()
    assert one.model is not first
    assert one.state.log_history[0]["mi_loss"] > 0
    with pytest.raises(ValueError, match=r"carma_blocks must be parts of model.*model_init.*carma_blocks='path"):
        trainer(tmp_path, carma_blocks=list(build().get_submodule(path)), **options)
