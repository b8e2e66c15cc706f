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
    """`answer`: the request's body -> the reply's text."""

    def __init__(self, answer: Callable[[dict[str, Any]], str]) -> None:
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

    def reply(self, body: dict[str, Any]) -> bytes:
        with self.lock:
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            message = {"role": "assistant", "content": self.answer(body)}
        finally:  # before it is sent: the client may send the next request at once
            with self.lock:
                self.at_once -= 1
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        whole = {"id": "1", "object": "chat.completion", "created": 1, "model": "stub", "usage": usage}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        return json.dumps(whole | {"choices": [choice]}).encode()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64  # more connections would be refused, and retried a second later


class _Handler(BaseHTTPRequestHandler):
    stub: ChatStub

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        headers = {name.lower(): value for name, value in self.headers.items()}
        with self.stub.lock:
            self.stub.requests.append(Request(time.monotonic(), self.path, headers, body))
            fault = self.stub.faults.pop(0) if self.stub.faults else None
        reply = fault if isinstance(fault, Fault) else Fault(200, {}, fault or self.stub.reply(body))
        self.send_response(reply.status)
        defaults = {"Content-Length": str(len(reply.body)), "Content-Type": "application/json"}
        for name, value in (defaults | reply.headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(reply.body)

    def log_message(self, *_: object) -> None:
        """Keep the tests' output readable."""
