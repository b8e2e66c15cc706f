"""`ochat judge`: who is better wins whatever the place, a judge that loves a place makes ties, what cannot be read is
counted and never guessed: pytest tests/evaluate/test_judge.py"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from ochat import cli
from ochat.errors import ConfigError, DataError, ServerError
from ochat.evaluate import proportion
from ochat.evaluate.judges import verdict
from ochat.evaluate.judges.judge import JudgeOptions, judge
from ochat.evaluate.judges.verdict import Pair
from tests.chat_stub import ChatStub, Fault

COUNT = 10


@pytest.fixture
def files(tmp_path):
    """A's answers are longer to all questions but the last three."""
    for name, length in (("a", 9), ("b", 5)):
        sizes = [length if i < 7 else 14 - length for i in range(COUNT)]
        asked = [{"instruction": f"Q{min(i, 8)}", "generator": f"model-{name}"} for i in range(COUNT)]  # the last twice
        outputs = [each | {"output": name * size} for each, size in zip(asked, sizes, strict=True)]
        (tmp_path / f"{name}.json").write_text(json.dumps(outputs))
        choices = [[{"index": 0, "turns": [f"{name}{i} first", f"{name}{i} second"]}] for i in range(3)]
        lines = [{"question_id": 81 + i, "model_id": name, "choices": each} for i, each in enumerate(choices)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    asked = [{"question_id": 80 + i, "turns": [f"Q{i} one", f"Q{i} two"]} for i in range(6)]
    asked[2]["reference"] = ["right one", "right two"]
    (tmp_path / "question.jsonl").write_text("".join(json.dumps(each) + "\n" for each in asked))
    return tmp_path


def options(files, stub, kind="json", **more) -> JudgeOptions:
    paths = {"a": files / f"a.{kind}", "b": files / f"b.{kind}", "output": files / "verdicts.jsonl"}
    return JudgeOptions(**paths | {"endpoint": stub.endpoint, "judge": "wise"} | more)


def replies(body) -> tuple[str, str]:
    """The two replies as the judge sees them."""
    text = body["messages"][-1]["content"]
    first, second = (re.search(rf"\[Assistant {n}\]\n(\w+)", text) for n in (1, 2))
    assert first and second
    return first[1], second[1]


def longer(body) -> str:
    first, second = replies(body)
    return f"I saw both.\n**Verdict: {1 if len(first) > len(second) else 2}**"


def test_the_better_one_wins_in_whichever_place(files, capsys):
    summary = files / "summary.json"
    with ChatStub(longer) as stub:
        line = [str(files / name) for name in ("a.json", "b.json", "verdicts.jsonl")]
        cli.run("judge", [*line, "--endpoint", stub.endpoint, "--judge", "wise", "--summary", str(summary)])
        assert len(stub.requests) == 2 * COUNT
        body = stub.requests[0].body
        assert body["model"] == "wise" and body["temperature"] == 0 and body["max_tokens"] == 1024
        shown = sorted(replies(each.body) for each in stub.requests)
        assert shown == sorted(
            [("a" * 9, "b" * 5), ("b" * 5, "a" * 9)] * 7 + [("a" * 5, "b" * 9), ("b" * 9, "a" * 5)] * 3
        )
    record = json.loads(summary.read_text())
    assert (record["wins"], record["losses"], record["ties"], record["unread"]) == (7, 3, 0, 0)
    assert record["win_rate"] == 0.7 and record["interval"] == list(proportion.wilson(0.7, COUNT))
    assert record["verdicts"]["first"] == record["verdicts"]["second"] == COUNT
    assert (record["a"], record["b"]) == ("model-a", "model-b")
    shown = capsys.readouterr().out
    assert "70.0 [39.7, 89.2]" in shown and "model-a (A) against model-b (B), judged by wise" in " ".join(shown.split())
    lines = [json.loads(line) for line in (files / "verdicts.jsonl").read_text().splitlines()]
    assert len(lines) == 1 + 2 * COUNT and all(line["text"].startswith("I saw") for line in lines[1:])


@pytest.mark.parametrize(
    ("reply", "wanted"),
    [
        ("Verdict: 1", {"ties_by_place": COUNT, "win_rate": 0.5}),
        ("Verdict: tie", {"ties": COUNT, "win_rate": 0.5, "ties_by_place": 0}),
        ("I cannot say.", {"unread": COUNT, "win_rate": None, "interval": None}),
        ("", {"unread": COUNT, "win_rate_if_unread_lost": 0, "win_rate_if_unread_won": 1}),
    ],
)
def test_a_judge_that_does_not_look(files, reply, wanted):
    with ChatStub(lambda body: reply) as stub:
        record = judge(options(files, stub))
    assert {key: record[key] for key in wanted} == wanted
    outcomes = ("wins", "losses", "ties", "ties_by_place", "unread")
    assert sum(record[key] for key in outcomes) == record["questions"] == COUNT


def test_what_cannot_be_read_is_shown_and_bounded(files, capsys):
    """Of the ten questions A wins seven and loses three; of one of each, one order cannot be read."""

    def answer(body):
        text = body["messages"][-1]["content"]
        if ("Q0\n" in text or "Q7\n" in text) and replies(body)[0].startswith("a"):
            return ("Verdict", "length") if "Q0\n" in text else "Verdict: 1 or 2"
        return longer(body)

    with ChatStub(answer) as stub:
        record = judge(options(files, stub))
        line = [str(files / name) for name in ("a.json", "b.json", "verdicts.jsonl")]
        cli.run("judge", [*line, "--endpoint", stub.endpoint, "--judge", "wise"])
        assert len(stub.requests) == 2 * COUNT  # the second start asked nothing
    assert (record["wins"], record["losses"], record["unread"]) == (6, 2, 2)
    rates = [record[f"win_rate{which}"] for which in ("", "_if_unread_lost", "_if_unread_won")]
    assert rates == [0.75, 0.6, 0.8]
    assert record["verdicts"] == {"all": 20, "read": 18, "first": 9, "second": 9, "cut": 1, "refused": 0}
    shown = " ".join(capsys.readouterr().out.split())
    assert "not readable in one order or both 2" in shown and "60.0 / 80.0" in shown and "18 of 20" in shown
    assert f"the judge's words, and refusals, are in {files / 'verdicts.jsonl'}" in shown


def test_fastchats_conversations_are_judged_as_wholes(files):
    with ChatStub(lambda body: "Verdict: 2") as stub:
        with pytest.raises(ConfigError, match="give --questions question.jsonl"):
            judge(options(files, stub, "jsonl"))
        record = judge(options(files, stub, "jsonl", questions=files / "question.jsonl"))
        texts = [each.body["messages"][-1]["content"] for each in stub.requests]
    assert record["questions"] == 3 and (record["a"], record["b"]) == ("a", "b")
    ab = next(text for text in texts if "Q2 one" in text and text.index("a1 first") < text.index("b1 first"))
    order = ["right one", "right two", "=== Assistant 1", "Q2 one", "a1 first", "Q2 two", "a1 second"]
    order += ["=== Assistant 2", "Q2 one", "b1 first", "Q2 two", "b1 second", "Verdict: tie"]
    at = 0
    for part in order:
        at = ab.index(part, at) + len(part)
    assert not any("reference" in text for text in texts if "Q1 one" in text)


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("Verdict: 1", "1"),
        ("Reasons.\n\n**Verdict:** 2\n", "2"),
        ("verdict: TIE.", "tie"),
        ("## Verdict: **1**", "1"),
        ("Verdict: [[2]]", "2"),
        ("Verdict: 1\nOn reflection:\nVerdict: 2", "2"),
        ("I would write Verdict: 1 if it were shorter.\nVerdict: tie", "tie"),
        ("Verdict: 1 or 2", None),
        ("Verdict: Assistant", None),
        ("Verdict: 12", None),
        ("The verdict is 1", None),
        ("1", None),
        ("", None),
    ],
)
def test_a_verdict_is_the_last_line_that_is_one(text, read):
    assert verdict.read(text) == read


