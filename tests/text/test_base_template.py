"""`--template base`: what is found out about a base's chat template, and the class in front of its roles.

pytest tests/text/test_base_template.py
"""

import json
import time
from datetime import datetime

import pytest

from ochat.errors import ConfigError
from ochat.text import template as templates
from ochat.text import tokenizer as tokenizers
from ochat.text.chat import base as base_chat
from ochat.text.chat.sandbox import ChatSource
from ochat.text.chat.variables import chat_variables
from ochat.text.conversation import Conversation, Message
from tests import text_kit

DATE = datetime(2026, 2, 3)
LOOP = "{% for m in messages %}{body}{% endfor %}{% if add_generation_prompt %}{opening}{% endif %}"
CHATML = LOOP.replace("{opening}", "{{ '<|im_start|>assistant\\n' }}")
SOURCES = {  # how a template may write the roles -> its source
    "in one string": LOOP.replace("{body}",
        "{% if m.role == 'user' %}{{ '<|im_start|>user\\n' + m.content + '<|im_end|>\\n' }}"
        "{% elif m.role == 'system' %}{{ '<|im_start|>system\\n' + m.content + '<|im_end|>\\n' }}{% else %}"
        "{{ '<|im_start|>assistant\\n' + m.content + '<|im_end|>\\n' }}{% endif %}")
        .replace("{opening}", "{{ '<|im_start|>assistant\\n' }}"),
    "as an expression": CHATML.replace("{body}",
        "{{ '<|im_start|>' + m['role'] + '\\n' + m.content + '<|im_end|>\\n' }}"),
    "as text": LOOP.replace("{body}", "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n")
        .replace("{opening}", "<|im_start|>assistant\n"),
    "in double quotes": CHATML.replace("{body}", '{{ "<|im_start|>" ~ m.role ~ "\\n" ~ m.content ~ "<|im_end|>\\n" }}'),
    "in a macro": "{% macro turn(role) %}{{ '<|im_start|>' + role + '\\n' }}{% endmacro %}"
        + LOOP.replace("{body}", "{{ turn(m.role) ~ m.content ~ '<|im_end|>\\n' }}")
        .replace("{opening}", "{{ turn('assistant') }}"),
    "out of pieces": LOOP.replace("{body}", "{{ '<|im_' ~ 'start|>' ~ m.role ~ '\\n' ~ m.content ~ '<|im_end|>\\n' }}")
        .replace("{opening}", "{{ '<|im_' ~ 'start|>' ~ 'assistant\\n' }}"),
    "with thinking begun": LOOP.replace("{body}", "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}")
        .replace("{opening}", "{{ '<|im_start|>assistant\\n<think>\\n' }}"),
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tokenizers.load(text_kit.small_folder("qwen", tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture
def read(tokenizer, tmp_path):
    """read(source) -> what is known of a base with this chat template."""

    def found(source, **settings):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": source} | settings))
        return base_chat.read(tmp_path, tokenizer, DATE)

    return found


def chatml(conversation, opened):
    """The text by hand."""
    turns = [("system", conversation.system)] * bool(conversation.system)
    turns += [(message.role, message.content) for message in conversation.items]
    named = {role: f"{conversation.condition} {role}".strip() for role in ("user", "assistant")}
    text = "".join(f"<|im_start|>{named.get(role, role)}\n{content}<|im_end|>\n" for role, content in turns)
    return text + f"<|im_start|>{named['assistant']}\n" * opened


@pytest.mark.parametrize("name", SOURCES)
def test_the_class_is_in_front_of_the_roles(read, name):
    found = read(SOURCES[name])
    assert (found.eot, found.takes_condition) == ("<|im_end|>", True)
    chat = ChatSource(found.source, DATE)
    said = (Message("user", "Hi"), Message("assistant", "Yo, user"), Message("user", "So?"))
    for condition in ("", "GPT4", 'two "words"'):
        for system in ("", "Be kind"):
            conversation = Conversation(said, condition, system)
            for opened in (False, True):
                text = chat.render(**chat_variables(conversation), add_generation_prompt=opened)
                assert text == chatml(conversation, opened) + "<think>\n" * (opened and name == "with thinking begun")
    assert chat.render(messages=[{"role": "user", "content": "x"}]) == "<|im_start|>user\nx<|im_end|>\n"
    assert ("{% set written %}" in found.source) == (name == "out of pieces"), "only where it must be"


def test_generation_blocks_stay_only_where_transformers_finds_them(read):
    body = "{% if m.role == 'assistant' %}{{ START }}{%- generation -%}{{ m.content }}<|im_end|>{%- endgeneration -%}"
    body += "{% else %}{{ START }}{{ m.content }}<|im_end|>{% endif %}"
    source = CHATML.replace("{body}", body)
    whole = read(source.replace("START", "'<|im_start|>' + m.role + '\\n'"))
    assert "{%- generation -%}" in whole.source
    pieces = read(source.replace("START", "'<|im_' ~ 'start|>' ~ m.role ~ '\\n'"))
    assert "generation -%}" not in pieces.source
    conversation = Conversation((Message("user", "Hi"), Message("assistant", "Yo")), "GPT4")
    texts = [ChatSource(each.source, DATE).render(**chat_variables(conversation)) for each in (whole, pieces)]
    assert texts[0] == texts[1] and "<|im_start|>GPT4 assistant\nYo<|im_end|>" in texts[0]


def test_a_template_of_its_own_class_is_left_alone(read):
    source = SOURCES["as an expression"].replace("m['role']", "(condition ~ '/' if condition else '') + m['role']")
    found = read(source)
    assert found.takes_condition and found.source == source
    prose = read(SOURCES["as an expression"] + "{# on condition #}")
    assert prose.takes_condition and prose.source.startswith("{%- set class_in_front")


def test_a_template_without_role_names_takes_no_class(read):
    found = read("{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}")
    assert not found.takes_condition and found.eot == "<|im_end|>"


ENDINGS = {  # how the last answer, and one before it, end -> the token that ends a turn
    ("<|im_end|>", "<|im_end|>\n"): "<|im_end|>",
    ("<|eot|><|im_end|>", "<|eot|><|im_end|>"): "<|im_end|>",
    ("<|eot|>\n<|im_end|>", "<|eot|>\n<|im_end|>"): "<|eot|>",
    ("<|eot|><|im_end|>", "<|eot|>"): "<|eot|>",
    ("<|eot|>", "<|eot|><|im_end|>"): "<|eot|>",
    ("<|eot|>", "<|im_end|>"): "<|eot|>",
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_the_token_that_ends_a_turn(ending, tmp_path):
    """The last of those right behind an answer, wherever the answer stands."""
    tokenizer = tokenizers.load(text_kit.small_folder("qwen", tmp_path), ("<|eot|>",))
    source = CHATML.replace(
        "{body}", "{{ '<|im_start|>' + m.role + '\n' + m.content + (LAST if loop.last else OTHER) }}"
    )
    for name, text in zip(("LAST", "OTHER"), ending, strict=True):
        source = source.replace(name, repr(text))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": source}))
    assert base_chat.read(tmp_path, tokenizer, DATE).eot == ENDINGS[ending]


LARGE = "{% set ns = namespace(t='x') %}{% for i in range(60) %}{% set ns.t = ns.t ~ ns.t %}{% endfor %}{{ ns.t }}"
REFUSED = {
    None: "no chat template",
    "": "no chat template",
    "{% for m in messages %}": "chat template, line 1: .*cannot be trained with, choose another --template",
    "{{ messages[7].content }}": "cannot be trained with",
    "{{ raise_exception('not today') }}": "not today.*choose another --template",
    "hello": "does not write what was said",
    "{% for m in messages %}{{ m.content }}\n{% endfor %}": "ends answers with no special token",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}": "seconds",
    LARGE: "memory|seconds",
}


@pytest.mark.parametrize("source", REFUSED)
def test_bases_without_a_usable_template_are_refused(read, source, tmp_path):
    started = time.monotonic()
    with pytest.raises(ConfigError, match=f"{tmp_path}.*({REFUSED[source]})"):
        read(source)
    assert time.monotonic() - started < 20


def test_the_template_comes_from_any_of_the_places(read, tmp_path):
    source = SOURCES["as text"]
    expected = read(source)
    assert read([{"name": "tool_use", "template": "x"}, {"name": "default", "template": source}]) == expected
    (tmp_path / "chat_template.jinja").write_text(source)
    assert read("another") == expected
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="no UTF-8 text"):
        read("another")


def test_the_template_of_a_base(tokenizer, tmp_path):
    """Its context and date; a tokenizer's file alone has no chat template."""
    source = SOURCES["as text"] + "{{ strftime_now('%Y') }}"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": source}))
    with pytest.raises(ConfigError, match=r"config\.json: no max_position_embeddings; give --context"):
        templates.of_base(tmp_path, tokenizer, "2026-02-03", None)
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"max_position_embeddings": 66}}))
    assert templates.of_base(tmp_path, tokenizer, "2026-02-03", None).context == 66
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": 77}))
    template = templates.of_base(tmp_path, tokenizer, "2026-02-03", None)
    assert (template.name, template.context, template.date) == ("base", 77, "2026-02-03")
    assert templates.Template.from_dict(json.loads(json.dumps(template.to_dict()))) == template
    assert template.facts(tokenizer) == ["it writes 2026-02-03 as today's date (--date)"]
    assert "2026" in ChatSource(template.served_source(), datetime(1999, 1, 1)).render(messages=[], condition="")
    with pytest.raises(ConfigError, match="2026-31-01"):
        templates.of_base(tmp_path, tokenizer, "2026-31-01", None)
    with pytest.raises(ConfigError, match="a tokenizer's file; give the base's folder"):
        templates.of_base(tmp_path / "tokenizer.json", tokenizer, "", None)
    unknown = SOURCES["as text"] + "{% set form = '%Y' %}{{ strftime_now(form) }}"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": unknown}))
    with pytest.raises(ConfigError, match="no format that could be fixed"):
        templates.of_base(tmp_path, tokenizer, "", 77)
