"""`verify` passes what is right, and misses nothing that is wrong."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import carma_kernels
from carma_kernels import PairIndex, eager
from carma_kernels.__main__ import main
from carma_kernels.verify import table
from carma_kernels.verify.errors import TOLERANCE, Outcome
from carma_kernels.verify.problems import CHECKS, Check, Problem, random_problem
from tests.cli import processes

pytestmark = pytest.mark.usefixtures("no_interpreter")

MI = Check("mi_loss", "sequence", "cosine")


@pytest.fixture
def run(capsys):
    """The torch backend alone: the Triton backend takes a process of its own, in which its interpreter stays on."""

    def run(*arguments: str) -> tuple[int, list[str]]:
        status = main(["verify", "--backend", "torch", *arguments])
        out, err = capsys.readouterr()
        assert err == ""
        return status, out.splitlines()

    return run


def rows(lines: list[str]) -> Iterator[tuple[str, str]]:
    """Function and result of each row of the table."""
    for line in lines:
        words = line.split()
        if words and words[0] in {check.function for check in CHECKS}:
            yield words[0], words[-1]


def test_this_installation_is_right(run):
    status, lines = run("--cases", "1")
    assert status == 0
    results = list(rows(lines))
    assert len(results) == len(CHECKS) * len(TOLERANCE)
    assert {function for function, _ in results} == set(carma_kernels.__all__) & {
        "pairwise_similarity",
        "mi_loss",
        "stability_loss",
        "carma_loss",
    }
    assert {result for _, result in results} == {"ok"}
    assert lines[0].startswith("torch backend on cpu, random problems a check: 1")
    assert f"{len(results)} of {len(results)} checks within tolerance" in lines[-1]


IN_TWO_CHECKS = """
from carma_kernels.__main__ import main
from carma_kernels.verify import table
table.CHECKS = table.Check("mi_loss", "sequence", "cosine"), table.Check("stability_loss")
"""
BREAK_A_KERNEL = """
choose = table.choose_backend
def choose_and_break(backend, device):
    if backend == "triton":
        from carma_kernels import ops
        terms = ops.carma_terms
        ops.carma_terms = lambda *arguments: [broken(x, arguments[0][0].dtype) for x in terms(*arguments)]
    return choose(backend, device)
table.choose_backend = choose_and_break
"""
VALUES = """
def broken(x, dtype):
    return x * (1 + 2e-5)
"""
HALF_THE_GRADIENTS = """
import torch
def broken(x, dtype):
    return x + 0.02 * (x - x.detach()) if dtype == torch.bfloat16 else x
"""


@pytest.mark.parametrize(
    ("broken", "results"),
    [("", ["ok"] * 3), (VALUES, ["MISS"] * 3), (HALF_THE_GRADIENTS, ["ok", "MISS", "ok"])],
    ids=["right", "values", "gradients in bfloat16"],
)
def test_both_backends(broken: str, results: list[str]):
    """On a machine without a GPU, Triton's interpreter runs the kernels."""
    pytest.importorskip("triton")
    code = IN_TWO_CHECKS + (broken and broken + BREAK_A_KERNEL) + "sys.exit(main(['verify', '--device', 'cpu']))"
    result = processes.run(code=f"import sys\n{code}")
    assert result.stderr == ""
    assert result.returncode == int(broken != "")
    lines = result.stdout.splitlines()
    headers = [line for line in lines if " backend on " in line]
    assert [line.split(", ")[0] for line in headers] == ["torch backend on cpu", "triton backend on cpu"]
    assert "in Triton's interpreter" in headers[1]
    assert [result for _, result in rows(lines)] == ["ok"] * 8 + results * 2  # Triton has no fp64
    assert f"{8 + 2 * results.count('ok')} of 14 checks within tolerance" in result.stdout


def test_the_triton_backend_alone():
    pytest.importorskip("triton")
    result = processes.run("verify", "--backend", "triton", "--cases", "1")
    assert result.returncode == 0, result.stdout + result.stderr
    results = list(rows(result.stdout.splitlines()))
    assert results == [(check.function, "ok") for check in CHECKS for _ in range(len(TOLERANCE) - 1)]


