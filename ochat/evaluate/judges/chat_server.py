"""A server that speaks OpenAI's chat protocol (vLLM, transformers serve, the real one), asked within its limits.

    server = ChatServer(ServerOptions(endpoint="http://127.0.0.1:8000/v1"), "models/mine", print)
    server.ask([{"role": "user", "content": "Hi"}], max_tokens=64, temperature=0.0)    # Reply(text, is_cut)

What may pass (429, 5xx, a broken or missing answer) is tried again after a wait that doubles and is told; everything
else is refused with the server's words. The key stands in OPENAI_API_KEY, and is written nowhere.
"""

from __future__ import annotations

import http.client
import json
import math
import os
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ochat.errors import ConfigError, ServerError

LONGEST_WAIT_S = 60.0
MAX_REPLY_BYTES = 1 << 24
PASSING = (408, 409, 425, 429)  # beside all of 5xx
BUSY = (429, 503)  # said of the server, not of one request: all wait
KEY = "OPENAI_API_KEY"


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """How a server may be asked."""

    endpoint: str = ""  # an OpenAI-compatible server, http://host:port/v1; its key: environment variable OPENAI_API_KEY
    concurrent: int = 8  # requests at a time
    requests_per_minute: float = 0.0  # most requests that are sent in a minute; 0: as many as it takes
    retries: int = 6  # of a request that failed for a reason that may pass
    timeout_s: float = 600.0  # the longest wait for one reply


class Reply(NamedTuple):
    """What a server answered."""

    text: str
    is_cut: bool  # it ended at max_tokens


class _PassingFault(Exception):
    """Worth another try, not before `wait_s` where the server said so."""

    def __init__(self, message: str, wait_s: float = 0.0, is_busy: bool = False) -> None:
        super().__init__(message)
        self.wait_s, self.is_busy = wait_s, is_busy


class RefusedError(ServerError):
    """One request that the server does not want, such as one that is too long."""


class ChatServer:
    """One model of one server; may be asked from many threads. `warn` hears of every fault that is waited out."""

    def __init__(self, options: ServerOptions, model: str, warn: Callable[[str], object]) -> None:
        """Raises: ConfigError for options that cannot be."""
        _check(options)
        self.options, self.model, self.warn = options, model, warn
        self.url = options.endpoint.rstrip("/") + "/chat/completions"
        self._interval_s = 60 / options.requests_per_minute if options.requests_per_minute else 0.0
        self._next_start, self._lock = 0.0, threading.Lock()
        self._key = _key()
        self._open = urllib.request.build_opener(_NoRedirects).open

    def ask(self, messages: Sequence[dict[str, str]], *, max_tokens: int, temperature: float, **more: Any) -> Reply:
        """The reply to a chat; `more` goes into the request as it is.

        Raises: RefusedError with the server's words; ServerError after the last try. Costs: up to `retries` more
        requests, and a minute of waiting for each.
        """
        settings = {"max_tokens": max_tokens, "temperature": temperature} | more
        body = json.dumps({"model": self.model, "messages": list(messages)} | settings).encode()
        for attempt in range(1, self.options.retries + 2):
            self._wait_for_turn()
            try:
                return _read(self._post(body))
            except _PassingFault as fault:
                if attempt > self.options.retries:
                    raise ServerError(
                        f"{self.url}: given up after {attempt} tries, the last: {fault}; what was answered is kept, "
                        "and the same command goes on from there"
                    ) from None
                self._wait_out(fault, attempt)
        raise AssertionError("retries are not negative")

    def _wait_for_turn(self) -> None:
        with self._lock:
            start = max(time.monotonic(), self._next_start)
            self._next_start = start + self._interval_s
        time.sleep(max(start - time.monotonic(), 0.0))

    def _wait_out(self, fault: _PassingFault, attempt: int) -> None:
        wait_s = min(max(2.0 ** (attempt - 1), fault.wait_s), LONGEST_WAIT_S)
        self.warn(f"{self.url}: {fault}; try {attempt + 1} of {self.options.retries + 1} in {wait_s:.0f} s")
        if fault.is_busy:
            with self._lock:
                self._next_start = max(self._next_start, time.monotonic() + wait_s)
        else:
            time.sleep(wait_s)

    def _post(self, body: bytes) -> bytes:
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
        request = urllib.request.Request(self.url, body, headers)
        deadline = time.monotonic() + self.options.timeout_s
        try:
            with self._open(request, timeout=self.options.timeout_s) as response:
                return _whole(response, deadline)
        except urllib.error.HTTPError as error:
            with error:
                raise self._fault(error) from None
        except (OSError, http.client.HTTPException) as error:  # URLError and TimeoutError are OSErrors
            reason = getattr(error, "reason", None) or error
            raise _PassingFault(f"no answer ({reason or type(error).__name__})") from None

    def _fault(self, error: urllib.error.HTTPError) -> Exception:
        try:
            words = " ".join(error.read(2000).decode("utf-8", "replace").split())
        except (OSError, http.client.HTTPException):
            words = ""
        words = f"{error.code} {error.reason}: {words}"[:300]
        words = words.replace(self._key, "***") if self._key else words
        if error.code in PASSING or error.code >= 500:
            return _PassingFault(words, _seconds(error.headers.get("Retry-After")), error.code in BUSY)
        kind = RefusedError if error.code in (400, 413, 422) else ServerError
        hint = f"; is {KEY} set to its key?" if error.code in (401, 403) else ""
        return kind(f"{self.url}, model {self.model}: {words}{hint}")


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another host, and turn POST into GET: it is an error that names the place."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> None:
        return None


