"""The CARMA losses as a definition to read: plain PyTorch under autograd, the oracle of every faster version.

Each function loops over layers, sequences, words and pairs as the formulas of the paper (arXiv 2502.11066) do, in
fp64 for fp64 inputs and in fp32 otherwise. Nothing here depends on `carma_kernels`, whose functions take the same
parameters and one more, `backend`. Options are checked; tensors only where a mistake would go unnoticed.
"""

from csrc_ref.carma import CarmaConfig, CarmaOutput, carma_loss
from csrc_ref.mi import mi_loss
from csrc_ref.similarity import pairwise_similarity
from csrc_ref.stability import stability_loss

__all__ = ["CarmaConfig", "CarmaOutput", "carma_loss", "mi_loss", "pairwise_similarity", "stability_loss"]
