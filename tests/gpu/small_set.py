"""Every kernel once, on problems so small that compute-sanitizer is through with them in minutes."""

from __future__ import annotations

import argparse

import torch

import carma_kernels as ck
from carma_kernels import CarmaConfig, TokenSpans

DTYPES = ("float32", "float16", "bfloat16")
LENGTHS = (13, 70, 131)  # one tile, several rows of tiles, and the path for long sequences


def main() -> None:
    """Forward and backward, odd sizes throughout."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.small_set", description=__doc__)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS)
    asked = parser.parse_args()
    for dtype in (getattr(torch, name) for name in asked.dtypes):
        for T in asked.lengths:
            spans = TokenSpans.from_lists([[(1, 4), (T - 3, T)], [(0, 2)]], seq_len=T)
            pairs = spans.sample_pairs(3, torch.Generator().manual_seed(0)).to("cuda")
            spans = spans.to("cuda")
            hidden = [torch.randn(2, T, 33, device="cuda", dtype=dtype, requires_grad=True) for _ in range(3)]
            temperature = torch.tensor(0.1, device="cuda", requires_grad=True)
            config = CarmaConfig(temperature=temperature, match_negatives=5)
            mask = spans.attention_mask
            sum(
                [
                    ck.carma_loss(hidden, spans, config, mask=mask, backend="triton").loss,
                    ck.mi_loss(hidden, spans, negatives="batch", metric="dot", temperature=9.0, backend="triton"),
                    ck.carma_loss(hidden, pairs, mask=mask, backend="triton").loss,
                    ck.stability_loss(hidden, backend="triton"),
                    ck.pairwise_similarity(hidden, mask=mask, backend="triton").square().sum(),
                ]
            ).backward()
            assert all(layer.grad is not None and layer.grad.isfinite().all() for layer in hidden)


if __name__ == "__main__":
    main()
