"""The kernels that calls of the public functions launch, and whether the compile tool compiles them: JSON lines.

Run as a process of its own, in which Triton is no interpreter; nothing is compiled.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from itertools import product

import torch
from torch import Tensor

import carma_kernels as ck
from carma_kernels.ops import compile

TARGET, B, L, D = "sm_90", 2, 3, 768


class Named(compile.Compiler):
    """Names kernels, and compiles none."""

    def _compile(self, *_: object) -> str:
        return "not compiled"


def calls(T: int) -> Iterator[tuple[str, Callable[[list[Tensor]], Tensor]]]:
    """Each option of each loss with each other, of sequences of this length."""
    mask = torch.ones(B, T, dtype=torch.int64)
    mask[1, -2:] = 0
    words = [[(s, s + 3) for s in range(0, T - 5, 8)]] * B
    spans = ck.TokenSpans.from_lists(words, seq_len=T, attention_mask=mask)
    yield "stability_loss", lambda h: ck.stability_loss(h, backend="triton")
    yield "stability_loss masked", lambda h: ck.stability_loss(h, mask=mask, backend="triton")
    for metric, learned, matched in product(("cosine", "dot"), (True, False), (None, 5)):
        tau = torch.tensor(0.1, requires_grad=True) if learned else 0.1
        name = f"{metric} {'learned' if learned else 'fixed'} {matched}"
        for negatives in ("sequence", "batch"):
            config = ck.CarmaConfig(metric=metric, temperature=tau, match_negatives=matched, negatives=negatives)
            yield f"carma_loss {name} {negatives}", _carma(spans, config, None)
            yield f"carma_loss all {name} {negatives}", _carma(spans, config, "all")
            yield f"mi_loss {name} {negatives}", _mi(spans, config)
        if matched is None:
            config, pairs = ck.CarmaConfig(metric=metric, temperature=tau), spans.sample_pairs(5)
            yield f"carma_loss listed {name}", _carma(pairs, config, None)
            yield f"carma_loss listed all {name}", _carma(pairs, config, "all")
            yield f"mi_loss listed {name}", _mi(pairs, config)
            yield f"mi_loss listed by layer {name}", _mi(spans.sample_pairs(5, num_layers=L), config)
            for given in (None, mask):
                yield f"similarity {name} {given is not None}", _similarity(config, given)


def _carma(words: ck.TokenSpans | ck.PairIndex, config: ck.CarmaConfig, mask: str | None) -> Callable[..., Tensor]:
    return lambda h: ck.carma_loss(h, words, config, mask=mask, backend="triton").loss


def _mi(words: ck.TokenSpans | ck.PairIndex, config: ck.CarmaConfig) -> Callable[..., Tensor]:
    options = {"match_negatives": config.match_negatives, "negatives": config.negatives}
    chosen = options if isinstance(words, ck.TokenSpans) else {}
    return lambda h: ck.mi_loss(
        h, words, metric=config.metric, temperature=config.temperature, backend="triton", **chosen
    )


def _similarity(config: ck.CarmaConfig, mask: Tensor | None) -> Callable[..., Tensor]:
    options = {"metric": config.metric, "temperature": config.temperature, "mask": mask}
    return lambda h: ck.pairwise_similarity(h, backend="triton", **options).sum()


def main() -> None:
    for dtype in compile.DTYPES:
        compiler = Named(TARGET)
        known = {
            (row.kernel, row.arguments)
            for problem in compile.problems(subset=False).values()
            for row in compiler.compile(problem, dtype)
        }
        for T in (8, 30, 58, 124, 300):
            for call, run in calls(T):
                hidden = [torch.zeros(B, T, D, dtype=dtype, requires_grad=True) for _ in range(L)]
                with compiler._recorded() as launches:
                    run(hidden).backward()
                for kernel, _, options in launches:
                    constants = compile.constants(options)
                    row = {"call": f"{call} T={T} {dtype}", "kernel": kernel.__name__, "constants": constants}
                    sys.stdout.write(json.dumps({**row, "compiled": (kernel.__name__, constants) in known}) + "\n")


if __name__ == "__main__":
    main()
