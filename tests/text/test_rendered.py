"""Rendered templates: ids are those of the text that transformers renders, weights those of what the assistant says.

The chat templates are written here, each with one of the habits that published ones have.
pytest tests/text/test_rendered.py
"""

import re
from dataclasses import replace
from datetime import datetime

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from ochat.errors import ConfigError, DataError
from ochat.text import template as templates
from ochat.text import tokenizer as tokenizers
from ochat.text.chat import marks, rendered
from ochat.text.chat.sandbox import ChatSource
from ochat.text.chat.variables import chat_variables
from ochat.text.conversation import Conversation, Message, WeightedSpan
from ochat.text.template import Template
from tests import text_kit

MARKS = ("<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>")
OPENING = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
TOOLS = "{% if tools %}{{ '<|im_start|>system\\n' + tools | tojson + '<|im_end|>\\n' }}{% endif %}"
TURN = "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
CALLS = "{% for c in m.tool_calls or [] %}{{ '<call>' + c.function | tojson + '</call>' }}{% endfor %}"
IF_ASSISTANT, END = "{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\\n' }}", "{% endif %}{% endfor %}"
LAST_THOUGHT = (
    "{% if loop.last and m.reasoning_content %}{{ '<think>\\n' + m.reasoning_content + '\\n</think>\\n' }}{% endif %}"
)
GENERATION = "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}"
SOURCES = {
    "plain": "{% for m in messages %}" + TURN + "{% endfor %}" + OPENING,
    "trims": "{% for m in messages %}" + TURN.replace("m.content", "m.content | trim") + "{% endfor %}" + OPENING,
    "blocks": "{% for m in messages %}" + IF_ASSISTANT + GENERATION + "{% else %}" + TURN + END + OPENING,
    "blocks with the newline": "{% for m in messages %}" + IF_ASSISTANT + "{% generation %}{{ m.content }}"
        "{% endgeneration %}{% generation %}{{ '<|im_end|>\\n' }}{% endgeneration %}{% else %}" + TURN + END + OPENING,
    "tools": TOOLS + "{% for m in messages %}" + IF_ASSISTANT + "{{ m.content }}" + CALLS + "{{ '<|im_end|>\\n' }}"
        "{% elif m.role == 'tool' %}{{ '<|im_start|>user\\n<reply>' + m.content + '</reply><|im_end|>\\n' }}"
        "{% else %}" + TURN + END + OPENING,
    "drops earlier reasoning": "{% for m in messages %}" + IF_ASSISTANT + LAST_THOUGHT
        + "{{ m.content + '<|im_end|>\\n' }}{% else %}" + TURN + END + OPENING.replace("nt\\n", "nt\\n<think>\\n"),
    "drops earlier reasoning, blocks": "{% for m in messages %}" + IF_ASSISTANT
        + GENERATION.replace("{{ m.content", LAST_THOUGHT + "{{ m.content") + "{% else %}" + TURN + END + OPENING,
    "own system text": "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\\nBe kind.<|im_end|>\\n' }}"
        "{% endif %}{% for m in messages %}" + TURN + "{% endfor %}" + OPENING,
}  # fmt: skip
CALL = ({"name": "rain", "arguments": {"in": "Ulm é\n"}},)
TOOL = ({"type": "function", "function": {"name": "rain", "description": "é <b>", "parameters": {}}},)
SAID = {
    "turns": Conversation((Message("user", "Hi "), Message("assistant", " Hello!\n"), Message("user", "\n\nAnd?"),
                           Message("assistant", "漢字 fine."))),
    "system": Conversation((Message("user", "Hi"), Message("assistant", "Yo")), system=" Be brief.\n"),
    "tools": Conversation((Message("user", "Rain?"), Message("assistant", "", tool_calls=CALL), Message("tool", "no\n"),
                           Message("assistant", "No."), Message("user", "So?"), Message("assistant", "So.")),
                          tools=TOOL),
    "reasoning": Conversation((Message("user", "1+1"), Message("assistant", "2", reasoning="easy"),
                               Message("user", "2+2"), Message("assistant", "4", reasoning="one\nmore"))),
    "two answers": Conversation((Message("user", "Hi"), Message("assistant", "a"), Message("assistant", "b"))),
    "the assistant begins": Conversation((Message("assistant", "O"), Message("user", "Hi"), Message("assistant", "x"))),
}  # fmt: skip
CANNOT = {("tools", name) for name in SOURCES if name != "tools"}
CANNOT |= {("reasoning", name) for name in SOURCES if "reasoning" not in name}


