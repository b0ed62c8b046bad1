"""The torch backend: lean PyTorch with a hand-written backward, for CPUs, MPS and wherever Triton is not.

A few layers at a time, as many as suit the device (`layers.py`), in fp32 (fp64 for fp64 inputs), so the workspace does
not grow with L; between forward and backward only a few numbers a token are kept.
"""

from carma_kernels.eager.carma import carma_terms, carma_terms_and_gradients
from carma_kernels.eager.similarity import pairwise_similarity

__all__ = ["carma_terms", "carma_terms_and_gradients", "pairwise_similarity"]
