"""What the evaluation came to: a table, a picture, and the figures as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich import box
from rich.table import Table

from carma_kernels.cap.evaluation import Evaluation, Score

TASK_ONLY = "task loss only"
WITH_CARMA = "with CARMA"
_SHORT = {TASK_ONLY: "task", WITH_CARMA: "CARMA"}
_COLOURS = {TASK_ONLY: "#0072B2", WITH_CARMA: "#D55E00"}  # as in the demo
_MARKERS = {TASK_ONLY: "o", WITH_CARMA: "s"}

Evaluations = Mapping[str, Evaluation]
"""By the checkpoint's name"""


def summary_table(evaluations: Evaluations, num_definitions: int) -> Table:
    """All checkpoints side by side: untouched, by protocol and start layer, and by share of synonyms."""
    table = Table(
        title=f"Naming what {num_definitions} definitions define, with the tokens of each word pooled",
        title_justify="left",
        caption=(
            "top-1, top-10: the word's first token is the model's first choice, among its first ten. kept: of what was "
            f"right (top-1) untouched, the share that still is. One definition is {1 / num_definitions:.1%}."
        ),
        caption_justify="left",
        box=box.SIMPLE_HEAD,  # narrow, for a terminal of 80 columns
        padding=(0, 1, 0, 0),
    )
    table.add_column("pooled from")
    columns = [(measure, name) for measure in ("top-1", "top-10", "kept", "loss") for name in evaluations]
    for measure, name in columns:
        table.add_column(f"{measure}\n{_SHORT[name]}", justify="right")

    def row(label: str, score: Callable[[Evaluation], Score]) -> None:
        scores = {name: score(evaluation) for name, evaluation in evaluations.items()}
        table.add_row(label, *(_cell(scores[name], measure) for measure, name in columns))

    row("nowhere", lambda evaluation: evaluation.untouched)
    first = next(iter(evaluations.values()))
    for protocol, by_layer in first.pooled.items():
        table.add_section()
        for layer in by_layer:
            row(f"{layer}, {protocol}", lambda evaluation, p=protocol, i=layer: evaluation.pooled[p][i])  # type: ignore[misc]
    table.add_section()
    for share in first.synonyms:
        row(f"synonyms {share:.0%}", lambda evaluation, s=share: evaluation.synonyms[s])  # type: ignore[misc]
    return table


def draw(evaluations: Evaluations, num_definitions: int, path: Path) -> None:
    """Accuracies and task loss by start layer, a column for each protocol and one for the synonyms, as PNG."""
    first = next(iter(evaluations.values()))
    num_columns = len(first.pooled) + bool(first.synonyms)
    figure = Figure(figsize=(1 + 3.2 * num_columns, 8), layout="constrained")
    figure.suptitle(f"Constituent-aware pooling, on {num_definitions} definitions", fontsize=14)
    rows = figure.subplots(3, num_columns, squeeze=False, sharey="row")
    measures: list[tuple[str, Callable[[Score], float]]] = [
        ("top-1 accuracy [%]", lambda score: 100 * score.top1),
        ("top-10 accuracy [%]", lambda score: 100 * score.top10),
        ("task loss [nats]", lambda score: score.task_loss),
    ]
    for axes, (label, measure) in zip(rows, measures, strict=True):
        axes[0].set_ylabel(label)
        for axis, protocol in zip(axes, first.pooled, strict=False):
            for name, evaluation in evaluations.items():
                _line(axis, name, {layer: measure(score) for layer, score in evaluation.pooled[protocol].items()})
                untouched = measure(evaluation.untouched)
                axis.axhline(untouched, color=_COLOURS[name], linestyle="--", linewidth=1, label=f"{name}, no pooling")
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        if first.synonyms:
            for name, evaluation in evaluations.items():
                shares = {0.0: evaluation.untouched, **evaluation.synonyms}
                _line(axes[-1], name, {100 * share: measure(score) for share, score in shares.items()})
    for axis, protocol in zip(rows[0], first.pooled, strict=False):
        axis.set_title(f"{protocol} of a word's tokens")
    for axis in rows[-1]:
        axis.set_xlabel("pooled from layer")
    if first.synonyms:
        rows[0][-1].set_title("synonyms, no pooling")
        rows[-1][-1].set_xlabel("words replaced [%]")
    for axis in figure.axes:
        axis.grid(alpha=0.25)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    for axes in rows[:2]:
        axes[0].set_ylim(0, 1.05 * axes[0].get_ylim()[1])
    figure.legend(*rows[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=140)  # without pyplot, so Agg: no display is needed


def write_json(evaluations: Evaluations, about: Mapping[str, Any], path: Path) -> None:
    """Every figure, with `about` in front: checkpoints, data, settings and machine."""
    results = {
        **about,
        "checkpoints": {
            name: {
                "untouched": evaluation.untouched._asdict(),
                "pooled": {
                    protocol: {str(layer): score._asdict() for layer, score in by_layer.items()}
                    for protocol, by_layer in evaluation.pooled.items()
                },
                "synonyms": {str(share): score._asdict() for share, score in evaluation.synonyms.items()},
            }
            for name, evaluation in evaluations.items()
        },
    }
    path.write_text(json.dumps(results, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def _cell(score: Score, measure: str) -> str:
    if measure == "loss":
        return f"{score.task_loss:.3f}"
    value = {"top-1": score.top1, "top-10": score.top10, "kept": score.kept}[measure]
    return "" if value is None else f"{value:.1%}"


def _line(axis: Axes, name: str, points: Mapping[float, float]) -> None:
    axis.plot(list(points), list(points.values()), label=name, color=_COLOURS[name], marker=_MARKERS[name])
