"""Time and peak memory of both CARMA losses, `gamma * L_MI + eta * L_Stability`, for every provider and workload."""

from __future__ import annotations

import random
import time
from dataclasses import asdict

import pytest

from bench import check
from bench.providers import PROVIDERS
from carma_kernels.measure import peak_memory, synchronize


@pytest.mark.parametrize("provider", PROVIDERS, ids=str)
@pytest.mark.parametrize("passes", ["forward", "forward+backward"])
def test_carma_loss(benchmark, workload, provider, passes, device):
    case = workload.build(device=device)
    loss = provider.prepare(case)

    def step() -> check.Result:
        result = check.run(loss, case.hidden_states, backward=passes == "forward+backward")
        synchronize(device)
        return result

    check.check_part(provider, workload, device)
    results = []
    random.seed(0)
    start = time.perf_counter()
    memory = peak_memory(lambda: results.append(step()), device)
    seconds = time.perf_counter() - start  # the watch slows down what allocates often
    check.check_whole(results.pop(), provider, workload)

    benchmark.extra_info.update(
        provider=provider.name,
        semantics=provider.semantics,
        passes=passes,
        workload=asdict(workload),
        num_pairs=case.num_pairs,
        hidden_bytes=case.nbytes,
        peak_bytes=memory,
    )
    random.seed(0)
    benchmark.pedantic(step, rounds=_rounds(seconds), warmup_rounds=1 if seconds < 10 else 0)


def _rounds(seconds: float) -> int:
    """As many as fit into some five seconds, 5 to 50; one for what takes longer than ten."""
    return 1 if seconds > 10 else max(5, min(50, int(5 / seconds)))
