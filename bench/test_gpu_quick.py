"""The quick bench for a GPU goes all the way without one, and what fails in it is a line."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from bench import check, gpu_quick, quick_tables, report, tune
from bench.gpu_quick import COMPILED, GRAPH, IMPLEMENTATIONS, LONG, PLAIN, REDUCED, SHORT, TORCH, TRITON, WIDE
from bench.test_report import MACHINE
from carma_kernels.kernels import launch

pytestmark = pytest.mark.smoke

ALL = [TRITON, GRAPH, TORCH, PLAIN, COMPILED, REDUCED]


def rehearse(folder: Path, *parts: str) -> tuple[int, dict]:
    """The exit code, and what was saved last."""
    pytest.importorskip("triton")
    code = gpu_quick.main(["--rehearse", "--out", str(folder), *(["--only", *parts] if parts else [])])
    return code, json.loads(max(folder.glob("*-quick*.json"), key=lambda path: path.stat().st_mtime_ns).read_text())


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        gpu_quick.main([])
    assert stopped.value.code == 2
    assert "no GPU" in capsys.readouterr().err


def test_a_rehearsal_of_everything(tmp_path, capsys):
    code, found = rehearse(tmp_path)
    text = capsys.readouterr().out
    assert code == 0, text
    tiny = {workload: asdict(stand_in) for workload, stand_in in gpu_quick.TINY.items()}
    for workload in (SHORT, WIDE, LONG):
        rows = [row for row in found["implementations"] if row["workload"] == tiny[workload]]
        names = [row["implementation"] for row in rows]
        assert set(ALL) <= set(names)
        assert len(set(names)) == len(names)
        assert all(len(row["seconds"]) == len(row["ratios"]) == 2 for row in rows)
        kernels = [row["kernel"] for row in found["kernels"] if row["workload"] == tiny[workload]]
        assert ("short_backward" if workload is SHORT else "stability_forward") in kernels
    assert {row["kernel"] for row in found["candidates"]} == {
        "short_backward",
        "mi_scores",
        "mi_weights",
        "mi_gradient",
    }
    assert {row["pieces"] for row in found["candidates"] if row["kernel"] == "short_backward"} == {None, 1, 2}
    assert [row["implementation"] for row in found["operations"]] == ALL
    for kind in ("implementations", "kernels", "candidates"):
        assert not [row["error"] for row in found[kind] if "error" in row]
    tables = quick_tables.quick(found)
    assert tables in text
    assert max(len(line) for line in tables.splitlines() if line.startswith("|")) <= 120


def test_a_second_run_leaves_the_first(tmp_path):
    for _ in range(2):
        code, found = rehearse(tmp_path, "rates")
        assert code == 0
        assert found["machine_info"]["command"].endswith("--only rates")
        assert [part["name"] for part in found["parts"]] == ["rates"]
    assert len(list(tmp_path.iterdir())) == 2


def test_an_implementation_that_fails_is_a_row(tmp_path, monkeypatch, capsys):
    """Before the rounds or in them; the others go on."""

    def no_memory(*_):
        raise torch.OutOfMemoryError("tried to allocate 200 GiB")

    def fails_later(gpu, case):
        step, calls = IMPLEMENTATIONS[TORCH](gpu, case), iter(range(13))  # up to the rounds

        def later():
            next(calls, None) is not None or no_memory()
            return step()

        return later

    monkeypatch.setitem(IMPLEMENTATIONS, GRAPH, no_memory)
    monkeypatch.setitem(IMPLEMENTATIONS, PLAIN, fails_later)
    code, found = rehearse(tmp_path, "eager, short")
    assert code == 0
    rows = {row["implementation"]: row for row in found["implementations"]}
    assert rows[GRAPH]["error"] == "OutOfMemoryError: tried to allocate 200 GiB"
    assert "OutOfMemoryError" in rows[PLAIN]["error"]
    assert all(len(rows[name]["ratios"]) == 2 for name in (TRITON, TORCH))
    assert f"- {GRAPH}: OutOfMemoryError: tried to allocate 200 GiB" in capsys.readouterr().out


def test_an_implementation_that_compiles_too_long_is_a_row(tmp_path, monkeypatch):
    def slow(*_):
        raise gpu_quick.OutOfTime

    monkeypatch.setitem(IMPLEMENTATIONS, COMPILED, slow)
    code, found = rehearse(tmp_path, "compiled, short", "rates")
    assert code == 1
    (row,) = found["implementations"]
    assert (row["implementation"], row["error"]) == (COMPILED, "was not ready in time")
    assert [bool(part["error"]) for part in found["parts"]] == [False, True]


def test_a_wrong_result_is_refused(tmp_path, monkeypatch):
    """Triton's are left out in a rehearsal, so they are wrong."""
    right = check.assert_close
    monkeypatch.setattr(gpu_quick, "_rehearsed", gpu_quick.launches_left_out)
    code, found = rehearse(tmp_path, "eager, short")
    assert check.assert_close is right
    assert code == 0
    rows = {row["implementation"]: row for row in found["implementations"]}
    assert "AssertionError" in rows[TRITON]["error"]
    assert "ratios" not in rows[TORCH]
    assert len(rows[TORCH]["seconds"]) == 2


