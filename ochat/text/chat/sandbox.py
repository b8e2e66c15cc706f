"""Render chat templates (Jinja) as servers do, in a sandbox with bounds on time and memory.

    chat = ChatSource(source, date); chat.render(messages=messages, add_generation_prompt=True)

A template comes with a model from anywhere, and is a program. It reaches nothing but its variables, and what takes too
long or too much is stopped.

Source: what transformers' apply_chat_template gives a template: trim_blocks, lstrip_blocks, loop controls, `tojson`,
`raise_exception`, `strftime_now` and `{% generation %}` blocks.
"""

from __future__ import annotations

import contextlib
import json
import resource
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

from ochat.errors import ConfigError, DataError
from ochat.text.chat.marks import GENERATED_ENDS

SECONDS = 5  # most time of compiling, and of one rendering
MAX_SOURCE = 1 << 20  # characters; published templates have some thousand
MAX_CHARACTERS = 1 << 26  # most that a rendering may write
MAX_BYTES = 1 << 30  # most memory that it may take; other threads may need some meanwhile
MAX_INTEGER_BITS = 4096


class RefusedError(DataError):
    """A template refused a conversation, by its own words, or it broke."""


class _Generation(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}`: what the assistant writes."""

    tags = {"generation"}

    def parse(self, parser: Any) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Callable[[], str]) -> str:
        text = caller()
        first, last = GENERATED_ENDS
        return f"{first}{text}{last}" if self.environment.globals["marks_generation"] else text


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The sandbox, without arithmetic on huge integers: it can take hours that no signal interrupts."""

    intercepted_binops = frozenset({"**", "*"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**":
            raise jinja2.TemplateError("powers are not available in chat templates")
        are_integers = isinstance(left, int) and isinstance(right, int)
        if are_integers and left.bit_length() + right.bit_length() > MAX_INTEGER_BITS:
            raise jinja2.TemplateError("an integer is too large")
        return super().call_binop(context, operator, left, right)


class ChatSource:
    """A compiled chat template. `date` is what its strftime_now tells. Not to be pickled: keep the source.

    Raises: ConfigError for a source that is no template, with its line.
    """

    def __init__(self, source: str, date: datetime) -> None:
        if len(source) > MAX_SOURCE:
            raise ConfigError(f"chat template: {len(source):,} characters; at most {MAX_SOURCE:,} are compiled")
        self._environment = _Environment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        self._environment.filters["tojson"] = _to_json
        self._environment.globals.update(raise_exception=_refuse, strftime_now=date.strftime, marks_generation=False)
        try:
            with _bounds():
                self._template = self._environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(f"chat template, line {error.lineno}: {error.message}") from None
        except (Exception, _TooLong) as error:  # a hostile source breaks wherever it is read
            raise ConfigError(f"chat template: cannot be compiled ({_reason(error)})") from None

    def render(self, *, marked: bool = False, **variables: Any) -> str:
        """The text. `marked`: with GENERATED_ENDS around what generation blocks write.

        Raises: RefusedError if the template refuses or breaks on this conversation, or exceeds the bounds.
        """
        self._environment.globals["marks_generation"] = marked
        parts, length = [], 0
        try:
            with _bounds():
                for part in self._template.generate(**variables):
                    length += len(part)
                    if length > MAX_CHARACTERS:
                        raise jinja2.TemplateError(f"it writes more than {MAX_CHARACTERS >> 20} million characters")
                    parts.append(part)
        except (Exception, _TooLong) as error:  # a template may raise anything that its variables' methods do
            raise RefusedError(f"the chat template refuses it: {_reason(error)}") from None
        finally:
            self._environment.globals["marks_generation"] = False
        return "".join(parts)


class _TooLong(BaseException):
    """The deadline; not an Exception, so that nothing in between takes it for its own."""


def _reason(error: BaseException) -> str:
    if isinstance(error, _TooLong):
        return f"it takes more than {SECONDS} seconds"
    if isinstance(error, MemoryError):
        return f"it takes more than {MAX_BYTES >> 20} MiB of memory"
    return str(error) or type(error).__name__


@contextlib.contextmanager
def _bounds() -> Iterator[None]:
    """Raises _TooLong in the block after SECONDS, and MemoryError where it takes more than MAX_BYTES.

    Only a process's main thread can be interrupted; in others the block runs without bounds.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise _TooLong

    limits = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_bytes().split()[0])
    most = pages * resource.getpagesize() + MAX_BYTES
    before = signal.signal(signal.SIGALRM, stop)
    timer = signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        if limits[0] == resource.RLIM_INFINITY or limits[0] > most:
            resource.setrlimit(resource.RLIMIT_AS, (most, limits[1]))
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, *timer)  # of whoever else waits for this signal


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: Sequence[str] | None = None,
    sort_keys: bool = False,
) -> str:
    pair = None if separators is None else (separators[0], separators[1])
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=pair, sort_keys=sort_keys)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)
