"""`ochat answer`: what a benchmark's judge reads are the model's answers by hand, from here or from a server, however
often it was interrupted: pytest tests/evaluate/test_answer.py"""

from __future__ import annotations

import json
import shutil
import threading

import pytest

from ochat import cli
from ochat.errors import ConfigError, DataError, ServerError
from ochat.evaluate.judges import asked_model
from ochat.evaluate.judges.answer import AnswerOptions, answer
from ochat.export.hf_folder import export
from ochat.infer.generate import generate
from ochat.model import hf
from ochat.text.conversation import Conversation, Message
from ochat.text.template import load as load_template
from ochat.text.tokenizer import load as load_tokenizer
from tests import tiny
from tests.chat_stub import ChatStub, Fault

ALPACA = [  # as published: the reference's answer stands beside the question
    {"dataset": "helpful_base", "instruction": f"{i}+1", "output": "theirs", "generator": "text_davinci_003"}
    for i in range(20)
] + [{"dataset": "koala", "instruction": "3+1", "output": "theirs", "generator": "text_davinci_003"}]
CATEGORIES = ("writing", "math", "stem", "unheard", "roleplay", "coding")
MT_BENCH = [
    {"question_id": 81 + i, "category": category, "turns": [f"{i}+{i}", "Again."], "reference": ["", ""]}
    for i, category in enumerate(CATEGORIES)
] + [{"question_id": 99, "category": "generic", "turns": ["7+7"]}]


@pytest.fixture(scope="module")
def model(world, alone, tmp_path_factory):
    folder = tmp_path_factory.mktemp("answer") / "mine"
    export(world.folder / "alone", folder, dtype="float32")
    return folder


@pytest.fixture
def files(tmp_path):
    (tmp_path / "alpaca.json").write_text(json.dumps(ALPACA))
    (tmp_path / "question.jsonl").write_text("".join(json.dumps(each) + "\n" for each in MT_BENCH))
    return tmp_path


def options(model, files, form="mt_bench", **more) -> AnswerOptions:
    name = "alpaca.json" if form == "alpaca_eval" else "question.jsonl"
    given = {"model": str(model), "questions": files / name, "output": files / "out" / "mine.jsonl", "format": form}
    return AnswerOptions(**given | {"max_new_tokens": 6, "dtype": "float32"} | more)


def by_hand(model, turns, condition, temperature=0.0, seeds=(0, 0), most=6) -> list[str]:
    """Each turn asked alone, as training writes the conversation up to it."""
    loaded, tokenizer, template = hf.load(model, dtype="float32"), load_tokenizer(model), load_template("openchat_v3.2")
    items: list[Message] = []
    for text, seed in zip(turns, seeds, strict=False):
        items += [Message("user", text), Message("assistant", "")]
        ids = template.encode(Conversation(tuple(items), condition), tokenizer)[0][:-1]  # without the end of turn
        stop = [tokenizer.special_tokens[tiny.EOT]]
        (new,) = generate(loaded, [ids], max_new_tokens=most, stop_ids=stop, temperature=temperature, seed=seed)
        items[-1] = Message("assistant", tokenizer.decode(new).strip())
    return [item.content for item in items[1::2]]


def test_the_export_of_a_run_answers_by_the_name_of_the_run(model, files):
    """Else any two runs' answers would be by one generator, "export"."""
    for folder, name in (("first", "first"), ("second", "export")):
        shutil.copytree(model, files / folder / "export")
        if name == "first":
            (files / folder / "config.toml").touch()  # that is what makes it a run's
        answer(options(files / folder / "export", files, "alpaca_eval", output=files / "out.json", limit=1))
        assert [each["generator"] for each in json.loads((files / "out.json").read_text())] == [name]
        (files / "out.json").unlink()


def test_alpaca_eval_reads_the_models_answers_in_order(model, files, capsys):
    output = files / "model_outputs.json"
    line = [str(model), str(files / "alpaca.json"), str(output), "--format", "alpaca_eval", "--condition", "GPT3"]
    cli.run("answer", [*line, "--max-new-tokens", "6", "--dtype", "float32"])
    found = json.loads(output.read_text())
    assert [list(each) for each in found] == [["instruction", "output", "generator", "dataset"]] * 21
    assert [each["instruction"] for each in found] == [each["instruction"] for each in ALPACA]
    assert {each["generator"] for each in found} == {"mine"} and found[-1]["dataset"] == "koala"
    for each in found[::7]:
        assert [each["output"]] == by_hand(model, [each["instruction"]], "GPT3")
    assert "21 answers in" in capsys.readouterr().out
    assert list(files.glob("*.partial*")) == []


