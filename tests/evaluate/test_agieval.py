"""`ochat agieval`: the published prompt, letters read from tricky answers in both ways, and accuracies by hand:
pytest tests/evaluate/test_agieval.py"""

from __future__ import annotations

import json
import math

import pytest

from ochat import cli
from ochat.errors import ConfigError, DataError, ServerError
from ochat.evaluate import proportion
from ochat.evaluate.judges import agieval_task
from ochat.evaluate.judges.agieval import AgievalOptions, evaluate, table
from tests.chat_stub import ChatStub, Fault

AQUA = {
    "passage": None,
    "question": "A car runs 30 km in 20 minutes. What is its speed?",
    "options": ["(A)60 km/h", "(B)75 km/h", "(C)90 km/h", "(D)45 km/h", "(E)30 km/h"],
    "label": "C",
    "answer": None,
    "other": {"solution": "30 * 3 = 90.\nC"},
}
SAT = {"passage": "Once.\n", "question": "Who?", "options": ["(A)I", "(B)You", "(C)He", "(D)She"], "label": "B"}


@pytest.fixture
def folder(tmp_path):
    data = tmp_path / "v1_1"
    data.mkdir()
    for name, record in (("aqua-rat", AQUA), ("sat-en", SAT), ("gaokao-history", SAT)):
        labels = "ABCD" if name == "sat-en" else "CCB"
        lines = [json.dumps(record | {"label": label, "question": f"{i}. Who?"}) for i, label in enumerate(labels)]
        (data / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return data


def test_the_prompt_is_the_published_one(tmp_path):
    def prompt(name, record):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(record))
        return agieval_task.read(tmp_path / f"{name}.jsonl").questions[0].turns[0]

    assert prompt("aqua-rat", AQUA) == (
        "Q: A car runs 30 km in 20 minutes. What is its speed? Answer Choices: (A)60 km/h (B)75 km/h (C)90 km/h "
        "(D)45 km/h (E)30 km/h\nA: Among A through E, the answer is"
    )
    assert prompt("sat-en", SAT) == (
        "Once.\nQ: Who? Answer Choices: (A)I (B)You (C)He (D)She\nA: Among A through D, the answer is"
    )
    assert prompt("logiqa-zh", SAT) == "Once.\n问题：Who? 选项：(A)I (B)You (C)He (D)She\n答案：从A到D, 我们应选择"
    one_text = SAT | {"options": ["(A)I (B)You (C)He (D)She (E)It"], "label": "E"}
    assert prompt("lsat-ar", one_text).endswith("Among A through E, the answer is")


# answer, as AGIEval reads it, strictly
ANSWERS = [
    ("C", "C", "C"),
    ("(C)", "C", "C"),
    (" C. 90 km/h", "C", "C"),
    ("**C**", "C", "C"),
    ("C) 90 km/h", "C", "C"),
    ("C because it is 3 times 30.", "C", "C"),
    ("$C$", "C", "C"),
    ("The answer is C.", "C", "C"),
    ("The correct answer is: (C) 90 km/h", "C", "C"),
    ("Answer: C", "A", "C"),  # the first capital is the word's own
    ("Because 30 * 3 is 90, the answer is C.", "B", "C"),
    ("Among A through E, the answer is C", "A", "C"),
    ("A car that runs 30 km in 20 minutes runs 90. So the answer is (C).", "A", "C"),
    ("The answer is A? No: 20 minutes are a third, so the answer is C", "A", "C"),
    ("the answer is $\\boxed{C}$", "C", "C"),
    ("It must be (C), for (C) says so.", "C", "C"),
    ("It is (A) or (C).", "A", None),
    ("The answer is A or C.", "A", None),
    ("The answer is not A.", "A", None),
    ("Answer Choices: (A) 60 (B) 75", "A", None),
    ("A lot of text", "A", None),
    ("Definitely", "D", None),
    ("90 km/h", None, None),
    ("", None, None),
    ("the answer is c", None, None),
    ("F", "F", None),  # no option of this question
    ("G", None, None),  # AGIEval's letters end at F
    ("答案是C。", "C", "C"),
    ("选C", "C", "C"),
]


@pytest.mark.parametrize(("text", "published", "strict"), ANSWERS)
def test_letters_are_read_from_tricky_answers(text, published, strict):
    assert agieval_task.published(text) == published
    assert agieval_task.strict(text, 5) == strict


def test_accuracies_are_those_by_hand(folder, tmp_path, capsys):
    """The server says the second letter to SAT (right once in four) and answers AQuA in words that AGIEval misreads."""

    def answer(body):
        text = body["messages"][0]["content"]
        return "B" if text.startswith("Once") else "90, so the answer: C" if "1. " in text else "?"

    output = tmp_path / "numbers.json"
    with ChatStub(answer) as stub:
        cli.run("agieval", ["mine", str(folder), "--endpoint", stub.endpoint, "--output", str(output)])
        assert len(stub.requests) == 7 and all(each.body["temperature"] == 0 for each in stub.requests)
    record = json.loads(output.read_text())
    sat, aqua = record["tasks"]["sat-en"], record["tasks"]["aqua-rat"]
    assert list(record["tasks"]) == ["aqua-rat", "sat-en"]  # the paper's that are there, and no other
    assert (sat["questions"], sat["correct"], sat["accuracy"], sat["no_letter"]) == (4, 1, 0.25, 0)
    assert (aqua["correct"], aqua["no_letter"], aqua["strict_no_letter"]) == (1, 2, 2)
    assert sat["interval"] == pytest.approx([0.0456, 0.6994], abs=1e-4)  # statsmodels' proportion_confint, wilson
    average = record["average"]
    assert average["accuracy"] == pytest.approx((0.25 + 1 / 3) / 2)
    low = average["accuracy"] - math.hypot(0.25 - sat["interval"][0], 1 / 3 - aqua["interval"][0]) / 2
    assert average["interval"][0] == pytest.approx(low)
    shown = " ".join(capsys.readouterr().out.split())
    assert (
        "average of 2 " in shown and "not the paper's 7 tasks" in shown and "25.0" in shown and "[4.6, 69.9]" in shown
    )


