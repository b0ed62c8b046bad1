"""Constituent-aware pooling: how much of a model's accuracy is left when the tokens of a word are made one?"""

from carma_kernels.cap.intervention import constituent_pooling
from carma_kernels.cap.synonyms import read_synonyms, replace_synonyms

__all__ = ["constituent_pooling", "read_synonyms", "replace_synonyms"]
