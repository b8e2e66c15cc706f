"""`ochat answer`: the files hold the model's own answers, from this process or a server, however often interrupted."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import sys
import threading
import time

import pytest

from ochat import cli
from ochat.commands.answer import AnswerOptions, main
from ochat.errors import ConfigError, DataError, ServerError
from ochat.evaluate import model_client, server_client
from ochat.evaluate.answer_files import Answer, generator_name, kept_answers
from ochat.evaluate.model_client import EndpointAnswerer
from ochat.evaluate.server_client import Server
from ochat.text.conversation import Conversation, Message
from tests import tiny
from tests.chat_stub import ChatStub, Fault
from tests.evaluate.conftest import answer_alone, read_lines
from tests.tiny import write_lines

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
PARTIAL = "mine.jsonl.partial.jsonl"


@pytest.fixture
def files(tmp_path):
    (tmp_path / "alpaca.json").write_text(json.dumps(ALPACA))
    write_lines(tmp_path / "question.jsonl", MT_BENCH)
    return tmp_path


@pytest.fixture
def stub():
    with ChatStub(lambda body: "x") as stub:
        yield stub


def ask(model, files, form="mt_bench", **more) -> list[dict]:
    """Run the command; the records of its file. A stub in the place of the model is a server that holds "mine"."""
    if isinstance(model, ChatStub):
        model, more = "mine", {"endpoint": model.endpoint} | more
    name = "alpaca.json" if form == "alpaca_eval" else "question.jsonl"
    given = {"model": str(model), "questions": files / name, "output": files / "out" / "mine.jsonl", "format": form}
    options = AnswerOptions(**given | {"max_new_tokens": 6, "dtype": "float32"} | more)
    main(options)
    return json.loads(options.output.read_text()) if form == "alpaca_eval" else read_lines(options.output)


def turns_of(records) -> list[list[str]]:
    return [record["choices"][0]["turns"] for record in records]


def refused(needle, *args, error=ConfigError, **more):
    with pytest.raises(error, match=needle) as caught:
        ask(*args, **more)
    return str(caught.value)


def by_hand(model, turns, condition, temperature=0.0, seeds=(0, 0)) -> list[str]:
    """Each turn asked alone."""
    items: list[Message] = []
    for text, seed in zip(turns, seeds, strict=False):
        items.append(Message("user", text))
        found, _ = answer_alone(model, Conversation(tuple(items), condition), 6, temperature, seed)
        items.append(Message("assistant", found.strip()))
    return [item.content for item in items[1::2]]


def test_alpaca_evals_file_holds_the_models_answers_in_order(exported, files, capsys):
    output = files / "model_outputs.json"
    line = [str(exported), str(files / "alpaca.json"), str(output), "--format", "alpaca_eval", "--condition", "GPT3"]
    cli.run("answer", [*line, "--max-new-tokens", "6", "--dtype", "float32"])
    found = json.loads(output.read_text())
    for each, asked in zip(found, ALPACA, strict=True):
        same = {key: asked[key] for key in ("instruction", "dataset")}
        assert each == same | {"output": each["output"], "generator": "mine"}
    for each in found[::7]:
        assert [each["output"]] == by_hand(exported, [each["instruction"]], "GPT3")
    assert "21 answers in" in capsys.readouterr().out and not list(files.glob("*.partial*"))
    for name, wanted in (("run", "run"), ("other", "export")):  # an export's generator is its run
        (files / name / "export").mkdir(parents=True)
        (files / "run" / "config.toml").touch()
        assert generator_name("alpaca_eval", str(files / name / "export"), files) == wanted


@pytest.mark.parametrize(
    ("form", "given", "condition"), [("mt_bench", None, "GPT4"), ("vicuna_bench", 0.9, ""), ("mt_bench", 0.0, "GPT3")]
)
def test_fastchats_file_holds_all_turns_of_the_class_at_its_temperatures(exported, files, form, given, condition):
    found = ask(exported, files, form, condition=condition, seed=3, temperature=given)
    assert [each["question_id"] for each in found] == [each["question_id"] for each in MT_BENCH]
    for each, asked in zip(found, MT_BENCH, strict=True):
        assert list(each) == ["question_id", "answer_id", "model_id", "choices", "tstamp"]
        assert each["model_id"] == "mine" and each["tstamp"] > 1.6e9 and len(each["answer_id"]) == 22
        seeds = [model_client.turn_seed(3, str(asked["question_id"]), turn) for turn in (0, 1)]
        temperature = TEMPERATURES.get(asked["category"], 0.7) if given is None else given
        wanted = by_hand(exported, asked["turns"], condition, temperature, seeds)
        assert each["choices"] == [{"index": 0, "turns": wanted}], asked
    assert len({each["answer_id"] for each in found}) == len(found)
    assert (
        len({model_client.turn_seed(*each) for each in [(3, "81", 0), (4, "81", 0), (3, "82", 0), (3, "81", 1)]}) == 4
    )


def test_an_interrupted_start_resumes_and_ends_the_same(exported, files, monkeypatch):
    whole = turns_of(ask(exported, files, output=files / "whole.jsonl", seed=5))
    monkeypatch.setattr(model_client, "QUESTIONS_PER_BATCH", 2)
    real, calls = model_client.complete, []

    def failing(model, prompts, *rest, **settings):
        calls.append(len(prompts))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(model, prompts, *rest, **settings)

    monkeypatch.setattr(model_client, "complete", failing)
    with pytest.raises(KeyboardInterrupt):
        ask(exported, files, seed=5)
    before, calls[:] = len(read_lines(files / "out" / PARTIAL)) - 1, [0] * 9
    assert turns_of(ask(exported, files, seed=5)) == whole
    assert before and sum(calls) + 2 * before == 13  # turns; two of each question that was not answered before but one
    assert not (files / "out" / PARTIAL).exists()


def test_kept_answers_of_another_model_class_or_questions_are_refused(exported, files, stub, tmp_path):
    stub.faults = [Fault(401)] * 9
    refused("OPENAI_API_KEY", stub, files, error=ServerError)
    refused("model 'mine'", "another", files, endpoint=stub.endpoint)
    refused("condition None.*'GPT3'", stub, files, condition="GPT3")
    write_lines(files / "question.jsonl", MT_BENCH[:1])
    refused("questions", stub, files)
    changed = shutil.copytree(exported, tmp_path / "copy")
    assert model_client.fingerprint(changed) == model_client.fingerprint(exported)
    (changed / "SHA256SUMS").write_text("other weights")
    assert model_client.fingerprint(changed) != model_client.fingerprint(exported)


def test_a_server_gets_both_turns_the_class_temperatures_and_seeds(files, stub):
    stub.answer = lambda body: f" {body['messages'][-1]['content']}! "
    answered = ask(stub, files, condition="GPT3", concurrent=3)
    asked = {len(each.body["messages"]): each.body for each in stub.requests if "0+0" in str(each.body)}
    assert [each["content"] for each in asked[3]["messages"]] == ["0+0", "0+0!", "Again."]
    assert asked[1]["chat_template_kwargs"] == {"condition": "GPT3"} and asked[1]["temperature"] == 0.7
    assert asked[1]["max_tokens"] == 6 and asked[1]["seed"] != asked[3]["seed"]
    math = next(each.body for each in stub.requests if each.body["messages"][0]["content"] == "1+1")
    assert math["temperature"] == 0 and "seed" not in math
    assert turns_of(answered)[0] == ["0+0!", "Again.!"]
    assert len(stub.requests) == 13 and stub.most_at_once <= 3
    ask(stub, files, output=files / "b.jsonl", limit=1)
    assert "chat_template_kwargs" not in stub.requests[-1].body  # the server's default


def test_the_key_goes_to_the_server_and_into_no_message(files, stub, monkeypatch, caplog, capsys):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    ask(stub, files, output=files / "a.jsonl", limit=1)
    assert "authorization" not in stub.requests[-1].headers
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret\n")
    stub.faults = [Fault(400, body=b'{"error": {"message": "sk-secret is wrong"}}')]
    shown = refused("is wrong", stub, files, limit=1, error=ServerError)
    assert stub.requests[-1].headers["authorization"] == "Bearer sk-secret"
    stub.faults = [Fault(307, {"Location": f"{stub.endpoint}/elsewhere"})] * 9
    refused("307", stub, files, limit=1, error=ServerError)
    assert {each.path for each in stub.requests} == {"/v1/chat/completions"}
    monkeypatch.setenv("OPENAI_API_KEY", "sk-sécret")
    shown += refused("OPENAI_API_KEY", stub, files, limit=1) + caplog.text + str(capsys.readouterr())
    kept = "".join(path.read_text() for path in files.rglob("*") if path.is_file())
    assert "sk-s" not in shown + kept


def test_a_key_that_the_server_writes_back_is_in_no_answer_and_no_half_of_it_in_a_message(files, stub, monkeypatch):
    key = "sk-" + "secret" * 20
    monkeypatch.setenv("OPENAI_API_KEY", key)
    stub.answer = lambda body: f"I was sent {key}."
    ask(stub, files, limit=1)
    said = [{"error": {"message": "x" * at + key}} for at in range(200, 300, 9)]
    stub.faults = [Fault(400, body=json.dumps(each).encode()) for each in said]
    shown = "".join(refused("400", stub, files, output=files / "b.jsonl", limit=1, error=ServerError) for _ in said)
    kept = "".join(path.read_text() for path in files.rglob("*") if path.is_file())
    assert "I was sent ***." in kept and "secret" not in kept + shown


@pytest.mark.parametrize(
    "address", ["http://me:hidden@127.0.0.1/v1", "http://me:hidden@[/v1", "http://h/v1?key=hidden", "http://h/#hidden"]
)
def test_an_address_with_a_secret_is_refused_and_not_shown(files, stub, address, caplog, capsys):
    with pytest.raises(ConfigError) as error:
        main(AnswerOptions(model="m", questions=files / "alpaca.json", output=files / "out.json", endpoint=address))
    with pytest.raises(ConfigError) as other:
        Server(address, "m")
    said = str(error.value) + str(other.value) + caplog.text + str(capsys.readouterr())
    assert "hidden" not in said and said.count("the key is read from OPENAI_API_KEY") == 2


@pytest.mark.parametrize(
    "start", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n", b"HTTP/1.1 500 No\r\n\r\n"]
)
def test_a_server_that_never_ends_its_answer_is_left_in_time(files, monkeypatch, start):
    """A byte at a time, in the headers or in the body: no single wait is long."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def trickle():
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    threading.Thread(target=forever, args=(connection,), daemon=True).start()

        def forever(connection):
            with connection, contextlib.suppress(OSError):
                connection.sendall(start)
                while True:
                    connection.sendall(b"x")
                    time.sleep(0.05)

        threading.Thread(target=trickle, daemon=True).start()
        address = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        monkeypatch.setattr(server_client, "TIMEOUT_S", 1.0)
        for attempt in (
            lambda: EndpointAnswerer(address, "m", 8, None, 0, 1, 0.0, 0, 1.0)._ask([{"role": "user", "content": "x"}]),
            lambda: Server(address, "m"),
        ):
            began = time.monotonic()
            with pytest.raises(ServerError, match="no whole answer within 1 s"):
                attempt()
            assert time.monotonic() - began < 20


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_server_is_asked_again_and_the_rate_holds(files, stub, status):
    stub.faults = [Fault(status, {"Retry-After": "0.01"})]
    ask(stub, files, limit=2, requests_per_minute=300)
    times = sorted(each.time_s for each in stub.requests)
    assert len(times) == 5 and times[-1] - times[0] > 0.6  # 0.8, but for a slow arrival of the first


