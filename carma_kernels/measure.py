"""What a computation costs and where it ran: peak tensor memory, and the versions and devices of this machine."""

from __future__ import annotations

import gc
import importlib
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch._C import _autograd, _profiler


def peak_memory(fn: Callable[[], object], device: torch.device | str) -> int:
    """Bytes of tensor memory that `fn()` has allocated, at its peak, above what was live before.

    Temporaries inside an op and everything a backward allocates count; what libraries allocate for themselves (MKL's
    or cuBLAS's workspace, Python objects) does not. The answer does not depend on the allocator's caching, and is the
    same in every run for the same work. Frees of memory that was live before are not credited on a CPU, where the
    allocator does not report them, but are on a GPU: let `fn` allocate everything it frees.

    Args:
        fn: called once.
        device: whose memory, a CPU or a CUDA/ROCm device. A CUDA allocator rounds every block up to 512 bytes. On a CPU
            the calling thread is watched, where autograd runs too; threads that `fn` starts itself are not seen.

    Raises:
        ValueError: another kind of device.
        RuntimeError: on a CPU, a torch profiler is already running.
    """
    device = torch.device(device)
    gc.collect()  # garbage in reference cycles would otherwise be freed at some time or other during fn
    if device.type == "cpu":
        return _peak_cpu(fn)
    if device.type == "cuda":
        return _peak_cuda(fn, device)
    raise ValueError(f"device must be a CPU or a CUDA/ROCm device, whose allocators can be watched; got {device}.")


def synchronize(device: torch.device | str) -> None:
    """Wait until the device has done all work given to it, so that a clock read next is right; nothing on a CPU."""
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def environment() -> dict[str, Any]:
    """Versions and devices that a measurement, or a bug report, depends on; None for what is not there.

    Returns:
        JSON-ready: `carma_kernels`, `commit` and `dirty` (of the checkout this package lies in), `python`, `torch`,
        `triton`, `numpy`, `platform`, `cpu`, `cpu_cores` (usable by this process), `torch_threads`, `cuda` (torch's
        toolkit version), `gpus` (a list of `name`, `capability`, `memory`), `gpu_driver`.
    """
    commit, dirty = _checkout(Path(__file__).resolve().parent.parent)
    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return {
        "carma_kernels": _installed_version("carma-kernels"),
        "commit": commit,
        "dirty": dirty,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _triton_version(),
        "numpy": _installed_version("numpy"),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "cuda": torch.version.cuda or torch.version.hip,
        "gpus": [
            {"name": gpu.name, "capability": f"{gpu.major}.{gpu.minor}", "memory": gpu.total_memory} for gpu in gpus
        ],
        "gpu_driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if gpus else None,
    }


def _peak_cuda(fn: Callable[[], object], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    fn()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


class _Allocation(NamedTuple):
    """One event of torch's CPU allocator."""

    time: int  # ns
    address: int
    size: int  # bytes, negative for a free


def _peak_cpu(fn: Callable[[], object]) -> int:
    live: dict[int, int] = {}  # bytes by address
    total = peak = 0
    for event in sorted(_cpu_allocations(fn), key=lambda event: event.time):
        if event.size > 0:
            live[event.address] = event.size
            total += event.size
            peak = max(peak, total)
        else:
            total -= live.pop(event.address, 0)  # 0: live before, so not fn's
    return peak


def _cpu_allocations(fn: Callable[[], object]) -> list[_Allocation]:
    """Every allocation and free while `fn` runs.

    This is `torch.profiler.profile(profile_memory=True)` without its records of operators, of which there are many more
    than of memory: a loop over 20 000 slices took 10 GB of them and ran 10 times as long.
    """
    if _autograd._profiler_enabled():
        raise RuntimeError("peak_memory on a CPU uses torch's profiler, and one is already running: stop it first.")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch 2.13 logs two lines to stderr for each profile
    # positional, as the names of a pybind11 constructor: shapes, memory, stack, flops, modules
    config = _profiler.ProfilerConfig(
        _profiler.ProfilerState.KINETO, False, True, False, False, False, _profiler._ExperimentalConfig()
    )
    activities = {_profiler.ProfilerActivity.CPU}
    no_operator = {_profiler.RecordScope.LITE_INTERPRETER}  # an empty set would stand for every scope
    _autograd._prepare_profiler(config, activities)
    _autograd._enable_profiler(config, activities, no_operator)  # type: ignore[call-arg]  # missing in torch's stub
    try:
        fn()
    finally:
        result = _autograd._disable_profiler()
    return [
        _Allocation(event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size)
        for event in result.experimental_event_tree()
        if isinstance(event.extra_fields, _profiler._ExtraFields_Allocation) and event.extra_fields.device.type == "cpu"
    ]


def _installed_version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _triton_version() -> str | None:
    # imported, because the distribution has another name in ROCm's and Windows' builds
    try:
        return str(importlib.import_module("triton").__version__)
    except ImportError:
        return None


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return _output("sysctl", "-n", "machdep.cpu.brand_string") or platform.processor() or platform.machine()


def _checkout(root: Path) -> tuple[str | None, bool | None]:
    """Commit of the checkout at `root`, and whether tracked files were changed since; None, None if it is none."""
    top = _output("git", "-C", str(root), "rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != root:  # e.g. site-packages within somebody's repository
        return None, None
    commit = _output("git", "-C", str(root), "rev-parse", "--verify", "HEAD")
    if commit is None:
        return None, None
    return commit, bool(_output("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no"))


def _output(*command: str) -> str | None:
    """What a program prints; None if it is not there or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
