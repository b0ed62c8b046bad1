"""Pictures of a result file; `bench.report --page` draws them."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.floor import Cost, Rates
from bench.providers import PEERS, PROVIDERS
from bench.workloads import GROWTH, Workload

_PEERS = iter(["black", "#98df8a", "tab:green", "tab:purple", "tab:brown", "tab:olive", "tab:cyan", "tab:pink"])
_OWN = iter(["tab:orange", "tab:red", "#ff9896", "tab:blue", "#aec7e8"])
COLOURS = {provider.name: next(_PEERS if provider.name in PEERS else _OWN) for provider in PROVIDERS}
"""The same implementation has the same colour in every picture."""

Benchmark = dict[str, Any]
"""One entry of `benchmarks` in pytest-benchmark's JSON."""


def draw(stored: dict[str, Any], folder: Path) -> list[str]:
    """Draw what a result file holds; the names of the pictures, without the folder and `.png`."""
    folder.mkdir(parents=True, exist_ok=True)
    if "steps" in stored:
        figures = {"train_step": _train_step(stored["steps"])}
    elif "benchmarks" not in stored:
        figures = {}
    else:
        chosen = [b for b in stored["benchmarks"] if b["extra_info"].get("passes") == "forward+backward"]
        by_name = {name: [b for b in chosen if b["extra_info"]["workload"]["name"] == name] for name in _names(chosen)}
        machine = stored["machine_info"]
        figures = {"speed": _speed(by_name.get("paper", [])), "growth": _growth(by_name.get("growth", []))}
        figures["roofline"] = _roofline(chosen, Rates(**machine["rates"]))
    drawn = {name: figure for name, figure in figures.items() if figure is not None}
    for name, figure in drawn.items():
        # no version of matplotlib in the file: the same results give the same bytes
        figure.savefig(folder / f"{name}.png", dpi=110, bbox_inches="tight", metadata={"Software": None})
        plt.close(figure)
    return list(drawn)


def _names(benchmarks: list[Benchmark]) -> set[str]:
    return {b["extra_info"]["workload"]["name"] for b in benchmarks}


def _speed(chosen: list[Benchmark]) -> Figure | None:
    """Time of each implementation for the paper's batches, and memory beside it."""
    if not chosen:
        return None
    workloads = list(dict.fromkeys(_label(b) for b in chosen))
    names = [name for name in COLOURS if any(b["extra_info"]["provider"] == name for b in chosen)]
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(12, 0.9 + 0.17 * len(workloads) * (len(names) + 2)), sharey=True
    )
    height = 0.85 / len(names)
    for n, name in enumerate(names):
        own = {_label(b): b for b in chosen if b["extra_info"]["provider"] == name}
        places = [workloads.index(label) + n * height for label in own]
        left.barh(places, [1e3 * b["stats"]["median"] for b in own.values()], height, color=COLOURS[name], label=name)
        shares = [b["extra_info"]["peak_bytes"] / b["extra_info"]["hidden_bytes"] for b in own.values()]
        right.barh(places, shares, height, color=COLOURS[name])
    left.set_yticks([n + 0.4 for n in range(len(workloads))], workloads)
    left.invert_yaxis()
    left.set(xscale="log", xlabel="median ms, forward + backward", title="time (log scale)")
    right.set(xscale="log", xlabel="peak extra memory / size of the hidden states", title="memory (log scale)")
    right.axvline(1, color="grey", linewidth=0.8)
    left.legend(loc="upper center", bbox_to_anchor=(1.0, -0.12), ncols=3, frameon=False)
    return figure


def _growth(chosen: list[Benchmark]) -> Figure | None:
    """Time and memory as one size grows: tokens, batch, layers, width, share of tokens in words of several."""
    if not chosen:
        return None
    middle = GROWTH[0]
    sizes = ("T", "B", "L", "D", "words")
    figure, axes = plt.subplots(2, len(sizes), figsize=(16, 6.4), sharey="row")
    for column, size in enumerate(sizes):
        for name, colour in COLOURS.items():
            points = sorted(
                (_number(b, size), 1e3 * b["stats"]["median"], b["extra_info"]["peak_bytes"] / 1e6)
                for b in chosen
                if b["extra_info"]["provider"] == name and _differs_in(b, middle) <= {size}
            )
            if points:
                x, milliseconds, megabytes = zip(*points, strict=True)
                axes[0, column].plot(x, milliseconds, "o-", color=colour, markersize=3, label=name)
                axes[1, column].plot(x, megabytes, "o-", color=colour, markersize=3)
        label = "share of tokens in words of several" if size == "words" else size
        axes[1, column].set_xlabel(label)
        for axis in axes[:, column]:
            axis.set(xscale="linear" if size == "words" else "log", yscale="log")
            if size != "words":
                values = sorted({_number(b, size) for b in chosen if _differs_in(b, middle) <= {size}})
                axis.set_xticks(values, [str(value) for value in values], rotation=45)
                axis.minorticks_off()
                _guide(axis)
    axes[0, 0].set_ylabel("median ms")
    axes[1, 0].set_ylabel("peak extra MB")
    fixed = f"L={middle.L}, B={middle.B}, T={middle.T}, D={middle.D}, 30 % of tokens in words of several"
    figure.suptitle(f"forward + backward; where a size is not varied: {fixed}; dashed: linear")
    handles, labels = max((axis.get_legend_handles_labels() for axis in axes[0]), key=lambda pair: len(pair[0]))
    figure.legend(handles, labels, loc="lower center", ncols=4, frameon=False)
    figure.tight_layout(rect=(0, 0.08, 1, 0.97))
    return figure


