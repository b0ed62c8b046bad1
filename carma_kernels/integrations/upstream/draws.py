"""Random numbers as Python's `random` would give them one by one, all at once."""

from __future__ import annotations

import random

import numpy as np
from numpy.typing import NDArray


def draw_uniform(shape: tuple[int, ...], source: random.Random | None = None) -> NDArray[np.float64]:
    """What as many calls of `source.random()` return, in C order; the source is left as those calls would leave it.

    Python and numpy run the same Mersenne Twister, and make a double of two of its words in the same way: the state is
    lent to numpy and handed back.

    Args:
        shape: of the result.
        source: None for Python's global generator, the one behind `random.random()`.
    """
    get, put = (random.getstate, random.setstate) if source is None else (source.getstate, source.setstate)
    version, words, next_gauss = get()  # 624 words of the twister, then the place among them
    twister = np.random.MT19937(0)
    twister.state = {
        "bit_generator": "MT19937",
        "state": {"key": np.array(words[:-1], dtype=np.uint32), "pos": words[-1]},
    }
    drawn = np.random.Generator(twister).random(shape)
    state = twister.state["state"]
    put((version, (*state["key"].tolist(), int(state["pos"])), next_gauss))
    return drawn
