"""What the registered operators of all backends have in common."""

from __future__ import annotations

from typing import Any


def forbid_double_backward(backward: Any, loss: str) -> None:
    """Have a gradient's gradient raise, and say why.

    Args:
        backward: the `torch.library.custom_op` that computes the gradient.
        loss: what the user called.
    """

    def refuse(*_: Any) -> Any:
        raise RuntimeError(
            f"the gradient of {loss} cannot be differentiated again: its backward is written by hand, and has none. "
            "Leave the CARMA terms out of a gradient penalty, or compute them with csrc_ref, which autograd "
            "differentiates."
        )

    backward.register_autograd(refuse)
