"""CARMA with Hugging Face and TransformerLens models.

`HiddenStateTap` captures what their blocks return, `CarmaCollator` finds the words of a batch, `CarmaTrainerMixin` and
`CarmaWindow` put the losses into a `Trainer` and into loops of your own.
"""

from carma_kernels.integrations.transformers.collator import CarmaCollator
from carma_kernels.integrations.transformers.tap import HiddenStateTap
from carma_kernels.integrations.transformers.trainer import CarmaTrainerMixin
from carma_kernels.integrations.transformers.window import CarmaWindow

__all__ = ["CarmaCollator", "CarmaTrainerMixin", "CarmaWindow", "HiddenStateTap"]
