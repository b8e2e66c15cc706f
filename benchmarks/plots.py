"""A picture per operator, drawn from an ops.csv alone; one of a step's scaling, from a train_step_scaling.csv.

python -m benchmarks.plots DIR/ops.csv PICTURES     # or PICTURES.tar.gz for one archive of them
"""

from __future__ import annotations

import sys
import tarfile
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.cases import OPERATORS
from benchmarks.report import Row, case_of, read

# one colour an implementation, the same in every picture and apart for colour-blind eyes; ours stands out
COLOURS = {
    "triton": "#d55e00",
    "reference": "#8c8c8c",
    "compiled": "#0072b2",
    "torch": "#009e73",
    "liger": "#cc79a7",
    "liger-sum": "#e6b8d2",
    "cce": "#56b4e9",
    "quack": "#b8a100",
}


AXES = {
    "T": "tokens of a step",
    "length": "tokens of a document",
    "supervised": "supervised share",
    "processes": "processes",
}


def draw(rows: list[Row], folder: Path) -> list[Path]:
    """PNG files, one for each operator that has a measurement, or the one of scaling; ImportError without
    matplotlib."""
    pyplot = _pyplot()
    folder.mkdir(parents=True, exist_ok=True)
    if rows and "axis" in rows[0]:
        return [_scaling(pyplot, rows, folder / "train_step_scaling.png")]
    drawn = []
    for operator in OPERATORS:
        measured = [row for row in rows if row["operator"] == operator and row["median_ms"]]
        if not measured:
            continue
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


def _pyplot() -> Any:
    matplotlib = import_module("matplotlib")
    matplotlib.use("Agg")
    return import_module("matplotlib.pyplot")


def _picture(pyplot: Any, operator: str, rows: list[Row], path: Path) -> None:
    """A panel a pass, a group of bars a case: the share of the floor's speed that each implementation reaches."""
    heads = list(dict.fromkeys((row["model"], row["V"]) for row in rows))
    rows = sorted(rows, key=lambda row: (heads.index((row["model"], row["V"])), -float(row["supervised"])))
    passes = list(dict.fromkeys(row["pass"] for row in rows))
    cases = list(dict.fromkeys(case_of(row) for row in rows))
    size = (7 * len(passes), 1.6 + 1.1 * len(cases))
    figure, panels = pyplot.subplots(1, len(passes), sharey=True, squeeze=False, layout="constrained", figsize=size)
    for panel, which in zip(panels[0], passes, strict=True):
        _panel(panel, which, [row for row in rows if row["pass"] == which], cases)
    legends = [panel.get_legend_handles_labels() for panel in panels[0]]
    handles = {text: handle for legend in legends for handle, text in zip(*legend, strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles), frameon=False)
    first = rows[0]
    versions = (
        f"{first['device']}, torch {first['torch']}, triton {first['triton']}, {first['commit']}, {first['date']}"
    )
    figure.suptitle(f"{operator}, T = {first['T']}\n{versions}", fontsize=10)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _panel(panel: Any, which: str, rows: list[Row], cases: list[str]) -> None:
    latest = {(case_of(row), row["implementation"]): row for row in rows}  # a case may be in several groups
    names = [name for name in COLOURS if any(key[1] == name for key in latest)]
    height = 0.8 / max(len(names), 1)
    for place, name in enumerate(names):
        measured = {case: latest[case, name] for case in cases if (case, name) in latest}
        at = [cases.index(case) + (place - (len(names) - 1) / 2) * height for case in measured]
        shares = [100 * float(row["floor_fraction"]) for row in measured.values()]
        is_weighted = all(row["status"] != "unweighted" for row in measured.values())
        label = name if is_weighted else f"{name} (unweighted)"
        panel.barh(at, shares, height * 0.9, color=COLOURS[name], label=label, hatch=None if is_weighted else "///")
        for y, share, row in zip(at, shares, measured.values(), strict=True):
            panel.text(share, y, f" {float(row['median_ms']):.3g} ms", va="center", fontsize=7)
    panel.set_yticks(range(len(cases)), cases)
    panel.set_ylim(len(cases) - 0.5, -0.5)
    panel.set_xlim(0, 115)
    panel.axvline(100, color="black", linewidth=0.8, linestyle="--")
    panel.set_xlabel("% of the speed of the floor, by the ceilings measured in the same run")
    panel.set_title(which, fontsize=10)
    panel.spines[["top", "right"]].set_visible(False)


def _scaling(pyplot: Any, rows: list[Row], path: Path) -> Path:
    """A panel an axis: the step's time with its spread, beside what FLOPs alone would make of the largest size's, or
    of one process's."""
    axes = [axis for axis in AXES if any(row["axis"] == axis for row in rows)]
    figure, panels = pyplot.subplots(1, len(axes), squeeze=False, layout="constrained", figsize=(4 * len(axes), 3.6))
    for panel, axis in zip(panels[0], axes, strict=True):
        points = sorted((row for row in rows if row["axis"] == axis), key=lambda row: float(row["value"]))
        at = [float(row["value"]) for row in points]
        low, middle, high = (
            [1e3 * float(row[name]) for row in points] for name in ("step_s_p20", "step_s", "step_s_p80")
        )
        anchor = 0 if axis == "processes" else -1
        flops = [float(row["flops"]) / int(row["processes"]) for row in points]
        panel.plot(
            at, [middle[anchor] * each / flops[anchor] for each in flops], "--", color="grey", label="as the FLOPs"
        )
        below = [m - x for m, x in zip(middle, low, strict=True)]
        above = [x - m for m, x in zip(middle, high, strict=True)]
        panel.errorbar(at, middle, [below, above], marker="o", capsize=3, color=COLOURS["triton"], label="a step")
        panel.set_xlabel(AXES[axis])
        panel.set_ylim(bottom=0)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("ms")
    panels[0][0].legend(frameon=False)
    first = rows[0]
    figure.suptitle(f"{first['model']} model, {first['cpu']}, torch {first['torch']}, {first['commit']}", fontsize=10)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


if __name__ == "__main__":
    target = Path(sys.argv[2])
    done = archive(read(Path(sys.argv[1])), target) if target.suffix == ".gz" else draw(read(Path(sys.argv[1])), target)
    print(*done, sep="\n")