def template_of(source, **changes):
    return Template(
        "mine", 4096, "<|im_end|>", tokenize="rendered", chat_template=source, condition_roles="none", **changes
    )


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    return {k: tokenizers.load(text_kit.small_folder(k, folder / k), MARKS) for k in ("llama", "gemma", "gpt2", "qwen")}


REAL = [pytest.param(name, marks=pytest.mark.slow) for name in ("llama3", "mistral", "smollm2")]


@pytest.fixture(scope="module", params=["gpt2", "llama", *REAL])
def served(request, tmp_path_factory):
    """A tokenizer, and the same in transformers."""
    transformers = pytest.importorskip("transformers")
    kind, folder = request.param, tmp_path_factory.mktemp("served")
    if kind == "smollm2":
        path = text_kit.smollm2_tokenizer(folder)
    else:
        is_small = kind in ("gpt2", "llama")
        path = text_kit.small_folder(kind, folder / "base") if is_small else text_kit.real_tokenizer(kind)
    tokenizer = tokenizers.load(path, MARKS)
    tokenizer.save(folder / "out", chat_template="", eos_token="<|im_end|>")
    return tokenizer, transformers.PreTrainedTokenizerFast.from_pretrained(folder / "out")


@pytest.mark.parametrize("said", SAID)
@pytest.mark.parametrize("name", SOURCES)
def test_ids_and_masks_are_transformers(served, name, said):
    """Where a template has no generation blocks, the mask is that of the same template with them."""
    (tokenizer, theirs), conversation = served, SAID[said]
    source, template = SOURCES[name], template_of(SOURCES[name])
    if (said, name) in CANNOT:
        with pytest.raises(DataError, match="leaves out|refuses it"):
            template.encode(conversation, tokenizer)
        return
    variables = chat_variables(conversation)
    messages, tools = variables["messages"], variables.get("tools")
    ids, weights = template.encode(conversation, tokenizer)
    options = {"tools": tools, "return_dict": True}
    assert ids == theirs.apply_chat_template(messages, chat_template=source, **options)["input_ids"]
    asked = replace(conversation, items=conversation.items[:-1])
    if asked.items[-1].role != "assistant":
        prompt = theirs.apply_chat_template(
            chat_variables(asked)["messages"], chat_template=source, add_generation_prompt=True, **options
        )
        assert template.encode_prompt(asked, tokenizer) == prompt["input_ids"]
    shown = "".join(text_kit.with_specials(tokenizer, [i]) for i, w in zip(ids, weights, strict=True) if w)
    assert set(weights) == {0, 1} and shown.count("<|im_end|>") == sum(
        m.role == "assistant" for m in conversation.items
    )
    if "blocks" in name:
        mask = theirs.apply_chat_template(messages, chat_template=source, return_assistant_tokens_mask=True, **options)
        assert [int(weight) for weight in weights] == mask["assistant_masks"]


@pytest.mark.parametrize("name", ["chatml", "qwen3", "llama3.1"])
@pytest.mark.parametrize("said", SAID)
@pytest.mark.parametrize("condition", ["", "GPT4"])
def test_built_in_templates_are_rendered_by_transformers_alike(served, name, said, condition):
    tokenizer, theirs = served
    if name == "llama3.1" and theirs.bos_token != "<|begin_of_text|>":
        return
    template, conversation = templates.load(name), replace(SAID[said], condition=condition)
    if said == "reasoning" and name != "qwen3":
        with pytest.raises(DataError, match="leaves out reasoning; --reasoning drop"):
            template.encode(conversation, tokenizer)
        return
    variables = chat_variables(conversation)
    found = theirs.apply_chat_template(
        variables["messages"], chat_template=template.chat_template, tools=variables.get("tools"), condition=condition,
        return_dict=True, return_assistant_tokens_mask=True,
    )  # fmt: skip
    ids, weights = template.encode(conversation, tokenizer)
    assert (ids, [int(weight) for weight in weights]) == (found["input_ids"], found["assistant_masks"])
    if condition:
        text = text_kit.with_specials(tokenizer, ids)
        assert re.search(r"GPT4 user\b", text) or said == "the assistant begins"
        assert text.count("GPT4 assistant") == sum(m.role == "assistant" for m in conversation.items)


