"""A rendered conversation whose prefixes are exchanged has the ids of the conversation of that class, or it is refused:
pytest tests/text/test_rendered_prefixes.py"""

from dataclasses import replace

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from ochat.errors import DataError
from ochat.text import prefixes, rendered_prefixes, token_weights
from ochat.text import template as templates
from ochat.text import tokenizer as tokenizers
from ochat.text.conversation import Conversation, Message
from ochat.text.template import Template
from tests import text_kit
from tests.text.test_rendered import MARKS, SAID

NAMES = ("chatml", "qwen3", "llama3.1")
CLASSES = ("", "GPT4", "GPT3", " a b", "reward:0", "quality:3,verbosity:1", "user", "漢字")
KINDS = ["gpt2", "llama", "gemma", "qwen", "llama3", "mistral", "smollm2"]
OWN = {  # the header of a turn, where `c` is the class
    "the role is in front": "m.role ~ (' ' ~ c if c else '') ~ '\\n'",
    "a line of its own": "m.role ~ ('\\n' ~ c if c else '') ~ '\\n'",
    "a colon": "(c ~ ' ' if c else '') ~ m.role ~ ': '",
}
TURN = "{% set c = condition if m.role in ('user', 'assistant') else '' %}{{ '<|im_start|>' ~ HEADER }}"
CONTENT = "{{ m.content ~ '<|im_end|>\\n' }}"


def of_header(header):
    turn = TURN.replace("HEADER", header)
    prompt = "{% set m = {'role': 'assistant'} %}" + turn
    source = "{% for m in messages %}" + turn + CONTENT + "{% endfor %}{% if add_generation_prompt %}" + prompt
    return Template("mine", 4096, "<|im_end|>", tokenize="rendered", chat_template=source + "{% endif %}")


@pytest.fixture(scope="module")
def by_kind(tmp_path_factory):
    folder, found = tmp_path_factory.mktemp("kinds"), {}
    for kind in KINDS:
        try:
            if kind == "smollm2":
                path = text_kit.smollm2_tokenizer(folder)
            elif kind in ("llama3", "mistral"):
                path = text_kit.real_tokenizer(kind)
            else:
                path = text_kit.small_folder(kind, folder / kind)
        except pytest.skip.Exception:
            continue
        found[kind] = tokenizers.load(path, (*MARKS, "<|begin_of_text|>"))
    return found


def spans_of(template, tokenizer, conversation):
    segments = template.segments(conversation, tokenizer)
    ids, spans = token_weights.encode([segments], tokenizer)[0]
    found = rendered_prefixes.slots(template, tokenizer, conversation, segments)
    return ids, rendered_prefixes.numbered(template, tokenizer, found, ids, spans)


def exchanged(ids, spans, of_class):
    found, begin = [], 0
    for span in spans:
        found += of_class[span.prefix - 1] if span.prefix else ids[begin : span.end]
        begin = span.end
    return found


def check_law(template, tokenizer, conversation, classes=CLASSES):
    """From every class to every other."""
    encoded = {own: spans_of(template, tokenizer, replace(conversation, condition=own)) for own in classes}
    of_class = {name: rendered_prefixes.ids(template, tokenizer, name) for name in classes}
    for own, (ids, spans) in encoded.items():
        assert any(span.prefix for span in spans) and all(span.role == "prefix" for span in spans if span.prefix)
        for other in classes:
            assert exchanged(ids, spans, of_class[other]) == encoded[other][0], (own, other)


def template_of(name):
    return templates.load(name) if name in NAMES else of_header(OWN[name])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [*NAMES, *OWN])
def test_exchanging_is_encoding_anew(by_kind, kind, name):
    if kind not in by_kind:
        pytest.skip(f"no {kind} tokenizer here")
    template, tokenizer = template_of(name), by_kind[kind]
    described = prefixes.describe(template, tokenizer, CLASSES)
    assert described.keys() == {"ids"}, described
    for said, conversation in SAID.items():
        if name in NAMES and not (said == "reasoning" and name != "qwen3") or said in ("turns", "system"):
            check_law(template, tokenizer, conversation)