@pytest.mark.parametrize("form", ["mt_bench", "vicuna_bench"])
def test_fastchat_reads_both_turns_at_its_temperatures(model, files, form):
    answer(options(model, files, form, condition="GPT4", seed=3))
    found = [json.loads(line) for line in (files / "out" / "mine.jsonl").read_text().splitlines()]
    assert [each["question_id"] for each in found] == [each["question_id"] for each in MT_BENCH]
    temperatures = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "math": 0, "coding": 0}
    for each, asked in zip(found, MT_BENCH, strict=True):
        assert list(each) == ["question_id", "answer_id", "model_id", "choices", "tstamp"]
        assert each["model_id"] == "mine" and each["tstamp"] > 1.6e9 and len(each["answer_id"]) == 22
        seeds = [asked_model.seed_of(3, str(asked["question_id"]), turn) for turn in (0, 1)]
        wanted = by_hand(model, asked["turns"], "GPT4", temperatures.get(asked["category"], 0.7), seeds)
        assert each["choices"] == [{"index": 0, "turns": wanted}], asked
    assert len({each["answer_id"] for each in found}) == len(found)


def test_the_class_the_seed_and_the_temperature_change_answers(model, files):
    def turns(**more):
        output = files / f"{len(list(files.iterdir()))}.jsonl"
        return [each.turns for _, each in answer(options(model, files, output=output, max_new_tokens=20, **more))]

    first = turns()
    assert first == turns(condition="GPT4", seed=0) and first != turns(condition="GPT3") != turns(condition="")
    other = turns(seed=1)
    greedy = [i for i, category in enumerate(CATEGORIES) if category in ("math", "coding")]
    assert [first[i] for i in greedy] == [other[i] for i in greedy] and first != other
    assert turns(temperature=0.0) == turns(temperature=0.0, seed=1)


def test_an_interrupted_start_goes_on_and_ends_the_same(model, files, monkeypatch, capsys):
    def written(output):
        lines = [json.loads(line) for line in output.read_text().splitlines()]
        return [line | {"tstamp": 0} for line in lines]

    answer(options(model, files, output=files / "whole" / "mine.jsonl", seed=5))
    monkeypatch.setattr(asked_model, "QUESTIONS_PER_BATCH", 2)
    real, calls = asked_model.LocalModel._generate, []

    def failing(self, prompts, *rest):
        calls.append(len(prompts))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(self, prompts, *rest)

    monkeypatch.setattr(asked_model.LocalModel, "_generate", failing)
    with pytest.raises(KeyboardInterrupt):
        answer(options(model, files, seed=5))
    partial = files / "out" / "mine.jsonl.partial.jsonl"
    assert partial.is_file() and not (files / "out" / "mine.jsonl").exists()
    with pytest.raises(ConfigError, match='begun with condition "GPT4", now it is "GPT3"'):
        answer(options(model, files, seed=5, condition="GPT3"))
    before, calls[:] = len(partial.read_text().splitlines()) - 1, [0] * 9
    answer(options(model, files, seed=5))
    assert before and sum(calls) + 2 * before == 13  # turns; two of each that was not answered before, but for one
    assert f"{before} of 7 were answered before" in capsys.readouterr().err
    assert written(files / "out" / "mine.jsonl") == written(files / "whole" / "mine.jsonl")
    assert not partial.exists()


def test_kept_answers_of_another_model_or_other_questions_are_refused(model, files, tmp_path):
    shutil.copytree(model, tmp_path / "copy")
    stub = ChatStub(lambda body: "x")
    with stub:
        stub.faults = [Fault(401)] * 9
        begun = options("served", files, endpoint=stub.endpoint, retries=0, concurrent=1)
        with pytest.raises(ServerError, match="is OPENAI_API_KEY set"):
            answer(begun)
        with pytest.raises(ConfigError, match='begun with model "served"'):
            answer(options("another", files, endpoint=stub.endpoint))
        (files / "question.jsonl").write_text(json.dumps(MT_BENCH[0]))
        with pytest.raises(ConfigError, match="begun with questions "):
            answer(begun)
    same, changed = asked_model.fingerprint(model), tmp_path / "copy"
    assert same == asked_model.fingerprint(changed)
    (changed / "SHA256SUMS").write_text("other weights")
    assert same != asked_model.fingerprint(changed)


def test_a_server_is_asked_what_the_model_here_is(files):
    """Both turns, the first answer in between; the class; FastChat's temperatures; a seed where one draws."""
    with ChatStub(lambda body: f" {body['messages'][-1]['content']}! ") as stub:
        answered = answer(options("mine", files, endpoint=stub.endpoint, condition="GPT3", concurrent=3))
        asked = {len(each.body["messages"]): each.body for each in stub.requests if "0+0" in str(each.body)}
        assert asked[3]["messages"] == [
            {"role": "user", "content": "0+0"},
            {"role": "assistant", "content": "0+0!"},
            {"role": "user", "content": "Again."},
        ]
        assert asked[1]["chat_template_kwargs"] == {"condition": "GPT3"} and asked[1]["temperature"] == 0.7
        assert asked[1]["max_tokens"] == 6 and asked[1]["seed"] != asked[3]["seed"]
        math = next(each.body for each in stub.requests if each.body["messages"][0]["content"] == "1+1")
        assert math["temperature"] == 0 and "seed" not in math
        assert [each.turns for _, each in answered][0] == ("0+0!", "Again.!")
        assert len(stub.requests) == 13 and stub.most_at_once <= 3
        more = options("mine", files, endpoint=stub.endpoint, output=files / "b.jsonl", limit=1)
        answer(more)
        assert "chat_template_kwargs" not in stub.requests[-1].body  # the server's default


