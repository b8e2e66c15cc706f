"""The table holds means over seeds with t intervals, and differences paired by seed."""

from __future__ import annotations

import io

import numpy as np
import pytest
from rich.console import Console

from ochat.evaluate import intervals
from ochat.evaluate.ablate import table

pytest.importorskip("scipy", reason="the extra `report` is not installed")


def test_t_intervals_are_the_printed_tables_and_contain_the_truth_as_often_as_they_say():
    found = intervals.mean_of([1.0, 2.0, 4.0])
    half = 4.30265273 * np.std([1, 2, 4], ddof=1) / np.sqrt(3)
    assert found["mean"] == pytest.approx(7 / 3) and found["interval"] == pytest.approx([7 / 3 - half, 7 / 3 + half])
    assert intervals.mean_of([0.5]) == {"mean": 0.5, "interval": None, "values": [0.5]}
    draws = np.random.default_rng(0).normal(3.0, 2.0, (2000, 5))
    held = [low <= 3.0 <= high for low, high in (intervals.mean_of(row)["interval"] for row in draws.tolist())]
    assert 0.935 < np.mean(held) < 0.965  # three standard errors are 0.0146


def result(variant, seed, exact, nll, conditions=("GPT4", "GPT3")):
    ends = {"exact_interval": [0.1, 0.2], "nll_interval": [1, 2]}
    prefixes = {name: {"exact": exact / i, "nll": nll * i} | ends for i, name in enumerate(conditions, 1)}
    named = {"variant": variant, "title": variant.upper(), "seed": seed, "conditions": list(conditions)}
    classes = {"GPT4": {"conversations": 50, "prefixes": prefixes}}
    return named | {"classes": classes, "interval": {"method": "percentile bootstrap"}}


def test_the_table_is_means_over_seeds_and_differences_by_seed():
    results = [result("c-rlft", seed, 0.9 + seed / 100, 0.1) for seed in (0, 1, 2)]
    results += [result("sft", seed, 0.2 + seed / 100, 0.5, ("",)) for seed in (2, 1, 7)]
    results += [result("no-reward", 1, 0.6, 0.2)]
    record = table.summarise(results, "GPT4", "GPT3")
    ours, sft, single = record["rows"]
    assert ours["exact"]["expert"]["values"] == [0.9, 0.91, 0.92] and ours["exact"]["above_ours"] is None
    assert ours["nll"]["suboptimal"]["mean"] == pytest.approx(0.2)
    low, high = ours["exact"]["expert"]["interval"]
    assert (low + high) / 2 == pytest.approx(0.91) and high - low == pytest.approx(2 * 4.302653 * 0.01 / 3**0.5)
    assert sft["exact"]["suboptimal"] is None and sft["seeds"] == [2, 1, 7]
    assert sft["exact"]["above_ours"]["values"] == pytest.approx([0.22 - 0.92, 0.21 - 0.91])  # seeds 2 and 1, paired
    assert single["exact"]["expert"]["interval"] == [0.1, 0.2] and single["exact"]["above_ours"]["interval"] is None
    text = table.markdown(record)
    assert "| C-RLFT | 3 | 91.0 [88.5, 93.5] |" in text and "-70.0 [-70.0, -70.0]" in text
    shown = io.StringIO()
    console = Console(file=shown, width=80)
    for each in table.tables(record):
        console.print(each)
    assert max(map(len, shown.getvalue().splitlines())) <= 80 and "91.0" in shown.getvalue()


def test_no_interval_leaves_the_range_of_its_measure():
    results = [result("c-rlft", seed, exact, 1.0) for seed, exact in enumerate((1.0, 0.9))]
    results += [result("sft", seed, 0.01, nll) for seed, nll in enumerate((0.2, 2.0))]
    ours, sft = table.summarise(results, "GPT4", "GPT3")["rows"]
    assert ours["exact"]["expert"]["interval"] == [pytest.approx(0.3147, abs=1e-4), 1.0]
    assert sft["exact"]["above_ours"]["interval"] == [-1.0, pytest.approx(-0.3047, abs=1e-4)]
    assert sft["nll"]["expert"]["interval"][0] == 0.0 and sft["nll"]["above_ours"]["interval"][0] < -5
