"""Time and peak memory of both CARMA losses, `gamma * L_MI + eta * L_Stability`, for every provider and workload."""

from __future__ import annotations

import random
import time
from dataclasses import asdict

import pytest
import torch

from bench import check, on_gpu
from bench.floor import costs
from carma_kernels.measure import peak_memory, synchronize


def test_carma_loss(benchmark, workload, provider, passes, device, dtype):
    check.check_part(provider, workload, device, dtype)
    case = workload.build(device=device, dtype=dtype, values=dtype)
    loss = provider.prepare(case)

    def run() -> check.Result:
        return check.run(loss, case.hidden_states, backward=passes == "forward+backward")

    def step() -> check.Result:
        result = run()
        synchronize(device)
        return result

    start = time.perf_counter()
    if provider.compiles:
        step()
    first_call = time.perf_counter() - start

    results = []
    random.seed(0)
    start = time.perf_counter()
    memory = peak_memory(lambda: results.append(step()), device)
    seconds = time.perf_counter() - start  # the watch slows down what allocates often
    check.check_whole(results.pop(), provider, workload, device, dtype)

    cost = costs(workload, dtype.itemsize, passes)
    benchmark.extra_info.update(
        provider=provider.name,
        semantics=provider.semantics,
        passes=passes,
        workload=asdict(workload),
        dtype=str(dtype).removeprefix("torch."),
        num_pairs=case.num_pairs,
        hidden_bytes=case.nbytes,
        peak_bytes=memory,
        floor=[asdict(of_pass) for of_pass in cost],
        compile_seconds=first_call if provider.compiles else None,
        graph_seconds=on_gpu.graph_seconds(run, case.hidden_states) if device.type == "cuda" else None,
    )
    random.seed(0)
    benchmark.pedantic(
        step,
        setup=on_gpu.cold_cache(device) if device.type == "cuda" else None,
        rounds=_rounds(seconds, 2 if workload.name == "growth" else 5),
        warmup_rounds=1 if seconds < 10 else 0,
    )


def _rounds(seconds: float, budget: float) -> int:
    """As many as fit into some seconds, 5 to 50; one for what takes longer than ten."""
    return 1 if seconds > 10 else max(5, min(50, int(budget / seconds)))


@pytest.fixture
def dtype(pytestconfig):
    return getattr(torch, pytestconfig.option.dtype)
