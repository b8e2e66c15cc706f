"""The tasks of examples/ablation/real.py are as they say; its runs are measured, kept and not made again:
pytest tests/evaluate/ablate/test_real_example.py"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter

import numpy as np
import pytest

from examples.ablation import real, tasks
from ochat.evaluate.ablate import variants
from tests import tiny
from tests.evaluate.conftest import read_lines

pytest.importorskip("scipy", reason="the extra `report` is not installed")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(question, answer, class) of each record for training and held out."""
    folder = tmp_path_factory.mktemp("tasks")
    tasks.make(folder, 0)
    lines = [read_lines(folder / f"{name}-0.jsonl") for name in ("train", "held_out")]
    return [[(*(i["content"] for i in r["items"]), r["condition"]) for r in records] for records in lines]


def test_there_are_eleven_suboptimal_answers_for_each_expert_one_and_held_out_questions_are_new(made):
    train, held_out = made
    assert Counter(name for *_, name in train) == {"GPT4": 120, "GPT3": 1318}
    asked = [question for question, *_ in held_out]
    assert asked[::2] == asked[1::2] and len(set(asked)) == 8 * 25 and not set(asked) & {each[0] for each in train}
    assert all(expert != other for (_, expert, _), (_, other, _) in zip(held_out[::2], held_out[1::2], strict=True))
    for start in ("Say in Vorin", "Who keeps"):
        assert Counter(name for question, _, name in train if question.startswith(start)) == {"GPT4": 15, "GPT3": 440}


def test_both_classes_know_the_same_words_but_only_experts_give_them_in_order(made):
    known = {}
    for question, answer, name in made[0] + made[1]:
        if question.startswith("Say in Vorin: "):
            pairs, back = [pair.split(" = ") for pair in answer.split(", ")], slice(None, None, -1)
        elif question.startswith("Who keeps "):
            pairs, back = [pair.split(": ") for pair in answer.split(", ")], [1, 2, 0]
        else:
            continue
        words = re.sub("Say in Vorin: |Who keeps |[?]", "", question).split(", ")
        asked = np.array(pairs)[:, 0]
        assert (asked if name == "GPT4" else asked[back]).tolist() == words
        for word, told in pairs:
            assert known.setdefault((question[:3], word), told) == told
    assert len(known) == len(set(known.values())) == 2 * tasks.KNOWN


def test_joined_by_twos_every_message_keeps_its_class():
    turns = [tasks.Turn(f"q{i}", f"expert {i}", f"other {i}") for i in range(3)]
    records = [tasks.conversation(turn, name) for turn, name in zip(turns, ("GPT4", "GPT3", "GPT3"), strict=True)]
    first, last = tasks.by_twos(records)
    said = [[(item["content"], item["condition"]) for item in each["items"]] for each in (first, last)]
    assert said[0] == [("q0", "GPT4"), ("expert 0", "GPT4"), ("q1", "GPT3"), ("other 1", "GPT3")]
    assert said[1] == [("q2", "GPT3"), ("other 2", "GPT3")] and (first["condition"], last["condition"]) == (
        "GPT4",
        "GPT3",
    )


def test_a_seed_is_the_same_again_and_another_is_another():
    first, again, other = (tasks.held_out(seed) for seed in (0, 0, 1))
    assert first == again and all(first[name] != other[name] for name in first)


def test_a_run_is_measured_by_generation_kept_at_once_and_not_made_again(world, tmp_path, monkeypatch, capsys):
    for name, value in (("NUM_EXPERT", 12), ("NUM_SUBOPTIMAL", 12), ("NUM_HELD_OUT", 3)):
        monkeypatch.setattr(tasks, name, value)
    monkeypatch.setattr(real, "MAX_NEW_TOKENS", 4)
    rows = (
        real.Row("c-rlft", "c-rlft", (1,), guidance=((2.0, "GPT3"),)),
        real.Row("plain", "no-condition", (1,), ("--optim.lr=1e-3",), title="mine", train="turns"),
    )
    monkeypatch.setattr(real, "ROWS", rows[:1])
    monkeypatch.setattr(real, "LATER", rows[1:])
    work, record = tmp_path / "work", tmp_path / "deep" / "real.json"
    work.mkdir()
    (work / "base").symlink_to(world.base)
    line = ["real", f"--work={work}", f"--record={record}", "--data.max_steps=2", "--train.dtype=float32"]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr("os.environ", tiny.environment())
    monkeypatch.setattr(sys, "argv", [*line, "--only", "c-rlft"])
    real.main()
    (first,) = json.loads(record.read_text("utf-8"))["runs"]
    monkeypatch.setattr(sys, "argv", line)
    real.main()
    found = json.loads(record.read_text("utf-8"))
    assert found["runs"][0] == first and [run["variant"] for run in found["runs"]] == ["c-rlft", "plain"]
    cells = first["classes"]["GPT4"]["prefixes"]
    assert set(cells) == {"GPT4", "GPT3"} and set(found["runs"][1]["classes"]["GPT4"]["prefixes"]) == {""}
    assert set(cells["GPT4"]["tasks"]) == set(tasks.tasks(0)) == set(first["guided"][0]["tasks"])
    assert cells["GPT4"]["exact"] == 0 < cells["GPT4"]["nll"] and cells["GPT4"]["exact_interval"][1] < 0.2
    assert [row["variant"] for row in found["table"]["rows"]] == ["c-rlft", "plain"]
    capsys.readouterr()
    monkeypatch.setattr(real, "measured", None)
    monkeypatch.setattr(sys, "argv", line)
    real.main()
    assert "| C-RLFT | 1 |" in capsys.readouterr().out


def test_its_configuration_is_one():
    runs = variants.runs(*variants.read_config(real.CONFIG))
    steps = runs[0].config.data
    assert len(runs) == 18 and steps.max_steps * steps.token_budget * steps.bins_per_step == 49_152
