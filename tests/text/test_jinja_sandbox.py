"""Chat templates render as transformers renders them, and none takes the machine.

pytest tests/text/test_jinja_sandbox.py
"""

import resource
import signal
import threading
import time
from datetime import datetime

import pytest

from ochat.errors import ConfigError, DataError
from ochat.text.chat import sandbox
from ochat.text.chat.marks import GENERATED_ENDS
from ochat.text.chat.sandbox import ChatSource

DATE = datetime(2026, 2, 3)
MESSAGES = [{"role": "user", "content": "é <b> \n"}, {"role": "assistant", "content": "x", "tool_calls": [{"a": 1.0}]}]
SOURCES = {
    "blocks on lines of their own": "  {% for m in messages %}\n{{ m.role }}\n  {% endfor %}\n",
    "dashes": "a \n {%- for m in messages -%} \n {{- m.content -}} \n {%- endfor -%} \n b",
    "json": "{{ messages | tojson }}{{ messages | tojson(indent=2) }}{{ {'b': 1, 'a': 2} | tojson(sort_keys=true) }}",
    "loop controls": "{% for m in messages %}{% if loop.last %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %};{% endfor %}",
    "methods": "{{ 'a,b'.split(',')[-1] ~ messages[0].content.strip() ~ missing }}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 6 %}{% endfor %}{{ ns.n }}",
    "macro": "{% macro say(m) %}[{{ m.role }}]{% endmacro %}{{ say(messages[1]) }}",
}


@pytest.mark.parametrize("name", SOURCES)
def test_it_renders_as_transformers_does(name):
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    expected = utils.render_jinja_template([MESSAGES], chat_template=SOURCES[name])[0][0]
    assert ChatSource(SOURCES[name], DATE).render(messages=MESSAGES, tools=None, documents=None) == expected


def test_the_date_is_the_given_one_and_marks_are_for_those_who_ask():
    chat = ChatSource("{{ strftime_now('%d %b %Y') }}{% generation %}x{% endgeneration %}", DATE)
    first, last = GENERATED_ENDS
    assert chat.render(marked=True) == f"03 Feb 2026{first}x{last}"
    assert chat.render() == "03 Feb 2026x"


HOSTILE = {  # what it does, and the words of the refusal
    "loops without end": ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "seconds"),
    "doubles a text": (
        "{% set ns = namespace(t='x') %}{% for i in range(60) %}{% set ns.t = ns.t ~ ns.t %}{% endfor %}{{ ns.t }}",
        "memory|seconds",
    ),
    "repeats a text": ("{{ ('x' * 2000000000) | length }}", "memory"),
    "pads a text": ("{{ messages[0].content | center(99999999999) }}", "memory"),
    "takes a power": ("{{ 9 ** 9 ** 9 }}", "powers"),
    "squares a number": (
        "{% set ns = namespace(n=3) %}{% for i in range(60) %}{% set ns.n = ns.n * ns.n %}{% endfor %}{{ ns.n }}",
        "integer",
    ),
    "writes without end": (
        "{% for i in range(99999) %}{{ 'x' * 99999 }}{% endfor %}",
        "million characters|memory|seconds",
    ),
    "calls itself": ("{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}", "recursion"),
    "reaches for Python": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe|undefined"),
    "changes what it is given": ("{{ messages.append(1) }}", "unsafe|not safely callable"),
    "reads a file": ("{% include '/etc/passwd' %}", "refuses it"),
    "divides by nothing": ("{{ 1 / 0 }}", "division"),
    "refuses": ("{{ raise_exception('no system text') }}", "refuses it: no system text"),
    "calls what is not there": ("{{ nothing() }}", "undefined"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_is_refused_in_bounded_time_and_memory(name, monkeypatch):
    monkeypatch.setattr(sandbox, "SECONDS", 0.5)
    source, message = HOSTILE[name]
    limits, handler, started = (
        resource.getrlimit(resource.RLIMIT_AS),
        signal.getsignal(signal.SIGALRM),
        time.monotonic(),
    )
    with pytest.raises(DataError, match=message):
        ChatSource(source, DATE).render(messages=MESSAGES)
    assert time.monotonic() - started < 5
    assert resource.getrlimit(resource.RLIMIT_AS) == limits and signal.getsignal(signal.SIGALRM) is handler


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% if x %}\n\n{% endfor %}", "line 3: .*endfor"),
        ("{{ x | nofilter }}", "line 1: .*nofilter"),
        ("{% generation %}x", "line 1: "),
        ("x" * (sandbox.MAX_SOURCE + 1), "characters; at most"),
        ("{% for i in x %}" * 500 + "{% endfor %}" * 500, "cannot be compiled|line"),
        ("{{ " + "(" * 20_000 + "x" + ")" * 20_000 + " }}", "cannot be compiled"),
        ("{{ '" + "x" * 9 + "' | center(99999999999) }}", None),
    ],
)
def test_what_is_no_template_is_refused_by_its_line(source, message):
    if message is None:  # folded when it is compiled, in bounds too
        with pytest.raises((ConfigError, DataError)):
            ChatSource(source, DATE).render()
    else:
        with pytest.raises(ConfigError, match=message):
            ChatSource(source, DATE)


def test_other_users_of_the_timer_keep_it():
    before = signal.setitimer(signal.ITIMER_REAL, 300)
    try:
        assert ChatSource("x", DATE).render() == "x"
        assert 200 < signal.getitimer(signal.ITIMER_REAL)[0] <= 300
    finally:
        signal.setitimer(signal.ITIMER_REAL, *before)


def test_a_thread_renders_too():
    found = []
    thread = threading.Thread(target=lambda: found.append(ChatSource("x", DATE).render()))
    thread.start()
    thread.join()
    assert found == ["x"]
