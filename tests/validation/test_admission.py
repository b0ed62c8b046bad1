"""Triton is used unasked once it has agreed with the torch backend: who finds out, when, and what comes of it."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import carma_kernels as ck
from carma_kernels import _backend, _self_check, eager
from tests.validation.calls import FUNCTIONS, HIDDEN, PAIRS, SPANS, call

pytestmark = pytest.mark.usefixtures("fresh")

TIMES = _self_check._REPEATS
CPU = torch.device("cpu")


def admitted() -> set[tuple[torch.dtype, str]]:
    return {(dtype, kernels) for _, dtype, kernels in _backend._admitted}


def test_a_check_then_the_call(on_gpu: SimpleNamespace):
    loss = ck.mi_loss(HIDDEN, SPANS)
    assert on_gpu.calls == ["carma_terms"] * (TIMES + 1)
    assert torch.equal(loss, ck.mi_loss(HIDDEN, SPANS, backend="torch"))
    ck.mi_loss(HIDDEN, SPANS)
    assert len(on_gpu.calls) == TIMES + 2


def test_each_kind_and_dtype_by_itself(on_gpu: SimpleNamespace):
    fp32, fp16 = torch.float32, torch.float16
    for step in (
        lambda: ck.mi_loss(HIDDEN, SPANS),
        lambda: ck.carma_loss(HIDDEN, SPANS),  # the same kernels
        lambda: ck.mi_loss(HIDDEN, PAIRS),
        lambda: ck.stability_loss(HIDDEN),
        lambda: ck.pairwise_similarity(HIDDEN),
        lambda: ck.mi_loss(HIDDEN.half(), SPANS),
    ):
        on_gpu.calls.clear()
        before = admitted()
        step()
        assert len(on_gpu.calls) == 1 + TIMES * len(admitted() - before)
    kinds = {"short groups", "listed pairs", "stability alone", "similarity"}
    assert admitted() == {*((fp32, kind) for kind in kinds), (fp16, "short groups")}


class Scaled(torch.autograd.Function):
    """Something whose gradient is off."""

    @staticmethod
    def forward(_, tensor: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(_, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient * 1.01


def wrong_values(ops: SimpleNamespace) -> None:
    terms, similarity = ops.carma_terms, ops.pairwise_similarity
    ops.carma_terms = lambda *arguments: [x + 0.01 * x.detach() for x in terms(*arguments)]
    ops.pairwise_similarity = lambda *arguments: (lambda x: x + 0.01 * x.detach())(similarity(*arguments))


def wrong_gradients(ops: SimpleNamespace) -> None:
    terms, similarity = ops.carma_terms, ops.pairwise_similarity
    ops.carma_terms = lambda *arguments: [Scaled.apply(x) for x in terms(*arguments)]
    ops.pairwise_similarity = lambda *arguments: Scaled.apply(similarity(*arguments))


def flaky(ops: SimpleNamespace) -> None:
    """Right, but for the last bits."""
    terms, similarity = ops.carma_terms, ops.pairwise_similarity
    ops.carma_terms = lambda *arguments: [x * (1 + 1e-6 * len(ops.calls)) for x in terms(*arguments)]
    ops.pairwise_similarity = lambda *arguments: similarity(*arguments) * (1 + 1e-6 * len(ops.calls))


def not_a_number(ops: SimpleNamespace) -> None:
    terms, similarity = ops.carma_terms, ops.pairwise_similarity
    ops.carma_terms = lambda *arguments: [x * float("nan") for x in terms(*arguments)]
    ops.pairwise_similarity = lambda *arguments: similarity(*arguments) * float("nan")


def crashing(ops: SimpleNamespace) -> None:
    def fail(*_: object) -> None:
        ops.calls.append("failed")
        raise RuntimeError("Triton Error [CUDA]: device kernel image is invalid")

    ops.carma_terms = ops.pairwise_similarity = fail


FAULTS = [
    (
        wrong_values,
        r"(the MI loss|the stability loss|the matrix) differs by 1\.0e-02 of its largest number, where 1\.\d",
    ),
    (wrong_gradients, r"the gradient of layer 0 differs by 1\.0e-02 of its largest number, where 1\.0e-04 is allowed"),
    (flaky, r"(loss|matrix) is not the same when it is computed again, in \d+ of \d+ numbers"),
    (not_a_number, "(loss|matrix) differs by nan of its largest number"),
    (crashing, r"RuntimeError: Triton Error \[CUDA\]: device kernel image is invalid"),
]


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(("fault", "words"), FAULTS, ids=lambda value: getattr(value, "__name__", None))
def test_a_fault_is_a_reason_for_torch(fault, words: str, function: str, on_gpu: SimpleNamespace, monkeypatch):
    """With one warning, in this call and all others on the device."""
    fault(on_gpu)
    with pytest.warns(RuntimeWarning, match=words) as caught:
        results = [call(function), call(function)]
    assert len(caught) == 1
    message = str(caught[0].message)
    assert message.startswith(f"Triton cannot be used on cpu: its self-check failed, {function} (")
    assert "of hidden states [3, " in message
    assert "in torch.float32 on cpu: " in message
    for way_out in ("carma_kernels doctor", "carma_kernels verify", "CARMA_KERNELS_BACKEND=torch"):
        assert way_out in message
    assert caught[0].filename.endswith("calls.py")
    assert ck.choose_backend(None, "cpu")[0] == "torch"

    on_gpu.calls.clear()
    for other in FUNCTIONS:
        call(other)
    call(function, HIDDEN.half())
    assert on_gpu.calls == []
    expected = call(function, backend="torch")
    for result in results:
        assert torch.equal(getattr(result, "loss", result), getattr(expected, "loss", expected))


def test_another_device_is_another_matter(on_gpu: SimpleNamespace):
    crashing(on_gpu)
    with pytest.warns(RuntimeWarning, match="Triton cannot be used on cpu"):
        ck.mi_loss(HIDDEN, SPANS)
    assert ck.choose_backend(None, "cuda:1")[0] == "triton"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        MemoryError(),
        KeyboardInterrupt(),
    ],
    ids=repr,
)
@pytest.mark.parametrize("where", ["ops", "eager"])
def test_what_is_not_tritons_fault_is_raised(error: BaseException, where: str, on_gpu: SimpleNamespace, monkeypatch):
    def fail(*_: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(on_gpu if where == "ops" else eager, "carma_terms", fail)
        for _ in range(2):
            with pytest.raises(type(error)):
                ck.mi_loss(HIDDEN, SPANS)
    assert admitted() == set()
    ck.mi_loss(HIDDEN, SPANS)
    assert admitted() == {(torch.float32, "short groups")}


def test_what_the_torch_backend_cannot_do_is_raised(on_gpu: SimpleNamespace, monkeypatch):
    def fail(*_: object) -> None:
        raise RuntimeError("an assertion of the device's, from before")

    monkeypatch.setattr(eager, "carma_terms", fail)
    with pytest.raises(RuntimeError, match="from before"):
        ck.mi_loss(HIDDEN, SPANS)
    assert on_gpu.calls == []


def test_once_admitted_its_errors_are_the_users(on_gpu: SimpleNamespace):
    ck.mi_loss(HIDDEN, SPANS)
    crashing(on_gpu)
    with pytest.raises(RuntimeError, match="image is invalid"):
        ck.mi_loss(HIDDEN, SPANS)


def test_done_without_if_the_variable_says_so(on_gpu: SimpleNamespace, monkeypatch):
    monkeypatch.setenv("CARMA_KERNELS_SELF_CHECK", "0")
    ck.mi_loss(HIDDEN, SPANS)
    assert on_gpu.calls == ["carma_terms"]
    for value in ("1", ""):
        on_gpu.calls.clear()
        _backend._admitted.clear()
        monkeypatch.setenv("CARMA_KERNELS_SELF_CHECK", value)
        ck.mi_loss(HIDDEN, SPANS)
        assert len(on_gpu.calls) == TIMES + 1


def test_a_group_is_for_the_call_alone(on_gpu: SimpleNamespace):
    groups = []
    terms = on_gpu.carma_terms
    on_gpu.carma_terms = lambda hidden, mi, stability, group=None: groups.append(group) or terms(hidden, mi, stability)
    implementation = _backend.implementation(None, CPU)
    implementation.carma_terms(HIDDEN, None, ck.functional.StabilityTerm(range(3), None, 1e-8), "some ranks")
    assert groups == [None] * TIMES + ["some ranks"]


# where no check can be made


@contextmanager
def capturing(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(torch.backends.cuda, "is_built", lambda: True)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        yield


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def in_capture(step: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch) -> Tensor:
    with capturing(monkeypatch):
        return step(HIDDEN)


def in_a_backward(step: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch) -> Tensor:
    results = []
    one = torch.ones((), requires_grad=True)
    one.register_hook(lambda _: results.append(step(HIDDEN)))
    (one * 2).backward()
    return results[0]


def under_a_mode(step: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch) -> Tensor:
    with Watching():
        return step(HIDDEN)


def of_a_fake(step: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch) -> Tensor:
    with FakeTensorMode() as mode:
        hidden = mode.from_tensor(HIDDEN)
    return step(hidden)


def under_fakes(step: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch) -> Tensor:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        return step(mode.from_tensor(HIDDEN))


def in_a_transform(step: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch) -> Tensor:
    return torch.func.functionalize(lambda _: step(HIDDEN))(torch.ones(()))


def compiled(step: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch) -> Tensor:
    torch._dynamo.reset()
    return torch.compile(step, backend="eager", fullgraph=True)(HIDDEN)


NOT_NOW = [
    (in_capture, "while a CUDA graph is captured"),
    (in_a_backward, "in a backward"),
    (under_a_mode, "under a dispatch mode"),
    (of_a_fake, "under a dispatch mode"),
    (under_fakes, "under a dispatch mode"),
    (in_a_transform, "under a dispatch mode or a transform of torch.func"),
    (compiled, "while torch.compile or torch.export traces"),
]


@pytest.mark.parametrize(("where", "words"), NOT_NOW, ids=lambda value: getattr(value, "__name__", None))
def test_where_nothing_can_be_checked(where, words: str, on_gpu: SimpleNamespace, monkeypatch):
    """The torch backend computes the call, and a warning, once, says so; a later call makes the check."""
    steps = (ck.stability_loss, lambda hidden: ck.stability_loss(hidden), ck.pairwise_similarity)
    with pytest.warns(RuntimeWarning, match=f"cannot be done {words}") as caught:
        *_, result = [where(step, monkeypatch) for step in steps]
    assert len(caught) == 1
    message = str(caught[0].message)
    assert "the torch backend computes" in message
    for way_out in ("Call the loss once before that", "backend='triton'", "CARMA_KERNELS_SELF_CHECK=0"):
        assert way_out in message
    assert on_gpu.calls == []
    assert admitted() == set()
    if where not in (of_a_fake, under_fakes):
        assert torch.equal(result, ck.pairwise_similarity(HIDDEN, backend="torch"))

    ck.stability_loss(HIDDEN)
    assert admitted() == {(torch.float32, "stability alone")}
    on_gpu.calls.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        where(ck.stability_loss, monkeypatch)
    assert on_gpu.calls == ["carma_terms"]


@pytest.mark.parametrize("where", [where for where, _ in NOT_NOW], ids=lambda where: where.__name__)
def test_nothing_to_be_checked_there(where, on_gpu: SimpleNamespace, monkeypatch):
    monkeypatch.setenv("CARMA_KERNELS_SELF_CHECK", "0")
    where(ck.stability_loss, monkeypatch)
    assert on_gpu.calls == ["carma_terms"]


# what the caller has set


@pytest.mark.parametrize(
    "context",
    [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)],
    ids=["no_grad", "inference_mode", "autocast"],
)
def test_by_itself(context, on_gpu: SimpleNamespace):
    """Gradients are compared whatever the caller's mode is, which is what the call then finds."""
    seen = []
    terms = on_gpu.carma_terms

    def look(*arguments):
        seen.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")))
        return terms(*arguments)

    on_gpu.carma_terms = look
    with context():
        users = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")
        ck.mi_loss(HIDDEN.clone().requires_grad_(torch.is_grad_enabled()), SPANS)
    assert seen == [(True, False, False)] * TIMES + [users]