texts = st.text(max_size=8) | st.sampled_from(text_kit.NASTY)
messages = st.builds(
    Message, st.sampled_from(["user", "assistant"]), texts, st.none() | st.sampled_from([0.0, 0.5, 2.0])
)
conversations = st.builds(
    Conversation, st.lists(messages, min_size=1, max_size=5).map(tuple), st.sampled_from(["", "GPT4", " a b "]), texts
)


@example("llama", "chatml", Conversation((Message("user", "0\r", 0.5),)))
@example("llama", "trims", Conversation((Message("user", "0\r", 0.5),)))
@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["llama", "gemma", "gpt2", "qwen"]), st.sampled_from(["chatml", *SOURCES]), conversations)
def test_nothing_is_lost_or_moved(small, kind, name, conversation):
    """Any text comes back from the ids; each turn's end weighs what its message does; a special token that a message
    spells stays text."""
    tokenizer = small[kind]
    template = templates.load(name) if name == "chatml" else template_of(SOURCES[name])
    try:
        ids, weights = template.encode(conversation, tokenizer)
    except DataError as error:
        assert re.search("plane 16|has no prompt for this message|no generation block around this message", str(error))
        assume(False)
    special = list(tokenizer.special_tokens.values())
    turns = (
        len(conversation.items) + bool(conversation.system) + (name == "own system text" and not conversation.system)
    )
    assert ids.count(tokenizer.special_tokens["<|im_end|>"]) == turns
    own = {"user": 0.0, "assistant": 1.0}
    expected = [own[m.role] if m.weight is None else m.weight for m in conversation.items]
    ends = [w for i, w in zip(ids, weights, strict=True) if i == tokenizer.special_tokens["<|im_end|>"]][
        -len(expected) :
    ]
    said = [bool(message.content.strip()) or message.role == "assistant" for message in conversation.items]
    assert [w for w, is_said in zip(ends, said, strict=True) if is_said] == [
        w for w, is_said in zip(expected, said, strict=True) if is_said
    ]
    if kind == "gpt2":  # it normalises nothing
        written = text_kit.with_specials(tokenizer, ids)
        assert written == rendered.compiled(template.chat_template, template.eot, "", ()).render(
            replace(conversation, condition="" if template.condition_roles == "none" else conversation.condition)
        )
    assert not set(ids) & (set(special) - {tokenizer.special_tokens[t] for t in ("<|im_start|>", "<|im_end|>")})


def test_spans_weigh_characters_of_a_message(small):
    """Blanks that a template trims do not shift them."""
    answer = Message("assistant", "  right WRONG right ", 1.0, (WeightedSpan(8, 13, 0.0),))
    conversation = Conversation((Message("user", "x"), answer))
    for name in ("plain", "trims", "blocks"):
        ids, weights = template_of(SOURCES[name]).encode(conversation, small["gpt2"])
        off = [small["gpt2"].decode([i]) for i, w in zip(ids, weights, strict=True) if w == 0]
        assert "".join(off).endswith(("WRONG\n", "WRONG")) and "right" not in "".join(off), name
    rewriting = template_of(SOURCES["plain"].replace("m.content", "m.content | tojson"))
    quoted = replace(conversation, items=(conversation.items[0], replace(answer, content='  "ght" WRONG right ')))
    with pytest.raises(DataError, match=r"items\[1\]: the chat template rewrites this message"):
        rewriting.encode(quoted, small["gpt2"])


