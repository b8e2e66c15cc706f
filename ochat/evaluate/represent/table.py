"""Tabulate the numbers of a map, and word its figure's title and captions: console.print(represent_table(record))."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from ochat.evaluate.intervals import LEVEL

NAMES = {
    "own_all": "own prefix, all tokens",
    "own_answers": "own prefix, answers",
    "one_all": "one prefix, all tokens",
    "one_answers": "one prefix, answers",
    "words": "the answers' words",
}
WITHOUT_CLASSES = {"own_all": "no class, all tokens", "own_answers": "no class, answers", "words": NAMES["words"]}


def represent_table(record: dict[str, Any]) -> Table:
    """A row for each model and view; the view that is drawn is marked with *."""
    probe, sample = record["probe"], record["sample"]
    shown = Table(
        title=f"How far apart {_list(sample['classes'])} lie ({sample['per_class']:,} conversations of each)",
        caption=escape(
            f"silhouette: 1 apart, 0 mixed ({record['distance']}; PCA, UMAP: Euclidean). probe: accuracy on unseen "
            f"prompts, {probe['chance']:.0%} is chance; [low, high]: {LEVEL:.0%}; p: {probe['permutations']} "
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
        for view, name in (NAMES if row["names_classes"] else WITHOUT_CLASSES).items():
            is_drawn = view == _shown_view(record, row)
            shown.add_row(f"{'*' if is_drawn else ' '} {name}", *_cells(row, view, is_drawn))
        shown.add_section()
    return shown


def title(record: dict[str, Any]) -> str:
    """What the figure shows."""
    prefix, tokens = record["view"].split("_")
    written = "each under its own class's prefix" if prefix == "own" else f"all under {record['one_prefix']}'s prefix"
    over = "all tokens" if tokens == "all" else "the answers' tokens"
    sample = record["sample"]
    drawn = f"{sample['per_class']:,} conversations each of {_list(sample['classes'])}, {written}"
    return f"{drawn}:\nmean of the last layer's states over {over}"


def caption(record: dict[str, Any], row: dict[str, Any]) -> str:
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


def _shown_view(record: dict[str, Any], row: dict[str, Any]) -> str:
    return record["view"] if row["names_classes"] else record["view"].replace("one", "own")


def _cells(row: dict[str, Any], view: str, is_drawn: bool) -> list[str]:
    numbers = row["views"][view]
    probe = numbers["probe"]
    low, high = (100 * end for end in probe["interval"])
    return [
        f"{numbers['silhouette']:z.3f}",
        f"{numbers['silhouette_pca']:z.3f}",
        f"{row['silhouette_umap']:z.3f}" if is_drawn else "",
        f"{100 * probe['accuracy']:.1f} " + escape(f"[{low:.1f}, {high:.1f}]"),
        f"{probe['p_value']:.3f}",
    ]


def _list(names: list[str]) -> str:
    shown = [name or "no class" for name in names]
    return " and ".join([", ".join(shown[:-1]), shown[-1]])
