"""The published classes with swapped imports: time and memory beside other implementations, and what is promised."""

from __future__ import annotations

import random
import time
from dataclasses import asdict
from statistics import median
from types import SimpleNamespace

import pytest
import torch

from bench import check, published
from bench.floor import costs
from bench.providers import Loss, Provider
from bench.workloads import PAPER, TINY, Case, Workload
from carma_kernels.integrations.upstream import MILoss, StabilityLoss
from carma_kernels.measure import peak_memory, synchronize

DENSE = next(workload for workload in PAPER if workload.B == 16 and workload.words == "dense")


def _drop_in(case: Case) -> Loss:
    spans = [[SimpleNamespace(start_idx=start, end_idx=end) for start, end in words] for words in case.spans]
    mi, stability = MILoss(end_layer=None), StabilityLoss(end_layer=None)

    def loss(hidden_states):
        cache = {f"transformer.h.{layer}": (h,) for layer, h in enumerate(hidden_states)}
        of_mi, of_stability = mi.calculate_mi_loss(cache, spans), stability.calculate_loss(cache)
        return published.MI_WEIGHT * of_mi + published.STABILITY_WEIGHT * of_stability

    return loss


DROP_IN = Provider("integrations.upstream", "published", _drop_in)


@pytest.mark.parametrize("passes", ["forward", "forward+backward"])
@pytest.mark.parametrize("batch", [*(pytest.param(tiny, marks=pytest.mark.smoke) for tiny in TINY), *PAPER], ids=str)
def test_drop_in(benchmark, batch: Workload, passes: str, device: torch.device):
    check.check_part(DROP_IN, batch, device, torch.float32)
    case = batch.build(device=device)
    loss = DROP_IN.prepare(case)

    def step() -> check.Result:
        result = check.run(loss, case.hidden_states, backward=passes == "forward+backward")
        synchronize(device)
        return result

    results = []
    random.seed(0)
    memory = peak_memory(lambda: results.append(step()), device)
    check.check_whole(results.pop(), DROP_IN, batch, device, torch.float32)

    benchmark.extra_info.update(
        provider=DROP_IN.name,
        semantics=DROP_IN.semantics,
        passes=passes,
        workload=asdict(batch),
        dtype="float32",
        num_pairs=case.num_pairs,
        hidden_bytes=case.nbytes,
        peak_bytes=memory,
        floor=[asdict(of_pass) for of_pass in costs(batch, 4, passes)],
        compile_seconds=None,
        graph_seconds=None,
    )
    random.seed(0)
    benchmark.pedantic(step, rounds=20, warmup_rounds=2)


@pytest.mark.smoke
@pytest.mark.parametrize("tiny", TINY, ids=str)
def test_values_gradients_and_draws(tiny: Workload):
    case = tiny.build(dtype=torch.float64)
    ends = []
    results = []
    for loss in (DROP_IN.prepare(case), lambda h: published.carma_loss(h, case.spans)):
        random.seed(0)
        results.append(check.run(loss, case.hidden_states, backward=True))
        ends.append(random.getstate())
    check.assert_close(*results, tolerance=1e-12)
    assert ends[0] == ends[1]


@pytest.mark.parametrize("batch", PAPER, ids=str)
def test_what_is_promised(batch: Workload, device: torch.device):
    """Forward + backward: 200 times as fast with dense words and B = 16, and nowhere slower."""
    case = batch.build(device=device)

    def seconds(loss: Loss, rounds: int) -> float:
        times = []
        for _ in range(rounds):
            random.seed(0)
            start = time.perf_counter()
            check.run(loss, case.hidden_states, backward=True)
            synchronize(device)
            times.append(time.perf_counter() - start)
        return median(times)

    ours = seconds(DROP_IN.prepare(case), 9)
    theirs = seconds(lambda h: published.carma_loss(h, case.spans), 1 if batch.B > 1 else 9)
    assert theirs >= (200 if batch == DENSE else 1) * ours, f"{theirs / ours:.3g} times as fast"