def _roofline(chosen: list[Benchmark], rates: Rates) -> Figure | None:
    """How near to the machine's limit: FLOPs a second over FLOPs a byte, of the least that must be done."""
    if not chosen:
        return None
    figure, axis = plt.subplots(figsize=(8, 5.4))
    intensities = []
    for name, colour in COLOURS.items():
        points = [_roofline_point(b) for b in chosen if b["extra_info"]["provider"] == name]
        if points:
            x, y = zip(*points, strict=True)
            axis.scatter(x, y, s=14, color=colour, label=name, alpha=0.7)
            intensities += x
    line = [min(intensities) / 2, rates.flops_per_second / rates.bytes_per_second, 2 * max(intensities)]
    line.sort()
    axis.plot(line, [min(rates.flops_per_second, i * rates.bytes_per_second) for i in line], color="black")
    axis.set(xscale="log", yscale="log", xlabel="FLOPs a byte that must be done", ylabel="of these FLOPs, a second")
    axis.set_title(
        f"limit: {rates.bytes_per_second / 1e9:.4g} GB/s copied, {rates.flops_per_second / 1e9:.4g} GFLOP/s multiplied"
    )
    axis.legend(fontsize="small", frameon=False)
    return figure


def _train_step(runs: list[dict[str, Any]]) -> Figure | None:
    """What CARMA adds to a training step, by model and implementation."""
    if not runs:
        return None
    models = list(dict.fromkeys(_step_label(run) for run in runs))
    names = [name for name in dict.fromkeys(run["losses"] for run in runs) if name != "none"]
    size = (12, 1.8 + 0.2 * len(models) * (len(names) + 1))
    figure, (left, right) = plt.subplots(1, 2, figsize=size, sharey=True, layout="constrained")
    height = 0.85 / len(names)
    for n, name in enumerate(names):
        for place, model in enumerate(models):
            own = {run["losses"]: run for run in runs if _step_label(run) == model}
            if name in own and "none" in own:
                time = median(own[name]["seconds"]) / median(own["none"]["seconds"])
                memory = own[name]["peak_bytes"] / own["none"]["peak_bytes"]
                label = name if place == 0 else None
                left.barh(place + n * height, 100 * (time - 1), height, color=f"C{n}", label=label)
                right.barh(place + n * height, 100 * (memory - 1), height, color=f"C{n}")
    left.set_yticks([n + 0.4 for n in range(len(models))], models)
    left.invert_yaxis()
    left.set_xlabel("% more time a step than without CARMA")
    right.set_xlabel("% more peak memory than without CARMA")
    figure.legend(loc="outside lower center", ncols=len(names), frameon=False)
    return figure


def _roofline_point(b: Benchmark) -> tuple[float, float]:
    costs = [Cost(**cost) for cost in b["extra_info"]["floor"]]
    flops, moved = sum(cost.flops for cost in costs), sum(cost.bytes for cost in costs)
    return flops / moved, flops / b["stats"]["median"]


def _label(b: Benchmark) -> str:
    w = b["extra_info"]["workload"]
    return f"B={w['B']}, T={w['T']}, {w['words']}"


def _step_label(run: dict[str, Any]) -> str:
    return f"{run['model']}, B={run['B']}, T={run['T']}" + (", checkpointing" if run["checkpointing"] else "")


def _number(b: Benchmark, size: str) -> float:
    value = b["extra_info"]["workload"][size]
    return 0.3 if value == "dense" else value


def _differs_in(b: Benchmark, middle: Workload) -> set[str]:
    w = b["extra_info"]["workload"]
    return {size for size in ("L", "B", "T", "D", "words") if w[size] != getattr(middle, size)}


def _guide(axis: Axes) -> None:
    """A dashed line of slope one through the lowest of the points farthest to the right."""
    lines = [line for line in axis.get_lines() if len(line.get_xdata()) > 1]
    if lines:
        x, y = min((line.get_data() for line in lines), key=lambda data: (-data[0][-1], data[1][-1]))
        axis.plot([x[0], x[-1]], [y[-1] * x[0] / x[-1], y[-1]], "--", color="grey", linewidth=0.8)