@pytest.mark.parametrize("fault", [b"garbage", b"{}", b'{"choices": []}', Fault(500), Fault(404)])
def test_a_broken_server_is_named_and_what_it_answered_is_kept(files, stub, fault):
    limits = {"concurrent": 1, "retries": 0}
    stub.answer = lambda body: stub.faults.append(fault) or "x"  # the first turn is answered, no other
    write_lines(files / "question.jsonl", [MT_BENCH[6], MT_BENCH[0]])
    refused(stub.endpoint, stub, files, error=ServerError, **limits)
    stub.faults, stub.answer, before = [], lambda body: "x", len(stub.requests)
    assert len(ask(stub, files, **limits)) == 2 and len(stub.requests) == before + 2


def test_answers_under_way_at_an_error_are_kept(files, stub):
    """Four at a time: one is refused while three are answered; no more are begun."""
    is_refused = threading.Event()
    stub.answer = lambda body: "x" if is_refused.wait(30) else "too late"
    write_lines(files / "question.jsonl", [{"question_id": i, "turns": [f"{i}"]} for i in range(20)])
    stub.faults = [Fault(400)]
    threading.Timer(0.5, is_refused.set).start()
    refused("400", stub, files, error=ServerError, concurrent=4)
    assert len(stub.requests) == 4 and len(read_lines(files / "out" / PARTIAL)) == 1 + 3