@pytest.mark.parametrize("name", ["openchat_v3.2", "chatml", "qwen3"])
def test_a_message_whose_characters_all_weigh_0_has_no_end_of_turn_to_learn(tmp_path, name):
    tokens = ["<|end_of_turn|>"] if name == "openchat_v3.2" else []
    tokenizer = tokenizers.load(text_kit.small_folder("qwen", tmp_path), tokens)
    said = Message("assistant", "wrong", None, (WeightedSpan(0, 5, 0.0),))
    conversation = Conversation((Message("user", "x"), said))
    assert not any(templates.load(name).encode(conversation, tokenizer)[1])
    in_part = replace(conversation, items=(conversation.items[0], replace(said, content="wrong!")))
    assert sum(templates.load(name).encode(in_part, tokenizer)[1]) >= 2


TWO_CALLS = replace(SAID["tools"], items=(Message("user", "Rain?"), Message("assistant", "", tool_calls=CALL * 2)))


def test_thoughts_in_content_are_the_reasoning_that_the_template_makes_of_them(small):
    """Ids are those of the messages as they were; --reasoning applies to such thoughts, too."""
    template, tokenizer = templates.load("qwen3"), small["qwen"]
    asked, inline = Message("user", "q"), Message("assistant", "<think>\nwhy\n</think>\n\nbecause")
    apart = replace(inline, content="because", reasoning="why")
    for items, same in (((asked, inline), (asked, apart)), ((asked, inline) * 2, (asked, apart) * 2)):
        written = template.encode(Conversation(items), tokenizer)
        assert written == template.encode(Conversation(same), tokenizer)
        assert written[0] == tokenizer.encode_with_specials(template._rendered.render(Conversation(items)))
        assert template.with_thoughts_apart(Conversation(items)) == Conversation(same)
    dropped = templates.with_reasoning(template, "drop").encode(Conversation((asked, inline)), tokenizer)
    assert dropped == template.encode(Conversation((asked, replace(apart, reasoning=""))), tokenizer)
    for other in ("a<think>b</think>c", "<think>a</think>b</think>c"):
        with pytest.raises(DataError, match=r"content of items\[1\]; it takes <think> out"):
            template.encode(Conversation((asked, Message("assistant", other))), tokenizer)
    chatml = templates.load("chatml")
    assert chatml.with_thoughts_apart(Conversation((asked, inline))) == Conversation((asked, inline))


