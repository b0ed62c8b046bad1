"""`python -m carma_kernels evaluate` on tiny checkpoints with random weights."""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from carma_kernels import TokenSpans
from carma_kernels.__main__ import main
from carma_kernels.cap import cli, constituent_pooling, read_synonyms, replace_synonyms
from carma_kernels.cap.evaluation import Score
from carma_kernels.cap.pooling import POSITIONS, PROTOCOLS
from carma_kernels.cap.report import TASK_ONLY, WITH_CARMA
from carma_kernels.demo.definitions import Definition, read_definitions, shipped_file
from carma_kernels.demo.model import build_gpt2, word_logits
from carma_kernels.demo.text import Collator, prompt, train_tokenizer

DEFINITIONS = read_definitions(shipped_file())[:40]
LAYERS = 2


class Outcome(NamedTuple):
    status: int
    out: Path

    @property
    def results(self) -> dict[str, Any]:
        return json.loads((self.out / "pooling.json").read_text(encoding="utf-8"))


def save(folder: Path, seed: int, layers: int = LAYERS) -> Path:
    tokenizer = train_tokenizer(DEFINITIONS, 270)  # hardly more than letters: every word is split
    model = build_gpt2(vocab_size=len(tokenizer), layers=layers, width=16, heads=2, seed=seed)
    for parameter in model.parameters():  # what is pooled has to show in the answers
        if parameter.dim() > 1:
            parameter.data *= 6
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    batch = Collator(tokenizer)(DEFINITIONS)
    for _ in range(20):  # right about some of them
        optimizer.zero_grad()
        F.cross_entropy(word_logits(model, batch), batch.labels).backward()
        optimizer.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the demo leaves it under runs/."""
    runs = tmp_path_factory.mktemp("work") / "runs"
    for seed, checkpoint in enumerate(("task-only", "with-carma")):
        save(runs / "demo-20260102-000000" / checkpoint, seed)
    shutil.copytree(runs / "demo-20260102-000000", runs / "demo-20260101-000000")
    (runs / "demo-20260103-000000").mkdir()  # stopped before it had anything to save
    return runs / "demo-20260102-000000"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "mine.jsonl"
    file.write_text("\n".join(json.dumps(entry._asdict()) for entry in DEFINITIONS), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def outcome(demo: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    out = tmp_path_factory.mktemp("out") / "new" / "folder"
    checkpoints = ("--task-only", demo / "task-only", "--carma", demo / "with-carma")
    return Outcome(
        evaluate(*checkpoints, "--data", data, "--all", "--batch-size", 7, "--synonyms", 0.3, "--out", out), out
    )


def test_the_choices_are_those_of_pooling():
    """Written out, so that help need not import what pools."""
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    choices = {action.dest: action.choices for action in parser._actions}
    assert choices["protocol"] == tuple(parser.get_default("protocol")) == PROTOCOLS
    assert choices["positions"] == POSITIONS
    assert parser.get_default("positions") == POSITIONS[0]


def evaluate(*arguments: object) -> int:
    return main(["evaluate", "--device", "cpu", *map(str, arguments)])


@torch.no_grad()
def one_at_a_time(folder: Path, definitions: list[Definition], **pooling: Any) -> tuple[list[list[int]], list[float]]:
    """Of each definition on its own the ten best tokens, and the loss."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    best, losses = [], []
    for entry in definitions:
        encoding = tokenizer([prompt(entry.definition)], return_tensors="pt", truncation=True)
        inputs = {name: encoding[name] for name in ("input_ids", "attention_mask")}
        label = tokenizer(entry.word)["input_ids"][0]
        if pooling:
            with constituent_pooling(model, TokenSpans.from_encoding(encoding), **pooling):
                logits = model(**inputs).logits[0, -1]
        else:
            logits = model(**inputs).logits[0, -1]
        order = logits.topk(10).indices.tolist()
        best.append([int(token == label) for token in order])
        losses.append(-logits.log_softmax(0)[label].item())
    return best, losses


