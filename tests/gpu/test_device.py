"""On the device: no waiting, any device and stream, memory, and the picking of the backend."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import carma_kernels as ck
from carma_kernels import TokenSpans, _backend
from carma_kernels.measure import peak_memory
from tests.cases import BF16, FP16, FP32, Backend, Case
from tests.compare import upstream_gradients
from tests.contracts.ops import Op, make_problem, same_bits

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("users_defaults")]


@pytest.fixture
def waiting_is_an_error() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_no_host_sync(backend: Backend, op: Op, dtype: torch.dtype, request: pytest.FixtureRequest) -> None:
    """Once the kernels are compiled."""
    problem = make_problem(op, backend, Case(L=3, D=64, stacked=False), dtype=dtype)
    upstream = upstream_gradients(problem.forward())
    torch.autograd.grad(problem.forward(), problem.leaves, upstream)
    request.getfixturevalue("waiting_is_an_error")
    torch.autograd.grad(problem.forward(), problem.leaves, upstream)


def test_the_guard_notices(waiting_is_an_error: None) -> None:
    with pytest.raises(RuntimeError, match="synchronizing"):
        torch.ones(1, device="cuda").item()


def test_another_device_than_the_current(backend: Backend, op: Op) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    assert torch.cuda.current_device() == 0
    first, second = (replace(backend, device=device) for device in ("cuda:0", "cuda:1"))
    here, there = make_problem(op, first, Case(L=3, D=64)), make_problem(op, second, Case(L=3, D=64))
    assert all(x.device.index == 1 for x in there.forward())
    for x, y in zip(there.gradients(), here.gradients(), strict=True):
        assert same_bits(x.cpu(), y.cpu())


def test_another_stream(backend: Backend, op: Op) -> None:
    problem = make_problem(op, backend, Case(L=3, D=64, stacked=False))
    expected = problem.gradients()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10**7)  # what the kernels read is there when their turn comes, not when they are launched
        gradients = problem.gradients()
    torch.cuda.current_stream().wait_stream(stream)
    assert all(map(same_bits, gradients, expected))


def words(B: int, T: int) -> TokenSpans:
    return TokenSpans.from_lists([[(at, at + 3) for at in range(0, T - 3, 5)]] * B, seq_len=T).to("cuda")


@pytest.mark.alone
@pytest.mark.parametrize("shape", [(12, 16, 58, 768), (12, 8, 1024, 1024)], ids=str)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_extra_memory(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Beside the gradient: a hundredth of the hidden states, and the workspace's budget for long sequences."""
    spans = words(*shape[1:3])
    hidden = torch.randn(shape, device="cuda", dtype=dtype, requires_grad=True)

    def step() -> Tensor:
        loss = ck.carma_loss(hidden, spans, mask=spans.attention_mask, backend="triton").loss
        return torch.autograd.grad(loss, hidden)[0]

    step()
    budget = 0 if shape[2] <= 128 else max(128 * 2**20, hidden[0].nbytes)
    assert peak_memory(step, "cuda") <= 1.01 * hidden.nbytes + budget


