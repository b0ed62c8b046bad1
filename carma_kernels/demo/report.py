"""What the two runs came to: a table, a picture, and the numbers as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.table import Table

from carma_kernels.demo.training import Comparison, Evaluation, Record

TASK_ONLY = "task loss only"
WITH_CARMA = "with CARMA"
_COLOURS = {TASK_ONLY: "#0072B2", WITH_CARMA: "#D55E00"}  # blue and vermillion of Okabe and Ito's colour-blind safe set
_MARKERS = {TASK_ONLY: "o", WITH_CARMA: "s"}


def summary_table(comparison: Comparison) -> Table:
    """Both runs side by side on the held-out definitions, and what a training step costs."""
    without, carma = comparison.task_only, comparison.with_carma
    table = Table(title="Held-out definitions after training, and the cost of a training step", title_justify="left")
    table.add_column("")
    for heading in (TASK_ONLY, WITH_CARMA, "difference"):
        table.add_column(heading, justify="right")

    def compare(label: str, before: float, after: float) -> None:
        table.add_row(label, f"{before:.3f}", f"{after:.3f}", _change(before, after))

    def compare_layers(labels: Iterable[str], before: list[float], after: list[float]) -> None:
        for label, *values in zip(labels, before, after, strict=True):
            compare(label, *values)
        table.add_section()

    first, last, carma_last = without.first, without.last, carma.last
    table.add_row("task loss, untrained", f"{first.task_loss:.3f}", f"{carma.first.task_loss:.3f}", "")
    compare("task loss", last.task_loss, carma_last.task_loss)
    for name, before, after in zip(("top-1", "top-10"), last.accuracy, carma_last.accuracy, strict=True):
        table.add_row(f"{name} accuracy", f"{before:.1%}", f"{after:.1%}", f"{100 * (after - before):+.1f} points")
    table.add_section()
    layers = len(last.mi_per_layer)
    compare("L_MI, mean over layers", last.mi, carma_last.mi)
    compare_layers((f"  layer {i}" for i in range(1, layers + 1)), last.mi_per_layer, carma_last.mi_per_layer)
    compare("L_Stability, sum over pairs", last.stability, carma_last.stability)
    pairs = (f"  layers {i} to {i + 1}" for i in range(1, layers))
    compare_layers(pairs, last.stability_per_layer, carma_last.stability_per_layer)
    step, carma_step, difference = without.median_step_seconds, carma.median_step_seconds, comparison.step_difference
    table.add_row("time a step, median", _milliseconds(step), _milliseconds(carma_step), _milliseconds(difference))
    table.add_row("  CARMA's share of it", "", f"{difference / carma_step:.1%}", "")
    alone = comparison.median_carma_seconds
    table.add_row("  CARMA's losses alone", "", f"{alone / carma_step:.1%}", _milliseconds(alone))
    table.add_row("peak memory of a step", *_memory(without, carma))
    table.caption_justify = "left"
    table.caption = (
        f"Always answering with the most frequent tokens: top-1 {comparison.baseline.top1:.1%}, top-10 "
        f"{comparison.baseline.top10:.1%}. CARMA's share of a step is the median difference of the two runs' steps on "
        "the same batch; its losses alone are their forward and backward on hidden states cut off from the model. "
        "Memory is what a step allocates above weights and optimizer state."
    )
    return table


def draw(comparison: Comparison, path: Path) -> None:
    """The curves of both runs over the steps, and their profiles over the layers, as PNG."""
    figure = Figure(figsize=(13, 7.6), layout="constrained")
    figure.suptitle("A small GPT-2 learns to name what a definition defines: held-out definitions", fontsize=14)
    (task, mi, stability), (accuracy, mi_layers, stability_layers) = figure.subplots(2, 3)
    records = {TASK_ONLY: comparison.task_only, WITH_CARMA: comparison.with_carma}
    layers = len(comparison.with_carma.last.mi_per_layer)

    for name, record in records.items():
        steps = range(1, len(record.task_losses) + 1)
        task.plot(steps, record.task_losses, color=_COLOURS[name], alpha=0.3, linewidth=0.8, zorder=1)
    _curves(task, records, lambda measured: measured.task_loss)
    task.set(title="Task loss (thin: training batches)", ylabel="cross-entropy [nats]")
    _curves(mi, records, lambda measured: measured.mi)
    mi.set(title="MI loss, mean over layers", ylabel="L_MI [nats]", ylim=(0, None))
    _curves(stability, records, lambda measured: measured.stability)
    stability.set(title="Stability loss, sum over pairs of layers", ylabel="L_Stability", ylim=(0, None))
    _curves(accuracy, records, lambda measured: 100 * measured.accuracy.top10)
    baseline = 100 * comparison.baseline.top10
    accuracy.axhline(baseline, color="dimgrey", linestyle="--", label="always the most frequent tokens")
    accuracy.set(title="Top-10 accuracy", ylabel="first token of the word found [%]", ylim=(0, None))

    _profile(mi_layers, records, lambda measured: measured.mi_per_layer, [str(i) for i in range(1, layers + 1)])
    mi_layers.set(title="MI loss of each layer, after training", xlabel="layer", ylabel="L_MI [nats]")
    pairs = [f"{i}→{i + 1}" for i in range(1, layers)]
    _profile(stability_layers, records, lambda measured: measured.stability_per_layer, pairs)
    stability_layers.set(title="Stability loss of each pair, after training", xlabel="layers", ylabel="relative change")

    for axis in figure.axes:
        axis.grid(alpha=0.25)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*accuracy.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=140)  # without pyplot, so Agg: no display is needed


def write_json(comparison: Comparison, about: dict[str, Any], path: Path) -> None:
    """Everything measured, with `about` in front: settings, data and machine."""
    runs = {TASK_ONLY: comparison.task_only, WITH_CARMA: comparison.with_carma}
    results = {
        **about,
        "most_frequent_tokens": comparison.baseline._asdict(),
        "carma_share": {
            "paired_step_difference_seconds": comparison.step_difference,
            "losses_alone_seconds": comparison.median_carma_seconds,
        },
        "runs": {name: _run_as_json(record) for name, record in runs.items()},
    }
    path.write_text(json.dumps(results, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def _run_as_json(record: Record) -> dict[str, Any]:
    return {
        "median_step_seconds": record.median_step_seconds,
        "peak_memory_bytes": record.peak_memory,
        "held_out": [
            {
                "step": step,
                "task_loss": measured.task_loss,
                **measured.accuracy._asdict(),
                "mi": measured.mi,
                "mi_per_layer": measured.mi_per_layer,
                "stability": measured.stability,
                "stability_per_layer": measured.stability_per_layer,
            }
            for step, measured in record.evaluations.items()
        ],
        "training_task_loss": record.task_losses,
        "step_seconds": record.step_seconds,
    }


def _curves(axis: Axes, records: dict[str, Record], measure: Callable[[Evaluation], float]) -> None:
    for name, record in records.items():
        values = [measure(evaluation) for evaluation in record.evaluations.values()]
        axis.plot(list(record.evaluations), values, label=name, color=_COLOURS[name], marker=_MARKERS[name])
    axis.set_xlabel("training step")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def _profile(
    axis: Axes, records: dict[str, Record], measure: Callable[[Evaluation], list[float]], names: list[str]
) -> None:
    width = 0.4
    for offset, (name, record) in zip((-width / 2, width / 2), records.items(), strict=True):
        places = [place + offset for place in range(len(names))]
        axis.bar(places, measure(record.last), width, label=name, color=_COLOURS[name])
    axis.set_xticks(range(len(names)), names)


def _change(before: float, after: float) -> str:
    return f"{(after - before) / before:+.1%}" if before else ""


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms"


def _memory(without: Record, carma: Record) -> tuple[str, str, str]:
    if without.peak_memory is None or carma.peak_memory is None:
        return "not measured", "not measured", ""
    mib = [f"{record.peak_memory / 2**20:.1f} MiB" for record in (without, carma) if record.peak_memory is not None]
    return mib[0], mib[1], _change(without.peak_memory, carma.peak_memory)