def _whole(response: http.client.HTTPResponse, deadline: float) -> bytes:
    parts, size = [], 0
    while part := response.read1(1 << 16):
        parts.append(part)
        size += len(part)
        if size > MAX_REPLY_BYTES:
            raise _PassingFault(f"an answer of more than {MAX_REPLY_BYTES >> 20} MiB")
        if time.monotonic() > deadline:
            raise _PassingFault("no end of the answer within the time")
    return b"".join(parts)  # one that was cut off is no JSON


def _read(content: bytes) -> Reply:
    try:
        choice = json.loads(content)["choices"][0]
        is_cut = choice.get("finish_reason") == "length"
        text: str = choice["message"]["content"] or ("" if is_cut else choice["message"]["content"])
        text.encode()  # without half of a surrogate pair
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise _PassingFault(f"a broken answer, {content[:80]!r}") from None
    return Reply(text, is_cut)


def _seconds(retry_after: str | None) -> float:
    """The header as seconds; 0 where it is missing, or a date, which the doubling wait will do for."""
    try:
        value = float(retry_after or 0)
    except ValueError:
        return 0.0
    return value if math.isfinite(value) and value > 0 else 0.0


def _key() -> str:
    """The key, without the blanks and line ends that a file of it has. Raises: ConfigError for one that no request can
    carry, without a word of it."""
    key = os.environ.get(KEY, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise ConfigError(f"{KEY}: holds characters that no key has; set it again")
    return key


def _is_address(endpoint: str) -> bool:
    try:
        parts = urllib.parse.urlsplit(endpoint)
        parts.port  # noqa: B018  raises for what is no number
    except ValueError:
        return False
    is_plain = endpoint.isascii() and endpoint.isprintable() and " " not in endpoint
    return parts.scheme in ("http", "https") and bool(parts.hostname) and is_plain


def _check(options: ServerOptions) -> None:
    if not _is_address(options.endpoint):
        given = options.endpoint or "URL"
        raise ConfigError(f"--endpoint {given}: an address is needed, such as http://127.0.0.1:8000/v1")
    limits = {"concurrent": 1, "retries": 0, "requests_per_minute": 0, "timeout_s": 1}
    for name, least in limits.items():
        value = getattr(options, name)
        if not (math.isfinite(value) and value >= least):
            raise ConfigError(f"--{name.replace('_', '-')} {value}: at least {least} is needed")