def test_a_later_turn_without_room_is_an_empty_cut_answer(exported, files, capsys):
    turns = ["x" * 440, "y" * 30, "z" * 100]
    write_lines(files / "question.jsonl", [{"question_id": "a", "category": "math", "turns": turns}])
    (found,) = turns_of(ask(exported, files, max_new_tokens=3))
    assert found[2] == "" and "1 of them cut short" in capsys.readouterr().out


BAD_OPTIONS = [
    ({"limit": 0}, "--limit 0"),
    ({"max_new_tokens": 0}, "--max-new-tokens 0"),
    ({"temperature": -0.5}, "--temperature -0.5"),
    ({"condition": "a<|end_of_turn|>"}, "special token"),
    ({"device": "cuda:9"}, "--device cuda:9"),
    ({"template": "chatml"}, "chatml"),
    ({"model": "nowhere"}, "nowhere"),
    ({"output": "there.jsonl"}, "there.jsonl"),
    ({"endpoint": "localhost:8000"}, "--endpoint localhost:8000"),
    ({"endpoint": "http://h/v1", "concurrent": 0}, "--concurrent 0"),
    ({"endpoint": "http://h/v1", "timeout_s": float("nan")}, "--timeout-s nan"),
]
BAD_QUESTIONS = [
    ({"turns": []}, DataError, "question.jsonl:2: turns"),
    ({"turns": [1]}, DataError, ":2: turns"),
    ({"question_id": None}, DataError, ":2: question_id"),
    ({"question_id": 81}, DataError, ":2: question_id 81"),
    ({"required_temperature": -1}, DataError, ":2: required_temperature"),
    ({"turns": ["x" * 600]}, ConfigError, ":2: .*512"),  # longer than the context
]


