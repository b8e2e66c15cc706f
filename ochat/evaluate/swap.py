"""Measure how likely each class's answers are under each class's prefix: the swap matrix, as numbers and as a table.

    matrix = swap_matrix(model, template, tokenizer, held_out, ["GPT4", "GPT3"])
    matrix["GPT3"].nll[:, 0]     # of each conversation of GPT3, summed over its tokens, under GPT4's prefix
    record = summarise(matrix, conditions);  console.print(swap_table(record, conditions))

Before training the prefix means nothing and a row's values are alike; after it, a row is lowest on the diagonal.

Tokens of one conversation depend on each other; conversations (mostly) do not. So whole conversations are resampled
with replacement, and each mean is taken again as a ratio of sums: a percentile bootstrap, because these ratios are
skewed, perplexity most, and a t interval of an accuracy near 1 leaves [0, 1]. All conditions see the same draws, so the
difference of two prefixes is paired, and far more certain than either mean. Intervals of few conversations are too
narrow: at 95 %, for skewed lengths and losses, those of 10, 20, 50 and 100 contained the truth in 85, 88, 92 and 93 %
of 500 draws (those of tests/evaluate/test_swap.py; t intervals: 90, 90, 94 and 95 % of 400). Exact match is one
score a conversation, and may be none or all of them, where a bootstrap has no spread: its interval is Wilson's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ochat_kernels
import torch
from numpy.typing import NDArray
from rich import box
from rich.markup import escape
from rich.table import Table

from ochat.data.batch import Example, PackedBatch, pack
from ochat.errors import DataError
from ochat.evaluate import intervals
from ochat.evaluate.held_out import HeldOut
from ochat.model.attention.backends import Needs
from ochat.model.attention.packed import PackedAttention, default_backend
from ochat.model.transformer import HeadFunction, Transformer
from ochat.text.template import Template
from ochat.text.tokenizer import Tokenizer
from ochat.train.loss import head_loss

TOKENS_PER_PASS = 4096  # enough to fill matrix products; the head's logits exist a chunk of rows at a time anyway
RESAMPLES, SEED = 2000, 0
NONE = "(none)"  # instead of a class
TAIL = 100 * (1 - intervals.LEVEL) / 2  # percent, at either end of an interval
METHOD = f"percentile bootstrap over conversations (exact: {intervals.METHOD})"
SHOWN = {  # measure: heading, factor and form
    "nll": ("nll", 1, ".3f"),
    "perplexity": ("per-\nplexity", 1, ",.2f"),
    "accuracy": ("accuracy\n%", 100, ".1f"),
    "exact": ("exact\n%", 100, ".1f"),
    "nll_above_own": ("nll above\nown prefix", 1, ".3f"),
}


@dataclass(frozen=True, eq=False)
class Sums:
    """Of the n conversations of one class, under C conditions. Weights only choose tokens: each counts as one."""

    tokens: NDArray[np.int64]  # (n,) supervised
    nll: NDArray[np.float64]  # (n, C) nats, summed over a conversation's tokens
    correct: NDArray[np.int64]  # (n, C) tokens that have the largest logit

    @property
    def exact(self) -> NDArray[np.int64]:
        """(n, C) 1 where all of a conversation's tokens have the largest logit: greedy decoding of each turn, after the
        true earlier turns, gives exactly that turn."""
        return (self.correct == self.tokens[:, None]).astype(np.int64)


def swap_matrix(
    model: Transformer,
    template: Template,
    tokenizer: Tokenizer,
    conversations: Sequence[HeldOut],
    conditions: Sequence[str],
    advance: Callable[[int], object] = lambda num_conversations: None,
) -> dict[str, Sums]:
    """{class of the answers: its sums under each condition, in order}, of the conversations with a supervised token
    that fits the template's context.

    Conversations run packed, without gradients; `advance` gets the number of each pass. Cost: a forward pass of all
    conversations for each condition. Raises DataError for no conversations, or a class without a supervised token.
    """
    if not conversations or not conditions:
        raise DataError("the swap matrix needs at least one held-out conversation and one condition")
    examples = [each.under(conditions, template, tokenizer) for each in conversations]
    sums = np.zeros((len(conditions), len(examples), 3))  # tokens, nll, correct
    for column in range(len(conditions)):
        for places, batch in packs(each[column] for each in examples):
            np.add.at(sums[column], np.array(places)[batch.supervised_classes.numpy()], rows(model, batch))
            advance(len(places))
    tokens, nll, correct = sums.transpose(2, 1, 0)  # (n, C) each
    assert (tokens == tokens[:, :1]).all(), "the same tokens are measured under every condition"
    found: dict[str, Sums] = {}
    for name in dict.fromkeys(each.condition for each in conversations):
        kept = np.array([each.condition == name for each in conversations]) & (tokens[:, 0] > 0)
        if not kept.any():
            raise DataError(f"the conversations of class {name!r} hold no supervised token: nothing to measure")
        found[name] = Sums(tokens[kept, 0].astype(np.int64), nll[kept], correct[kept].astype(np.int64))
    return found


@torch.no_grad()
def rows(model: Transformer, batch: PackedBatch) -> NDArray[np.float64]:
    """(R, 3) of the supervised rows: 1, negative log-likelihood in nats, and 1 where the largest logit is the label's
    or else 0."""
    batch = batch.to(model.embed.weight.device)
    out = forward(model, batch, head_loss(ochat_kernels.load("reference"), model, batch))
    return torch.stack([torch.ones_like(out.nll).double(), out.nll.double(), out.correct.double()], 1).cpu().numpy()


def forward(model: Transformer, batch: PackedBatch, head: HeadFunction) -> Any:
    """What the head gives for the supervised rows of a batch on the model's device."""
    weight, config = model.embed.weight, model.config
    backend = default_backend(weight.device, Needs.of(config, model.compute_dtype or weight.dtype))
    attend = PackedAttention(batch.cu_seqlens, batch.max_seqlen, backend, batch.lengths, config.windows)
    return model(batch.input_ids, batch.position_ids, attend, head, batch.supervised_rows)


