"""Several texts in one row: a sequence to the losses, in which texts would take each other's tokens for negatives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

TURN_PACKING_OFF = (
    "in a packed or padding-free batch texts take each other's tokens for negatives. Turn that off (packing=False, "
    "padding_free=False, no DataCollatorWithFlattening)."
)


def refuse_packed_example(number: int, example: Mapping[str, Any]) -> None:
    """Look at what TRL leaves in the examples of a data set that it has packed.

    Raises:
        ValueError: the example holds several texts.
    """
    lengths, positions = example.get("seq_lengths"), example.get("position_ids")
    if lengths is not None and len(lengths) > 1:
        raise ValueError(f"example {number} holds {len(lengths)} texts (its seq_lengths): {TURN_PACKING_OFF}")
    if positions is not None and _starts_again(np.asarray(positions)):
        raise ValueError(f"example {number} holds several texts (its position_ids start again): {TURN_PACKING_OFF}")


def refuse_packed_batch(batch: Mapping[str, Any], valid: Tensor) -> None:
    """Look at what a batch on the host tells attention of the texts in its rows.

    Args:
        batch: what a collator returned.
        valid: `[B, T]` bool, its valid tokens.

    Raises:
        ValueError: some row holds several texts.
    """
    B = len(valid)
    for name in ("cu_seq_lens_q", "cu_seq_lens_k", "seq_lengths"):
        texts = 0 if batch.get(name) is None else _count(name, batch[name])
        if texts > B:
            raise ValueError(f"{name} says that the batch holds {texts} texts in {B} sequence(s): {TURN_PACKING_OFF}")
    for name, tells in (("position_ids", _starts_again), ("seq_idx", _changes), ("attention_mask", _changes)):
        rows = np.asarray(batch[name]) if batch.get(name) is not None else np.empty(0)
        if rows.shape != tuple(valid.shape):  # [1, T] for all rows, [3, B, T] of a vision model, a mask of token pairs
            continue
        for b, (row, mask) in enumerate(zip(rows, valid.numpy(), strict=True)):
            if tells(row[mask]):
                raise ValueError(f"sequence {b} of the batch holds several texts (its {name}): {TURN_PACKING_OFF}")


def _count(name: str, value: Any) -> int:
    if name == "seq_lengths":
        return sum(np.asarray(lengths).size for lengths in value)
    return len(value) - 1


def _starts_again(positions: np.ndarray) -> bool:
    return positions.ndim == 1 and bool((np.diff(positions) <= 0).any())


def _changes(numbers: np.ndarray) -> bool:
    return bool((np.diff(numbers) != 0).any())
