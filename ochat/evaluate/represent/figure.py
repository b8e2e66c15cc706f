"""Draw the map: a column for each model, PCA above UMAP, a colour and a marker for each class.

    write_figures([Path("map.svg")], record, sample)

matplotlib without pyplot: no window, no state. Classes differ in brightness and in marker too, so that the figure reads
without colour.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ochat.evaluate.represent import table
from ochat.evaluate.represent.sample import Sample

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = (
    "#0072B2",
    "#E69F00",
    "#000000",
    "#CC79A7",
    "#009E73",
    "#D55E00",
)  # Okabe and Ito's, alternating dark and light
MARKERS = ("o", "^", "x", "s", "D", "v", "P")
COLUMN_INCHES, ROW_INCHES, DPI = 3.9, 3.5, 110
SLICES = 20  # classes take turns in being drawn: none lies on top of all others


@dataclass(frozen=True, eq=False)
class Panel:
    """One model's column."""

    label: str
    caption: str  # its numbers
    pca: NDArray[np.float32]  # (n, 2)
    explained: Sequence[float]  # shares of the variance, of two axes
    umap: NDArray[np.float32]  # (n, 2)
    labels: NDArray[np.int64]  # (n,) places in the classes


def write_figures(paths: Sequence[Path], record: dict[str, Any], sample: Sample) -> None:
    """Draw the record's map into each of the files."""
    panels = [
        Panel(
            row["label"],
            table.caption(record, row),
            np.array(row["points"]["pca"]),
            row["views"][record["view"]]["pca_explained"],
            np.array(row["points"]["umap"]),
            sample.labels,
        )
        for row in record["models"]
    ]
    for path in paths:  # drawn again for each: a second layout of the same figure moves a little
        write(path, draw(panels, sample.classes, table.title(record)))


def draw(panels: Sequence[Panel], classes: Sequence[str], title: str) -> Figure:
    """The figure of all models, side by side."""
    from matplotlib.figure import Figure

    size = (COLUMN_INCHES * len(panels), 2 * ROW_INCHES + 1)
    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    axes = figure.subplots(2, len(panels), squeeze=False)
    most_lines = max(panel.caption.count("\n") for panel in panels) + 1
    for (above, below), panel in zip(axes.T, panels, strict=True):
        _scatter(above, panel.pca, panel.labels, classes)
        _scatter(below, panel.umap, panel.labels, classes)
        above.set_title(_plain(panel.label), fontweight="bold", pad=8 + 12 * most_lines)
        below_title = {"xycoords": "axes fraction", "textcoords": "offset points", "ha": "center", "va": "bottom"}
        above.annotate(_plain(panel.caption), (0.5, 1), (0, 4), fontsize=8, **below_title)
        shares = [f"PCA {axis} ({share:.0%} of the variance)" for axis, share in enumerate(panel.explained, 1)]
        above.set(xlabel=shares[0], ylabel=shares[1])
        below.set(xlabel="UMAP 1", ylabel="UMAP 2")
    handles, names = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(len(classes), 3), markerscale=2, frameon=False)
    figure.suptitle(_plain(title), fontsize=10)
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