texts = st.text(max_size=8) | st.sampled_from(text_kit.NASTY) | st.sampled_from(rendered_prefixes.BEGINNINGS)
pairs = st.lists(st.tuples(texts, texts), min_size=1, max_size=3)


@example("smollm2", "chatml", [("<|im_start|>user\n", "<|im_end|>")])
@settings(max_examples=100, deadline=None)
@given(st.sampled_from(KINDS), st.sampled_from([*NAMES, *OWN]), pairs)
def test_any_text_can_follow(by_kind, kind, name, said):
    assume(kind in by_kind)
    items = tuple(Message(role, text) for pair in said for role, text in zip(("user", "assistant"), pair, strict=True))
    try:
        template_of(name).segments(Conversation(items), by_kind[kind])
    except DataError:
        assume(False)
    check_law(template_of(name), by_kind[kind], Conversation(items), ("", "GPT4", "reward:0"))


UNSAFE = {  # a template's header, and the words of the refusal
    "nothing between": ("m.role ~ ' ' ~ c", "between the class and what a message says"),
    "nothing in its place": ("c ~ '<|im_end|>' ~ m.role ~ '\\n'", "writes nothing in its place"),
    "special tokens": ("(c ~ '<|im_start|>' if c else '') ~ m.role ~ '\\n'", "writes other special tokens"),
    "by its name": ("(c ~ ' ' if c and c != 'GPT4' else '') ~ m.role ~ '\\n'", "the class 'GPT4' at other places"),
}


@pytest.mark.parametrize("name", UNSAFE)
def test_a_template_without_a_safe_end_is_refused(by_kind, name):
    header, why = UNSAFE[name]
    described = prefixes.describe(of_header(header), by_kind["gpt2"], ("GPT3", "GPT4"))
    assert described.keys() == {"refused"} and why in described["refused"]


def test_a_class_that_joins_what_follows_is_refused(by_kind):
    """Llama 3's pre-tokenizer takes newlines to the punctuation in front of them."""
    if "llama3" not in by_kind:
        pytest.skip("no llama3 tokenizer here")
    template, tokenizer = of_header(OWN["the role is in front"]), by_kind["llama3"]
    assert "ids" in prefixes.describe(template, tokenizer, ("A",))
    assert (
        "under the class 'A.', a token holds the end" in prefixes.describe(template, tokenizer, ("A", "A."))["refused"]
    )


@pytest.fixture
def joining(tmp_path):
    """A tokenizer in which one text of a message joins the role in front of it."""
    path = text_kit.small_folder("gpt2", tmp_path / "joining")
    model = tokenizers.load(path, MARKS).model
    model.add_tokens([AddedToken("user\nJOIN", normalized=False)])
    model.save(str(path / "tokenizer.json"))
    return tokenizers.load(path, MARKS)


def said(*texts):
    return Conversation(
        tuple(Message(role, text) for role, text in zip(("user", "assistant") * 9, texts, strict=False)), "GPT4"
    )


def test_a_conversation_that_cannot_be_exchanged_is_refused(joining):
    chatml = templates.load("chatml")
    assert "ids" in prefixes.describe(chatml, joining, ("GPT4",))
    assert any(span.prefix for span in spans_of(chatml, joining, said("x", "y"))[1])
    with pytest.raises(DataError, match="under the class 'GPT4', a token holds the end of a turn's prefix"):
        spans_of(chatml, joining, said("JOIN", "y"))
    late = replace(
        chatml, chat_template=chatml.chat_template + "{% if messages | length > 2 %}{{ condition }}{% endif %}"
    )
    assert "ids" in prefixes.describe(chatml, joining, ("GPT4",))
    spans_of(late, joining, said("x", "y"))
    with pytest.raises(DataError, match="the class changes the text at other places"):
        spans_of(late, joining, said("x", "y", "x", "y"))
