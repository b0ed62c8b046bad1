"""No run overwrites another's results."""

from __future__ import annotations

import json

import pytest

from bench import saved

pytestmark = pytest.mark.smoke


def test_each_run_has_a_file(monkeypatch, tmp_path):
    monkeypatch.setattr(saved, "RESULTS", tmp_path)
    paths = []
    for number in range(3):
        paths.append(saved.new_file("NVIDIA H200 (PCIe)", "quick"))
        saved.write(paths[-1], {"number": number})
    assert [path.parent for path in paths] == [tmp_path / "nvidia-h200-pcie"] * 3
    first, second, third = (path.name for path in paths)
    date = first.removesuffix("-quick.json")
    assert (second, third) == (f"{date}-quick-2.json", f"{date}-quick-3.json")
    assert [json.loads(path.read_text())["number"] for path in paths] == [0, 1, 2]
    assert len(list(paths[0].parent.iterdir())) == 3  # nothing unfinished is left


def test_everything_has_no_part(tmp_path):
    path = saved.new_file("a CPU", folder=tmp_path)
    assert path.parent == tmp_path
    assert path.stem.count("-") == 2
