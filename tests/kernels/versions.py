"""Every loss on random batches, with what a launch would compile counted instead, by Triton's own keys: JSON lines.

Run as a process of its own, in which Triton is no interpreter. The batches differ in all that a user's may: sequences,
tokens, words, padding, pairs, and the address at which a mask or an upstream gradient begins.
"""

from __future__ import annotations

import json
import random
import sys
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

import carma_kernels as ck
from carma_kernels import CarmaConfig, TokenSpans, _runtime

L, D, K = 3, 64, 3
LENGTHS = (16, 32, 64, 128, 260)  # the longest of each kind of group; a group of a batch may be longer
Loss = Callable[[list[Tensor], TokenSpans, Tensor], Tensor]


def anywhere(tensor: Tensor) -> Tensor:
    """A contiguous copy that begins at any address its elements may have."""
    start = random.randrange(16)
    place = torch.empty(start + tensor.numel(), dtype=tensor.dtype)[start:]
    return place.view(tensor.shape).copy_(tensor)


def carma(hidden: list[Tensor], spans: Any, mask: Tensor | None, **config: Any) -> Tensor:
    return ck.carma_loss(hidden, spans, CarmaConfig(**config), mask=mask, backend="triton").loss


def mi(hidden: list[Tensor], spans: Any, **options: Any) -> Tensor:
    losses = ck.mi_loss(hidden, spans, reduction="none", backend="triton", **options)
    return (losses * anywhere(torch.ones(L))).sum()


LOSSES: dict[str, Loss] = {
    "carma": lambda h, spans, mask: carma(h, spans, mask),
    "carma, no mask": lambda h, spans, _: carma(h, spans, None),
    "carma, batch": lambda h, spans, mask: carma(h, spans, mask, negatives="batch", match_negatives=5),
    "carma, listed": lambda h, spans, mask: carma(h, spans.sample_pairs(K), mask),
    "carma, dense": lambda h, spans, mask: carma(h, spans, mask),
    "mi": lambda h, spans, _: mi(h, spans),
    "mi, dot, learned": lambda h, spans, _: mi(h, spans, metric="dot", temperature=anywhere(torch.ones(())).squeeze()),
    "mi, listed by layer": lambda h, spans, _: mi(h, spans.sample_pairs(K, num_layers=L)),
    "stability": lambda h, _, mask: ck.stability_loss(h, mask=mask, backend="triton"),
    "stability of all": lambda h, *_: ck.stability_loss(h, backend="triton"),
    "similarity": lambda h, _, mask: similarity(h, mask),
}


def similarity(hidden: list[Tensor], mask: Tensor) -> Tensor:
    matrix = ck.pairwise_similarity(hidden, mask=mask, backend="triton")
    upstream = anywhere(torch.ones(matrix.shape))
    matrix.backward(upstream)
    return sum(layer.sum() for layer in hidden)  # type: ignore[return-value]


def upstream_of_any_kind() -> None:
    """What arrives for the layers comes as one number for all or one each, with any stride and factor."""
    from carma_kernels.ops.layers import Upstream

    arguments = Upstream.arguments.fget  # type: ignore[attr-defined]

    def varied(given: Upstream) -> Any:
        stride = random.choice([0, 1, 2, 16])
        grad = anywhere(torch.zeros(stride * given.grad.numel() + 1))
        grads = grad.as_strided(given.grad.shape, (stride,) * given.grad.dim(), grad.storage_offset())
        return arguments(Upstream(random.choice([grad[0], grads]), random.choice([1.0, 0.3, 16.0])))

    Upstream.arguments = property(varied)  # type: ignore[method-assign, assignment]


def batch(B: int, T: int, wordless: bool = False) -> tuple[list[Tensor], TokenSpans, Tensor]:
    valid = torch.arange(T) < torch.tensor([random.randint(max(1, T // 2), T) for _ in range(B)])[:, None]
    words = []
    for row in valid:
        at, spans = 0, []
        while not wordless and (end := at + random.randint(2, 5)) <= int(row.sum()):
            spans.append((at, end))
            at = end + random.randint(0, 6)
        words.append(spans)
    hidden = [torch.zeros(B, T, D, dtype=torch.bfloat16, requires_grad=True) for _ in range(L)]
    return hidden, TokenSpans.from_lists(words, seq_len=T, attention_mask=valid), anywhere(valid)


class Driver:
    """What a launch asks of a driver before it compiles."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int) -> int:
        return 0


def main() -> None:
    from carma_kernels.kernels import launch as table
    from carma_kernels.ops import mi_dense

    compiled: dict[str, set[str]] = defaultdict(set)  # by kernel

    def compile_nothing(kernel: Any, key: str, _signature: Any, device: int, *_: Any) -> object:
        compiled[kernel.__name__].add(key)
        return kernel.device_caches[device][0].setdefault(key, object())

    def launch(kernel: Any, grid: Any, *arguments: Any, **options: Any) -> None:
        kernel.run(*arguments, grid=grid, warmup=True, **options)

    triton.runtime.driver.set_active(Driver())
    triton.JITFunction._do_compile = compile_nothing
    _runtime.target = lambda _device: _runtime.TARGETS["sm_90"]
    _runtime.launch = launch
    mi_dense.SHORTEST = 129
    random.seed(0)
    upstream_of_any_kind()
    batches = int(sys.argv[1])
    for name, loss in LOSSES.items():
        compiled.clear()
        table.LONG_PATH = "dense" if name == "carma, dense" else "tiles"
        for kernel in kernels():
            kernel.device_caches.clear()
        for T in LENGTHS:  # the first of each kind
            for B in (1, 2):
                loss(*batch(B, T)).backward()
        loss(*batch(2, 8, wordless=True)).backward()
        first = {kernel: set(keys) for kernel, keys in compiled.items()}
        for _ in range(batches):
            T = random.choice([random.randint(2, 128), random.randint(129, 260)])
            loss(*batch(random.randint(1, 5), T)).backward()
        for kernel, keys in compiled.items():
            later = len(keys - first.get(kernel, set()))
            sys.stdout.write(json.dumps({"loss": name, "kernel": kernel, "versions": len(keys), "later": later}) + "\n")


def kernels() -> list[Any]:
    from carma_kernels.kernels import mi, mi_backward, mi_dense, pairs, short, similarity, stability

    return [
        value
        for module in (mi, mi_backward, mi_dense, pairs, short, similarity, stability)
        for name, value in vars(module).items()
        if name.endswith("_kernel")
    ]


if __name__ == "__main__":
    main()