def packs(examples: Iterable[Example]) -> Iterator[tuple[list[int], PackedBatch]]:
    """(places, batch) of each pass over examples that come one at a time; a row's class is its example's number in the
    batch. Memory: the examples of a pass."""
    waiting: dict[int, Example] = {}

    def lengths() -> Iterator[int]:
        for place, example in enumerate(examples):
            if len(example.input_ids):
                waiting[place] = example
            yield len(example.input_ids)

    for places in passes(lengths()):
        yield places, pack([waiting.pop(place) for place in places], places, range(len(places)))


def passes(lengths: Iterable[int]) -> Iterator[list[int]]:
    """Places of whole conversations, in order, about TOKENS_PER_PASS tokens together; empty ones are left out."""
    places, tokens = [], 0
    for place, length in enumerate(lengths):
        if places and tokens + length > TOKENS_PER_PASS:
            yield places
            places, tokens = [], 0
        if length:
            places.append(place)
        tokens += length
    if places:
        yield places


def summarise(matrix: dict[str, Sums], conditions: Sequence[str]) -> dict[str, Any]:
    """{class: {conversations, tokens, prefixes: {condition: {nll, perplexity, accuracy, exact, nll_above_own, each with
    ..._interval}}}}.

    `exact`: the share of conversations that greedy decoding gives word for word, to the end of the turn (Sums.exact).
    `nll_above_own`: the nll less that under the class's own prefix; None where that was not measured. An interval is
    [low, high], or None for a class of one conversation. The same matrix gives the same intervals.
    """
    return {name: _of_class(name, sums, conditions) for name, sums in matrix.items()}