def test_answers_are_kept_and_a_second_start_asks_for_the_rest(folder, tmp_path):
    kept = tmp_path / "answers.jsonl"
    with ChatStub(lambda body: "C") as stub:
        asked = {"model": "mine", "data": folder, "answers": kept, "endpoint": stub.endpoint, "concurrent": 1}
        whole = evaluate(AgievalOptions(**asked | {"answers": None}))
        stub.faults = [b'{"choices": [{"message": {"content": "C"}}]}'] * 3 + [Fault(401)]
        with pytest.raises(ServerError):
            evaluate(AgievalOptions(**asked))
        num_before = len(stub.requests)
        assert evaluate(AgievalOptions(**asked)) == whole
        assert len(stub.requests) - num_before == 4
        assert evaluate(AgievalOptions(**asked)) == whole and len(stub.requests) - num_before == 4
        with pytest.raises(ConfigError, match="begun with questions"):
            evaluate(AgievalOptions(**asked, tasks=("sat-en",)))


def test_a_model_here_answers(world, folder):
    asked = AgievalOptions(
        model=str(world.base), data=folder / "sat-en.jsonl", template="openchat_v3.2", dtype="float32", max_new_tokens=4
    )
    record = evaluate(asked)
    assert record["tasks"]["sat-en"]["questions"] == 4 and record["condition"] == "GPT4"


def test_a_task_named_twice_counts_once_and_the_papers_are_so_in_any_order(folder):
    with ChatStub(lambda body: "C") as stub:
        asked = AgievalOptions(model="m", data=folder, tasks=("sat-en", "sat-en"), endpoint=stub.endpoint)
        found = evaluate(asked)
        assert len(stub.requests) == 4 and list(found["tasks"]) == ["sat-en"]
    rows = dict.fromkeys(reversed(agieval_task.PAPER), found["tasks"]["sat-en"])
    assert "not the paper's" in str(table(found).caption)
    assert "not the paper's" not in str(table(found | {"tasks": rows}).caption)


def test_a_chosen_task_that_is_not_the_papers(folder):
    with ChatStub(lambda body: "C") as stub:
        asked = AgievalOptions(model="m", data=folder, tasks=("gaokao-history",), endpoint=stub.endpoint, limit=2)
        assert evaluate(asked)["tasks"]["gaokao-history"]["accuracy"] == 1.0
        assert "我们应选择" in stub.requests[0].body["messages"][0]["content"]


@pytest.mark.parametrize(
    ("name", "more", "named"),
    [
        ("jec-qa-kd", {}, "jec-qa-kd is no task that is scored here"),
        ("aqua-rat", {"label": ["A", "B"]}, ":1: label: expected one letter from A to E"),
        ("aqua-rat", {"label": "F"}, ":1: label: expected one letter"),
        ("aqua-rat", {"label": ""}, ":1: label: expected one letter"),
        ("aqua-rat", {"options": None}, ":1: options: expected a list"),
        ("aqua-rat", {"options": list("abcdefgh")}, ":1: options: 8 of them"),
        ("aqua-rat", {"passage": 3}, ":1: passage: expected text or null"),
        ("aqua-rat", {"question": None}, ":1: question: expected text"),
    ],
)
def test_a_record_that_cannot_be_scored_is_named(tmp_path, name, more, named):
    (tmp_path / f"{name}.jsonl").write_text(json.dumps(AQUA | more))
    with pytest.raises(DataError, match=named):
        agieval_task.read(tmp_path / f"{name}.jsonl")


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"tasks": ("sat",)}, "--tasks sat: not one"),
        ({"tasks": ("lsat-ar",)}, "lsat-ar.jsonl: no such file; give AGIEval's folder"),
        ({"limit": 0}, "--limit 0"),
        ({"max_new_tokens": 0}, "--max-new-tokens 0"),
    ],
)
def test_what_cannot_be_is_named(folder, more, named):
    with pytest.raises(ConfigError, match=named):
        evaluate(AgievalOptions(model="m", data=folder, endpoint="http://127.0.0.1:1/v1", **more))


def test_intervals_hold_the_truth_as_often_as_they_say():
    """Summed over all outcomes, exactly; ties only make them hold it more often."""
    for count, share in ((10, 0.5), (50, 0.1), (200, 0.35), (200, 0.9)):
        held = sum(
            math.comb(count, right) * share**right * (1 - share) ** (count - right)
            for right in range(count + 1)
            if proportion.wilson(right / count, count)[0] <= share <= proportion.wilson(right / count, count)[1]
        )
        assert 0.92 <= held <= 0.985, (count, share, held)
    assert proportion.wilson(0.0, 10)[0] == 0 and proportion.wilson(1.0, 10)[1] == 1
    assert proportion.wilson(1.0, 10)[0] == pytest.approx(0.7225, abs=1e-4)