def test_a_server_that_fails_midway_is_asked_only_for_the_rest(files):
    release = threading.Semaphore(4)

    def reply(body):
        return "yes" if release.acquire(blocking=False) else (None, "stop")

    with ChatStub(reply) as stub:
        asked = options("mine", files, endpoint=stub.endpoint, concurrent=1, retries=0)
        with pytest.raises(ServerError, match="given up after 1 tries.*goes on from there"):
            answer(asked)
        assert len(stub.requests) == 5
        release = threading.Semaphore(99)
        answer(asked)
        assert len(stub.requests) == 5 + 13 - 4
    assert len((files / "out" / "mine.jsonl").read_text().splitlines()) == 7


def test_answers_that_were_cut_are_told(files, capsys):
    with ChatStub(lambda body: (None, "length") if "1+1" in str(body) else "whole") as stub:
        cli.run("answer", ["mine", str(files / "alpaca.json"), str(files / "o.json"), "--endpoint", stub.endpoint])
    assert "21 answers in" in (out := capsys.readouterr().out) and "2 of them cut short" in out  # 1+1 and 11+1
    assert json.loads((files / "o.json").read_text())[1]["output"] == ""


def test_a_later_turn_without_room_is_an_empty_cut_answer(model, files):
    turns = ["x" * 440, "y" * 30, "z" * 100]
    (files / "question.jsonl").write_text(json.dumps({"question_id": "a", "category": "math", "turns": turns}))
    ((_, found),) = answer(options(model, files, max_new_tokens=3))
    assert found.turns[2] == "" and found.is_cut
    (files / "question.jsonl").write_text(json.dumps({"question_id": "a", "category": "math", "turns": ["x" * 600]}))
    with pytest.raises(ConfigError, match="question.jsonl:1: 6.. tokens, but the model's context is 512"):
        answer(options(model, files, output=files / "b.jsonl"))


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"limit": 0}, "--limit 0"),
        ({"max_new_tokens": -1}, "--max-new-tokens -1"),
        ({"max_new_tokens": 0}, "--max-new-tokens 0"),
        ({"temperature": -0.5}, "--temperature -0.5"),
        ({"condition": "a<|end_of_turn|>"}, "spells a special token"),
        ({"device": "cuda:9"}, "--device cuda:9"),
        ({"template": "chatml"}, "chatml"),
    ],
)
def test_what_cannot_be_is_named_before_the_model_is_loaded(model, files, monkeypatch, more, named):
    monkeypatch.setattr("ochat.export.open_model.open_model", lambda *_, **__: pytest.fail("too late"))
    with pytest.raises(ConfigError, match=named):
        answer(options(model, files, **more))
    with pytest.raises(ConfigError, match="nowhere is not a folder"):
        answer(options("nowhere", files))
    (files / "there.jsonl").touch()
    with pytest.raises(ConfigError, match="exists; remove it"):
        answer(options(model, files, output=files / "there.jsonl"))


@pytest.mark.parametrize(
    ("form", "record", "named"),
    [
        ("alpaca_eval", {"instruktion": "x"}, "alpaca.json:2: instruction: missing .there is 'instruktion'"),
        ("mt_bench", {"question_id": 1, "turns": []}, "question.jsonl:2: turns: expected a list"),
        ("mt_bench", {"question_id": 1, "turns": [1]}, "question.jsonl:2: turns: expected a list"),
        ("mt_bench", {"turns": ["a"]}, "question.jsonl:2: question_id: expected"),
        ("mt_bench", {"question_id": 81, "turns": ["a"]}, "question.jsonl:2: question_id 81 is there twice"),
        ("mt_bench", {"question_id": 1, "turns": ["a"], "required_temperature": -1}, ":2: required_temperature"),
    ],
)
def test_a_bad_question_is_named_by_its_line(model, files, form, record, named):
    name, good = ("alpaca.json", ALPACA[0]) if form == "alpaca_eval" else ("question.jsonl", MT_BENCH[0])
    (files / name).write_text(json.dumps(good) + "\n" + json.dumps(record) + "\n")
    with pytest.raises(DataError, match=named):
        answer(options(model, files, form))