def test_two_orders_make_one_outcome():
    assert [verdict.winner(each, swapped=False) for each in ("1", "2", "tie", None)] == ["A", "B", "tie", None]
    assert [verdict.winner(each, swapped=True) for each in ("1", "2", "tie", None)] == ["B", "A", "tie", None]
    found = [[verdict.combined(one, other) for other in ("A", "B", "tie", None)] for one in ("A", "B", "tie", None)]
    assert found == [
        ["A", "tie", "tie", None],
        ["tie", "B", "tie", None],
        ["tie", "tie", "tie", None],
        [None, None, None, None],
    ]


def test_both_orders_hold_the_same_and_an_empty_reply_is_said():
    pair = Pair("1", ("Q?",), ("",), ("yes",))
    one, other = (verdict.ask(pair, swapped=swapped)[1]["content"] for swapped in (False, True))
    assert sorted(one) == sorted(other) and one != other and "(an empty reply)" in one


def test_a_server_that_fails_midway_is_asked_only_for_the_rest(files):
    with ChatStub(longer) as stub:
        stub.faults = [json.dumps({"choices": [{"message": {"content": "Verdict: 1"}}]}).encode()] * 5 + [Fault(401)]
        asked = options(files, stub, concurrent=1)
        with pytest.raises(ServerError, match="401"):
            judge(asked)
        with pytest.raises(ConfigError, match='begun with judge "wise", now it is "other"'):
            judge(options(files, stub, judge="other"))
        judge(asked)
        assert len(stub.requests) == 6 + 2 * COUNT - 5


