"""The command line: subcommands, help, exit statuses, and what is loaded for it."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest

import carma_kernels
from carma_kernels import __main__
from carma_kernels.__main__ import COMMANDS, main
from tests.cli import processes


def stopped(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int | str | None, str, str]:
    """Exit status and output of a call that argparse ends."""
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    return exit.value.code, *capsys.readouterr()


def test_help_names_every_command(capsys):
    status, out, _ = stopped(capsys, "--help")
    assert status == 0
    assert list(COMMANDS) == ["doctor", "verify", "demo", "evaluate"]
    for name, command in COMMANDS.items():
        assert name in out
        assert command.help[:30] in out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command(command: str, capsys):
    status, out, _ = stopped(capsys, command, "--help")
    assert status == 0
    assert f"carma-kernels {command}" in out
    assert COMMANDS[command].help[1:20] in out


def test_help_shows_options_with_their_defaults(capsys):
    out = " ".join(stopped(capsys, "verify", "--help")[1].split())
    for option in ("--cases N", "--seed N", "--device DEVICE", "--backend {all,torch,triton}", "--verbose"):
        assert option in out
    assert "random problems for each check; slow ones share them out among the dtypes (default: 5)" in out
    assert "(default: 0)" in out
    assert "(default: all)" in out
    assert "--json" in stopped(capsys, "doctor", "--help")[1]


def test_version(capsys):
    assert stopped(capsys, "--version")[:2] == (0, f"carma_kernels {carma_kernels.__version__}\n")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "the following arguments are required: command"),
        (["nonsense"], "invalid choice: 'nonsense'"),
        (["doctor", "--nonsense"], "unrecognized arguments: --nonsense"),
        (["verify", "--cases", "0"], "must be a number >= 1, got '0'"),
        (["verify", "--cases", "many"], "must be a number >= 1, got 'many'"),
        (["verify", "--backend", "nonsense"], "invalid choice: 'nonsense'"),
    ],
)
def test_wrong_usage(arguments, complaint, capsys):
    status, out, err = stopped(capsys, *arguments)
    assert status == 2
    assert out == ""
    assert complaint in err
    assert "usage: carma-kernels" in err


@pytest.fixture
def command(monkeypatch):
    """A subcommand that does what the test says."""
    module = SimpleNamespace(add_arguments=lambda parser: parser.add_argument("--number", type=int, default=1))
    monkeypatch.setitem(sys.modules, "carma_kernels.for_test", module)
    monkeypatch.setitem(COMMANDS, "for-test", __main__.Command("carma_kernels.for_test", "for this test"))
    return module


@pytest.mark.parametrize("status", [0, 1, 7])
def test_the_commands_status_is_the_process(command, status):
    command.run = lambda args: status + args.number
    assert main(["for-test", "--number", "0"]) == status


def test_arguments_come_from_the_process(command, monkeypatch):
    command.run = lambda args: args.number
    monkeypatch.setattr(sys, "argv", ["carma-kernels", "for-test", "--number", "5"])
    assert main() == 5


def test_an_interrupt_is_no_error(command):
    def run(args):
        raise KeyboardInterrupt

    command.run = run
    assert main(["for-test"]) == 130


def test_a_bug_is_not_hidden(command):
    def run(args):
        raise ZeroDivisionError

    command.run = run
    with pytest.raises(ZeroDivisionError):
        main(["for-test"])


REFUSE_TORCH = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "numpy", "triton", "transformers", "rich"}:
            raise AssertionError(f"{name} is imported")

sys.meta_path.insert(0, Refuse())
sys.argv = ["/usr/bin/carma-kernels"]
from carma_kernels.__main__ import main
sys.exit(main(ARGUMENTS))
"""


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], *([command, "--help"] for command in COMMANDS)])
def test_help_does_not_wait_for_torch(arguments: list[str]):
    result = processes.run(code=REFUSE_TORCH.replace("ARGUMENTS", repr(arguments)))
    assert result.returncode == 0, result.stderr
    assert result.stdout


@pytest.mark.parametrize("arguments", [[], ["nonsense"], *([command, "--nonsense"] for command in COMMANDS)])
def test_wrong_arguments_do_not_wait_for_torch(arguments: list[str]):
    result = processes.run(code=REFUSE_TORCH.replace("ARGUMENTS", repr(arguments)))
    assert result.returncode == 2, result.stderr
    assert "carma-kernels" in result.stderr.splitlines()[-1]


def test_as_a_process_without_what_is_optional():
    """`doctor` needs torch and numpy and no more, nothing warns, and the other commands stay out of it."""
    optional = ("transformers", "tokenizers", "rich", "matplotlib", "triton", "pytest", "csrc_ref")
    code = (
        processes.without(*optional)
        + "from carma_kernels.__main__ import main\n"
        + "status = main(['doctor'])\n"
        + "print(sorted({'carma_kernels.verify', 'carma_kernels.demo'} & set(sys.modules)))\n"
        + "sys.exit(status)"
    )
    result = processes.run(code=code)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert "triton        not installed" in result.stdout
    assert result.stdout.endswith("no problems found.\n[]\n")


def test_nobody_reads_on():
    """As in `carma-kernels verify | head -1`."""
    process = subprocess.Popen(
        [sys.executable, "-m", "carma_kernels", "doctor"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=processes.ROOT,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    with process.stderr:
        process.stdout.close()
        errors = process.stderr.read()
    assert process.wait(timeout=120) == 141
    assert errors == ""
