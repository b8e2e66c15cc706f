"""Draw the map: a column for each model, PCA above UMAP, a colour and a marker for each class.

    write_figures([Path("map.svg")], record, sample.labels)

matplotlib without pyplot: no window, no state. Classes differ in brightness and in marker too, so that the figure reads
without colour.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ochat.evaluate.represent import table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, alternating dark and light
COLOURS = ("#0072B2", "#E69F00", "#000000", "#CC79A7", "#009E73", "#D55E00")
MARKERS = ("o", "^", "x", "s", "D", "v", "P")
COLUMN_INCHES, ROW_INCHES, DPI = 3.9, 3.5, 110
SLICES = 20  # classes take turns in being drawn: none lies on top of all others


def write_figures(paths: Sequence[Path], record: dict[str, Any], labels: NDArray[np.int64]) -> None:
    """Draw the record's map into each of the files. `labels`: (n,) places in the record's classes."""
    for path in paths:  # drawn again for each: a second layout of the same figure moves a little
        write(path, draw(record, labels))


def draw(record: dict[str, Any], labels: NDArray[np.int64]) -> Figure:
    """The figure of all models, one column each."""
    from matplotlib.figure import Figure

    rows, classes = record["models"], record["sample"]["classes"]
    captions = [table.caption(record, row) for row in rows]
    size = (COLUMN_INCHES * len(rows), 2 * ROW_INCHES + 1)
    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    axes = figure.subplots(2, len(rows), squeeze=False)
    most_lines = max(caption.count("\n") for caption in captions) + 1
    for (above, below), row, caption in zip(axes.T, rows, captions, strict=True):
        _scatter(above, np.array(row["points"]["pca"]), labels, classes)
        _scatter(below, np.array(row["points"]["umap"]), labels, classes)
        above.set_title(_plain(row["label"]), fontweight="bold", pad=8 + 12 * most_lines)
        below_title = {"xycoords": "axes fraction", "textcoords": "offset points", "ha": "center", "va": "bottom"}
        above.annotate(_plain(caption), (0.5, 1), (0, 4), fontsize=8, **below_title)
        explained = enumerate(row["views"][record["view"]]["pca_explained"], 1)
        shares = [f"PCA {axis} ({share:.0%} of the variance)" for axis, share in explained]
        above.set(xlabel=shares[0], ylabel=shares[1])
        below.set(xlabel="UMAP 1", ylabel="UMAP 2")
    handles, names = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(len(classes), 3), markerscale=2, frameon=False)
    figure.suptitle(_plain(table.title(record)), fontsize=10)
    return figure


def write(path: Path, figure: Figure) -> None:
    """The figure as PNG or SVG, by the file's ending: the same bytes for the same figure."""
    import matplotlib

    metadata = {"Date": None} if path.suffix.lower() == ".svg" else {}
    with matplotlib.rc_context({"svg.hashsalt": "ochat"}):
        figure.savefig(path, format=path.suffix[1:].lower(), dpi=DPI, metadata=metadata)


def _scatter(axes: Axes, points: NDArray[np.float32], labels: NDArray[np.int64], classes: Sequence[str]) -> None:
    """Points (n, 2) of all classes, each class in so many slices; ticks carry no meaning and are left out."""
    for place in range(SLICES):
        for number, name in enumerate(classes):
            colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
            part = points[labels == number][place::SLICES]
            face = {} if marker == "x" else {"edgecolors": "white", "linewidths": 0.3}
            label = _plain(name or "no class") if place == 0 else None
            axes.scatter(*part.T, s=16, c=colour, marker=marker, alpha=0.8, label=label, **face)
    axes.set(xticks=[], yticks=[])


def _plain(text: str) -> str:
    """Escaped text: matplotlib would read what is between two dollar signs as mathematics."""
    return text.replace("$", r"\$")
