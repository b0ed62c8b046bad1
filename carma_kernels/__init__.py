"""CARMA's losses (arXiv 2502.11066) over the hidden states of a language model, fast and lean.

`mi_loss` keeps the tokens of a word together, `stability_loss` keeps consecutive layers close, `carma_loss` does both
in one pass; `TokenSpans` says which tokens form a word.
"""

from typing import TYPE_CHECKING

from carma_kernels._lazy import importer, is_command

if TYPE_CHECKING or not is_command():
    from carma_kernels._backend import choose as choose_backend
    from carma_kernels.config import CarmaConfig
    from carma_kernels.functional import (
        CarmaOutput,
        carma_loss,
        mi_loss,
        pairwise_similarity,
        stability_loss,
        total_loss,
    )
    from carma_kernels.modules import CarmaLoss, MILoss, StabilityLoss
    from carma_kernels.pairs import PairIndex
    from carma_kernels.spans import TokenSpans
else:
    __getattr__, __dir__ = importer(
        __name__,
        {
            "choose_backend": "_backend.choose",
            "CarmaConfig": "config.CarmaConfig",
            "CarmaOutput": "functional.CarmaOutput",
            "carma_loss": "functional.carma_loss",
            "mi_loss": "functional.mi_loss",
            "pairwise_similarity": "functional.pairwise_similarity",
            "stability_loss": "functional.stability_loss",
            "total_loss": "functional.total_loss",
            "CarmaLoss": "modules.CarmaLoss",
            "MILoss": "modules.MILoss",
            "StabilityLoss": "modules.StabilityLoss",
            "PairIndex": "pairs.PairIndex",
            "TokenSpans": "spans.TokenSpans",
        },
    )

__version__ = "0.1.0"

__all__ = [
    "CarmaConfig",
    "CarmaLoss",
    "CarmaOutput",
    "MILoss",
    "PairIndex",
    "StabilityLoss",
    "TokenSpans",
    "carma_loss",
    "choose_backend",
    "mi_loss",
    "pairwise_similarity",
    "stability_loss",
    "total_loss",
]
