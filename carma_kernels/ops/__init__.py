"""The Triton backend: allocate, launch, and register the operators and their backward.

Same functions as `carma_kernels.eager`. Importing it imports Triton.
"""

from carma_kernels.ops.carma import carma_terms, carma_terms_and_gradients
from carma_kernels.ops.similarity import pairwise_similarity
from carma_kernels.ops.usable import kernels_for, takes

__all__ = ["carma_terms", "carma_terms_and_gradients", "kernels_for", "pairwise_similarity", "takes"]