def test_a_refused_request_is_counted_and_asked_again(files):
    with ChatStub(longer) as stub:
        good = json.dumps({"choices": [{"message": {"content": "Verdict: 1"}}]}).encode()
        stub.faults = [good, Fault(400, body=b"too long"), Fault(400, body=b"too long"), Fault(400, body=b"too long")]
        record = judge(options(files, stub, concurrent=1))
        assert record["unread"] == 2 and record["verdicts"]["refused"] == 3
        record = judge(options(files, stub, concurrent=1))
        assert record["unread"] == 0 and len(stub.requests) == 2 * COUNT + 3


def test_a_server_that_wants_none_is_left_at_once(files):
    with ChatStub(longer) as stub:
        stub.faults = [Fault(400, body=b"no such model")] * 99
        with pytest.raises(ServerError, match="first 3 requests were all refused: .*model wise: 400 .*no such model"):
            judge(options(files, stub, concurrent=1, retries=0))
        assert len(stub.requests) <= 4  # one may have been under way


def test_answers_to_different_questions_are_refused(files):
    with ChatStub(longer) as stub:
        theirs = json.loads((files / "b.json").read_text())
        (files / "b.json").write_text(json.dumps(theirs[1:]))
        with pytest.raises(DataError, match="b.json: has no answer to 1 of the 10 questions .*'Q0'"):
            judge(options(files, stub))
        (files / "b.json").write_text(json.dumps(theirs[::-1]))  # another order is none of our business
        assert judge(options(files, stub))["wins"] == 7
        (files / "a.jsonl").write_text((files / "a.jsonl").read_text().splitlines()[0] * 1 + "\n")
        with pytest.raises(DataError, match="has no answer to 2 of the 3"):
            judge(options(files, stub, "jsonl", questions=files / "question.jsonl", output=files / "v2.jsonl"))
        assert len(stub.requests) == 2 * COUNT


def test_verdicts_beside_other_questions_are_refused(files):
    with ChatStub(longer) as stub:
        asked = options(files, stub, "jsonl", questions=files / "question.jsonl")
        judge(asked)
        (files / "question.jsonl").write_text((files / "question.jsonl").read_text().replace("right one", "another"))
        with pytest.raises(ConfigError, match="verdicts.jsonl: begun with questions"):
            judge(asked)


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"judge": ""}, "--judge NAME"),
        ({"endpoint": ""}, "--endpoint"),
        ({"limit": 0}, "--limit 0"),
        ({"max_new_tokens": 0}, "--max-new-tokens 0"),
        ({"summary": Path("nowhere/summary.json")}, "nowhere/summary.json: cannot be written"),
        ({"output": Path()}, ".: cannot be written"),
    ],
)
def test_what_cannot_be_is_named(files, more, named):
    with ChatStub(longer) as stub, pytest.raises(ConfigError, match=named):
        judge(options(files, stub, **more))
