"""Writes what docs/evidence.md shows of the records in docs/evidence/: its tables, and pictures/evidence_small.svg.

    PYTHONPATH=.:kernels python docs/evidence_tables.py [--small ablations/small/ablation]    # also renews small.json

tests/test_docs.py fails while the page is not what this makes of the records. Medians in the small laboratory, because
a seed either learns the rule or does not. The interval of a median difference is that of order statistics: from the
k-th smallest to the k-th largest, k as large as the binomial distribution allows at 95 %.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Iterator, Sequence
from math import comb
from pathlib import Path
from typing import Any

import torch

from ochat.evaluate import intervals
from ochat.evaluate.ablate import table as ablation_table

HERE = Path(__file__).parent
PAGE, PICTURE = HERE / "evidence.md", HERE / "pictures" / "evidence_small.svg"
SMALL, GUIDANCE, REAL = (HERE / "evidence" / f"{name}.json" for name in ("small", "small_guidance", "tasks"))
MACHINE = "2 cores of an AMD EPYC, shared with other work; one thread a run, two at a time"
OURS, EXPERT = "c-rlft", "GPT4"
KNOWLEDGE = ("translate", "keepers")  # tasks of the real model that sub-optimal answers alone teach
LEFT, WIDTH, TOP, ROW = 150, 560, 16, 46  # of the picture
STYLE = (
    "text{fill:#1a1a2e;font-size:14px}.s{fill:#667;font-size:12px}.g{stroke:#c8ccd8}.d{fill:#3f51b5;fill-opacity:.55}"
    ".q{stroke:#e07b00;stroke-width:2}.m{stroke:#e07b00;stroke-width:4}@media (prefers-color-scheme: dark){"
    "text{fill:#f0f0f5}.s{fill:#b8bccb}.g{stroke:#4a4f63}.d{fill:#9fa8da;fill-opacity:.65}.q,.m{stroke:#ffb14d}}"
)


def main() -> None:
    """Write the page and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", type=Path, help="the folder of examples/ablation/small.py's runs")
    if folder := parser.parse_args().small:
        found = json.loads((folder / "table.json").read_text("utf-8"))
        command = f"python examples/ablation/small.py --seeds {len(found['rows'][0]['seeds'])}"
        record = {"command": command, "machine": MACHINE, "torch": torch.__version__, "table": found}
        SMALL.write_text(json.dumps(read(SMALL) | record, indent=1) + "\n", "utf-8")  # keeps what other runs found
    PAGE.write_text(page(PAGE.read_text("utf-8")), "utf-8")
    PICTURE.write_text(picture(read(SMALL)["table"]["rows"]), "utf-8")


def read(path: Path) -> dict[str, Any]:
    """A record."""
    return json.loads(path.read_text("utf-8"))


def page(text: str) -> str:
    """The page with each table, which stands between two comments, made again."""
    tables = {
        "small": lambda: table(read(SMALL)["table"]["rows"]),
        "small guidance": lambda: guidance_table(read(GUIDANCE)),
        "real": lambda: [ablation_table.markdown(read(REAL)["table"]).rstrip()],
        "real groups": lambda: groups_table(read(REAL)["runs"]),
        "real tasks": lambda: tasks_table(read(REAL)["runs"]),
        "real guidance": lambda: guided_table(read(REAL)["runs"]),
    }
    for name, lines in tables.items():
        mark, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        if mark in text:
            made = "\n".join([mark, "", *lines(), "", end])
            text = re.sub(f"{mark}.*?{end}", lambda _, made=made: made, text, flags=re.DOTALL)
    return text


