"""Draw a picture for each operator from an ops.csv.

python -m benchmarks.plots DIR/ops.csv PICTURES     # or PICTURES.tar.gz for one archive of them
"""

from __future__ import annotations

import sys
import tarfile
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.csv_file import Row, read
from benchmarks.report import case_of

# colours that colour-blind readers can tell apart, for implementations in the order of the rows
COLOURS = ("#d55e00", "#8c8c8c", "#0072b2", "#009e73", "#cc79a7", "#e6b8d2", "#56b4e9", "#b8a100", "#000000")


def draw(rows: list[Row], folder: Path) -> list[Path]:
    """PNG files, one for each operator that has a measurement; ImportError without matplotlib."""
    matplotlib = import_module("matplotlib")
    matplotlib.use("Agg")
    pyplot = import_module("matplotlib.pyplot")
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for operator in dict.fromkeys(row["operator"] for row in rows):
        measured = [row for row in rows if row["operator"] == operator and row["median_ms"]]
        if measured:
            drawn.append(folder / f"{operator}.png")
            _picture(pyplot, operator, measured, drawn[-1])
    return drawn


def archive(rows: list[Row], path: Path) -> list[str]:
    """The pictures as one .tar.gz; returns their names."""
    with tempfile.TemporaryDirectory() as folder:
        pictures = draw(rows, Path(folder))
        with tarfile.open(path, "w:gz") as tar:
            for picture in pictures:
                tar.add(picture, arcname=picture.name)
    return [picture.name for picture in pictures]


def _picture(pyplot: Any, operator: str, rows: list[Row], path: Path) -> None:
    """A panel a pass, a group of bars a case: the share of the floor's speed that each implementation reaches."""
    passes, cases = (list(dict.fromkeys(map(key, rows))) for key in (lambda row: row["pass"], case_of))
    names = list(dict.fromkeys(row["implementation"] for row in rows))
    size = (7 * len(passes), 1.6 + 1.1 * len(cases))
    figure, panels = pyplot.subplots(1, len(passes), sharey=True, squeeze=False, layout="constrained", figsize=size)
    for panel, which in zip(panels[0], passes, strict=True):
        _panel(panel, which, [row for row in rows if row["pass"] == which], cases, names)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(names), frameon=False)
    about = ", ".join(f"{name} {rows[0][name]}" for name in ("device", "torch", "triton", "commit", "date", "T"))
    figure.suptitle(f"{operator}\n{about}", fontsize=10)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _panel(panel: Any, which: str, rows: list[Row], cases: list[str], names: list[str]) -> None:
    latest = {(case_of(row), row["implementation"]): row for row in rows}  # a case may be in several groups
    height = 0.8 / len(names)
    for place, name in enumerate(names):
        measured = {case: latest[case, name] for case in cases if (case, name) in latest}
        at = [cases.index(case) + (place - (len(names) - 1) / 2) * height for case in measured]
        shares = [100 * float(row["floor_fraction"]) for row in measured.values()]
        is_weighted = all(row["status"] != "unweighted" for row in measured.values())
        style = {"color": COLOURS[place % len(COLOURS)], "hatch": None if is_weighted else "///"}
        panel.barh(at, shares, height * 0.9, label=name if is_weighted else f"{name} (unweighted)", **style)
        for y, share, row in zip(at, shares, measured.values(), strict=True):
            panel.text(share, y, f" {float(row['median_ms']):.3g} ms", va="center", fontsize=7)
    panel.set_yticks(range(len(cases)), cases)
    panel.set_ylim(len(cases) - 0.5, -0.5)
    panel.set_xlim(0, 115)
    panel.axvline(100, color="black", linewidth=0.8, linestyle="--")
    panel.set_xlabel("% of the speed of the floor, by the ceilings measured in the same run")
    panel.set_title(which, fontsize=10)


if __name__ == "__main__":
    target, found = Path(sys.argv[2]), read(Path(sys.argv[1]))
    print(*(archive if target.suffix == ".gz" else draw)(found, target), sep="\n")