def expected(best: list[list[int]], losses: list[float], untouched: list[list[int]]) -> Score:
    right = [row[0] for row in untouched]
    return Score(
        top1=sum(row[0] for row in best) / len(best),
        top10=sum(map(sum, best)) / len(best),
        kept=sum(row[0] * was for row, was in zip(best, right, strict=True)) / sum(right) if sum(right) else None,
        task_loss=sum(losses) / len(losses),
    )


def assert_score(found: dict[str, float], score: Score) -> None:
    assert found == pytest.approx(score._asdict(), rel=1e-4)


@pytest.mark.parametrize(("name", "folder"), [(TASK_ONLY, "task-only"), (WITH_CARMA, "with-carma")])
def test_figures(outcome: Outcome, demo: Path, name: str, folder: str):
    found = outcome.results["checkpoints"][name]
    untouched = one_at_a_time(demo / folder, DEFINITIONS)
    assert_score(found["untouched"], expected(*untouched, untouched[0]))
    assert 0 < found["untouched"]["top1"] < 1
    assert found["untouched"]["kept"] == 1
    assert 0 < found["pooled"]["max"]["0"]["kept"] < 1
    assert set(found["pooled"]) == {"mean", "max", "sum"}
    for protocol, by_layer in found["pooled"].items():
        assert set(by_layer) == {"0", "1"}
        pooled = one_at_a_time(demo / folder, DEFINITIONS, protocol=protocol, start_layer=1)
        assert_score(by_layer["1"], expected(*pooled, untouched[0]))
        assert by_layer["1"]["task_loss"] != pytest.approx(found["untouched"]["task_loss"], rel=1e-3)
    reworded = [
        entry._replace(definition=replace_synonyms(entry.definition, read_synonyms(), 0.3, avoid=[entry.word]))
        for entry in DEFINITIONS
    ]
    assert_score(found["synonyms"]["0.3"], expected(*one_at_a_time(demo / folder, reworded), untouched[0]))


def test_files(outcome: Outcome):
    assert outcome.status == 0
    assert {file.name for file in outcome.out.iterdir()} == {"pooling.json", "pooling.png", "table.txt"}
    table = (outcome.out / "table.txt").read_text(encoding="utf-8")
    for text in ("40 definitions", "0, mean", "1, max", "0, sum", "synonyms 30%"):
        assert text in table
    figures = outcome.results["checkpoints"]
    assert f"{figures[TASK_ONLY]['pooled']['sum']['1']['task_loss']:.3f}" in table
    with Image.open(outcome.out / "pooling.png") as picture:
        assert picture.size[0] > 1000
        assert len(picture.convert("RGB").reduce(8).getcolors(maxcolors=10**6)) > 20
    assert outcome.results["data"]["definitions"] == 40
    assert outcome.results["machine"]["torch"] == torch.__version__


