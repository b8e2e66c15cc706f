"""Asking a server: what may pass is tried again within bounds and told, the rest is refused with the server's words;
the rate holds; no more requests than allowed are under way: pytest tests/evaluate/test_chat_server.py"""

from __future__ import annotations

import threading
import time

import pytest

from ochat.errors import ConfigError, ServerError
from ochat.evaluate.judges import chat_server
from ochat.evaluate.judges.chat_server import ChatServer, RefusedError, ServerOptions
from ochat.evaluate.judges.parallel import in_parallel
from tests.chat_stub import CUT, DRIP, HANG, ChatStub, Fault

HI = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def stub():
    with ChatStub(lambda body: f"echo {body['messages'][-1]['content']}") as stub:
        yield stub


@pytest.fixture
def waits(monkeypatch):
    """How long it would have slept, without sleeping."""
    waited: list[float] = []
    monkeypatch.setattr(chat_server.time, "sleep", waited.append)
    return waited


def server(stub, told=None, **options) -> ChatServer:
    return ChatServer(
        ServerOptions(endpoint=stub.endpoint, **options), "mine", [].append if told is None else told.append
    )


def ask(server: ChatServer, **more):
    return server.ask(HI, max_tokens=7, temperature=0.5, **more)


def test_a_request_says_what_was_asked_and_carries_the_key(stub, monkeypatch):
    assert ask(server(stub)) == ("echo Hi", False)
    assert "Authorization" not in stub.requests[0].headers
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key")
    ask(server(stub), chat_template_kwargs={"condition": "GPT3"})
    _, path, headers, body = stub.requests[1]
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer secret-key"
    assert body == {"model": "mine", "messages": HI, "max_tokens": 7, "temperature": 0.5} | {
        "chat_template_kwargs": {"condition": "GPT3"}
    }


