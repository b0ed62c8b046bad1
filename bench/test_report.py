"""The tables say what was stored."""

from __future__ import annotations

import json

import pytest

from bench import report
from bench.providers import BASELINE

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


def cells(table, provider):
    return next([c.strip() for c in line.split("|")[1:-1]] for line in table.splitlines() if provider in line)


def test_ratio_spread_and_memory():
    results = [measured(BASELINE, 5.0), measured("ours", 0.010), measured("ours", 1.0, name="tiny")]
    text = report.details(results, MACHINE)
    assert cells(text, "ours")[2:] == ["10", "9 to 20 (7)", "500x", "3", "1.50x", "30 %", ""]
    assert cells(text, BASELINE)[2:5] == ["5000", "4500 to 10000 (7)", "1x"]
    assert text.count("| ours") == 1  # the tiny workload is not a result
    assert "commit 0123456789 with changes" in text


def test_a_ratio_needs_the_baseline_of_the_same_pass():
    results = [measured(BASELINE, 5.0, passes="forward"), measured("ours", 0.010)]
    assert cells(report.details(results, MACHINE), "ours")[4] == ""


def test_summary_has_a_column_for_each_implementation():
    text = report.summary([measured(BASELINE, 5.0), measured("ours", 0.010)], MACHINE)
    header, _, row = [line for line in text.splitlines() if line.startswith("|")][:3]
    assert [c.strip() for c in header.split("|")[2:-1]] == [BASELINE, "ours"]
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