class TestTheBackendPicked:
    """Where nobody asks for one."""

    @pytest.fixture(autouse=True)
    def fresh(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_backend, "_obstacles", {})
        monkeypatch.setattr(_backend, "_admitted", set())
        monkeypatch.setattr(_backend, "_warned", set())
        monkeypatch.delenv("CARMA_KERNELS_BACKEND", raising=False)
        monkeypatch.delenv("CARMA_KERNELS_SELF_CHECK", raising=False)

    @pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)
    def test_is_triton_which_agrees(self, dtype: torch.dtype) -> None:
        """In every kind of kernels, and with the options that are constants in them."""
        spans, long = words(2, 10), words(2, 200)
        hidden = torch.randn(3, 2, 10, 64, device="cuda", dtype=dtype)
        long_hidden = torch.randn(3, 2, 200, 64, device="cuda", dtype=dtype)
        learned = torch.tensor(0.1, device="cuda")
        pairs = spans.sample_pairs(5)
        for call in (
            lambda **asked: ck.mi_loss(hidden, spans, **asked),
            lambda **asked: ck.mi_loss(long_hidden, long, **asked),
            lambda **asked: ck.mi_loss(hidden, pairs, **asked),
            lambda **asked: ck.stability_loss(hidden, **asked),
            lambda **asked: ck.pairwise_similarity(hidden, **asked),
        ):
            assert same_bits(call(), call(backend="triton"))
        assert {kernels for _, _, kernels in _backend._admitted} == {
            "short groups",
            "long groups",
            "listed pairs",
            "stability alone",
            "similarity",
        }
        for options in (
            {"metric": "dot"},
            {"match_negatives": 5},
            {"temperature": learned},
            {"negatives": "batch"},
            {"temperature": 0.01},
            {"temperature": 1e-3},
        ):
            for given, of_given in ((hidden, spans), (list(long_hidden), long)):
                _backend._admitted.clear()
                ck.mi_loss(given, of_given, **options)
                ck.carma_loss(given, of_given, ck.CarmaConfig(**options), mask=of_given.attention_mask)
                assert len(_backend._admitted) == 1
        backend, reason = ck.choose_backend(None, "cuda:0")
        assert backend == "triton"
        assert "agreed with the torch backend" in reason

    def test_is_torch_for_what_triton_does_not_take(self) -> None:
        hidden, spans = torch.randn(2, 2, 10, 64, device="cuda", dtype=torch.float64), words(2, 10)
        assert ck.mi_loss(hidden, spans).dtype == torch.float64
        assert not _backend._admitted

    def test_is_torch_after_a_kernel_that_cannot_be_launched(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from carma_kernels.kernels import launch

        too_many = launch.Configuration({"BLOCK_ROWS": 1, "BLOCK_D": 64}, num_warps=64)
        monkeypatch.setitem(launch.TABLE, "stability_forward", [too_many])
        hidden = torch.randn(2, 2, 10, 64, device="cuda")
        with pytest.warns(RuntimeWarning, match="Triton cannot be used on cuda:0: its self-check failed") as caught:
            losses = [ck.stability_loss(hidden) for _ in range(2)]
        assert len(caught) == 1
        assert all(same_bits(loss, ck.stability_loss(hidden, backend="torch")) for loss in losses)
        assert ck.choose_backend(None, "cuda")[0] == "torch"

    def test_the_check_waits_even_where_that_is_an_error(self, request: pytest.FixtureRequest) -> None:
        """And leaves the mode, and the generators, as they were."""
        hidden = torch.randn(2, 2, 10, 64, device="cuda")
        before = torch.cuda.get_rng_state()
        request.getfixturevalue("waiting_is_an_error")
        ck.stability_loss(hidden)
        assert _backend._admitted
        assert torch.cuda.get_sync_debug_mode() == 2
        torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(torch.cuda.get_rng_state(), before)

    def test_no_check_in_a_capture(self) -> None:
        hidden = torch.randn(2, 2, 10, 64, device="cuda")
        ck.stability_loss(hidden, backend="torch")  # what cuBLAS needs is there
        graph = torch.cuda.CUDAGraph()
        with (
            pytest.warns(RuntimeWarning, match="cannot be done while a CUDA graph is captured"),
            torch.cuda.graph(graph),
        ):
            loss = ck.stability_loss(hidden)
        graph.replay()
        assert torch.allclose(loss, ck.stability_loss(hidden, backend="torch"))
        assert not _backend._admitted

    def test_out_of_memory_is_no_reason(self) -> None:
        hidden = torch.randn(2, 2, 10, 64, device="cuda")
        ck.stability_loss(hidden)
        huge = torch.empty(1, device="cuda", dtype=torch.float16).expand(2, 2**16, 2**15, 64)
        with pytest.raises(torch.OutOfMemoryError):
            ck.stability_loss(huge)
        assert ck.choose_backend(None, "cuda:0")[0] == "triton"