def table(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The lines of a table in Markdown: medians and quartiles over seeds, and differences paired by seed."""
    yield "| variant | exact, `GPT4` prefix, % | range | less C-RLFT | below C-RLFT | exact, `GPT3` prefix, % | nll |"
    yield "|---|---:|---:|---:|---:|---:|---:|"
    (ours,) = (values(row, "exact", "expert") for row in rows if row["variant"] == OURS)
    for row in rows:
        found = values(row, "exact", "expert")
        by_seed = [100 * (value - own) for value, own in zip(found, ours, strict=True)]
        paired = [median_interval(by_seed), f"{sum(each < 0 for each in by_seed)} of {len(by_seed)}"]
        cells = [
            row["title"],
            quartiles([100 * each for each in found], ".1f"),
            f"{100 * min(found):.1f} to {100 * max(found):.1f}",
            *(["", ""] if row["variant"] == OURS else paired),
            quartiles([100 * each for each in other], ".1f") if (other := values(row, "exact", "suboptimal")) else "-",
            quartiles(values(row, "nll", "expert"), ".2f"),
        ]
        yield "| " + " | ".join(cells) + " |"


def guidance_table(record: dict[str, Any]) -> Iterator[str]:
    """Medians and quartiles of the shares of answers that are each class's, at each guidance."""
    yield "| | C-RLFT | | without reward | |"
    yield "|---:|---:|---:|---:|---:|"
    yield "| **guidance** | **the expert's, %** | **the other's, %** | **the expert's, %** | **the other's, %** |"
    for scale in dict.fromkeys(row["guidance"] for row in record["rows"]):
        cells = [
            quartiles([100 * share for share in row[side]], ".1f")
            for row in record["rows"]
            if row["guidance"] == scale
            for side in ("expert", "suboptimal")
        ]
        yield f"| {scale:g} | " + " | ".join(cells) + " |"


def groups_table(runs: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Exact answers under the expert's prefix to the tasks of knowledge and to the others, and less C-RLFT's, paired by
    seed."""
    yield "| variant | seeds | knowledge, % | less C-RLFT | computed, % | less C-RLFT |"
    yield "|---|---:|---:|---:|---:|---:|"
    shares = {
        title: {seed: grouped(found) for seed, found in by_seed.items()} for title, by_seed in asked(runs).items()
    }
    ours = next(iter(shares.values()))
    for title, by_seed in shares.items():
        cells = []
        for group in (0, 1):
            cells.append(shown_mean([each[group] for each in by_seed.values()], 0.0, ".1f"))
            less = [each[group] - ours[seed][group] for seed, each in by_seed.items()]
            cells.append("-" if by_seed is ours else shown_mean(less, -100.0, "+.1f"))
        yield f"| {title} | {len(by_seed)} | " + " | ".join(cells) + " |"


def grouped(found: dict[str, Any]) -> tuple[float, float]:
    """Percent of exact answers to the tasks of knowledge, and to the others."""
    known = [task["expert"] for name, task in found.items() if name in KNOWLEDGE]
    others = [task["expert"] for name, task in found.items() if name not in KNOWLEDGE]
    return 100 * statistics.fmean(known), 100 * statistics.fmean(others)


def tasks_table(runs: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Exact answers to each task under the expert's prefix, in percent, means over seeds."""
    found = asked(runs)
    names = list(next(iter(next(iter(found.values())).values())))
    yield "| variant | " + " | ".join(f"`{name}`" for name in names) + " |"
    yield "|---|" + "---:|" * len(names)
    for title, by_seed in found.items():
        means = (100 * statistics.fmean(each[name]["expert"] for each in by_seed.values()) for name in names)
        yield f"| {title} | " + " | ".join(f"{mean:.0f}" for mean in means) + " |"


def asked(runs: Sequence[dict[str, Any]]) -> dict[str, dict[int, dict[str, Any]]]:
    """title -> seed -> what each task's answers were under the expert's prefix, or under none. C-RLFT comes first."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for run in runs:
        prefix = run["conditions"][0]
        tasks = run["classes"][EXPERT]["prefixes"][prefix]["tasks"]
        found.setdefault(run["title"], {})[run["seed"]] = tasks
    return found


def guided_table(runs: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Exact answers with guidance, and less those without, paired by seed."""
    yield "| variant | away from | guidance | exact, % | less guidance 1 |"
    yield "|---|---|---:|---:|---:|"
    found: dict[tuple[str, str, float], list[tuple[float, float]]] = {}
    for run in runs:
        for guided in run["guided"]:
            share = statistics.fmean(task["expert"] for task in guided["tasks"].values())
            own = run["classes"][EXPERT]["prefixes"][EXPERT]["exact"]
            key = run["title"], guided["against"] or "none", guided["guidance"]
            found.setdefault(key, []).append((100 * share, 100 * own))
    for (title, against, scale), pairs in found.items():
        shares, differences = [share for share, _ in pairs], [share - own for share, own in pairs]
        columns = ((shares, 0.0, ".1f"), (differences, -100.0, "+.1f"))
        shown = [shown_mean(values, least, form) for values, least, form in columns]
        yield f"| {title} | {against} | {scale:g} | " + " | ".join(shown) + " |"


def shown_mean(found: Sequence[float], least: float, form: str) -> str:
    """Mean [low, high], cut to what percentages or their differences can be."""
    mean = intervals.mean_of(found)
    ends = mean["interval"] and [min(max(end, least), 100.0) for end in mean["interval"]]
    return intervals.shown(mean["mean"], ends, form)


def values(row: dict[str, Any], measure: str, side: str) -> list[float]:
    """Of each seed, in order; [] for a prefix that the variant does not have."""
    cell = row[measure][side]
    return cell["values"] if cell else []


def quartiles(found: Sequence[float], form: str) -> str:
    """Median (lower to upper quartile)."""
    low, middle, high = statistics.quantiles(found, n=4, method="inclusive")
    return f"{middle:{form}} ({low:{form}} to {high:{form}})"


def median_interval(found: Sequence[float]) -> str:
    """Median [low, high] at 95 %, by order statistics. Needs six values."""
    ordered, count = sorted(found), len(found)
    below = [sum(comb(count, i) for i in range(k)) / 2**count for k in range(count)]  # P(fewer than k below the median)
    k = max(k for k in range(1, count) if below[k] <= 0.025)
    return f"{statistics.median(ordered):+.1f} [{ordered[k - 1]:+.1f}, {ordered[-k]:+.1f}]"


def picture(rows: Sequence[dict[str, Any]]) -> str:
    """An SVG: a dot for each seed, at the same height in each row; a line from quartile to quartile, a bar at the
    median."""
    height = TOP + ROW * len(rows)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LEFT + WIDTH + 30} {height + 44}" '
        'font-family="system-ui, sans-serif">',
        f"<style>{STYLE}</style>",
    ]
    for percent in range(0, 101, 20):
        x = place(percent / 100)
        lines.append(f'<path class="g" d="M{x} {TOP} V{height}"/>')
        lines.append(f'<text class="s" x="{x}" y="{height + 16}" text-anchor="middle">{percent} %</text>')
    for number, row in enumerate(rows):
        found, middle = values(row, "exact", "expert"), TOP + ROW * number + ROW / 2
        lines.append(f'<text x="{LEFT - 14}" y="{middle + 5}" text-anchor="end">{row["title"].replace("`", "")}</text>')
        for seed, value in zip(row["seeds"], found, strict=True):
            y = middle + (seed * 0.618 % 1 - 0.5) * (ROW - 16)  # spread evenly whatever the number of seeds
            lines.append(f'<circle class="d" cx="{place(value)}" cy="{y:.1f}" r="4"/>')
        low, median, high = map(place, statistics.quantiles(found, n=4, method="inclusive"))
        lines.append(f'<path class="q" d="M{low} {middle} H{high}"/>')
        lines.append(f'<path class="m" d="M{median} {middle - 13} v26"/>')
    caption = f"held-out answers that are exactly right, {len(rows[0]['seeds'])} seeds; bar: median, line: quartiles"
    lines.append(f'<text class="s" x="{LEFT + WIDTH / 2}" y="{height + 36}" text-anchor="middle">{caption}</text>')
    return "\n".join([*lines, "</svg>\n"])


def place(share: float) -> float:
    """Where a share stands on the axis."""
    return round(LEFT + share * WIDTH, 1)


if __name__ == "__main__":
    main()
