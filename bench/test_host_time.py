"""The host's time of a call: nothing runs in it, and the table says what was stored."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

import carma_kernels as ck
from bench import host_time, report, saved
from bench.workloads import TINY
from carma_kernels import _backend, _self_check, eager

pytestmark = pytest.mark.smoke


@pytest.fixture
def tiny(monkeypatch):
    pytest.importorskip("triton")
    subjects = [replace(subject, workload=TINY[0]) for subject in host_time.SUBJECTS]
    monkeypatch.setattr(host_time, "SUBJECTS", subjects)


@pytest.mark.usefixtures("tiny")
def test_what_is_saved_is_what_is_printed(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(saved, "RESULTS", tmp_path)
    for _ in range(2):  # a second run leaves the first
        host_time.main(["--rounds", "3", "--save"])
    paths = sorted(tmp_path.glob("*/*-host-time*.json"))
    assert len(paths) == 2
    runs = json.loads(paths[1].read_text())["host_times"]
    assert [run["backend"] for run in runs] == ["triton", "triton by default", "triton", "triton", "torch"]
    for run in runs:
        assert run["both"]["min"] >= run["forward"]["min"] + run["backward"]["min"] > 0
        assert run["against_small"]["of_minima"] > 0
    assert report.host_times(runs) in capsys.readouterr().out


@pytest.mark.parametrize("backend", ["triton", None])
@pytest.mark.usefixtures("tiny")
def test_no_kernel_runs(backend, monkeypatch):
    """Triton's would refuse these tensors without its interpreter; nothing is checked, nor left to torch."""
    case = TINY[0].build()
    spans = ck.TokenSpans.from_lists(case.spans, seq_len=20)
    monkeypatch.setattr(eager, "carma_terms", None)
    monkeypatch.setattr(_self_check, "disagreement", None)
    with host_time.launches_left_out():
        ck.carma_loss(case.hidden_states, spans, backend=backend).loss.backward()
    assert all(layer.grad is not None for layer in case.hidden_states)
    assert torch.device("cpu") not in _backend._obstacles  # nothing of it is left behind


def test_the_row_of_a_run():
    times = {"forward": 1e-4, "backward": 3e-4, "both": 4e-4}
    run = {"backend": "triton", "dtype": "bfloat16", "workload": {"B": 1, "T": 2, "L": 3, "D": 4, "words": "dense"}}
    run |= {name: {"min": seconds, "median": 2 * seconds} for name, seconds in times.items()}
    row = report.host_times([run | {"against_small": {"of_minima": 2.0, "median": 2.5}}]).splitlines()[-1]
    assert [cell.strip() for cell in row.split("|")[3:-1]] == ["100 (200)", "300 (600)", "400 (800)", "2.00x (2.50x)"]
