"""The tables say what was stored."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest

from bench import report
from bench.providers import BASELINE, COMPILED, EAGER
from bench.workloads import GROWTH

pytestmark = pytest.mark.smoke

MACHINE = {
    "device": "a CPU",
    "rates": {"bytes_per_second": 1e10, "flops_per_second": 1e11},
    "torch_threads": 1,
    "cpu_cores": 2,
    "load_at_start": 0.1,
    "timer": "time.perf_counter",
    "torch": "2.13.0",
    "python": "3.11.7",
    "commit": "0123456789abcdef",
    "dirty": True,
}


def measured(provider, seconds, *, passes="forward+backward", name="paper"):
    return {
        "extra_info": {
            "provider": provider,
            "passes": passes,
            "workload": {"name": name, "L": 12, "B": 16, "T": 58, "D": 768, "words": "dense"},
            "hidden_bytes": 2_000_000,
            "peak_bytes": 3_000_000,
            "floor": [{"bytes": 10_000_000, "flops": 0}, {"bytes": 0, "flops": 200_000_000}],
            "compile_seconds": None,
        },
        "stats": {"median": seconds, "min": 0.9 * seconds, "max": 2 * seconds, "rounds": 7},
    }


OURS = "torch: carma_loss"


def table(text):
    """Its first table as rows by implementation, each a dictionary by column."""
    lines = [[c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    return {line[1]: dict(zip(lines[0], line, strict=False)) for line in lines[2:]}


def test_ratio_spread_and_memory():
    results = [measured(BASELINE, 5.0), measured(OURS, 0.010), measured(OURS, 1.0, name="tiny")]
    text = report.details(results, MACHINE)
    assert table(text)[OURS] == {
        "workload": "B=16, T=58, L=12, D=768, dense",
        "implementation": OURS,
        "median ms": "10",
        "min to max (rounds)": "9 to 20 (7)",
        "against published": "500x",
        "extra MB": "3",
        "of the hidden states": "1.50x",
        "must move MB": "10",
        "of the floor": "30 %",
    }
    assert table(text)[BASELINE]["median ms"] == "5000"
    assert table(text)[BASELINE]["against published"] == "1x"
    assert text.count(f"| {OURS}") == 1  # the tiny workload is not a result
    assert "commit 0123456789 with changes" in text


def test_a_ratio_needs_the_baseline_of_the_same_pass():
    results = [measured(BASELINE, 5.0, passes="forward"), measured(OURS, 0.010)]
    assert "against published" not in table(report.details(results, MACHINE))[OURS]


def test_a_column_for_what_only_some_have():
    compiled, on_gpu = measured(COMPILED, 0.020), measured(OURS, 0.010)
    compiled["extra_info"]["compile_seconds"] = 12.3
    on_gpu["extra_info"]["graph_seconds"] = [0.001, 0.004, 0.002]
    rows = table(report.details([compiled, on_gpu], MACHINE))
    assert rows[OURS]["against compiled"] == "2x"
    assert (rows[OURS]["as a CUDA graph"], rows[COMPILED]["as a CUDA graph"]) == ("2", "")
    assert (rows[OURS]["compiled in s"], rows[COMPILED]["compiled in s"]) == ("", "12.3")


def test_lost_cases_are_named():
    ours = [measured(OURS, 0.010), measured("torch: mi_loss + stability_loss", 0.001)]
    faster, slower = measured(EAGER, 0.004), measured(COMPILED, 0.020)
    assert "No peer was faster" in report.details([*ours, slower], MACHINE)
    lost = report.details([*ours, faster, slower], MACHINE).partition("Cases lost")[2]
    row = next([c.strip() for c in line.split("|")[1:-1]] for line in lost.splitlines() if EAGER in line)
    assert row[1:] == ["forward+backward", OURS, "10", EAGER, "4", "2.5x"]
    assert COMPILED not in lost.partition("\n\n")[2]


def test_powers_of_growth():
    runs = []
    for T in (64, 128, 256, 512):
        run = measured(OURS, 1e-6 * T**2, name="growth")
        run["extra_info"]["workload"] = asdict(replace(GROWTH[0], T=T))
        run["extra_info"]["peak_bytes"] = 1000 * T
        runs.append(run)
    text = report.details(runs, MACHINE).partition("The power of a size")[2]
    row = next([c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines() if OURS in line)
    assert row == [OURS, "2.00, 1.00", "", "", ""]


def test_summary_has_a_column_for_each_headline_implementation():
    runs = [measured(BASELINE, 5.0), measured(OURS, 0.010), measured("torch: mi_loss + stability_loss", 0.020)]
    text = report.summary([*runs, measured(OURS, 1.0, name="growth")], MACHINE)
    header, _, row, *_ = [line for line in text.splitlines() if line.startswith("|")]
    assert [c.strip() for c in header.split("|")[2:-1]] == [BASELINE, OURS]
    assert [c.strip() for c in row.split("|")[2:-1]] == ["5000 ms 1x", "10 ms 500x"]


def test_update_replaces_what_is_between_the_markers(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.update(page, "new")
    report.update(page, "newer")
    assert page.read_text() == f"before\n{report.BEGIN}\nnewer\n{report.END}\nafter\n"


@pytest.mark.parametrize("text", ["", report.BEGIN, report.END + report.BEGIN, (report.BEGIN + report.END) * 2])
def test_update_refuses_a_page_without_one_pair_of_markers(tmp_path, text):
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises(ValueError, match="must have one"):
        report.update(page, "new")
    assert page.read_text() == text


def test_a_page_gets_the_tables_and_the_pictures(tmp_path, monkeypatch):
    page, result = tmp_path / "page.md", tmp_path / "result.json"
    page.write_text(f"{report.BEGIN}{report.END}")
    runs = [measured(BASELINE, 5.0), measured("torch: carma_loss", 0.010)]
    runs += [measured("torch: carma_loss", seconds, name="growth") for seconds in (0.010, 0.020)]
    runs[-1]["extra_info"]["workload"] |= {"L": 8, "B": 4, "T": 256, "D": 512}
    result.write_text(json.dumps({"benchmarks": runs, "machine_info": MACHINE}))
    monkeypatch.setattr("sys.argv", ["report", str(result), "--page", str(page)])
    report.main()
    for name in ("speed", "growth", "roofline"):
        assert f"](pictures/{name}.png)" in page.read_text()
        assert (tmp_path / "pictures" / f"{name}.png").stat().st_size > 5000
    assert "500x" in page.read_text()
