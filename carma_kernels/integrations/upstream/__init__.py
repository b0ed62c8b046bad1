"""Drop-in `MILoss` and `StabilityLoss` for the published CARMA code (github.com/nura-j/CARMA, commit 0106af6).

Same constructors, methods, values, gradients and draws from Python's `random`, quirks included; each has a switch.
`docs/upstream.md` lists them and says how to swap the imports.
"""

from carma_kernels.integrations.upstream.losses import MILoss, StabilityLoss

__all__ = ["MILoss", "StabilityLoss"]
