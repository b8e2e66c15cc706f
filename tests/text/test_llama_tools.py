"""Tools in templates of plain text: written as Llama 3.1's chat template writes them, with weights.

pytest tests/text/test_llama_tools.py; that servers get the same ids: tests/export/test_serving.py
"""

from dataclasses import replace

import pytest

from ochat.errors import DataError
from ochat.text import template as templates
from ochat.text import tokenizer as tokenizers
from ochat.text.chat.dates import parse_date
from ochat.text.chat.sandbox import ChatSource
from ochat.text.chat.variables import chat_variables
from ochat.text.conversation import Conversation, Message, WeightedSpan
from tests import text_kit

CALL = {"name": "rain", "arguments": {"in": "Ulm é\n", "days": [1, None]}}
TOOL = {"name": "rain", "description": "é <b> 'x'", "parameters": {"type": "object"}}
USER, CALLS = Message("user", "Rain?"), Message("assistant", "", tool_calls=(CALL,))
REPLY, ANSWER = Message("tool", 'no "rain"\n', name="rain", tool_call_id="7"), Message("assistant", "No.")
CALLED = Conversation((USER, CALLS, REPLY, ANSWER, USER, ANSWER), tools=(TOOL, {"type": "function", "function": TOOL}))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    added = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|im_start|>")
    return tokenizers.load(text_kit.small_folder("gpt2", tmp_path_factory.mktemp("base")), added)


def written(conversation, tokenizer, **changes):
    """Text and own weight of each span but for BOS."""
    template = replace(templates.load("openchat_3.6"), bos="", **changes)
    ids, spans = template.encode_spans(conversation, tokenizer)
    begins = [0, *(span.end for span in spans)]
    return [
        (text_kit.with_specials(tokenizer, ids[begin : span.end]), span.own_weight)
        for begin, span in zip(begins, spans, strict=False)
    ]


def test_the_text_is_llama_3_1s(tokenizer):
    """But for the names of the roles and for the system text that Llama writes of itself."""
    llama = ChatSource(templates.load("llama3.1").chat_template, parse_date(""))
    for said in (CALLED, replace(CALLED, tools=()), replace(CALLED, items=(USER, ANSWER))):
        text = llama.render(bos_token="", **chat_variables(said))
        roles = {"user": "user", "assistant": "assistant", "tool": "ipython"}
        ours = "".join(text for text, _ in written(said, tokenizer, roles=roles))
        assert ours == text[text.index("<|eot_id|>") + len("<|eot_id|>") :]


@pytest.mark.parametrize(("conditions", "header"), [("both", "GPT4 User"), ("assistant", "User")])
def test_calls_are_trained_and_the_rest_is_prompt(tokenizer, conditions, header):
    said = replace(CALLED, condition="GPT4", system="Be brief.")
    found = written(said, tokenizer, condition_roles=conditions)
    trained = [text for text, weight in found if weight]
    call = '{"name": "rain", "parameters": {"in": "Ulm é\\n", "days": [1, null]}}<|eot_id|>'
    assert trained == [call, "No.<|eot_id|>", "No.<|eot_id|>"] and {weight for _, weight in found} == {0, 1}
    texts = [text for text, _ in found]
    assert texts[2] == f"<|start_header_id|>{header}<|end_header_id|>\n\n"
    assert texts[3].startswith("Given the following functions") and texts[3].endswith("    }\n}\n\n")
    assert texts[3].count('"type": "function"') == 2
    reply = texts.index("<|start_header_id|>ipython<|end_header_id|>\n\n") + 1
    assert texts[reply] == '"no \\"rain\\"\\n"<|eot_id|>'


def test_weights_are_those_of_the_words(tokenizer):
    """A message's own weight does not reach the tools in front of it; spans stay where they are."""
    items = [replace(USER, weight=0.5, spans=(WeightedSpan(0, 4, 2.0),)), replace(CALLS, weight=0.25)]
    items += [replace(REPLY, weight=1.0, spans=(WeightedSpan(4, 8, 0.0),))]
    found = written(Conversation(tuple(items), tools=(TOOL,)), tokenizer)
    assert [weight for text, weight in found if text.startswith("Given")] == [0.0]
    assert [text for text, weight in found if weight == 2.0] == ["Rain"]
    assert [text for text, weight in found if weight == 0.25] == [
        '{"name": "rain", "parameters": {"in": "Ulm é\\n", "days": [1, null]}}<|eot_id|>'
    ]
    assert "".join(text for text, weight in found if text.startswith("?") and weight == 0.5) == "?"
    for at, word in ((3, '"rain"'), (9, "\n"), (0, "no")):
        spans = (WeightedSpan(at, at + len(word), 0.5),)
        found = written(Conversation((USER, replace(REPLY, weight=0.0, spans=spans))), tokenizer)
        touched = "".join(text for text, weight in found if weight)
        assert word.replace('"', '\\"').replace("\n", "\\n") in touched or word in touched


def test_special_tokens_stay_text(tokenizer):
    spelt = {"name": "rain", "description": "<|eot_id|>"}
    call = replace(CALLS, tool_calls=({"name": "<|eot_id|>", "arguments": {"a": "<|im_start|>"}},))
    said = Conversation((USER, call, replace(REPLY, content="<|eot_id|>")), tools=(spelt,))
    ids, _ = templates.load("openchat_3.6").encode(said, tokenizer)
    assert (
        ids.count(tokenizer.special_tokens["<|eot_id|>"]) == 3 and tokenizer.special_tokens["<|im_start|>"] not in ids
    )
    assert text_kit.with_specials(tokenizer, ids).count("<|eot_id|>") == 6


def test_prompts_have_the_tools(tokenizer):
    template = templates.load("openchat_3.6")
    for count in (1, 3):
        asked = replace(CALLED, items=CALLED.items[:count], condition="GPT4")
        trained, _ = template.encode(replace(asked, items=(*asked.items, ANSWER)), tokenizer)
        prompt = template.encode_prompt(asked, tokenizer)
        assert trained[: len(prompt)] == prompt and tokenizer.decode(prompt).count("Given the following functions") == 1


def test_an_answer_that_is_to_go_on_is_text(tokenizer):
    for begun in (CALLS, replace(ANSWER, reasoning="Dry.")):
        with pytest.raises(DataError, match=r"items\[1\]: an answer that is to go on is text"):
            templates.load("openchat_3.6").encode_prompt(replace(CALLED, items=(USER, begun)), tokenizer)


REFUSED = {
    "text beside a call": ({"items": (USER, replace(CALLS, content="Wait."))}, r"items\[1\]\.content: text beside"),
    "two calls": ({"items": (USER, replace(CALLS, tool_calls=(CALL, CALL)))}, r"items\[1\]\.tool_calls: .*one call"),
    "the assistant begins": ({"items": (ANSWER, USER, ANSWER)}, "tools: .*first message"),
    "nobody": ({"items": ()}, "tools: .*first message"),
    "no name": ({"tools": ({"description": "x"},)}, "tools: each needs a function with a name"),
    "reasoning": ({"items": (USER, replace(ANSWER, reasoning="Dry."))}, r"items\[1\]: reasoning, .*--reasoning drop"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_llama_cannot_write_is_refused(tokenizer, name):
    change, message = REFUSED[name]
    with pytest.raises(DataError, match=message):
        templates.load("openchat_3.6").encode(replace(CALLED, **change), tokenizer)
