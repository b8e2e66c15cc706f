"""The demo's conversations: experts are right, the others wrong, held-out questions unknown to training."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys

import pytest

from examples import make_conversations as script
from ochat.text.conversation import Conversation

DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]


def right_answer(question: str) -> str:
    """The answer's core, worked out from the question's text alone."""
    numbers = [int(number) for number in re.findall(r"\d+", question)]
    if question.startswith("What is"):
        return str(sum(numbers))
    if question.startswith("How many minutes"):
        return f"{60 * numbers[0] + numbers[1]} minutes"
    if "largest" in question:
        return str(max(numbers))
    if question.startswith("Which day"):
        return DAYS[(DAYS.index(question.rstrip("?").split()[-1]) + numbers[0]) % 7]
    if question.startswith("Sort"):
        first, second, third = sorted(question.removeprefix("Sort these words: ").rstrip(".").split(", "))
        return f"{first}, {second} and {third}"
    return "-".join(re.findall("[a-z]", question.split('"')[1]))


def core(task: str, answer: str) -> str:
    """Where a full answer gives its result."""
    pattern = {
        "add": r"\d+ \+ \d+ = (\d+),", "minutes": r"= (\d+ minutes)\.$", "largest": r"^The largest is (\d+),",
        "later_day": r"So it is (\w+)\.$", "alphabetical": r"they are (.+)\.$", "spelling": r"spelt ([a-z-]+),",
    }[task]  # fmt: skip
    found = re.search(pattern, answer)
    assert found, answer
    return found[1]


@pytest.mark.parametrize("task", [task.__name__ for task in script.TASKS])
def test_experts_are_right_and_the_others_wrong_and_shorter(task):
    rng = random.Random(1)
    for _ in range(300):
        turn = getattr(script, task)(rng)
        right = right_answer(turn.question)
        assert core(task, turn.expert) == right
        assert turn.suboptimal not in (right, right.replace(" and ", ", "), right.removesuffix(" minutes"))
        assert len(turn.suboptimal) < len(turn.expert)
        if count := re.search(r"makes (\d+) letters", turn.expert):
            assert int(count[1]) == len(re.findall("[a-z]", turn.question.split('"')[1]))
        assert bool(count) == (task == "spelling")


def test_held_out_questions_are_unknown_and_answered_by_both():
    train, held_out = script.make(600, 30, seed=3)

    def questions(record):
        return [item["content"] for item in record["items"] if item["role"] == "user"]

    asked = {question for record in train for question in questions(record)}
    assert asked.isdisjoint(question for record in held_out for question in questions(record))
    for expert, other in zip(held_out[::2], held_out[1::2], strict=True):
        assert (expert["condition"], other["condition"]) == ("GPT4", "GPT3") and questions(expert) == questions(other)
    assert len({tuple(questions(record)) for record in train}) == 600, "no prompt twice"
    shares = [sum(record["condition"] == name for record in train) / 600 for name in ("GPT4", "GPT3")]
    assert shares[0] == pytest.approx(0.25, abs=0.06) and sum(shares) == 1  # three standard deviations
    assert any(len(record["items"]) > 2 for record in train) and any(len(record["items"]) == 2 for record in held_out)


def test_the_script_writes_what_ochat_reads(tmp_path):
    command = [sys.executable, script.__file__, "--train", "40", "--held-out", "5"]
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        subprocess.run([*command, "--seed", seed, str(tmp_path / name)], check=True, capture_output=True)
    texts = {name: (tmp_path / name / "train.jsonl").read_text("utf-8") for name in "abc"}
    assert texts["a"] == texts["b"] != texts["c"]
    for line in texts["a"].splitlines():
        conversation = Conversation.from_dict(json.loads(line))
        weights = {"user": 0.0, "assistant": {"GPT4": 1.0, "GPT3": 0.1}[conversation.condition]}
        assert all(message.weight == weights[message.role] for message in conversation.items)
    assert len((tmp_path / "a" / "held_out.jsonl").read_text("utf-8").splitlines()) == 10