FAULTS = {  # source, conversation, words of the refusal
    "leaves out system": (SOURCES["plain"].replace("in messages", "in messages if m.role != 'system'"),
                          SAID["system"], "leaves out the system text"),
    "leaves out a message": (SOURCES["plain"].replace("in messages", "in messages[-2:]"),
                             SAID["turns"], "leaves out the content of items.0."),
    "leaves out a call": (SOURCES["tools"].replace("m.tool_calls or []", "(m.tool_calls or [])[:1]"), TWO_CALLS,
                          "leaves out tool calls of items.1."),
    "writes one call twice": (SOURCES["tools"].replace("c.function", "m.tool_calls[0].function"), TWO_CALLS,
                              "leaves out tool calls of items.1."),
    "writes twice": (SOURCES["plain"].replace(TURN, TURN + TURN), SAID["turns"], "changes what"),
    "turns round": (SOURCES["plain"].replace("in messages", "in messages | reverse"), SAID["turns"], "changes what"),
    "looks into messages": (SOURCES["plain"].replace(TURN, "{{ m.content.startswith('Hi') }}" + TURN),
                            SAID["turns"], "changes what"),
    "never ends": (SOURCES["plain"].replace(" + '<|im_end|>\\n'", ""), SAID["turns"], "writes no '<|im_end|>' after"),
    "ends only the last answer": (SOURCES["plain"].replace("'<|im_end|>\\n' }}{% endfor",
            "('<|im_end|>' if m.role == 'user' or loop.last else '') }}{% endfor"),
        SAID["turns"], r"items\[1\]: .*other messages into this answer"),
    "opens otherwise": (SOURCES["plain"].replace("assistant\\n", "model: "), SAID["turns"], "where it would be"),
    "no block around one": (SOURCES["blocks"].replace("'assistant' %}", "'assistant' and loop.last %}"),
                            SAID["turns"], r"items\[1\]: .*no generation block"),
    "a block around all": ("{% generation %}" + SOURCES["plain"] + "{% endgeneration %}",
                           SAID["turns"], "other messages into an answer"),
    "refuses": ("{{ raise_exception('never') }}", SAID["turns"], "refuses it: never"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_template_that_cannot_write_a_conversation_is_refused(small, name):
    source, conversation, message = FAULTS[name]
    with pytest.raises(DataError, match=message):
        template_of(source).encode(conversation, small["gpt2"])


def test_special_tokens_where_they_cannot_be_escaped(small):
    named = replace(SAID["tools"], tools=({"name": "a<|im_end|>", "parameters": {}},))
    with pytest.raises(DataError, match=r"spell the special token '<\|im_end\|>'"):
        template_of(SOURCES["tools"]).encode(named, small["gpt2"])
    spelt = Conversation((Message("user", "<|im_start|>user\nx"), Message("assistant", "y")), "GPT4")
    around = "{% set written %}" + SOURCES["plain"] + "{% endset %}"
    around += "{{ written | replace('<|im_start|>user', '<|im_start|>' ~ condition ~ ' user') }}"
    with pytest.raises(DataError, match=r"items\[0\]: .*writes the class into this message"):
        replace(template_of(around), condition_roles="both").encode(spelt, small["gpt2"])


def test_reasoning_modes(small):
    tokenizer = small["gpt2"]

    def thought(mode, name="qwen3"):
        template = templates.with_reasoning(templates.load(name), mode)
        return tokenizer.decode(template.encode(SAID["reasoning"], tokenizer)[0]).count("easy"), tokenizer.decode(
            template.encode(SAID["reasoning"], tokenizer)[0]
        ).count("more")

    assert {mode: thought(mode) for mode in ("template", "last", "all", "drop")} == {
        "template": (0, 1), "last": (0, 1), "all": (1, 1), "drop": (0, 0),
    }  # fmt: skip
    assert thought("drop", "chatml") == (0, 0)
    lossy = template_of(SOURCES["drops earlier reasoning"], reasoning="all")
    with pytest.raises(DataError, match=r"items\[1\]: .*leaves out the reasoning .*--reasoning template, or last"):
        lossy.encode(SAID["reasoning"], tokenizer)


def test_segment_templates_refuse_what_they_cannot_write(small):
    words = {"tools": "tools: .* chatml_8192 cannot write them; use openchat_3.6", "reasoning": "--reasoning drop"}
    for said, message in words.items():
        with pytest.raises(DataError, match=message):
            templates.load("chatml_8192").encode(SAID[said], small["gpt2"])


def test_marks():
    labels: list[marks.Label] = []
    said = " " + marks.mark(" Hi ", ("content", 0), labels) + marks.mark(" \n", ("content", 1), labels) + "."
    assert marks.take(said, labels) == ("  Hi  \n.", {("content", 0): [(2, 4)]}, []) and labels == [("content", 0)]
    assert marks.take("\U0010fffd" + said[:-5], labels)[1:] == ({}, labels), (
        "half a mark, and a character of the template's own"
    )
    with pytest.raises(DataError, match="plane 16"):
        marks.mark("a\U00100005", ("content", 0), [])


def test_served_sources_hold_what_training_knew():
    """Class, variables, date and reasoning; blanks at the start of a template stay as they are."""
    source = "  {% if true %}\n {{ bos_token }}{{ condition }}|{{ keep_reasoning }}|{{ strftime_now('%d.%m.%Y') }}"
    source += "{% endif %}"
    template = template_of(source, variables={"bos_token": '<"s">'}, date="2026-02-03", default_condition="GPT4")
    template = replace(template, condition_roles="both", reasoning="all")
    chat = ChatSource(template.served_source(), datetime(1999, 1, 1))
    assert chat.render() == ' <"s">GPT4|all|03.02.2026'
    assert chat.render(condition="", keep_reasoning="x", bos_token="y") == ' <"s">|all|03.02.2026'
    with pytest.raises(ConfigError, match="--conditions assistant: the template chatml writes the class for both"):
        templates.with_conditions(templates.load("chatml"), "assistant")
