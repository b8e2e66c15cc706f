"""verify-export: a server that does as training did passes, and each way in which one can differ is named.

pytest tests/evaluate/test_verify_export.py
"""

from __future__ import annotations

import json
import threading
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from ochat.commands.verify_export import VerifyExportOptions, main
from ochat.errors import CheckpointError, ConfigError, DataError, ServerError
from ochat.evaluate import compare_served, engines
from ochat.evaluate.compare_served import MOST, Exported
from ochat.export import serving
from ochat.infer.generate import generate
from ochat.text.conversation import Conversation, Message
from tests import tiny


class Peer:
    """Answers as vLLM does, by the exported model itself; `fault` is what it does wrong."""

    def __init__(self, folder, fault):
        self.exported, self.fault = Exported.open(folder, "cpu"), fault
        self.name = "another" if fault == "name" else folder.name
        self.tells = fault != "tells nothing"

    def get(self, path):
        if path == "/v1/models":
            return {"data": [{"id": self.name}, {"id": f"{self.name}-2"}]}
        return {"version": "1"} if path == "/version" and self.tells else None

    def post(self, body):
        condition = body.get("chat_template_kwargs", {}).get("condition")
        condition = None if self.fault == "condition" else condition
        system = "".join(m["content"] for m in body["messages"] if m["role"] == "system")
        said = tuple(Message(m["role"], m["content"]) for m in body["messages"] if m["role"] != "system")
        chat, exported = Conversation(said, system=system), self.exported
        prompt = exported.prompt(chat, condition)
        if self.fault == "boundary":
            at = len(prompt) - 3
            prompt = prompt[:at] + exported.tokenizer.encode(serving.BOUNDARY) + prompt[at:]
        (answer,) = generate(exported.model, [prompt], max_new_tokens=body["max_tokens"], stop_ids=exported.stop_ids)
        values = compare_served._logprobs(exported.model, prompt, answer)
        shift = 1.0 if self.fault == "logprobs" else 0.0
        if self.fault == "answer" and answer:
            worst = int(values[0].argmin())
            answer = [worst, *answer[1:]]
            values = compare_served._logprobs(exported.model, prompt, answer)
        text = exported.tokenizer.decode(answer)
        choice = {"message": {"content": text if self.fault != "text" else "no"}, "finish_reason": "length"}
        found = {"choices": [choice], "usage": {"prompt_tokens": len(prompt)}}
        if self.tells:
            assert body["return_token_ids"]
            each = [
                {"token": f"token_id:{i}", "logprob": float(v[i]) + shift} for i, v in zip(answer, values, strict=True)
            ]
            choice |= {"token_ids": answer, "logprobs": {"content": [one | {"top_logprobs": [one]} for one in each]}}
            found["prompt_token_ids"] = prompt
        return found


@contextmanager
def serving_at(peer):
    class Handler(BaseHTTPRequestHandler):
        def reply(self, found):
            self.send_response(404 if found is None else 200)
            self.end_headers()
            self.wfile.write(json.dumps(found).encode())

        def do_GET(self):
            self.reply(peer.get(self.path))

        def do_POST(self):
            self.reply(peer.post(json.loads(self.rfile.read(int(self.headers["Content-Length"])))))

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()


