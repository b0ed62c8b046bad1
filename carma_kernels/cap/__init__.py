"""Constituent-aware pooling: how much of a model's accuracy is left when the tokens of a word are made one?"""

from typing import TYPE_CHECKING

from carma_kernels._lazy import importer

if TYPE_CHECKING:
    from carma_kernels.cap.intervention import constituent_pooling
    from carma_kernels.cap.synonyms import read_synonyms, replace_synonyms
else:
    __getattr__, __dir__ = importer(
        __name__,
        {
            "constituent_pooling": "intervention.constituent_pooling",
            "read_synonyms": "synonyms.read_synonyms",
            "replace_synonyms": "synonyms.replace_synonyms",
        },
    )

__all__ = ["constituent_pooling", "read_synonyms", "replace_synonyms"]
