"""Draw the tiles of the kernels for `docs/kernels.md`: `python docs/draw_kernels.py` writes `docs/pictures/*.svg`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

READ, SECOND, MADE, WRITTEN, IDLE = "#9ecae1", "#c7e9c0", "#fdd0a2", "#fc9272", "#f0f0f0"
"""What a program reads, what it reads besides, what it holds, what it writes, and what is not its own."""


def box(ax: Axes, x: float, y: float, width: float, height: float, color: str, text: str = "") -> None:
    """A rectangle whose upper left corner is at `(x, y)`, with text in its middle."""
    ax.add_patch(Rectangle((x, y), width, height, facecolor=color, edgecolor="#444444", linewidth=0.8))
    ax.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=9)


def note(ax: Axes, x: float, y: float, text: str, align: str = "center") -> None:
    """Words beside a rectangle."""
    ax.text(x, y, text, ha=align, va="center", fontsize=9)


def arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    """From one place to another."""
    ax.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": "#444444", "linewidth": 1.2})


def canvas(ax: Axes, title: str, width: float, height: float) -> None:
    """An empty drawing with its origin at the upper left."""
    ax.set_title(title, fontsize=10, loc="left", pad=10)
    ax.set_xlim(-0.2, width)
    ax.set_ylim(height, -0.2)
    ax.set_aspect("equal")
    ax.axis("off")


def stability(figure: Figure) -> None:
    """Some rows, all layers."""
    left, right = figure.subplots(1, 2)
    for ax, title in ((left, "forward: a program's rows, layer after layer"), (right, "backward")):
        canvas(ax, title, 11.4, 8)
        for layer in range(3):
            x = 0.4 + layer * 3.7
            box(ax, x, 1, 2.8, 4, IDLE)
            box(ax, x, 2, 2.8, 0.8, READ, "BLOCK_ROWS x D")
            note(ax, x + 1.4, 0.5, f"layer {layer}")
    for layer in range(2):
        start = 0.4 + layer * 3.7 + 2.8
        arrow(left, (start, 2.4), (start + 0.9, 2.4))
    note(left, 5.5, 5.7, "in registers: this layer's rows and those of the layer before")
    note(left, 5.5, 6.5, "out: |h|² and |h - h_before|² summed over the rows, and 1/|h| of each row")
    note(left, 5.5, 7.3, "a second kernel adds the programs' sums up, in order")
    for layer in range(3):
        x = 0.4 + layer * 3.7
        box(right, x, 3.4, 2.8, 0.8, WRITTEN, "gradient")
        arrow(right, (x + 1.4, 2.8), (x + 1.4, 3.4))
    for layer in range(2):
        x = 0.4 + layer * 3.7 + 2.8
        arrow(right, (x, 2.4), (x + 0.95, 3.4))
        arrow(right, (x + 0.9, 2.4), (x - 0.05, 3.4))
    note(right, 5.5, 5.7, "a layer's gradient takes it and its two neighbours:")
    note(right, 5.5, 6.5, "each element is read once and written once")


def short(figure: Figure) -> None:
    """Whole rows of the score matrix."""
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.35))
    canvas(left, "forward: scores of BLOCK_M rows, in registers", 11.5, 9.4)
    box(left, 3.6, 3, 5, 2.5, MADE, "scores\nBLOCK_M x BLOCK_T")
    box(left, 3.6, 5.5, 5, 2.5, IDLE, "the next program's")
    for step in range(3):
        box(left, 0.2 + step, 3, 1, 2.5, READ if step == 1 else IDLE, "x" if step == 1 else "")
        box(
            left,
            3.6,
            0 + 0.8 * step,
            5,
            0.8,
            READ if step == 1 else IDLE,
            "all tokens, transposed" if step == 1 else "",
        )
    note(left, 1.7, 2.5, "BLOCK_D at a time")
    box(left, 9.2, 3, 0.9, 2.5, WRITTEN, "z\nf")
    note(left, 5.5, 8.7, "a row is whole, so z, f and the costs come of it at once")
    canvas(right, "backward: scores again, then M times tokens", 15.5, 9.4)
    box(right, 0.2, 3, 5, 2.5, MADE, "M (rounded)\nBLOCK_M x BLOCK_T")
    box(right, 0.2, 5.5, 5, 2.5, IDLE)
    for step in range(4):
        box(right, 6 + step, 2, 1, 5, READ if step == 1 else IDLE, "all\ntokens" if step == 1 else "")
        box(right, 11 + step, 3, 1, 2.5, WRITTEN if step == 1 else IDLE)
    note(right, 5.6, 4.2, "×")
    note(right, 10.5, 4.2, "=")
    note(right, 13, 2.5, "gradient, BLOCK_D at a time")
    note(right, 13, 6.7, "less its projection on h,\nplus the stability loss's\nstencil of h's neighbours")
    note(right, 7.7, 8.7, "a block of columns after the other, or shared out among up to four programs")


def mi(figure: Figure) -> None:
    """Tiles of anchors x keys."""
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.45))
    canvas(left, "scores, weights: tiles in rank space", 11.6, 10.2)
    left_edge, top = 1.6, 1.6
    for i in range(2):
        for j in range(4):
            own = (i, j) == (1, 2)
            box(left, left_edge + 2 * j, top + 1.6 * i, 2, 1.6, MADE if own else IDLE, "tile" if own else "")
    box(left, left_edge, top + 3.2, 8, 2.4, "white", "rows of other tokens: nothing is computed")
    note(left, left_edge + 4, 0.5, "V keys: anchors, then the other valid tokens")
    left.text(1.1, top + 1.6, "A anchors", rotation=90, ha="center", va="center", fontsize=9)
    box(left, left_edge, top + 5.9, 8, 0.8, "white", "a tile -> of each anchor: sum of exp(s)")
    box(left, left_edge, top + 6.9, 8, 0.8, "white", "in order -> z, f, costs (statistics)")
    box(left, left_edge, top + 7.9, 8, 0.5, "white")
    note(left, left_edge + 4, top + 8.15, "backward: a tile -> M', in the workspace")
    canvas(right, "gradient: rows of M' times hidden states", 16.6, 10.2)
    box(right, 0.4, 1.6, 6, 1.4, READ)
    box(right, 0.4, 3, 6, 1.4, IDLE)
    box(right, 4.4, 1.6, 1, 2.8, SECOND, "M'")
    note(right, 2.4, 2.3, "M', rows")
    note(right, 4.9, 4.9, "columns")
    note(right, 3.4, 1, "workspace A x V, of a layer or some")
    for step in range(3):
        box(right, 7.6 + step, 1.6, 1, 6, READ if step == 1 else IDLE, "h\n(keys)" if step == 1 else "")
    note(right, 7, 3, "×")
    note(right, 11.1, 3, "=")
    for step in range(3):
        box(right, 11.6 + 1.2 * step, 1.6, 1.2, 1.4, WRITTEN if step == 1 else IDLE)
        box(right, 11.6 + 1.2 * step, 3, 1.2, 1.4, IDLE)
        box(right, 11.6 + 1.2 * step, 4.4, 1.2, 3.2, SECOND if step == 1 else IDLE)
    note(right, 13.4, 1, "gradient: rows x BLOCK_D")
    note(right, 13.4, 8.1, "every row is written once")
    note(right, 8.2, 8.9, "an anchor's row: its row of M', over all keys")
    note(right, 8.2, 9.6, "another token's: its column of M', over the anchors alone")


def pairs(figure: Figure) -> None:
    """Gathered rows, and an index of edges by token."""
    left, right = figure.subplots(1, 2)
    canvas(left, "forward: a pair in a layer", 11, 6.6)
    for row in range(10):
        box(left, 0.4, 0.2 + 0.55 * row, 4, 0.55, {2: READ, 3: SECOND, 6: READ, 9: READ}.get(row, IDLE))
    for row, slot in ((2, 0), (6, 1), (9, 2)):
        arrow(left, (4.4, 0.47 + 0.55 * row), (6.2, 1.4 + 1.4 * slot))
        text = "positive" if slot == 0 else f"negative {slot}"
        box(left, 6.2, 1 + 1.4 * slot, 3.6, 0.8, MADE, f"s: {text}")
    note(left, 2.4, 0.2 + 0.55 * 3.5, "anchor")
    note(left, 8, 5.4, "K + 2 rows read")
    canvas(right, "backward: a token in a layer, by an index sorted once", 12, 6.6)
    box(right, 0.3, 2.4, 3.2, 0.8, WRITTEN, "row of token t")
    note(right, 1.9, 3.9, "one program,\none order of\nsummation")
    for place, text in enumerate(
        ("slot 0 of pair 3: t is its anchor", "slot 2 of pair 7: t is its token", "slot 1 of pair 9 ...")
    ):
        box(right, 5.2, 0.8 + 1.6 * place, 6.4, 0.9, READ, text)
        arrow(right, (5.2, 1.25 + 1.6 * place), (3.5, 2.8))
    note(right, 8.4, 5.9, "the other end's row of each, times its weight")


def similarity(figure: Figure) -> None:
    """A symmetric matrix."""
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.4))
    canvas(left, "forward: from the diagonal upwards", 8.4, 8)
    for i in range(4):
        for j in range(4):
            color = MADE if (i, j) == (1, 3) else WRITTEN if (i, j) == (3, 1) else "white" if j < i else IDLE
            box(
                left,
                0.4 + 1.7 * j,
                0.2 + 1.7 * i,
                1.7,
                1.7,
                color,
                {MADE: "tile", WRITTEN: "its\nimage"}.get(color, ""),
            )
    note(left, 3.8, 7.5, "one product, stored twice")
    canvas(right, "backward: m = G + Gᵀ, times tokens", 13.8, 8)
    box(right, 0.4, 1.6, 5, 1.4, READ, "G, rows i")
    box(right, 0.4, 3.2, 1.4, 4, READ, "G,\ncolumns\ni")
    note(right, 3.9, 5.2, "read twice: here\nand for c_i")
    for step in range(3):
        box(right, 6.4 + step, 1.6, 1, 5, READ if step == 1 else IDLE, "h" if step == 1 else "")
        box(right, 10.4 + step, 1.6, 1, 1.4, WRITTEN if step == 1 else IDLE)
    note(right, 5.9, 2.3, "×")
    note(right, 9.9, 2.3, "=")
    note(right, 11.9, 1, "gradient")


DRAWINGS: dict[Callable[[Figure], None], tuple[float, float]] = {
    stability: (11, 3.7),
    short: (12, 3.9),
    mi: (12, 4.2),
    pairs: (11, 3.1),
    similarity: (10, 3.6),
}
"""With their sizes in inches."""


def main(folder: Path = Path(__file__).parent / "pictures", form: str = "svg") -> None:
    """Write a picture for each family of kernels."""
    # the same bytes each time: a picture that did not change is no change
    mpl.rcParams["svg.hashsalt"] = "carma_kernels"
    folder.mkdir(parents=True, exist_ok=True)
    for draw, size in DRAWINGS.items():
        figure = plt.figure(figsize=size, layout="constrained")
        draw(figure)
        figure.savefig(folder / f"{draw.__name__}.{form}", dpi=110, metadata={"Date": None} if form == "svg" else {})
        plt.close(figure)


if __name__ == "__main__":
    main()
