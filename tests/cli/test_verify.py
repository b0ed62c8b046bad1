"""`verify` passes what is right, and misses nothing that is wrong."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import carma_kernels
from carma_kernels import PairIndex, eager, verify
from carma_kernels.__main__ import main
from carma_kernels.verify import CHECKS, TOLERANCE, Check, Problem, random_problem
from tests.cli import processes

pytestmark = pytest.mark.usefixtures("no_interpreter")

MI = Check("mi_loss", "sequence", "cosine")
Terms = Callable[..., tuple[Tensor, Tensor]]


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
from carma_kernels import verify
from carma_kernels.__main__ import main
verify.CHECKS = verify.Check("mi_loss", "sequence", "cosine"), verify.Check("stability_loss")
"""
BREAK_A_KERNEL = """
choose = verify.choose_backend
def choose_and_break(backend, device):
    if backend == "triton":
        from carma_kernels import ops
        terms = ops.carma_terms
        ops.carma_terms = lambda *arguments: [x * (1 + 2e-5) for x in terms(*arguments)]
    return choose(backend, device)
verify.choose_backend = choose_and_break
"""


@pytest.mark.parametrize("broken", [False, True])
def test_both_backends(broken: bool):
    """On a machine without a GPU, Triton's interpreter runs the kernels."""
    pytest.importorskip("triton")
    code = IN_TWO_CHECKS + BREAK_A_KERNEL * broken + "sys.exit(main(['verify', '--cases', '1', '--device', 'cpu']))"
    result = processes.run(code=f"import sys\n{code}")
    assert result.stderr == ""
    assert result.returncode == int(broken)
    lines = result.stdout.splitlines()
    headers = [line for line in lines if " backend on " in line]
    assert [line.split(", ")[0] for line in headers] == ["torch backend on cpu", "triton backend on cpu"]
    assert "in Triton's interpreter" in headers[1]
    results = [result for _, result in rows(lines)]
    assert results == ["ok"] * 8 + ["MISS" if broken else "ok"] * 6  # Triton has no fp64
    assert f"{8 if broken else 14} of 14 checks within tolerance" in result.stdout


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
    with verify._interpreter(list(map(torch.device, devices)), backend):
        assert (os.environ.get("TRITON_INTERPRET") == "1") == on
    assert "TRITON_INTERPRET" not in os.environ


