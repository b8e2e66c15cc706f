"""Show the numbers of a map as a table, and draw it: a column for each model, PCA above UMAP, a colour and a marker for
each class.

    console.print(represent_table(record));  write_figure(Path("map.svg"), record, sample.labels)

matplotlib without pyplot: no window, no state. Classes differ in brightness and in marker too, so that the figure reads
without colour.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.markup import escape
from rich.table import Table

from ochat.evaluate import intervals

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAMES = {
    "own_all": "own prefix, all tokens",
    "own_answers": "own prefix, answers",
    "one_all": "one prefix, all tokens",
    "one_answers": "one prefix, answers",
    "words": "the answers' words",
}
WITHOUT_CLASSES = {"own_all": "no class, all tokens", "own_answers": "no class, answers", "words": NAMES["words"]}
# Okabe and Ito's colours, alternating dark and light
COLOURS = ("#0072B2", "#E69F00", "#000000", "#CC79A7", "#009E73", "#D55E00")
MARKERS = ("o", "^", "x", "s", "D", "v", "P")
COLUMN_INCHES, ROW_INCHES, DPI = 3.9, 3.5, 110
SLICES = 20  # classes take turns in being drawn: none lies on top of all others


def represent_table(record: dict[str, Any]) -> Table:
    """A row for each model and view; the view that is drawn is marked with *."""
    probe, sample = record["probe"], record["sample"]
    shown = Table(
        title=f"How far apart {_list(sample['classes'])} lie ({sample['per_class']:,} conversations of each)",
        caption=escape(
            f"silhouette: 1 apart, 0 mixed ({record['distance']}; PCA, UMAP: Euclidean). probe: accuracy on unseen "
            f"prompts, {probe['chance']:.0%} is chance; [low, high]: {intervals.LEVEL:.0%}; p: {probe['permutations']} "
            f"permutations. one prefix: {record['one_prefix'] or 'no class'}. *: drawn"
        ),
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    shown.add_column("model\n  mean over", overflow="fold")
    for heading in ("silhou-\nette", "PCA", "UMAP", "probe %", "p"):
        shown.add_column(heading, justify="right", no_wrap=True)
    for row in record["models"]:
        shown.add_row(f"[bold]{escape(row['label'])}[/]")
        drawn = record["view"] if row["names_classes"] else record["view"].replace("one", "own")
        for view, name in (NAMES if row["names_classes"] else WITHOUT_CLASSES).items():
            mark, umap = ("*", f"{row['silhouette_umap']:z.3f}") if view == drawn else (" ", "")
            numbers, probed = row["views"][view], row["views"][view]["probe"]
            distances = [f"{numbers[key]:z.3f}" for key in ("silhouette", "silhouette_pca")]
            accuracy = escape(intervals.shown(probed["accuracy"], probed["interval"], ".1f", 100))
            shown.add_row(f"{mark} {name}", *distances, umap, accuracy, f"{probed['p_value']:.3f}")
        shown.add_section()
    return shown


def write_figure(path: Path, record: dict[str, Any], labels: NDArray[np.int64]) -> None:
    """Draw the record's map as PNG or SVG, by the file's ending: the same bytes for the same record. `labels`: (n,)
    places in the record's classes."""
    import matplotlib
    from matplotlib.figure import Figure

    rows, classes = record["models"], record["sample"]["classes"]
    captions = [_caption(record, row) for row in rows]
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
    figure.suptitle(_plain(_title(record)), fontsize=10)
    ending = path.suffix[1:].lower()
    with matplotlib.rc_context({"svg.hashsalt": "ochat"}):
        figure.savefig(path, format=ending, dpi=DPI, metadata={"Date": None} if ending == "svg" else {})


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


def _title(record: dict[str, Any]) -> str:
    """What the figure shows."""
    prefix, tokens = record["view"].split("_")
    written = "each under its own class's prefix" if prefix == "own" else f"all under {record['one_prefix']}'s prefix"
    over = "all tokens" if tokens == "all" else "the answers' tokens"
    sample = record["sample"]
    drawn = f"{sample['per_class']:,} conversations each of {_list(sample['classes'])}, {written}"
    return f"{drawn}:\nmean of the last layer's states over {over}"


def _caption(record: dict[str, Any], row: dict[str, Any]) -> str:
    """A model's numbers: of what is drawn, and under one prefix."""
    prefix, tokens = record["view"].split("_")
    if not row["names_classes"]:
        return _line("no class in its prefixes", row["views"][f"own_{tokens}"])
    of_one = _line(f"all as {record['one_prefix'] or 'none'}", row["views"][f"one_{tokens}"])
    return of_one if prefix == "one" else f"{_line('own class', row['views'][record['view']])}\n{of_one}"


def _line(name: str, numbers: dict[str, Any]) -> str:
    accuracy = numbers["probe"]["accuracy"]
    return (
        f"{name}: silhouette {numbers['silhouette']:z.2f}, probe {accuracy:.0%} (p = {numbers['probe']['p_value']:.3f})"
    )


def _list(names: list[str]) -> str:
    shown = [name or "no class" for name in names]
    return " and ".join([", ".join(shown[:-1]), shown[-1]])