def test_a_key_with_a_line_end_is_sent_and_one_that_cannot_be_is_not_shown(stub, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key\n")
    ask(server(stub))
    assert stub.requests[0].headers["Authorization"] == "Bearer secret-key"
    for key in ("secret\nkey", "secret\u2014key"):
        monkeypatch.setenv("OPENAI_API_KEY", key)
        with pytest.raises(ConfigError, match="OPENAI_API_KEY: holds characters") as refused:
            server(stub)
        assert "secret" not in str(refused.value)


PASSING = [
    Fault(429), Fault(500), Fault(503, {"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}), b"", b"not JSON", b"[]",
    b'{"choices": []}', b'{"choices": [{"message": {"content": null}}]}', b"[" * 100_000, CUT,
    b'{"choices": [{"message": {"content": "\\ud800"}}]}', b'{"choices": [{"message": {"content": [1]}}]}', b"\xff",
]  # fmt: skip


def test_what_may_pass_is_tried_again_and_told(stub, waits):
    stub.faults, told = list(PASSING), []
    assert ask(server(stub, told, retries=len(PASSING))).text == "echo Hi"
    assert len(told) == len(PASSING) and len(stub.requests) == len(PASSING) + 1
    assert "429 Too Many Requests" in told[0] and "try 2 of 14 in 1 s" in told[0] and stub.endpoint in told[0]
    assert "a broken answer, b'not JSON'" in told[4]
    assert max(waits) <= chat_server.LONGEST_WAIT_S and sum(waits) > 100  # doubling, up to a minute


def test_it_gives_up_after_the_last_try(stub, waits):
    stub.faults = [Fault(500, body=b"the disk is full")] * 9
    with pytest.raises(ServerError, match="given up after 4 tries, the last: 500 .*the disk is full"):
        ask(server(stub, retries=3))
    assert len(stub.requests) == 4
    with pytest.raises(ServerError, match="no answer .*refused"):
        ChatServer(ServerOptions(endpoint="http://127.0.0.1:9/v1", retries=1), "mine", [].append).ask(
            HI, max_tokens=1, temperature=0
        )


@pytest.mark.parametrize("fault", [HANG, DRIP])
def test_a_server_that_does_not_end_is_left(stub, fault):
    stub.faults, told = [fault], []
    begun = time.monotonic()
    assert ask(server(stub, told, timeout_s=1)).text == "echo Hi"
    assert time.monotonic() - begun < 5 and len(told) == 1


@pytest.mark.parametrize("status", [400, 413, 422, 401, 404])
def test_what_will_not_pass_is_refused_with_its_words(stub, monkeypatch, status):
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key")
    stub.faults = [Fault(status, body=b"bad key:\nsecret-key" + b"x" * 9999)]
    with pytest.raises(ServerError, match=f"{status} .*bad key: ") as error:
        ask(server(stub))
    assert len(stub.requests) == 1 and "secret-key" not in str(error.value) and len(str(error.value)) < 500
    assert isinstance(error.value, RefusedError) == (status in (400, 413, 422))  # this request alone


def test_a_redirect_does_not_take_the_key_elsewhere(stub, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key")
    with ChatStub(lambda body: "caught") as other:
        stub.faults = [Fault(302, {"Location": other.endpoint}), Fault(307, {"Location": other.endpoint})]
        for status in (302, 307):
            with pytest.raises(ServerError, match=str(status)):
                ask(server(stub))
        assert not other.requests


def test_a_busy_server_holds_up_all(stub):
    stub.faults = [Fault(429, {"Retry-After": "1"})]
    asked = server(stub)
    list(in_parallel(lambda _: ask(asked), range(6), 1))
    times = [request.time_s for request in stub.requests]
    assert times[1] - times[0] >= 0.95 and times[-1] - times[1] < 1


def test_the_rate_holds(stub):
    asked = server(stub, requests_per_minute=1200)  # one in 50 ms
    list(in_parallel(lambda _: ask(asked), range(9), 8))
    times = sorted(request.time_s for request in stub.requests)
    assert times[-1] - times[0] >= 8 * 0.05 - 0.03  # a request may be late, and the next one not


def test_so_many_are_under_way_and_no_more():
    all_four = threading.Barrier(4, timeout=30)

    def answer(_: object) -> str:
        all_four.wait()  # none is answered before four are asked
        time.sleep(0.1)  # a fifth would be seen in this time
        return "done"

    with ChatStub(answer) as stub:
        asked = server(stub)
        found = list(in_parallel(lambda item: ask(asked).text, range(12), 4))
        assert sorted(found) == [(item, "done") for item in range(12)] and stub.most_at_once == 4


def test_after_an_error_nothing_is_begun_and_nothing_is_lost():
    begun = []

    def work(item: int) -> int:
        begun.append(item)
        time.sleep(0.05 if item else 0)
        if item == 0:
            raise ServerError("no")
        return item

    found = []
    with pytest.raises(ServerError):
        for item, _ in in_parallel(work, range(100), 4):
            found.append(item)
    assert sorted(found) == sorted(begun)[1:] and len(begun) <= 5


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"endpoint": "127.0.0.1:8000"}, "--endpoint 127.0.0.1:8000: an address"),
        ({"endpoint": "http://[::1"}, "--endpoint http://.*: an address"),
        ({"endpoint": "http://host:port/v1"}, "--endpoint http://host:port/v1: an address"),
        ({"endpoint": "http:///v1"}, "--endpoint http:///v1: an address"),
        ({"endpoint": "http://a b/v1"}, "--endpoint http://a b/v1: an address"),
        ({"concurrent": 0}, "--concurrent 0"),
        ({"retries": -1}, "--retries -1"),
        ({"requests_per_minute": float("nan")}, "--requests-per-minute nan"),
        ({"timeout_s": 0.0}, "--timeout-s 0.0"),
    ],
)
def test_options_that_cannot_be_are_named(more, named):
    with pytest.raises(ConfigError, match=named):
        ChatServer(ServerOptions(**{"endpoint": "http://127.0.0.1:1/v1"} | more), "mine", print)