def test_other_paths_for_long_sequences(tmp_path, monkeypatch):
    """Not one of them computes here."""
    seen = []
    monkeypatch.setattr(launch, "LONG_PATH", "tiles", raising=False)
    monkeypatch.setattr(check, "run", lambda *_, **__: seen.append(launch.LONG_PATH))
    code, found = rehearse(tmp_path, "eager, long", "eager, short", "kernels, long")
    assert code == 0
    of = {row["implementation"] for row in found["implementations"] if row["workload"]["T"] == 140}
    assert {"triton", "triton, kept", "triton, dense"} < of
    assert set(seen) == {"tiles", "kept", "dense"}
    assert launch.LONG_PATH == "tiles"
    assert {"kernels, long, triton, kept", "kernels, long, triton, dense"} < {part["name"] for part in found["parts"]}


def test_without_other_paths_it_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.delattr(launch, "LONG_PATH", raising=False)
    rehearse(tmp_path, "rates")
    assert "launch.LONG_PATH is not there" in capsys.readouterr().out


def kernel_row(**other):
    needs = {"registers": 128, "spills": 2, "shared_memory": 98304}
    row = {"workload": asdict(WIDE), "implementation": TRITON, "kernel": "mi_scores", "launches": 1, **needs}
    return row | {"cost": {"bytes": 2 * 10**9, "flops": 3 * 10**11}, "seconds": [0.9e-3, 1e-3, 1.2e-3]} | other


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.split("|")[1:-1]]


def test_the_tables_say_what_was_found():
    machine = MACHINE | {"rates": {"bytes_per_second": 4e12, "flops_per_second": 6e14}}
    implementation = {
        "workload": asdict(WIDE),
        "implementation": COMPILED,
        "hidden_bytes": 1_409_286_144,
        "floor": [{"bytes": 4 * 10**9, "flops": 0}],
        "seconds": [0.009, 0.010, 0.011],
        "ratios": [1.5, 2.5, 2.0],
        "host_seconds": 0.0012,
        "peak_bytes": 3_000_000,
        "held_bytes": 500_000,
        "first_seconds": 62.04,
    }
    candidate = {
        "options": {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_D": 64, "PIECES": 16, "num_warps": 8, "num_stages": 3},
        "is_own": True,
    }
    found = {
        "machine_info": machine,
        "implementations": [implementation],
        "operations": [{"workload": asdict(WIDE), "implementation": COMPILED, "operations": {"a": 3, "b": 4}}],
        "kernels": [kernel_row(), kernel_row(implementation="triton, kept", cost=None)],
        "candidates": [kernel_row(**candidate), {"kernel": "mi_scores", "workload": asdict(WIDE), "error": "is wrong"}],
        "parts": [{"name": "compiled, long", "error": "ended after 80 s"}, {"name": "rates", "error": ""}],
    }
    lines = quick_tables.quick(found).splitlines()
    rows = [cells(line) for line in lines if line.startswith("|")]
    assert rows[2] == ["mi_scores", "1024", "128x256x64 w8 s3 *", "1000", "900 to 1200", "128", "8", "96"]
    assert rows[3][:4] == ["mi_scores", "1024", "*", "failed"]
    assert rows[6] == ["mi_scores", "1024", "1", "1000", "900 to 1200", "2000", "50 %", "300", "50 %", "128", "8", "96"]
    assert rows[7][:5] == ["mi_scores, kept", "1024", "1", "1000", "900 to 1200"]
    assert rows[7][5:9] == [""] * 4
    assert rows[10] == [COMPILED, "10", "9.4 to 10.6", "2x", "10 %", "1200", "3.5", "62.0", "7"]
    assert "- mi_scores: is wrong" in lines
    assert "- compiled, long: ended after 80 s" in lines
    assert "copies 4 TB/s, multiplies 600 TFLOP/s" in lines[-1]
    assert max(len(line) for line in lines if line.startswith("|")) <= 120


def test_a_page_can_be_written_from_it(tmp_path, monkeypatch):
    found = {"machine_info": MACHINE, "kernels": [kernel_row()], "parts": []}
    page, result = tmp_path / "page.md", tmp_path / "result.json"
    page.write_text(f"{report.BEGIN}{report.END}")
    result.write_text(json.dumps(found))
    monkeypatch.setattr("sys.argv", ["report", str(result), "--page", str(page)])
    report.main()
    assert quick_tables.quick(found) in page.read_text()


def test_nothing_found_is_no_error():
    assert "a CPU" in quick_tables.quick({"machine_info": MACHINE, "parts": []})


def test_every_part_has_a_limit_and_a_kernel_to_measure():
    parts = gpu_quick.Quick(None, gpu_quick.Rehearsal(), gpu_quick.TINY)
    parts._other_paths = lambda: ["kept", "dense"]
    names, limits, _ = zip(*parts.parts(), strict=True)
    assert len(set(names)) == len(names)
    assert max(limits) <= 120
    for kernel in gpu_quick.candidates.QUICK:
        assert kernel in tune.SUBJECTS
