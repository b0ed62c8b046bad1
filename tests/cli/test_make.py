"""The targets of make on somebody's machine: what they install, from where, and what they take away."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.cli.processes import ROOT
from tests.cli.wheels import requirements_below

CONSTRAINTS = (ROOT / "constraints.txt").read_text().split()
DEV = [
    "setup",
    "test",
    "lint",
    "types",
    "bench",
    "test-gpu-quick",
    "test-gpu",
    "test-gpu-sanitizer",
    "bench-gpu-quick",
    "bench-gpu",
    "tune",
]
DEMO = ["demo", "evaluate"]
CORE = ["doctor", "verify"]
INSTALLS = {**dict.fromkeys(DEV, ".[dev]"), **dict.fromkeys(DEMO, ".[demo]"), **dict.fromkeys(CORE, ".")}


def make(*arguments: str, venv: Path) -> str:
    """What make would do, with a virtual environment in that folder."""
    if shutil.which("make") is None:
        pytest.skip("needs make")
    command = ["make", "--dry-run", *arguments, f"VENV={venv}"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    return result.stdout


def installs(text: str) -> list[str]:
    return [line for line in text.splitlines() if "pip install" in line]


def extras() -> dict[str, list[Requirement]]:
    with open(ROOT / "pyproject.toml", "rb") as file:
        project = tomllib.load(file)["project"]
    named = {"": project["dependencies"], **project["optional-dependencies"]}
    return {extra: [Requirement(line) for line in lines] for extra, lines in named.items()}


def test_versions_are_those_that_every_index_has():
    """No `1.0+cpu`, which only an index of CPU builds has, and which would keep a GPU's build out."""
    assert [line for line in CONSTRAINTS if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", line)] == []


def test_every_requirement_is_pinned():
    """And what it requires, but for the libraries that torch's builds for GPUs bring along, which torch pins itself."""
    pinned = {canonicalize_name(line.split("==")[0]) for line in CONSTRAINTS}
    roots = {requirement.name for lines in extras().values() for requirement in lines} - {"carma-kernels"}
    needed = requirements_below(*roots)
    assert {name for name in needed if name not in pinned and not name.startswith(("nvidia-", "cuda-"))} == set()


def test_pins_are_what_the_extras_ask_for():
    pins = {canonicalize_name(name): version for name, version in (line.split("==") for line in CONSTRAINTS)}
    for requirement in (requirement for lines in extras().values() for requirement in lines):
        if requirement.name != "carma-kernels":
            assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), requirement


@pytest.mark.parametrize("target", INSTALLS)
def test_a_target_installs_what_it_needs(target: str, tmp_path: Path):
    [line] = installs(make(target, venv=tmp_path / "none"))
    words = line.replace("'", "").split()
    assert words[words.index("--editable") + 1 :] == [INSTALLS[target]]
    assert words[words.index("--constraint") + 1] == "constraints.txt"
    assert not [word for word in words if "index" in word or "find-links" in word or "://" in word]


def test_the_sets_complete_each_other(tmp_path: Path):
    """In one environment: after the demo the tests get the rest, and after the tests nothing is missing."""
    (tmp_path / "bin").mkdir()
    for stamp in ("bin/python", ".core", ".demo"):
        (tmp_path / stamp).touch()
    assert installs(make("doctor", "demo", venv=tmp_path)) == []
    assert len(installs(make("test", venv=tmp_path))) == 1
    (tmp_path / ".ready").touch()
    assert installs(make("doctor", "demo", "test", venv=tmp_path)) == []
    assert "-m venv" not in make("demo", venv=tmp_path)


@pytest.mark.parametrize("target", ["doctor", "demo", "test"])
def test_an_environment_of_ones_own_is_left_as_it_is(target: str, tmp_path: Path):
    text = make(target, "READY=", "BIN=/elsewhere", venv=tmp_path / "none")
    assert installs(text) == []
    assert "-m venv" not in text
    assert "/elsewhere/python" in text


def test_clean_leaves_what_the_user_has_trained(tmp_path: Path):
    def removed(target: str) -> set[str]:
        lines = make(target, venv=tmp_path).splitlines()
        return {word for line in lines if line.startswith("rm -rf ") for word in line.split()[2:]}

    assert removed("clean") > {str(tmp_path), "build", "dist"}
    assert removed("distclean") == removed("clean") | {"runs"}


def test_ci_names_no_index():
    assert "://" not in (ROOT / ".ci" / "run").read_text()
