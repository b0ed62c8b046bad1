"""The tuner refuses to time what is no GPU, and goes all the way in a rehearsal."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from bench import tune
from bench.candidates import CANDIDATES, QUICK, quick
from bench.launches import Launch, Resources
from carma_kernels import _runtime
from carma_kernels.kernels import launch

pytestmark = pytest.mark.smoke


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        tune.main([])
    assert stopped.value.code == 2
    assert "no GPU" in capsys.readouterr().err


def test_every_kernel_of_the_launch_table_can_be_tuned():
    off = {name for name in launch.TABLE if name.startswith("dense_")}  # until `LONG_PATH` has been measured
    assert set(tune.SUBJECTS) == set(CANDIDATES) == set(launch.TABLE) - {"similarity_norms"} - off


@pytest.mark.parametrize("name", tune.SUBJECTS)
def test_there_are_candidates_for_every_size(name):
    """With the constants of the table's own: a name that changed there would fail on the GPU."""
    subject = tune.SUBJECTS[name]
    for workload in subject.workloads:
        size = getattr(workload, subject.size)
        own = launch.choose(name, _runtime.TARGETS["sm_90"], size, 2)
        candidates = [candidate for candidate in CANDIDATES[name]() if candidate.max_size >= size]
        assert len(candidates) > 5
        assert all(candidate.constants.keys() == own.constants.keys() for candidate in candidates)


@pytest.mark.parametrize("name", QUICK)
def test_the_few_that_matter(name):
    """A dozen in all, which the tuner measures, too."""
    subject = tune.SUBJECTS[name]
    size = getattr(subject.workloads[-1], subject.size)
    own = launch.choose(name, _runtime.TARGETS["sm_90"], min(size, 64) if name == "short_backward" else size, 2)
    found = quick(name, own)
    assert 2 <= len(found) <= 6
    assert all(candidate in list(CANDIDATES[name]()) for candidate in found)
    assert any(candidate.max_registers == 128 for candidate in found) == (name != "mi_gradient")
    if name != "short_backward":
        assert any(256 in candidate.constants.values() for candidate in found)
        assert {candidate.num_stages for candidate in found} == {3, 4}


def tuner(monkeypatch, launched=None):
    """Of a kernel that does not run; the loss depends on its block. `launched`: options other than those chosen."""

    def kernel():
        raise AssertionError("it runs")

    kernel.__name__ = "_pairs_forward_kernel"
    monkeypatch.setattr(_runtime, "launch", lambda *_, **__: None)

    def loss(hidden, _spans):
        chosen = launch.choose("pairs_forward", _runtime.INTERPRETER, 16, 4)
        _runtime.launch(kernel, (8, 1), **(launched or chosen.options))
        return sum(h.sum() for h in hidden) * chosen.constants["BLOCK_D"]

    subject = tune.SUBJECTS["pairs_forward"]
    monkeypatch.setitem(tune.SUBJECTS, "pairs_forward", tune.replace(subject, loss=loss))
    return tune.Tuner("pairs_forward", tune.TINY.build())


OWN = launch.TABLE["pairs_forward"][0]


def times(_repeated):
    return 1.0, 2.0, 3.0


def test_a_candidate_that_computes_something_else_is_refused(monkeypatch):
    measure = tuner(monkeypatch).measure
    right = measure(tune.replace(OWN, num_warps=1), times)
    assert right.seconds == (1.0, 2.0, 3.0)
    assert right.configuration.num_warps == 1
    assert "is wrong" in measure(launch.Configuration({"BLOCK_D": 8}), times)


def test_a_candidate_that_was_not_launched_is_refused(monkeypatch):
    measure = tuner(monkeypatch, launched=OWN.options).measure
    assert measure(OWN, times).configuration == OWN
    assert measure(tune.replace(OWN, num_warps=1), times) == "is not what was launched"


def test_a_launch_can_be_changed(monkeypatch):
    measure, grids = tuner(monkeypatch).measure, []
    monkeypatch.setattr(_runtime, "launch", lambda _kernel, grid, **_: grids.append(grid))
    measure(None, lambda repeated: (repeated(),) * 3, lambda made: made._replace(grid=(8, 4)))
    assert set(grids) == {(8, 4)}


def test_pieces_are_a_parameter_and_programs():
    kernel = SimpleNamespace(__name__="_short_backward_kernel", arg_names=["table", "pieces", "N"])
    made = Launch(None, kernel, (12 * 2 * 16,), ("addresses", 2, 58), {})
    assert made.with_pieces(1)[2:4] == ((12 * 16,), ("addresses", 1, 58))
    assert made.with_pieces(3)[2:4] == ((12 * 3 * 16,), ("addresses", 3, 58))


def test_a_row_can_be_pasted():
    configuration = launch.Configuration({"BLOCK_D": 64}, num_warps=8, max_registers=128)
    row = tune.entry(tune.Measured(configuration, (1.0, 2.0, 3.0), Resources(64, 0, 4096)), 768, 2)
    pasted = eval(row.rstrip(","), {"Configuration": launch.Configuration})
    assert pasted == tune.replace(configuration, max_size=768, max_bytes=2, shared_memory=4096)


def test_faster_is_beyond_the_spread():
    configuration = launch.Configuration({})
    slow, near, fast = (
        tune.Measured(configuration, of, Resources(None, None, None))
        for of in ((9.0, 10.0, 11.0), (8.0, 8.5, 9.5), (7.0, 8.0, 8.9))
    )
    assert fast.beats(slow)
    assert not near.beats(slow)
    assert not slow.beats(fast)


def test_a_rehearsal():
    """In a process of its own: the interpreter has to be on before Triton is imported."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "bench.tune", "--rehearse", "--dtypes", "float32", "--only", "stability_backward"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "<- the table's" in result.stdout
    assert result.stdout.count("BLOCK_ROWS") >= 3  # the table's and two candidates, at least
    assert "NOT measured on a GPU" in result.stdout
    assert "fails" not in result.stdout
    assert "is wrong" not in result.stdout