def test_without_checkpoints_the_newest_demo(demo: Path, data: Path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(demo.parent.parent)
    options = ("--data", data, "--protocol", "sum", "--start-layer", 1, "--synonyms", "--out", tmp_path)
    assert evaluate(*options) == 0
    printed = capsys.readouterr().out
    assert "runs/demo-20260102-000000/task-only" in printed
    assert "4 definitions from" in printed  # a tenth
    found = Outcome(0, tmp_path).results["checkpoints"][TASK_ONLY]
    assert found["pooled"].keys() == {"sum"}
    assert found["pooled"]["sum"].keys() == {"1"}
    assert found["synonyms"] == {}


def test_after_the_demo(data: Path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny = "--layers 2 --width 16 --heads 2 --vocab-size 300 --batch-size 8 --steps 2 --device cpu"
    assert main(["demo", *tiny.split(), "--data", str(data)]) == 0
    assert evaluate("--data", data, "--protocol", "mean", "--synonyms", "--out", tmp_path / "out") == 0
    found = Outcome(0, tmp_path / "out").results
    [demo] = (tmp_path / "runs").iterdir()
    assert {Path(folder).parent.name for folder in found["folders"].values()} == {demo.name}
    losses = json.loads((demo / "results.json").read_text(encoding="utf-8"))["runs"]
    for name, checkpoint in found["checkpoints"].items():  # the same definitions were held out
        assert checkpoint["untouched"]["task_loss"] == pytest.approx(
            losses[name]["held_out"][-1]["task_loss"], rel=1e-4
        )


def test_one_checkpoint_of_another_family(demo: Path, data: Path, tmp_path):
    """Rotary positions, no padding token, and a first token that begins every text."""
    tokenizer = AutoTokenizer.from_pretrained(demo / "task-only")
    tokenizer.pad_token = None
    tokenizer.eos_token = "!"
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    assert evaluate("--carma", tmp_path / "llama", "--data", data, "--all", "--out", tmp_path / "out") == 0
    [(name, found)] = Outcome(0, tmp_path / "out").results["checkpoints"].items()
    assert name == WITH_CARMA
    assert len(found["pooled"]["mean"]) == 3
    assert all(
        math.isfinite(score["task_loss"]) for by_layer in found["pooled"].values() for score in by_layer.values()
    )


def test_code_that_comes_with_a_checkpoint_is_not_run_nor_asked_about(tmp_path, data: Path, monkeypatch, capsys):
    asked: list[Any] = []
    monkeypatch.setattr("builtins.input", lambda *_: asked.append(_) or "n")
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    auto_map = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    (folder / "config.json").write_text(json.dumps({"model_type": "unheard-of", "auto_map": auto_map}))
    (folder / "code.py").write_text("raise AssertionError('run')")
    assert evaluate("--carma", folder, "--data", data) == 2
    assert "cannot be loaded" in capsys.readouterr().err
    assert not asked


def test_no_checkpoint_at_all(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert evaluate() == 2
    assert "python -m carma_kernels demo" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda folder: shutil.rmtree(folder), "is no checkpoint: it has no config.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), "cannot be loaded"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\0" * 99), "cannot be loaded"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "cannot be loaded"),
    ],
)
def test_broken_checkpoints(demo: Path, data: Path, tmp_path, capsys, spoil, complaint):
    folder = tmp_path / "checkpoint"
    shutil.copytree(demo / "task-only", folder)
    spoil(folder)
    assert evaluate("--task-only", folder, "--data", data, "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert str(folder) in error
    assert complaint in error


def test_arguments_that_do_not_fit(demo: Path, data: Path, tmp_path, capsys):
    common = ("--data", data, "--out", tmp_path / "out")
    assert evaluate("--task-only", demo / "task-only", "--start-layer", 0, 2, *common) == 2
    assert "--start-layer 2: the model's blocks are 0 to 1" in capsys.readouterr().err
    deeper = save(tmp_path / "deeper", seed=0, layers=3)
    assert evaluate("--task-only", demo / "task-only", "--carma", deeper, *common) == 2
    assert "2 blocks (task loss only) and 3 blocks (with CARMA)" in capsys.readouterr().err
    assert evaluate("--task-only", deeper, "--data", tmp_path / "none.jsonl") == 2
    assert "none.jsonl" in capsys.readouterr().err
    for wrong in (("--protocol", "median"), ("--synonyms", "2"), ("--start-layer", "-1"), ("--positions", "last")):
        with pytest.raises(SystemExit):
            evaluate(*wrong)
        assert wrong[0] in capsys.readouterr().err


def test_the_example_of_the_docs(demo: Path):
    page = Path(__file__).parents[2] / "docs" / "cap.md"
    [code] = re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    model = AutoModelForCausalLM.from_pretrained(demo / "task-only").eval()
    tokenizer = AutoTokenizer.from_pretrained(demo / "task-only")
    names: dict[str, Any] = {"torch": torch, "model": model, "tokenizer": tokenizer, "texts": ["some words", "more"]}
    exec(code, names)
    with torch.no_grad():
        plain = model(**names["batch"]).logits
    assert names["logits"].shape == plain.shape
    assert not torch.equal(names["logits"], plain)