def resampled(columns: NDArray) -> NDArray[np.float64]:
    """(RESAMPLES, m) sums of the columns (n, m) over n rows drawn with replacement. Costs: RESAMPLES * n * m."""
    draw, count = np.random.default_rng(SEED), len(columns)
    drawn = (np.bincount(draw.integers(count, size=count), minlength=count) for _ in range(RESAMPLES))
    return np.stack([times @ columns.astype(np.float64) for times in drawn])


def swap_table(record: dict[str, Any], conditions: Sequence[str]) -> Table:
    """A row for each class and prefix; the likeliest prefix of a class is marked with *."""
    counts = "; ".join(
        f"{name or NONE}: {row['conversations']:,} conversations, {row['tokens']:,} tokens"
        for name, row in record.items()
    )
    what = f"[low, high]: {intervals.LEVEL:.0%}, {METHOD}. *: the likeliest prefix. nll: nats per supervised token"
    shown = Table(
        title="Held-out answers of each class under each class's prefix",
        caption=escape(f"{counts}. {what}. exact: conversations whose every token is the likeliest"),
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,  # with it, two classes of short names fit 80 columns
    )
    shown.add_column("class", overflow="fold")
    shown.add_column("prefix", overflow="fold")
    for heading, *_ in SHOWN.values():
        shown.add_column(heading, justify="right", no_wrap=True)
    for name, row in record.items():
        nll = {condition: row["prefixes"][condition]["nll"] for condition in conditions}
        for number, condition in enumerate(conditions):
            star = " *" if nll[condition] == min(nll.values()) else ""
            label, prefix = ("" if number else escape(name or NONE)), f"{escape(condition or NONE)}{star}"
            shown.add_row(label, prefix, *(_shown(row["prefixes"][condition], key) for key in SHOWN))
        shown.add_section()
    return shown


def _of_class(name: str, sums: Sums, conditions: Sequence[str]) -> dict[str, Any]:
    columns = np.column_stack([sums.tokens, sums.nll, sums.correct])
    drawn = np.vstack([columns.sum(0), resampled(columns)])  # (1 + RESAMPLES, 1 + 2C), the first row of all as they are
    nll, accuracy = np.split(drawn[:, 1:] / drawn[:, :1], 2, axis=1)
    exact = sums.exact.mean(0, keepdims=True)  # (1, C)
    measures = {"nll": nll, "perplexity": np.exp(nll), "accuracy": accuracy, "exact": exact}
    if name in conditions:
        measures["nll_above_own"] = nll - nll[:, [list(conditions).index(name)]]
    prefixes = {
        condition: _cell({key: values[:, column] for key, values in measures.items()}, len(columns))
        for column, condition in enumerate(conditions)
    }
    return {"conversations": len(columns), "tokens": int(sums.tokens.sum()), "prefixes": prefixes}


def _cell(measures: dict[str, NDArray[np.float64]], count: int) -> dict[str, Any]:
    """Each measure's value and interval, from (1 + RESAMPLES,) values; an exact one's from the value alone."""
    cell: dict[str, Any] = dict.fromkeys(name for key in SHOWN for name in (key, f"{key}_interval"))
    for key, values in measures.items():
        cell[key] = float(values[0])
        if count > 1:
            ends = (
                intervals.wilson(values[0], count) if key == "exact" else np.percentile(values[1:], [TAIL, 100 - TAIL])
            )
            cell[f"{key}_interval"] = [float(end) for end in ends]
    return cell


def _shown(cell: dict[str, Any], key: str) -> str:
    """A value above its interval; the intervals of perplexity and exact are only in the record."""
    if cell[key] is None:
        return "-"
    ends = None if key in ("perplexity", "exact") else cell[f"{key}_interval"]
    _, scale, form = SHOWN[key]
    form = ",.0f" if key == "perplexity" and cell[key] >= 1000 else form  # of a class that the model finds unlikely
    return escape(intervals.shown(cell[key], ends, form, scale, join="\n"))