FAULTS = {  # and words of the error
    "": "",
    "tells nothing": "",
    "condition": "does not pass chat_template_kwargs on .* ochat export RUN OUT --condition 'GPT3'",
    "boundary": "It takes the boundary for text: export with --boundary never",
    "answer": "the answer goes on with .* after 0 tokens",
    "logprobs": "log-probabilities differ by 1",
    "name": "none alone is called 'mine'; start it with that name",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_difference_is_named(exported, fault, capsys):
    with serving_at(Peer(exported, fault)) as url:
        options = VerifyExportOptions(exported, url, count=3, device="cpu")
        if FAULTS[fault]:
            with pytest.raises(ServerError, match=FAULTS[fault]):
                main(options)
            return
        main(options)
    lines = [line.split("│")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert [line[0].strip() for line in lines] == ["(default)", "GPT4", "GPT3"]
    assert all([cell.strip() for cell in line[1:4]] == ["3", "3", "3"] for line in lines)
    assert all((line[4].strip() == "-") == (fault == "tells nothing") for line in lines)


def test_a_server_that_tells_no_ids_is_compared_by_its_text(exported):
    peer = Peer(exported, "text")
    peer.tells = False
    with serving_at(peer) as url, pytest.raises(ServerError, match="the answer is 'no' for"):
        main(VerifyExportOptions(exported, url, count=1, device="cpu"))


def test_questions_come_from_the_data(exported, world):
    """Up to the last question, without those that do not fit."""
    opened = Exported.open(exported, "cpu")
    chats = [
        Conversation(
            (Message("user", "a"), Message("assistant", "b"), Message("user", "c"), Message("assistant", "d"))
        ),
        Conversation((Message("assistant", "b"),)),
        Conversation((Message("user", "x" * 600),)),
        Conversation((Message("user", "e"),), "GPT3"),
    ]
    found = compare_served.questions(opened, chats, 9)
    assert [[m.content for m in chat.items] for chat in found] == [["a", "b", "c"], ["e"]]
    assert {chat.condition for chat in found} == {""}
    with pytest.raises(DataError, match="no conversation there has a question"):
        compare_served.questions(opened, chats[1:3], 9)
    with serving_at(Peer(exported, "")) as url:
        main(VerifyExportOptions(exported, url, data=(world.data,), count=2, device="cpu"))


def test_a_tie_is_no_difference_and_a_merge_is_counted(exported):
    opened = Exported.open(exported, "cpu")
    (chat,) = compare_served.questions(opened, compare_served.own_chats(), 1)
    prompt = opened.prompt(chat, None)
    (answer,) = generate(opened.model, [prompt], max_new_tokens=MOST, stop_ids=opened.stop_ids)
    other = next(i for i in range(250) if i != answer[0])
    reply = compare_served.Reply(prompt, len(prompt), [other], "", None)
    assert compare_served._answer_problem(opened, prompt, answer, reply, 0.001)[0]
    assert compare_served._answer_problem(opened, prompt, answer, reply, 100.0) == ("", True)
    merged = replace(opened, served=Merging())
    row, problems = compare_served._compare_class(merged, [chat], None, [replace(reply, prompt_ids=[1, 2, 3])])
    assert (row.ids_equal, row.merged) == (1, 1) and not any("ids" in problem for problem in problems)


def test_tokens_within_a_character_that_a_server_does_not_tell_are_put_in(exported):
    """llama.cpp leaves them out of its list. Only where it counts more than it tells, and only our own."""
    tokenizer = Exported.open(exported, "cpu").tokenizer
    a, b, euro = (tokenizer.encode(text) for text in ("a", "b", "€"))
    ours = [*a, *euro, *b]
    told = compare_served.Reply([1], 1, [*a, euro[2], *b], "", [{1: 0.0}, {2: 0.0}, {3: 0.0}], withheld=2)
    filled = compare_served._with_withheld(tokenizer, ours, told)
    assert filled.answer_ids == ours and filled.logprobs == [{1: 0.0}, {}, {}, {2: 0.0}, {3: 0.0}]
    assert compare_served._with_withheld(tokenizer, ours, replace(told, withheld=0)).answer_ids == told.answer_ids
    other = replace(told, answer_ids=[*a, *a, *b])
    assert compare_served._with_withheld(tokenizer, [*a, *b, *b], other).answer_ids == other.answer_ids


class Merging:
    """A served folder that makes other ids."""

    def text(self, *_, **__):
        return ""

    def ids(self, _):
        return [1, 2, 3]


def test_what_cannot_be_compared_is_refused(exported, world, tmp_path):
    for more, words in (
        ({}, "give --server URL of a running server, or --engine"),
        ({"server": "localhost", "engine": "vllm"}, "give --server"),
        ({"server": "localhost:8000"}, "an address is needed"),
        ({"server": "http://127.0.0.1:9", "count": 0}, "--count 0: at least 1"),
        ({"engine": "llama.cpp"}, "needs the file of `ochat export RUN OUT --gguf FILE`"),
    ):
        with pytest.raises(ConfigError, match=words):
            main(VerifyExportOptions(exported, **{"device": "cpu"} | more))
    with pytest.raises(ServerError, match="no server answers there .* is it up"):
        main(VerifyExportOptions(exported, "http://127.0.0.1:9", device="cpu"))
    with pytest.raises(CheckpointError, match="not what `ochat export` writes"):
        main(VerifyExportOptions(tiny.write_tokenizer(tmp_path / "t"), "http://127.0.0.1:9", device="cpu"))


def test_an_engine_that_is_not_there_or_fails_is_named(exported, tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho \"ModuleNotFoundError: No module named 'vllm'\" >&2\nexit 1\n")
    python.chmod(0o755)
    with (
        pytest.raises(ServerError, match="has no vllm; name with --python"),
        engines.vllm(exported, str(python), on_cpu=True),
    ):
        pass
    python.write_text("#!/bin/sh\necho 'ValueError: too little memory' >&2\nexit 1\n")
    failed = pytest.raises(ServerError, match="xllamacpp did not start: ValueError: too little memory")
    with failed, engines.llama_cpp(tmp_path / "a.gguf", str(python)):
        pass


def test_transformers_reads_an_export_as_we_do(exported, capsys):
    main(VerifyExportOptions(exported, engine="transformers", count=2, device="cpu"))
    assert "in transformers" in " ".join(capsys.readouterr().out.split())
