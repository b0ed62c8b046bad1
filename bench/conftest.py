"""Options of the benches, what is recorded beside the times, and the table at the end."""

from __future__ import annotations

import ctypes
import os
import platform
from dataclasses import asdict
from itertools import chain, compress
from pathlib import Path

import pytest
import torch

from bench import report, saved
from bench.floor import measure_rates
from bench.providers import PROVIDERS
from bench.workloads import GROWTH, MODELS, PAPER, SLOW, TINY
from carma_kernels.measure import environment

LOAD_AT_START = pytest.StashKey[float]()
MACHINE = pytest.StashKey[dict]()
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def pytest_addoption(parser):
    group = parser.getgroup("carma_kernels")
    group.addoption("--save", action="store_true", help="write bench/results/<device>/<date>.json")
    group.addoption("--save-as", metavar="PART", help="the same for a part of the benches, to <date>-PART.json")
    group.addoption("--slow", action="store_true", help="also the workload that takes the published loops minutes")
    group.addoption("--threads", type=int, default=1, help="torch's threads on the CPU (default: %(default)s)")
    group.addoption("--device", default="cpu", help="where the hidden states lie (default: %(default)s)")
    group.addoption("--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="of hidden states")
    group.addoption("--models", action="store_true", help="also the hidden states of the paper's seven models")
    group.addoption("--growth", action="store_true", help="also one size at a time, to see what grows with it")


@pytest.hookimpl(tryfirst=True)  # pytest-benchmark reads its options in its own pytest_configure
def pytest_configure(config):
    config.stash[LOAD_AT_START] = os.getloadavg()[0]
    config.addinivalue_line("markers", "smoke: takes seconds in all; run it to see whether the benches still work")
    torch.compiler.config.force_disable_caches = True  # what is compiled is timed as for the first time
    config.addinivalue_line("filterwarnings", "ignore:.*force disabled by torch.compiler.config")
    config.option.benchmark_quiet = True  # its tables know neither ratios nor memory
    # a wrong result fails before anything is timed: that is one failure, not two
    config.addinivalue_line("filterwarnings", "ignore:Benchmark fixture was not used")
    if config.option.save or config.option.save_as:
        config.option.benchmark_json = saved.new_file(_device_name(config.option.device), config.option.save_as)


def pytest_report_header():
    missing = [f"{provider.name} ({provider.package})" for provider in PROVIDERS if not provider.is_installed]
    return f"not installed, so not measured: {', '.join(missing)}" if missing else None


def pytest_generate_tests(metafunc):
    if "workload" in metafunc.fixturenames:
        option = metafunc.config.option
        wanted = [PAPER, *compress([SLOW, MODELS, GROWTH], [option.slow, option.models, option.growth])]
        device = torch.device(option.device)
        metafunc.parametrize(
            ("workload", "provider", "passes"),
            [
                pytest.param(workload, provider, passes, marks=[pytest.mark.smoke] if workload in TINY else [])
                for workload in chain(TINY, *wanted)
                for provider in PROVIDERS
                if provider.runs(workload, device)
                for passes in (["forward+backward"] if workload in GROWTH else ["forward", "forward+backward"])
            ],
            ids=str,
        )


@pytest.fixture(autouse=True)
def threads(pytestconfig):
    before = torch.get_num_threads()
    torch.set_num_threads(pytestconfig.option.threads)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="session")
def kept_memory():
    """Have glibc keep what is freed, as allocators made for training do.

    Else it gives memory back to the kernel after some steps and not after others, by what ran before in the process,
    and up to a third of a step's time goes into getting it again.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for option in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
            assert libc.mallopt(option, 1 << 30), "glibc refused"


@pytest.fixture
def device(pytestconfig):
    return torch.device(pytestconfig.option.device)


def pytest_benchmark_generate_machine_info(config):
    if MACHINE not in config.stash:  # the summary asks again, when the results have changed the checkout
        config.stash[MACHINE] = _machine(config)
    return config.stash[MACHINE]


def _machine(config):
    return environment() | {
        "device": _device_name(config.option.device),
        "rates": _rates(config.option.device, config.option.dtype, config.option.threads),
        "torch_threads": config.option.threads,
        "load_at_start": round(config.stash[LOAD_AT_START], 2),
        "timer": str(config.option.benchmark_timer),
    }


def pytest_benchmark_generate_commit_info():
    env = environment()
    return {"id": env["commit"], "dirty": env["dirty"]}


def pytest_benchmark_update_json(config, output_json):
    for benchmark in output_json["benchmarks"]:  # extra_info says the same without addresses of functions
        del benchmark["params"], benchmark["options"]
    Path(config.option.benchmark_json).parent.mkdir(parents=True, exist_ok=True)


def pytest_terminal_summary(terminalreporter, config):
    benchmarks = [bench.as_dict() for bench in config._benchmarksession.benchmarks if not bench.has_error]
    if benchmarks:
        terminalreporter.section("measured")
        terminalreporter.write_line(report.details(benchmarks, pytest_benchmark_generate_machine_info(config)))
        if config.option.benchmark_json:
            terminalreporter.write_line(f"written to {config.option.benchmark_json}")


def _rates(device: str, dtype: str, threads: int) -> dict[str, float]:
    """Of the machine, on as many threads as what was measured."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    rates = measure_rates(torch.device(device), getattr(torch, dtype))
    torch.set_num_threads(before)
    return asdict(rates)


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else environment()["cpu"]