def test_a_wrong_gradient_shows_without_gradients(on_gpu: SimpleNamespace):
    wrong_gradients(on_gpu)
    with pytest.warns(RuntimeWarning, match="the gradient of layer 0"), torch.no_grad():
        ck.mi_loss(HIDDEN, SPANS)


def test_the_generators_are_left_alone(on_gpu: SimpleNamespace):
    before = torch.get_rng_state()
    ck.mi_loss(HIDDEN, PAIRS)
    ck.pairwise_similarity(HIDDEN)
    assert len(admitted()) == 2
    assert torch.equal(torch.get_rng_state(), before)


def test_within_a_checkpoint(on_gpu: SimpleNamespace):
    """The check saves nothing there, and reading what it saves does not compute the user's forward again."""
    forwards = []

    def forward(hidden: Tensor) -> Tensor:
        forwards.append(hidden)
        return ck.mi_loss(hidden, SPANS)

    hidden = HIDDEN.clone().requires_grad_()
    loss = checkpoint(forward, hidden, use_reentrant=False)
    assert len(forwards) == 1
    assert admitted() == {(torch.float32, "short groups")}
    loss.backward()
    assert len(forwards) == 2


def in_threads(call: Callable[[], None]) -> None:
    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_threads_make_one_check(on_gpu: SimpleNamespace):
    terms, together = on_gpu.carma_terms, threading.Barrier(4)

    def slowly(*arguments):
        time.sleep(0.01)
        return terms(*arguments)

    on_gpu.carma_terms = slowly
    losses = []

    def first_call() -> None:
        together.wait()
        losses.append(ck.mi_loss(HIDDEN, SPANS))

    in_threads(first_call)
    assert len(losses) == 4
    assert len(on_gpu.calls) == TIMES + 4


def test_threads_get_one_warning(on_gpu: SimpleNamespace):
    crashing(on_gpu)
    together = threading.Barrier(4)
    losses = []

    def first_call() -> None:
        together.wait()
        losses.append(ck.mi_loss(HIDDEN, SPANS))

    with pytest.warns(RuntimeWarning, match="self-check failed") as caught:
        in_threads(first_call)
    assert len(caught) == 1
    assert len(losses) == 4
    assert on_gpu.calls == ["failed"]
