"""A chat server for tests, on 127.0.0.1: it answers by a function, keeps every request, and fails as it is told.

with ChatStub(lambda body: "Hi") as stub:  stub.endpoint;  stub.requests[0].body["messages"]
stub.faults = [Fault(429, {"Retry-After": "1"}), b"garbage"]       # for the first requests, in order
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple


class Fault(NamedTuple):
    """A reply with an error's status."""

    status: int
    headers: dict[str, str] = {}
    body: bytes = b'{"error": {"message": "no"}}'


class Request(NamedTuple):
    time_s: float
    path: str
    headers: dict[str, str]
    body: dict[str, Any]


CUT = "cut off"  # a fault: fewer bytes than the header says
HANG = "hang"  # a fault: silence, until the server ends
DRIP = "drip"  # a fault: a byte now and then, for ever


class ChatStub:
    """`answer`: the request's body -> the reply's text, or (text, finish_reason)."""

    def __init__(self, answer: Callable[[dict[str, Any]], Any]) -> None:
        self.answer = answer
        self.requests: list[Request] = []
        self.faults: list[Fault | bytes | str] = []
        self.most_at_once, self.at_once = 0, 0
        self.lock, self.ended = threading.Lock(), threading.Event()

    def __enter__(self) -> ChatStub:
        handler = type("Handler", (_Handler,), {"stub": self})
        self.server = _Server(("127.0.0.1", 0), handler)
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}/v1"
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.server.shutdown()
        self.server.server_close()

    def next_fault(self) -> Fault | bytes | str | None:
        with self.lock:
            return self.faults.pop(0) if self.faults else None

    def counted_answer(self, body: dict[str, Any]) -> Any:
        """The answer; under way until just before it is sent, as its client may send the next request at once."""
        self.count(1)
        try:
            return self.answer(body)
        finally:
            self.count(-1)

    def count(self, change: int) -> None:
        with self.lock:
            self.at_once += change
            self.most_at_once = max(self.most_at_once, self.at_once)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64  # with fewer, those that wait are refused at first, and come again a second later


class _Handler(BaseHTTPRequestHandler):
    stub: ChatStub

    def do_POST(self) -> None:
        stub = self.stub
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with stub.lock:
            stub.requests.append(Request(time.monotonic(), self.path, dict(self.headers), body))
        fault = stub.next_fault()
        self._fail(fault) if fault is not None else self._reply(stub.counted_answer(body))

    def _reply(self, answer: Any) -> None:
        text, reason = answer if isinstance(answer, tuple) else (answer, "stop")
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": reason}
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        whole = {"id": "1", "object": "chat.completion", "created": 1, "model": "stub", "choices": [choice]}
        self._send(200, {}, json.dumps(whole | {"usage": usage}).encode())

    def _fail(self, fault: Fault | bytes | str) -> None:
        if fault == HANG:
            self.stub.ended.wait(30)
        elif fault == DRIP:
            self.send_response(200)
            self.end_headers()
            while not self.stub.ended.wait(0.05):
                self.wfile.write(b" ")
        elif fault == CUT:
            self._send(200, {"Content-Length": "1000"}, b'{"choices": [')
        elif isinstance(fault, Fault):
            self._send(fault.status, fault.headers, fault.body)
        else:
            self._send(200, {}, fault)

    def _send(self, status: int, headers: dict[str, str], body: Any) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""