def test_too_late_for_the_interpreter(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", sys)
    with verify._interpreter([torch.device("cpu")], "all"):
        assert "TRITON_INTERPRET" not in os.environ


def test_tolerances_are_those_of_the_design():
    assert TOLERANCE[torch.float64] == (1e-9, 1e-9)
    assert TOLERANCE[torch.float32] == (1e-5, 1e-5)
    assert set(TOLERANCE) == {torch.float64, torch.float32, torch.bfloat16, torch.float16}


class ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


def wrong_value(terms: Terms) -> Terms:
    def changed(hidden, mi, stability):
        sums, changes = terms(hidden, mi, stability)
        return sums * (1 + 2e-5), changes * (1 + 2e-5)

    return changed


def wrong_gradient(terms: Terms) -> Terms:
    def changed(hidden, mi, stability):
        sums, changes = terms(hidden, mi, stability)
        return ScaledGradient.apply(sums, 1.02), ScaledGradient.apply(changes, 1.02)

    return changed


def forgotten_layer(terms: Terms) -> Terms:
    """No gradient for the last layer."""

    def changed(hidden, mi, stability):
        if isinstance(hidden, Tensor):
            return terms(torch.cat([hidden[:-1], hidden[-1:].detach()]), mi, stability)
        return terms([*hidden[:-1], hidden[-1].detach()], mi, stability)

    return changed


def wrong_temperature_gradient(terms: Terms) -> Terms:
    def changed(hidden, mi, stability):
        if mi is not None and isinstance(mi.similarity.temperature, Tensor):
            temperature = ScaledGradient.apply(mi.similarity.temperature, 1.05)
            mi = dataclasses.replace(mi, similarity=dataclasses.replace(mi.similarity, temperature=temperature))
        return terms(hidden, mi, stability)

    return changed


def not_a_number(terms: Terms) -> Terms:
    def changed(hidden, mi, stability):
        sums, changes = terms(hidden, mi, stability)
        return sums * float("nan"), changes * float("nan")

    return changed


def ignored_mask(terms: Terms) -> Terms:
    """What lies in the padding, NaN, gets in."""

    def changed(hidden, mi, stability):
        return terms(hidden, mi, stability and dataclasses.replace(stability, mask=None))

    return changed


def crash(terms: Terms) -> Terms:
    def changed(hidden, mi, stability):
        raise RuntimeError("an illegal memory access\nwas encountered")

    return changed


@pytest.mark.parametrize("break_it", [wrong_value, wrong_gradient, forgotten_layer, not_a_number, crash])
@pytest.mark.parametrize("check", [MI, Check("stability_loss"), Check("carma_loss", "batch", "cosine")], ids=str)
def test_a_wrong_backend_is_a_miss(run, monkeypatch, break_it, check: Check):
    monkeypatch.setattr(verify, "CHECKS", (check,))
    monkeypatch.setattr(eager, "carma_terms", break_it(eager.carma_terms))
    status, lines = run("--cases", "4")
    assert status == 1
    assert list(rows(lines)) == [(check.function, "MISS")] * len(TOLERANCE)
    assert "0 of 4 checks within tolerance" in "\n".join(lines)
    assert any(line.startswith("MISS: this installation does not compute what the reference does") for line in lines)


@pytest.mark.parametrize(
    ("break_it", "check"), [(wrong_temperature_gradient, MI), (ignored_mask, Check("stability_loss"))]
)
def test_what_shows_in_some_problems_only_is_a_miss(run, monkeypatch, break_it, check: Check):
    monkeypatch.setattr(verify, "CHECKS", (check,))
    monkeypatch.setattr(eager, "carma_terms", break_it(eager.carma_terms))
    status, lines = run()
    assert status == 1
    assert {result for _, result in rows(lines)} == {"MISS"}


def test_a_wrong_similarity_is_a_miss_and_nothing_else(run, monkeypatch):
    monkeypatch.setattr(verify, "CHECKS", (Check("pairwise_similarity", metric="dot"), MI, Check("stability_loss")))
    similarity = eager.pairwise_similarity
    monkeypatch.setattr(eager, "pairwise_similarity", lambda *arguments: similarity(*arguments) * (1 + 2e-5))
    status, lines = run("--cases", "1")
    assert status == 1
    assert {function for function, result in rows(lines) if result == "MISS"} == {"pairwise_similarity"}
    assert {function for function, result in rows(lines) if result == "ok"} == {"mi_loss", "stability_loss"}


def test_a_miss_says_which_problem(run, monkeypatch):
    monkeypatch.setattr(verify, "CHECKS", (MI,))
    monkeypatch.setattr(eager, "carma_terms", crash(eager.carma_terms))
    _, lines = run("--cases", "3")
    details = [line for line in lines if line.startswith("    problem ")]
    assert len(details) == len(TOLERANCE)
    assert all("RuntimeError: an illegal memory access was encountered" in line for line in details)
    assert all("temperature=" in line and "reduction=" in line for line in details)


def test_verbose_has_a_line_for_each_problem(run, monkeypatch):
    monkeypatch.setattr(verify, "CHECKS", (MI,))
    status, lines = run("--cases", "3", "--verbose")
    assert status == 0
    details = [line for line in lines if line.startswith("    problem ")]
    assert len(details) == 3 * len(TOLERANCE)
    assert [line.split()[1] for line in details[:3]] == ["0:", "1:", "2:"]


def test_rows_appear_as_they_are_done(monkeypatch, capsys):
    monkeypatch.setattr(verify, "CHECKS", (MI, MI))
    seen = []

    def compare(*arguments):
        seen.append(capsys.readouterr().out)
        return verify.Outcome(random_problem(MI, torch.float32, 0, 0), 0.0, 0.0, 0.0, "")

    monkeypatch.setattr(verify, "_compare", compare)
    assert main(["verify", "--cases", "1", "--backend", "torch"]) == 0
    assert [text.count(" ok") for text in seen] == [0] + [1] * (2 * len(TOLERANCE) - 1)


def test_one_device_and_one_backend(run, monkeypatch):
    monkeypatch.setattr(verify, "CHECKS", (MI,))
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
