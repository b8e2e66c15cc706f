"""The table of a plan that says what more machines bring: a step on 8, 64 and 512 GPUs, eight a node.

Messages take their bytes over the speed of the links and the hops of their rings (roofline.py); what does not
hide behind computation is the time of the step. The same step as far as it has bins for all, larger ones beyond.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from msgspec import structs
from rich.table import Table

from ochat.plan import roofline
from ochat.plan.forecast import NOTABLE, Run
from ochat.plan.format import duration, rounded
from ochat.plan.gpus import Card
from ochat.plan.memory import GIB
from ochat.plan.roofline import Cut, Speed

GPUS = (8, 64, 512)
GPUS_OF_NODE = 8
COLUMNS = ("replicas", "bins", "a step", "tokens/s", "a GPU", "of 8's", "messages", "not hidden")
LEGEND = (
    "replicas: copies of the model, each sharded over the rest; bins: of a step; of 8's: a GPU's rate beside that on "
    "8, where it fits there; messages: GiB of a GPU in a step; not hidden: the share of the step that waits for them"
)


@dataclass(frozen=True)
class Row:
    """A step on so many GPUs."""

    ranks: int
    card: Card
    cut: Cut
    speed: Speed
    replicate: int  # copies of the model
    message_bytes: float  # of a GPU and step

    @property
    def rate(self) -> float:
        """Tokens/s a GPU."""
        return self.speed.tokens_per_s / self.ranks


def scale(run: Run, card: Card) -> list[Row]:
    """The run at each of GPUS where it fits, with parallel.replicate as configured or, where that is faster by more
    than NOTABLE, one replica a node."""
    rows = []
    for ranks in GPUS:
        choices = [_row(run, card, ranks, replicate) for replicate in _replicas(run, ranks)]
        fitting = [row for row in choices if run.memory(row.cut).total <= card.memory_gib * GIB]
        if fitting:
            best = max(fitting, key=lambda row: row.rate)
            rows.append(best if best.rate > NOTABLE * fitting[0].rate else fitting[0])
    return rows


def table(rows: list[Row]) -> Table:
    """A line for each number of GPUs and card."""
    title = f"on more GPUs, {GPUS_OF_NODE} a node"
    shown = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0), header_style="dim")
    for name in ("GPUs", "card", *COLUMNS):
        shown.add_column(name, justify="left" if name == "card" else "right", no_wrap=True)
    rates = {row.card.name: row.rate for row in rows if row.ranks == GPUS[0]}
    for row in rows:
        step, name = row.speed.step_seconds, row.card.name
        scaling = f"{row.rate / rates[name]:.0%}" if name in rates else "-"
        shown.add_row(
            f"{row.ranks:,}", name, f"{row.replicate}", f"{row.cut.bins_per_step:,}", duration(step),
            rounded(row.speed.tokens_per_s), rounded(row.rate), scaling, f"{row.message_bytes / GIB:,.1f}",
            f"{row.speed.communication / step:.0%}",
        )  # fmt: skip
    return shown


def _replicas(run: Run, ranks: int) -> list[int]:
    configured = run.config.parallel.replicate
    nodes = ranks // GPUS_OF_NODE
    return [each for each in dict.fromkeys((configured, nodes)) if ranks % each == 0] or [1]


def _row(run: Run, card: Card, ranks: int, replicate: int) -> Row:
    parallel = structs.replace(run.config.parallel, shard=ranks // replicate, replicate=replicate)
    run = dataclasses.replace(run, config=structs.replace(run.config, parallel=parallel))
    cut = run.settled(run.cut(ranks, GPUS_OF_NODE), card.memory_gib * GIB)
    predicted = roofline.predict(run.model, card, run.workload, cut)
    return Row(ranks, card, cut, predicted, replicate, roofline.message_bytes(run.model, cut))
