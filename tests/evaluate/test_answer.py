"""`ochat answer`: the files hold the model's own answers, from this process or a server, however often interrupted."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading

import pytest

from ochat import cli
from ochat.commands.answer import AnswerOptions, main
from ochat.errors import ConfigError, DataError, ServerError
from ochat.evaluate import model_client
from ochat.export.hf_folder import export
from ochat.infer.generate import generate
from ochat.model import hf
from ochat.text.conversation import Conversation, Message
from ochat.text.template import load as load_template
from ochat.text.tokenizer import load as load_tokenizer
from tests import tiny
from tests.chat_stub import ChatStub, Fault

ALPACA = [  # as published: with the reference's answer
    {"dataset": "helpful_base", "instruction": f"{i}+1", "output": "theirs", "generator": "text_davinci_003"}
    for i in range(20)
] + [{"dataset": "koala", "instruction": "3+1", "output": "theirs", "generator": "text_davinci_003"}]
CATEGORIES = ("writing", "math", "stem", "unheard", "roleplay", "coding")
TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "math": 0, "coding": 0}
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


def ask(model, files, form="mt_bench", **more) -> list[dict]:
    """Run the command; the records of its file."""
    name = "alpaca.json" if form == "alpaca_eval" else "question.jsonl"
    given = {"model": str(model), "questions": files / name, "output": files / "out" / "mine.jsonl", "format": form}
    options = AnswerOptions(**given | {"max_new_tokens": 6, "dtype": "float32"} | more)
    main(options)
    content = options.output.read_text()
    return json.loads(content) if form == "alpaca_eval" else [json.loads(line) for line in content.splitlines()]


def turns_of(records) -> list[list[str]]:
    return [record["choices"][0]["turns"] for record in records]


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


def test_alpaca_evals_file_holds_the_models_answers_in_order(model, files, capsys):
    output = files / "model_outputs.json"
    line = [str(model), str(files / "alpaca.json"), str(output), "--format", "alpaca_eval", "--condition", "GPT3"]
    cli.run("answer", [*line, "--max-new-tokens", "6", "--dtype", "float32"])
    found = json.loads(output.read_text())
    assert [list(each) for each in found] == [["instruction", "output", "generator", "dataset"]] * 21
    assert [each["instruction"] for each in found] == [each["instruction"] for each in ALPACA]
    assert {each["generator"] for each in found} == {"mine"} and found[-1]["dataset"] == "koala"
    for each in found[::7]:
        assert [each["output"]] == by_hand(model, [each["instruction"]], "GPT3")
    assert "21 answers in" in capsys.readouterr().out and not list(files.glob("*.partial*"))


@pytest.mark.parametrize("form", ["mt_bench", "vicuna_bench"])
def test_fastchats_file_holds_both_turns_at_its_temperatures(model, files, form):
    found = ask(model, files, form, condition="GPT4", seed=3)
    assert [each["question_id"] for each in found] == [each["question_id"] for each in MT_BENCH]
    for each, asked in zip(found, MT_BENCH, strict=True):
        assert list(each) == ["question_id", "answer_id", "model_id", "choices", "tstamp"]
        assert each["model_id"] == "mine" and each["tstamp"] > 1.6e9 and len(each["answer_id"]) == 22
        seeds = [model_client.turn_seed(3, str(asked["question_id"]), turn) for turn in (0, 1)]
        wanted = by_hand(model, asked["turns"], "GPT4", TEMPERATURES.get(asked["category"], 0.7), seeds)
        assert each["choices"] == [{"index": 0, "turns": wanted}], asked
    assert len({each["answer_id"] for each in found}) == len(found)


def test_the_generator_is_the_folders_name_and_a_runs_for_its_export(model, files):
    for folder, name in (("first", "first"), ("second", "export")):
        shutil.copytree(model, files / folder / "export")
        if name == "first":
            (files / folder / "config.toml").touch()  # makes it a run's
        (one,) = ask(files / folder / "export", files, "alpaca_eval", output=files / f"{folder}.json", limit=1)
        assert one["generator"] == name


def test_class_seed_and_temperature_change_answers(model, files):
    def turns(**more):
        return turns_of(ask(model, files, output=files / f"{len(list(files.iterdir()))}", max_new_tokens=20, **more))

    first, other = turns(), turns(seed=1)
    assert first == turns(condition="GPT4", seed=0) and first != turns(condition="GPT3") != turns(condition="")
    greedy = [i for i, category in enumerate(CATEGORIES) if category in ("math", "coding")]
    assert [first[i] for i in greedy] == [other[i] for i in greedy] and first != other
    assert turns(temperature=0.0) == turns(temperature=0.0, seed=1)


def test_an_interrupted_start_resumes_and_ends_the_same(model, files, monkeypatch):
    whole = turns_of(ask(model, files, output=files / "whole" / "mine.jsonl", seed=5))
    monkeypatch.setattr(model_client, "QUESTIONS_PER_BATCH", 2)
    real, calls = model_client.LocalAnswerer.complete, []

    def failing(self, prompts, *rest):
        calls.append(len(prompts))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(self, prompts, *rest)

    monkeypatch.setattr(model_client.LocalAnswerer, "complete", failing)
    with pytest.raises(KeyboardInterrupt):
        ask(model, files, seed=5)
    partial = files / "out" / "mine.jsonl.partial.jsonl"
    with pytest.raises(ConfigError, match='begun with condition "GPT4", now it is "GPT3"'):
        ask(model, files, seed=5, condition="GPT3")
    before, calls[:] = len(partial.read_text().splitlines()) - 1, [0] * 9
    assert turns_of(ask(model, files, seed=5)) == whole
    assert before and sum(calls) + 2 * before == 13  # turns; two of each question that was not answered before but one
    assert not partial.exists()


def test_kept_answers_of_another_model_or_other_questions_are_refused(model, files, tmp_path):
    with ChatStub(lambda body: "x") as stub:
        stub.faults = [Fault(401)] * 9
        with pytest.raises(ServerError, match="is OPENAI_API_KEY set"):
            ask("served", files, endpoint=stub.endpoint)
        with pytest.raises(ConfigError, match='begun with model "served"'):
            ask("another", files, endpoint=stub.endpoint)
        (files / "question.jsonl").write_text(json.dumps(MT_BENCH[0]))
        with pytest.raises(ConfigError, match="begun with questions "):
            ask("served", files, endpoint=stub.endpoint)
    changed = shutil.copytree(model, tmp_path / "copy")
    assert model_client.fingerprint(changed) == model_client.fingerprint(model)
    (changed / "SHA256SUMS").write_text("other weights")
    assert model_client.fingerprint(changed) != model_client.fingerprint(model)


def test_a_server_gets_both_turns_the_class_temperatures_and_seeds(files):
    with ChatStub(lambda body: f" {body['messages'][-1]['content']}! ") as stub:
        answered = ask("mine", files, endpoint=stub.endpoint, condition="GPT3", concurrent=3)
        asked = {len(each.body["messages"]): each.body for each in stub.requests if "0+0" in str(each.body)}
        assert [each["content"] for each in asked[3]["messages"]] == ["0+0", "0+0!", "Again."]
        assert asked[1]["chat_template_kwargs"] == {"condition": "GPT3"} and asked[1]["temperature"] == 0.7
        assert asked[1]["max_tokens"] == 6 and asked[1]["seed"] != asked[3]["seed"]
        math = next(each.body for each in stub.requests if each.body["messages"][0]["content"] == "1+1")
        assert math["temperature"] == 0 and "seed" not in math
        assert turns_of(answered)[0] == ["0+0!", "Again.!"]
        assert len(stub.requests) == 13 and stub.most_at_once <= 3
        ask("mine", files, endpoint=stub.endpoint, output=files / "b.jsonl", limit=1)
        assert "chat_template_kwargs" not in stub.requests[-1].body  # the server's default


def test_the_key_goes_to_the_server_and_into_no_message(files, monkeypatch, caplog, capsys):
    with ChatStub(lambda body: "x") as stub:
        monkeypatch.delenv("OPENAI_API_KEY", raising=False)
        ask("mine", files, endpoint=stub.endpoint, output=files / "a.jsonl", limit=1)
        assert "authorization" not in stub.requests[-1].headers
        monkeypatch.setenv("OPENAI_API_KEY", "sk-secret\n")
        stub.faults = [Fault(400, body=b'{"error": {"message": "sk-secret is wrong"}}')]
        with pytest.raises(ServerError, match=r"\*\*\* is wrong") as caught:
            ask("mine", files, endpoint=stub.endpoint, limit=1)
        assert stub.requests[-1].headers["authorization"] == "Bearer sk-secret"
        stub.faults = [Fault(307, {"Location": f"{stub.endpoint}/elsewhere"})] * 9
        with pytest.raises(ServerError, match="307"):
            ask("mine", files, endpoint=stub.endpoint, limit=1)
        assert {each.path for each in stub.requests} == {"/v1/chat/completions"}
        monkeypatch.setenv("OPENAI_API_KEY", "sk-sécret")
        with pytest.raises(ConfigError, match="OPENAI_API_KEY: holds") as unreadable:
            ask("mine", files, endpoint=stub.endpoint, limit=1)
    shown = f"{caught.value}{unreadable.value}{caplog.text}{capsys.readouterr()}"
    kept = "".join(path.read_text() for path in files.rglob("*") if path.is_file())
    assert "sk-s" not in shown + kept


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_server_is_asked_again_and_the_rate_holds(files, status):
    with ChatStub(lambda body: "x") as stub:
        stub.faults = [Fault(status, {"Retry-After": "0.01"})]
        ask("mine", files, endpoint=stub.endpoint, limit=2, requests_per_minute=600)
        times = sorted(each.time_s for each in stub.requests)
        assert len(times) == 5 and times[-1] - times[0] > 0.35


@pytest.mark.parametrize("fault", [b"garbage", b"{}", b'{"choices": []}', Fault(500), Fault(404)])
def test_a_broken_server_is_named_and_what_it_answered_is_kept(files, fault):
    limits = {"concurrent": 1, "retries": 0}
    with ChatStub(lambda body: stub.faults.append(fault) or "x") as stub:  # the first turn is answered, no other
        (files / "question.jsonl").write_text("".join(json.dumps(MT_BENCH[i]) + "\n" for i in (6, 0)))
        with pytest.raises(ServerError, match="resumes from the answers kept"):
            ask("mine", files, endpoint=stub.endpoint, **limits)
        stub.faults, stub.answer, before = [], lambda body: "x", len(stub.requests)
        assert len(ask("mine", files, endpoint=stub.endpoint, **limits)) == 2 and len(stub.requests) == before + 2


def test_answers_under_way_at_an_error_are_kept(files):
    """Four at a time: one is refused while three are answered; no more are begun."""
    refused = threading.Event()

    def slow(body):
        assert refused.wait(30)
        return "x"

    with ChatStub(slow) as stub:
        (files / "question.jsonl").write_text(
            "".join(json.dumps({"question_id": i, "turns": [f"{i}"]}) + "\n" for i in range(20))
        )
        stub.faults = [Fault(400)]
        threading.Timer(0.5, refused.set).start()
        with pytest.raises(ServerError, match="400"):
            ask("mine", files, endpoint=stub.endpoint, concurrent=4)
        partial = files / "out" / "mine.jsonl.partial.jsonl"
        assert len(stub.requests) == 4 and len(partial.read_text().splitlines()) == 1 + 3


def test_a_later_turn_without_room_is_an_empty_cut_answer(model, files, capsys):
    turns = ["x" * 440, "y" * 30, "z" * 100]
    (files / "question.jsonl").write_text(json.dumps({"question_id": "a", "category": "math", "turns": turns}))
    (found,) = turns_of(ask(model, files, max_new_tokens=3))
    assert found[2] == "" and "1 of them cut short" in capsys.readouterr().out
    (files / "question.jsonl").write_text(json.dumps({"question_id": "a", "category": "math", "turns": ["x" * 600]}))
    with pytest.raises(ConfigError, match="question.jsonl:1: 6.. tokens, but the model's context is 512"):
        ask(model, files, output=files / "b.jsonl")


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"limit": 0}, "--limit 0"),
        ({"max_new_tokens": 0}, "--max-new-tokens 0"),
        ({"temperature": -0.5}, "--temperature -0.5"),
        ({"condition": "a<|end_of_turn|>"}, "spells a special token"),
        ({"device": "cuda:9"}, "--device cuda:9"),
        ({"template": "chatml"}, "chatml"),
        ({"model": "nowhere"}, "nowhere is not a folder"),
        ({"output": "there.jsonl"}, "exists; remove it"),
        ({"endpoint": "localhost:8000"}, "--endpoint localhost:8000: an address is needed"),
        ({"endpoint": "http://h/v1", "concurrent": 0}, "--concurrent 0"),
        ({"endpoint": "http://h/v1", "timeout_s": float("nan")}, "--timeout-s nan"),
    ],
)
def test_wrong_options_are_named_before_the_model_is_loaded(model, files, monkeypatch, more, named):
    monkeypatch.setattr(model_client, "open_model", lambda *_, **__: pytest.fail("too late"))
    (files / "there.jsonl").touch()
    more |= {"output": files / more["output"]} if "output" in more else {}
    with pytest.raises(ConfigError, match=named):
        ask(**{"model": model, "files": files} | more)


@pytest.mark.parametrize(
    ("form", "record", "named"),
    [
        ("alpaca_eval", {"instruktion": "x"}, "alpaca.json:2: instruction: missing .there is 'instruktion'"),
        ("mt_bench", {"question_id": 1, "turns": []}, "question.jsonl:2: turns: expected a list"),
        ("mt_bench", {"question_id": 1, "turns": [1]}, "question.jsonl:2: turns: expected a list"),
        ("mt_bench", {"turns": ["a"]}, "question.jsonl:2: question_id: expected"),
        ("mt_bench", {"question_id": 81, "turns": ["a"]}, "question.jsonl:2: question_id 81 occurs twice"),
        ("mt_bench", {"question_id": 1, "turns": ["a"], "required_temperature": -1}, ":2: required_temperature"),
    ],
)
def test_a_bad_question_is_named_by_its_line(model, files, form, record, named):
    name, good = ("alpaca.json", ALPACA[0]) if form == "alpaca_eval" else ("question.jsonl", MT_BENCH[0])
    (files / name).write_text(json.dumps(good) + "\n" + json.dumps(record) + "\n")
    with pytest.raises(DataError, match=named):
        ask(model, files, form)


def test_openai_is_imported_only_for_an_endpoint(files, monkeypatch):
    program = "import sys, ochat.evaluate.model_client; sys.exit('openai' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], env=tiny.environment()).returncode == 0
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ConfigError, match="pip install 'ochat-crlft.judge.'"):
        ask("mine", files, endpoint="http://127.0.0.1:1/v1")


@pytest.mark.parametrize(("name", "needle"), [("agieval", "lm_eval"), ("judge", "alpaca_eval")])
def test_removed_commands_print_their_replacement(name, needle, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ochat", name, "anything", "--help"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2 and needle in capsys.readouterr().err
