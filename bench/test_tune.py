"""The tuner refuses to time what is no GPU, and goes all the way in a rehearsal."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from bench import tune
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
    assert set(tune.SUBJECTS) == set(launch.TABLE) - {"similarity_norms"}


@pytest.mark.parametrize("name", tune.SUBJECTS)
def test_there_are_candidates_for_every_size(name):
    """With the constants of the table's own: a name that changed there would fail on the GPU."""
    subject = tune.SUBJECTS[name]
    for workload in subject.workloads:
        size = getattr(workload, subject.size)
        own = launch.choose(name, _runtime.TARGETS["sm_90"], size, 2)
        candidates = [candidate for candidate in subject.candidates() if candidate.max_size >= size]
        assert len(candidates) > 5
        assert all(candidate.constants.keys() == own.constants.keys() for candidate in candidates)


def test_a_candidate_that_computes_something_else_is_refused(monkeypatch):
    def loss(hidden, _spans):
        chosen = launch.choose("pairs_forward", _runtime.INTERPRETER, 16, 4)
        return sum(h.sum() for h in hidden) * chosen.constants["BLOCK_D"]

    subject = tune.SUBJECTS["pairs_forward"]
    monkeypatch.setitem(tune.SUBJECTS, "pairs_forward", tune.replace(subject, loss=loss))
    tuner = tune.Tuner("pairs_forward", tune.TINY, torch.float32, "cpu")
    own = launch.TABLE["pairs_forward"][0]
    right = tuner.measure(tune.replace(own, num_warps=1), lambda _repeated: (1.0, 2.0, 3.0))
    wrong = tuner.measure(launch.Configuration({"BLOCK_D": 8}), lambda _repeated: (1.0, 2.0, 3.0))
    assert right.microseconds == (1.0, 2.0, 3.0)
    assert right.configuration.num_warps == 1
    assert "is wrong" in wrong


def test_a_row_can_be_pasted():
    configuration = launch.Configuration({"BLOCK_D": 64}, num_warps=8, max_registers=128)
    row = tune.entry(tune.Measured(configuration, (1.0, 2.0, 3.0), 4096), 768, 2)
    pasted = eval(row.rstrip(","), {"Configuration": launch.Configuration})
    assert pasted == tune.replace(configuration, max_size=768, max_bytes=2, shared_memory=4096)


def test_faster_is_beyond_the_spread():
    configuration = launch.Configuration({})
    slow, near, fast = (
        tune.Measured(configuration, times, 0) for times in ((9.0, 10.0, 11.0), (8.0, 8.5, 9.5), (7.0, 8.0, 8.9))
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
