"""A chat server for tests, on 127.0.0.1: it answers by a function and keeps every request.

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


class ChatStub:
    """`answer`: the request's body -> the reply's text, or (text, finish_reason)."""

    def __init__(self, answer: Callable[[dict[str, Any]], Any]) -> None:
        self.answer = answer
        self.requests: list[Request] = []
        self.faults: list[Fault | bytes] = []
        self.most_at_once, self.at_once = 0, 0
        self.lock = threading.Lock()

    def __enter__(self) -> ChatStub:
        handler = type("Handler", (_Handler,), {"stub": self})
        self.server = _Server(("127.0.0.1", 0), handler)
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}/v1"
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def count(self, change: int) -> None:
        with self.lock:
            self.at_once += change
            self.most_at_once = max(self.most_at_once, self.at_once)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64  # more connections would be refused, and retried a second later


class _Handler(BaseHTTPRequestHandler):
    stub: ChatStub

    def do_POST(self) -> None:
        stub = self.stub
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        headers = {name.lower(): value for name, value in self.headers.items()}
        with stub.lock:
            stub.requests.append(Request(time.monotonic(), self.path, headers, body))
            fault = stub.faults.pop(0) if stub.faults else None
        if isinstance(fault, Fault):
            self._send(fault.status, fault.headers, fault.body)
        elif fault is not None:
            self._send(200, {}, fault)
        else:
            self._reply(body)

    def log_message(self, *_: object) -> None:
        """Keep the tests' output readable."""

    def _reply(self, body: dict[str, Any]) -> None:
        self.stub.count(1)
        try:
            answer = self.stub.answer(body)
        finally:  # before it is sent: the client may send the next request at once
            self.stub.count(-1)
        text, reason = answer if isinstance(answer, tuple) else (answer, "stop")
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": reason}
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        whole = {"id": "1", "object": "chat.completion", "created": 1, "model": "stub", "choices": [choice]}
        self._send(200, {}, json.dumps(whole | {"usage": usage}).encode())

    def _send(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        defaults = {"Content-Length": str(len(body)), "Content-Type": "application/json"}
        for name, value in (defaults | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