@pytest.mark.parametrize(
    ("devices", "backend", "on"),
    [
        (["cpu"], "all", True),
        (["cpu"], "triton", True),
        (["cpu"], "torch", False),
        (["cpu", "cuda:0"], "all", False),  # natively there
    ],
)
def test_the_interpreter_is_on_where_it_is_needed(devices, backend: str, on: bool, monkeypatch):
    monkeypatch.delitem(sys.modules, "triton", raising=False)
    with table._interpreter(list(map(torch.device, devices)), backend):
        assert (os.environ.get("TRITON_INTERPRET") == "1") == on
    assert "TRITON_INTERPRET" not in os.environ


def test_too_late_for_the_interpreter(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", sys)
    with table._interpreter([torch.device("cpu")], "all"):
        assert "TRITON_INTERPRET" not in os.environ


def test_tolerances_are_those_of_the_design():
    assert TOLERANCE[torch.float64] == (1e-9, 1e-9)
    assert TOLERANCE[torch.float32] == (1e-5, 1e-5)
    assert set(TOLERANCE) == {torch.float64, torch.float32, torch.bfloat16, torch.float16}


def crash(*arguments: object) -> None:
    raise RuntimeError("an illegal memory access\nwas encountered")


def test_a_miss_says_which_problem(run, monkeypatch):
    monkeypatch.setattr(table, "CHECKS", (MI,))
    monkeypatch.setattr(eager, "carma_terms", crash)
    _, lines = run("--cases", "3")
    details = [line for line in lines if line.startswith("    problem ")]
    assert len(details) == len(TOLERANCE)
    assert all("RuntimeError: an illegal memory access was encountered" in line for line in details)
    assert all("temperature=" in line and "reduction=" in line for line in details)


def test_verbose_has_a_line_for_each_problem(run, monkeypatch):
    monkeypatch.setattr(table, "CHECKS", (MI,))
    status, lines = run("--cases", "3", "--verbose")
    assert status == 0
    details = [line for line in lines if line.startswith("    problem ")]
    assert len(details) == 3 * len(TOLERANCE)
    assert [line.split()[1] for line in details[:3]] == ["0:", "1:", "2:"]


def test_rows_appear_as_they_are_done(monkeypatch, capsys):
    monkeypatch.setattr(table, "CHECKS", (MI, MI))
    seen = []

    def compare(*arguments):
        seen.append(capsys.readouterr().out)
        return Outcome(random_problem(MI, torch.float32, 0, 0), 0.0, 0.0, 0.0, "")

    monkeypatch.setattr(table, "compare", compare)
    assert main(["verify", "--cases", "1", "--backend", "torch"]) == 0
    assert [text.count(" ok") for text in seen] == [0] + [1] * (2 * len(TOLERANCE) - 1)


@pytest.mark.parametrize(
    ("check", "cases", "numbers"),
    [
        (MI, "1", [[0], [0], [0], [0]]),
        (MI, "3", [[0, 1, 2]] * 4),
        (CHECKS[-1], "1", [[0], [1], [2], [3]]),
        (CHECKS[-1], "5", [[0, 4], [1], [2], [3]]),
    ],
)
def test_what_is_slow_has_problems_of_its_own_for_each_dtype(run, monkeypatch, check: Check, cases: str, numbers):
    monkeypatch.setattr(table, "CHECKS", (check,))
    monkeypatch.setattr(table, "compare", lambda _, problem, *__: Outcome(problem, 0.0, 0.0, 0.0, ""))
    _, lines = run("--cases", cases, "--verbose")
    seen: list[list[int]] = []
    for line in lines[2:-1]:
        if line.startswith("    problem "):
            seen[-1].append(int(line.split()[1].rstrip(":")))
        else:
            seen.append([])
    assert seen == numbers


def test_one_device_and_one_backend(run, monkeypatch):
    monkeypatch.setattr(table, "CHECKS", (MI,))
    status, lines = run("--cases", "1", "--device", "cpu", "--backend", "torch")
    assert status == 0
    assert sum(" backend on " in line for line in lines) == 1


def test_nothing_to_check_is_no_success(run, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    status, lines = run("--backend", "triton", "--device", "cpu")
    assert status == 1
    assert lines[0].startswith(
        "Not checked: triton backend on cpu. backend= asks for the triton backend, but Triton is"
    )
    assert lines[-1] == "Nothing was checked."


@pytest.mark.parametrize("device", ["nonsense", "meta", "cuda:99"])
def test_a_device_that_is_not_there(run, device: str):
    status, [line] = run("--device", device)
    assert status == 2
    assert line.startswith(f"--device {device}: ")
    assert "Devices that torch can use here: cpu" in line


def test_without_the_reference(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "csrc_ref", None)
    status, lines = run()
    assert status == 1
    assert "csrc_ref" in lines[0]
    assert lines[1].startswith("pip install")


def problems(check: Check, count: int = 40) -> list[Problem]:
    return [random_problem(check, torch.float32, 0, case) for case in range(count)]


def test_problems_repeat_and_differ():
    for one, same in zip(problems(MI, 5), problems(MI, 5), strict=True):
        assert str(one) == str(same)
        assert all(
            torch.equal(a, b) for a, b in zip(*(map(torch.nan_to_num, p.hidden) for p in (one, same)), strict=True)
        )
    assert len({str(problem) for problem in problems(MI)}) > 30
    assert str(random_problem(MI, torch.float32, 1, 0)) != str(problems(MI, 1)[0])


def test_problems_are_the_same_numbers_in_every_dtype():
    for dtype in TOLERANCE:
        problem, exact = random_problem(MI, dtype, 0, 0), random_problem(MI, torch.float64, 0, 0)
        for layer, exact_layer in zip(problem.hidden, exact.hidden, strict=True):
            assert torch.equal(layer.nan_to_num(), exact_layer.to(dtype).nan_to_num())


@pytest.mark.parametrize("check", CHECKS, ids=str)
def test_three_problems_have_met_every_option(check: Check):
    """As many as Triton's interpreter gets."""
    some = problems(check, 3)
    assert {problem.hidden[0].dim() for problem in some} == {3, 4}
    assert {isinstance(problem.temperature, Tensor) for problem in some} == {False, True}
    assert all(problem.pairs.num_pairs for problem in some)
    for name, values in {
        "match_negatives": {None, 5},
        "reduction": {"mean", "sum", "none"},
        "num_pairs": {None, 7},
    }.items():
        assert {problem.options.get(name) for problem in some} in (values, {None})
    if check.function != "mi_loss":
        assert {problem.mask is None for problem in some} == {False, True}
    if check.function == "stability_loss":
        assert all(last > first for first, last in filter(None, (problem.options["layers"] for problem in some)))


@pytest.mark.parametrize("check", CHECKS, ids=str)
def test_problems_cover_what_matters(check: Check):
    some = problems(check)
    assert {problem.hidden[0].dim() for problem in some} == {3, 4}
    assert {isinstance(problem.temperature, Tensor) for problem in some} == {False, True}
    assert any(hidden.isnan().any() for problem in some for hidden in problem.hidden)
    assert any((hidden == 0).all(-1).any() for problem in some for hidden in problem.hidden)
    if check.function != "mi_loss":
        assert {problem.mask is None for problem in some} == {False, True}
    if check.negatives == "sampled":
        drawn = [problem.pairs for problem in some]
        assert all(isinstance(pairs, PairIndex) for pairs in drawn)
        assert {pairs.negatives.dim() for pairs in drawn} == {2, 3}
    elif check.negatives != "-":
        masks = [problem.pairs.attention_mask for problem in some]
        assert any(not mask[:, 0].all() for mask in masks)  # padding on the left
        assert any(not mask[:, -1].all() for mask in masks)  # and on the right
        lengths = [
            (end - start, int(mask[b].sum()))
            for problem, mask in zip(some, masks, strict=True)
            for b, words in enumerate(problem.pairs.to_lists())
            for start, end in words
        ]
        assert any(length == whole > 1 for length, whole in lengths)  # a word that fills its sequence
        assert any(1 < length < whole for length, whole in lengths)
