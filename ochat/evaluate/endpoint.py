"""The address and the key of an HTTP endpoint, which no message or file may show, and the deadline of an exchange.

check_address(url, "--endpoint");  key = read_key();  hide(f"401: {key} is wrong", key)     # 401: *** is wrong
found = within(600.0, lambda: client.get(url).read(), "a request")
"""

from __future__ import annotations

import json
import os
import urllib.parse
from collections.abc import Callable
from typing import TypeVar

from ochat import background
from ochat.errors import ConfigError

T = TypeVar("T")
KEY = "OPENAI_API_KEY"
SHORTEST_KEY = 8  # a shorter one, such as "none" or "EMPTY", is no secret, and could be a word of an answer


def read_key() -> str:
    """The key, "" where there is none. Raises: ConfigError, which does not quote it, for one that no request can
    carry."""
    key = os.environ.get(KEY, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise ConfigError(f"{KEY}: holds characters that no key has; set it again")
    return key


def check_address(url: str, option: str, example: str) -> None:
    """Raises: ConfigError for what is no address of HTTP, and for one that may hold a secret, which it does not
    quote."""
    if any(sign in url for sign in "@?#"):
        raise ConfigError(
            f"{option}: an address without user, password, query and fragment is needed, such as {example}; "
            f"the key is read from {KEY}"
        )
    try:
        parts = urllib.parse.urlsplit(url)
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_address = False
    if not (is_address and url.isascii() and url.isprintable() and " " not in url):
        raise ConfigError(f"{option} {url}: an address is needed, such as {example}")


def hide(text: str, key: str) -> str:
    """The text without the key, which a server may write back. Cut it afterwards: half a key is not found."""
    if len(key) >= SHORTEST_KEY:
        for written in {key, json.dumps(key)[1:-1], repr(key)[1:-1], urllib.parse.quote(key, safe="")}:
            text = text.replace(written, "***")
    return text


def within(seconds: float, work: Callable[[], T], name: str) -> T:
    """What `work` returns or raises. Raises: TimeoutError after so long, however slowly it goes on; a time-out of
    sockets starts anew with each byte. The work is left to a daemon thread."""
    future = background.start(work, name)
    try:
        return future.result(seconds)
    except TimeoutError:
        if future.done():
            raise
        raise TimeoutError(f"no whole answer within {seconds:g} s") from None