@pytest.mark.parametrize(
    ("form", "more", "record", "error", "needle"),
    [("mt_bench", more, None, ConfigError, needle) for more, needle in BAD_OPTIONS]
    + [("mt_bench", {}, {"question_id": 1, "turns": ["a"]} | record, *rest) for record, *rest in BAD_QUESTIONS]
    + [("alpaca_eval", {}, {"instruktion": "x"}, DataError, "alpaca.json:2: instruction.*'instruktion'")],
)
def test_bad_input_is_named_before_the_model_is_loaded(exported, files, monkeypatch, form, more, record, error, needle):
    monkeypatch.setattr(model_client, "open_model", lambda *_, **__: pytest.fail("too late"))
    (files / "there.jsonl").touch()
    if record:
        name, good = ("alpaca.json", ALPACA[0]) if form == "alpaca_eval" else ("question.jsonl", MT_BENCH[0])
        write_lines(files / name, [good, record])
    more = more | ({"output": files / more["output"]} if "output" in more else {})
    refused(needle, error=error, **{"model": exported, "files": files, "form": form} | more)


def test_openai_is_imported_only_for_an_endpoint(files, monkeypatch):
    program = "import sys, ochat.evaluate.model_client; sys.exit('openai' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], env=tiny.environment()).returncode == 0
    monkeypatch.setitem(sys.modules, "openai", None)
    refused("pip install 'ochat-crlft.judge.'", "mine", files, endpoint="http://127.0.0.1:1/v1")


ABOUT = {"model": "mine", "condition": None, "sizes": (1, 2)}


@pytest.fixture
def kept(tmp_path):
    """A file of three answers, the last of them to the first question again."""
    keep_texts(tmp_path / "kept", ("1", "é\n"), ("2", "b"), ("1", "again"))
    return tmp_path / "kept"


def keep_texts(path, *answers):
    """Append answers; the text of each that is kept then."""
    with kept_answers(path, ABOUT) as (found, keep):
        for key, text in answers:
            keep(Answer(key, (text,), False, 1.5))
        return {key: answer.turns[0] for key, answer in found.items()}


def test_whole_lines_survive_a_cut_anywhere_and_the_last_of_a_key_counts(kept):
    content = kept.read_bytes()
    whole = [{}, {"1": "é\n"}, {"1": "é\n", "2": "b"}, {"1": "again", "2": "b"}]
    for cut in range(len(content) + 1):
        kept.write_bytes(content[:cut])
        wanted = whole[max(content[:cut].count(b"\n") - 1, 0)] | {"3": "c"}
        assert keep_texts(kept, ("3", "c")) == wanted == keep_texts(kept)


@pytest.mark.parametrize(
    "content", [b"my thesis", b"\x89PNG", b'{"key": "1"}\n{"key": "2"}\n', b"[1]\n", b"thesis\nin lines\n"]
)
def test_a_file_of_something_else_is_refused_and_left_alone(tmp_path, content):
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(ConfigError):
        keep_texts(tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == content


def test_another_process_and_a_damaged_line_are_named(kept):
    with kept_answers(kept, ABOUT), pytest.raises(ConfigError, match="another process"):
        keep_texts(kept)
    kept.write_text(kept.read_text().replace('"b"', '"b'))
    with pytest.raises(DataError, match=f"{kept}:3"):
        keep_texts(kept)
