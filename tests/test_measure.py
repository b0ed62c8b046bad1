"""Peak memory against allocations of known size, and the record of the environment."""

import json
import subprocess
import threading

import pytest
import torch
from torch import Tensor

from carma_kernels import measure
from carma_kernels.measure import environment, peak_memory, synchronize


def block(size: int) -> Tensor:
    """A tensor of `size` bytes."""
    return torch.empty(size, dtype=torch.uint8)


def freed_then_allocated() -> None:
    first = block(1000)
    del first
    second = block(3000)
    del second
    block(2000)


def both_live() -> None:
    first = block(1000)
    block(3000)
    del first


def nothing() -> None:
    block(0)


@pytest.mark.parametrize(("fn", "expected"), [(freed_then_allocated, 3000), (both_live, 4000), (nothing, 0)])
def test_peak_is_the_largest_sum_that_is_live_at_once(fn, expected):
    assert peak_memory(fn, "cpu") == expected


def test_peak_counts_from_what_was_live_before():
    before = block(10_000)
    assert peak_memory(lambda: block(500), "cpu") == 500
    del before


def test_the_result_of_fn_counts_and_is_let_go():
    kept = []
    assert peak_memory(lambda: kept.append(block(700)), "cpu") == 700
    assert peak_memory(lambda: block(700), "cpu") == 700


def test_peak_includes_temporaries_within_an_op():
    """logsumexp over [100, 100] fp32 allocates a whole exp(x - max), which no caller sees."""
    x = torch.randn(100, 100)
    peak = peak_memory(lambda: x.logsumexp(1), "cpu")
    assert peak >= x.nbytes
    assert peak < 2 * x.nbytes


def test_peak_includes_what_a_backward_allocates():
    x = torch.ones(1000, requires_grad=True)
    scale = torch.full((1000,), 2.0)
    loss = (x * scale).sum()

    forward = peak_memory(lambda: (x * scale).sum(), "cpu")
    assert forward == 4000 + 4  # the product and the sum

    backward = peak_memory(lambda: torch.autograd.grad(loss, x), "cpu")
    assert backward == 4 + 4000  # a one for the loss, and the gradient; sum's backward is a view


def test_thousands_of_allocations_are_counted_exactly():
    """Sizes climb and fall, so that one event lost, doubled or out of order changes the answer."""
    sizes = [100 + (7919 * n) % 5000 for n in range(10_000)]

    def sliding_window() -> None:
        window: list[Tensor] = []
        for size in sizes:
            window.append(block(size))
            if len(window) > 50:
                window.pop(0)

    # the 51st tensor is allocated before the first of the window goes
    expected = max(sum(sizes[max(0, n - 50) : n + 1]) for n in range(len(sizes)))
    assert peak_memory(sliding_window, "cpu") == expected


def test_peak_repeats():
    x = torch.randn(64, 64, requires_grad=True)

    def step() -> None:
        torch.autograd.grad((x @ x).softmax(1).square().sum(), x)

    assert len({peak_memory(step, "cpu") for _ in range(3)}) == 1


def test_peak_does_not_depend_on_the_number_of_threads():
    x = torch.randn(512, 512, requires_grad=True)

    def step() -> None:
        torch.autograd.grad((x @ x).logsumexp(1).sum(), x)

    threads = torch.get_num_threads()
    try:
        peaks = []
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            peaks.append(peak_memory(step, "cpu"))
    finally:
        torch.set_num_threads(threads)
    assert len(set(peaks)) == 1
    assert peaks[0] >= 3 * x.nbytes


def test_another_threads_allocations_are_not_counted():
    stop = threading.Event()
    started = threading.Event()

    def noise() -> None:
        while not stop.is_set():
            block(1_000_000)
            started.set()

    thread = threading.Thread(target=noise)
    thread.start()
    started.wait()
    try:
        assert peak_memory(lambda: [block(100) for _ in range(1000)], "cpu") == 100_000
    finally:
        stop.set()
        thread.join()


def test_frees_of_earlier_memory_are_not_credited():
    """Also where the earlier memory was allocated under a profile, whose books torch keeps."""
    kept = []
    peak_memory(lambda: kept.append(block(5000)), "cpu")

    def free_then_allocate() -> None:
        kept.clear()
        block(3000)

    assert peak_memory(free_then_allocate, "cpu") == 3000


def test_an_error_in_fn_arrives_and_leaves_the_measure_usable():
    def fail() -> None:
        raise KeyError("from fn")

    with pytest.raises(KeyError, match="from fn"):
        peak_memory(fail, "cpu")
    assert peak_memory(lambda: block(100), "cpu") == 100


def test_a_running_profiler_is_reported():
    with (
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]),
        pytest.raises(RuntimeError, match="already running"),
    ):
        peak_memory(lambda: None, "cpu")


def test_other_devices_are_refused():
    with pytest.raises(ValueError, match=r"device must be a CPU or a CUDA/ROCm device.*got meta"):
        peak_memory(lambda: None, "meta")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA/ROCm device")
def test_peak_on_a_gpu():
    def on_gpu(size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device="cuda")

    def freed_then_allocated() -> None:
        first = on_gpu(4096)
        del first
        second = on_gpu(8192)
        del second

    before = on_gpu(1 << 20)
    assert peak_memory(freed_then_allocated, "cuda") == 8192
    assert peak_memory(lambda: on_gpu(1), "cuda") == 512
    del before


def test_synchronize_does_nothing_on_a_cpu():
    synchronize("cpu")


def test_environment_can_be_stored_and_names_what_runs():
    env = environment()
    assert json.loads(json.dumps(env)) == env
    assert env["torch"] == torch.__version__
    assert env["torch_threads"] == torch.get_num_threads()
    assert env["cpu"]
    assert env["cpu_cores"] >= 1
    assert len(env["gpus"]) == torch.cuda.device_count()


@pytest.fixture
def checkout(tmp_path):
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=nobody", "-c", "user.email=nobody@example.com", "-c", "commit.gpgsign=false"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "--quiet")
    return tmp_path.resolve(), git


def test_commit_of_a_checkout(checkout):
    root, git = checkout
    assert measure._checkout(root) == (None, None)  # no commit yet

    (root / "file").write_text("1")
    git("add", "file")
    git("commit", "--quiet", "--message=first")
    assert measure._checkout(root) == (git("rev-parse", "HEAD"), False)

    (root / "file").write_text("2")
    assert measure._checkout(root) == (git("rev-parse", "HEAD"), True)


def test_a_package_installed_inside_another_checkout_has_no_commit(checkout):
    root, git = checkout
    git("commit", "--quiet", "--allow-empty", "--message=first")
    site_packages = root / "site-packages"
    site_packages.mkdir()
    assert measure._checkout(site_packages) == (None, None)
