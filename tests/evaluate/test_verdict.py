"""The verdict says what intervals allow and no more: pytest tests/evaluate/test_verdict.py"""

from __future__ import annotations

import json
import os

import numpy as np
import pytest

from ochat import cli
from ochat.evaluate import swap
from ochat.evaluate.swap import Sums
from ochat.evaluate.verdict import verdict
from ochat.run import layout


def classes(count: int = 200, **gaps: tuple[float, float, float] | None) -> dict:
    """What summarise returns of GPT4 and GPT3: (nll above own, low, high) under the other prefix; None: no interval."""
    found = {}
    for name, gap in gaps.items():
        other = {"GPT4": "GPT3", "GPT3": "GPT4"}[name]
        own = {"nll_above_own": 0.0, "nll_above_own_interval": [0.0, 0.0]}
        nats, *ends = gap or (0.5,)
        cells = {name: own, other: {"nll_above_own": nats, "nll_above_own_interval": ends or None}}
        found[name] = {"conversations": count, "tokens": 9 * count, "prefixes": cells}
    return found


def test_a_prefix_that_works_is_said_with_its_intervals_the_expert_first():
    said = verdict(classes(GPT3=(1.5, 1.4, 1.6), GPT4=(0.319, 0.271, 0.367)), "GPT4")
    assert said == (
        "The prefix works. Answers of GPT4 are likelier under their own prefix than under GPT3's by 0.319 nats a token "
        "[0.271, 0.367]; answers of GPT3 are likelier under their own prefix than under GPT4's by 1.500 nats a token "
        "[1.400, 1.600]."
    )


UP, DOWN, OPEN, TINY = (0.3, 0.2, 0.4), (-0.3, -0.4, -0.2), (0.01, -0.02, 0.04), (0.002, 0.001, 0.003)


@pytest.mark.parametrize(
    ("four", "three", "count", "begins", "says"),
    [
        (OPEN, OPEN, 200, "The prefix changes nothing yet", ["which includes 0", "raise the share", "GPT4 and GPT3"]),
        (OPEN, OPEN, 10, "The prefix changes nothing yet that these",
         ["are few (10 of GPT4, 10 of GPT3)", "Hold out more"]),
        (UP, OPEN, 200, "The prefix works for GPT4; for GPT3 that is open.", ["weight of GPT3."]),
        (UP, DOWN, 200, "The prefix does not tell the classes apart yet: it works for GPT4 alone.",
         ["less likely under their own prefix than under GPT4's by 0.300 nats a token [0.200, 0.400]", "of GPT3."]),
        (DOWN, OPEN, 200, "The prefix does not tell the classes apart yet. Ans", ["which includes 0", "Train longer"]),
        (DOWN, DOWN, 200, "The prefix works the wrong way for GPT4 and GPT3.", ["Look at which conversations"]),
        (TINY, TINY, 200, "The prefix hardly changes anything.", ["Train longer"]),
        (UP, UP, 49, "The prefix works.", ["Conversations are few", "true intervals are wider"]),
        (None, None, 1, "The prefix changes nothing yet", ["one conversation: no interval", "are few (1 of GPT4"]),
    ],
)  # fmt: skip
def test_what_is_open_or_wrong_is_said(four, three, count, begins, says):
    said = verdict(classes(count, GPT4=four, GPT3=three), "GPT4")
    assert said.startswith(begins), said
    for part in says:
        assert part in said, said
    if count >= 50:
        assert "few" not in said


def test_of_several_prefixes_the_one_that_comes_closest_counts():
    found = classes(GPT4=(0.5, 0.4, 0.6))
    found["GPT4"]["prefixes"]["GPT2"] = {"nll_above_own": 0.3, "nll_above_own_interval": [-0.1, 0.7]}
    assert "than under GPT2's by 0.300" in verdict(found) and "works." not in verdict(found)


def test_nothing_to_compare_is_said():
    alone = {"GPT4": {"conversations": 9, "tokens": 9, "prefixes": {"": {"nll_above_own": None}}}}
    assert verdict(alone).startswith("Nothing is compared") and verdict({}).startswith("Nothing is compared")


def test_the_words_follow_from_the_numbers_of_a_matrix():
    """Shifts of 0.5 and 0 nats a token between the prefixes, under noise of conversations: only the first shows."""
    draw = np.random.default_rng(0)
    tokens = draw.integers(5, 50, 200)
    own = draw.gamma(2.0, 0.5, 200)
    noise = draw.normal(0, 0.2, 200)
    four = Sums(tokens, np.column_stack([own, own + 0.5 + noise]) * tokens[:, None], np.zeros((200, 2), np.int64))
    three = Sums(tokens, np.column_stack([own + noise - noise.mean(), own]) * tokens[:, None], four.correct)
    said = verdict(swap.summarise({"GPT4": four, "GPT3": three}, ["GPT4", "GPT3"]), "GPT4")
    assert said.startswith("The prefix works for GPT4; for GPT3 that is open."), said


def test_a_run_and_its_export_keep_the_numbers_and_another_model_does_not(world, alone, chats, exported, capsys):
    run = world.folder / "alone"
    for model, kept in ((exported, False), (run / "export", True), (run, True)):
        (run / layout.SWAP).unlink(missing_ok=True)
        capsys.readouterr()
        cli.run("eval", [str(model), str(chats), "--dtype", "float32"])
        printed = " ".join(capsys.readouterr().out.split())
        assert (run / layout.SWAP).is_file() == kept and (str(run / layout.SWAP) in printed) == kept
        if kept:
            record = json.loads((run / layout.SWAP).read_text())
            before, _ = printed.split(" next: ")
            assert before.endswith(record["verdict"]) and record["classes"].keys() == {"GPT3", "GPT4"}
    (run / layout.SWAP).unlink()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_run_is_measured_and_said_not_to_keep_it(world, alone, chats, capsys):
    run = world.folder / "alone"
    run.chmod(0o555)
    try:
        cli.run("eval", [str(run), str(chats), "--dtype", "float32"])
    finally:
        run.chmod(0o755)
    assert "read-only" in capsys.readouterr().out and not (run / layout.SWAP).exists()
