"""Templates: the rules that hold for every one of them, and ids that do not come from this code.

tests/laws/test_golden.py has the ids of every template.
"""

import json
import pickle
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors

from ochat.errors import ConfigError
from ochat.text import template as templates
from ochat.text import tokenizer as tokenizers
from ochat.text.conversation import Conversation, Message
from tests import text_kit

EOT = "<|end_of_turn|>"
MARKS = (EOT, "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "</s>")
MARKS += ("<start_of_turn>", "<end_of_turn>")


def test_golden_training_ids():
    """Worked out segment by segment with tiktoken."""
    said = [("user", " 12345", None), ("assistant", "", 0.5), ("user", "café 😀", None), ("assistant", "漢字", None)]
    ids = [128000, 128006, 2374, 128007, 271, 3513, 10015, 13, 128009, 128006, 1502, 128007, 271, 220, 4513, 1774]
    ids += [128009, 128006, 72803, 128007, 271, 128009, 128006, 1502, 128007, 271, 936, 59958, 91416, 128009]
    ids += [128006, 72803, 128007, 271, 115953, 19113, 128009]
    conversation = Conversation(tuple(Message(*turn) for turn in said), "", "Be brief.")
    tokenizer = tokenizers.load(text_kit.real_tokenizer("llama3"))
    expected = ids, [0.0] * 21 + [0.5] + [0.0] * 12 + [1.0] * 3
    assert templates.load("openchat_3.6").encode(conversation, tokenizer) == expected


def test_golden_prompt():
    """The prompt whose ids the makers of OpenChat 3.5 published."""
    tokenizer = tokenizers.load(text_kit.real_tokenizer("mistral"), (EOT,))
    said = (Message("user", "Hello"), Message("assistant", "Hi"), Message("user", "How are you today?"))
    user, assistant = [420, 6316, 28781, 3198, 3123, 1247, 28747], [420, 6316, 28781, 3198, 3123, 21631, 28747]
    expected = [1, *user, 22557, 32000, *assistant, 15359, 32000, *user, 1602, 460, 368, 3154, 28804, 32000, *assistant]
    assert templates.load("openchat_3.5").encode_prompt(Conversation(said), tokenizer) == expected


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    return {k: tokenizers.load(text_kit.small_folder(k, folder / k), MARKS) for k in ("llama", "gemma", "gpt2", "qwen")}


kinds = st.sampled_from(["llama", "gemma", "gpt2", "qwen"])
SEGMENTS = [name for name in templates.names() if templates.load(name).tokenize == "segments"]
names = st.sampled_from(SEGMENTS)
texts = st.text(max_size=12) | st.sampled_from(text_kit.NASTY)
messages = st.builds(
    Message, st.sampled_from(["user", "assistant"]), texts, st.none() | st.floats(-2, 2), condition=st.none() | texts
)
conversations = st.builds(Conversation, st.lists(messages, min_size=1, max_size=4).map(tuple), texts, texts)


@settings(max_examples=150, deadline=None)
@given(kinds, names, conversations)
def test_segments_stand_alone(small, kind, name, conversation):
    """Ids are the segments' ids in a row, content holds no special id, weights follow the messages, and spans cover
    every token."""
    tokenizer, template = small[kind], templates.load(name)
    eot, live = tokenizer.special_tokens[template.eot], tokenizer.encode_with_specials
    ids, weights = ([] if tokenizer.bos_id is None else [tokenizer.bos_id]), []
    if conversation.system:
        ids += live(template.role_prefix("system")) + tokenizer.encode(conversation.system) + [eot]
    weights += [0.0] * len(ids)
    for message in conversation.items:
        own_class = conversation.condition if message.condition is None else message.condition
        prefix = live(template.role_prefix(message.role, own_class))
        content = tokenizer.encode(message.content)
        assert not set(content) & set(tokenizer.special_tokens.values())
        own = {"user": 0.0, "assistant": 1.0}[message.role] if message.weight is None else message.weight
        ids += prefix + content + [eot]
        weights += [0.0] * len(prefix) + [own] * (len(content) + 1)
    assert template.encode(conversation, tokenizer) == (ids, weights)
    again, spans = template.encode_spans(conversation, tokenizer)
    ends = [span.end for span in spans]
    assert again == ids and ends == sorted(set(ends)) and ends[-1] == len(ids)
    said = [(span.role, span.weight) for span in spans if span.role in ("user", "assistant")]
    assert said == [(m.role, m.weight) for m in conversation.items]
    assert all(span.weight is None for span in spans if span.role in ("bos", "system", "prefix"))
    assert [span.condition for span in spans if span.role in ("user", "assistant")] == [
        message.condition for message in conversation.items
    ]


@settings(max_examples=100, deadline=None)
@given(kinds, names, conversations, texts, st.sampled_from(["both", "assistant"]), st.sampled_from(["", "\n"]))
def test_exchanging_the_numbered_prefixes_writes_another_class(
    small, kind, name, conversation, condition, mode, suffix
):
    """The ids under a class are those of the conversation in which every turn has that class."""
    template, tokenizer = templates.with_conditions(templates.load(name), mode), small[kind]
    template = replace(template, suffix=suffix)
    ids, spans = template.encode_spans(conversation, tokenizer)
    texts = ["", *template.prefix_texts(condition)]
    begins, found = [0, *(span.end for span in spans)], []
    for begin, span in zip(begins, spans, strict=False):
        found += tokenizer.prefix_ids(texts[span.prefix]) if span.prefix else ids[begin : span.end]
    items = tuple(replace(message, condition=None) for message in conversation.items)
    assert found == template.encode(replace(conversation, items=items, condition=condition), tokenizer)[0]
    marked = [span.role for span in spans if span.prefix]
    carried = [m for m in conversation.items if template.carries_condition(m.role)]
    assert marked == ["prefix"] * len(carried)


@settings(max_examples=50, deadline=None)
@given(kinds, names, conversations)
def test_prompt_is_a_beginning_of_training(small, kind, name, conversation):
    """A prompt is what training saw before the rest of an answer: a training sequence begins with it."""
    template, tokenizer = templates.load(name), small[kind]
    prompt = template.encode_prompt(conversation, tokenizer)
    shown = replace(conversation, condition=conversation.condition or template.default_condition)
    if shown.items[-1].role != "assistant":
        shown = replace(shown, items=(*shown.items, Message("assistant", "")))
    trained, _ = template.encode(shown, tokenizer)
    assert trained[:-1] == prompt and trained[-1] == tokenizer.special_tokens[template.eot]


def test_conditions_modes(small):
    template = templates.load("openchat_3.5")
    shown = {m: templates.with_conditions(template, m) for m in ("both", "assistant", "ignore")}
    prefixes = {m: [t.role_prefix(role, "A B") for role in ("user", "assistant")] for m, t in shown.items()}
    assert prefixes == {
        "both": ["A B User:", "A B Assistant:"],
        "assistant": ["User:", "A B Assistant:"],
        "ignore": ["User:", "Assistant:"],
    }
    assert shown["ignore"].default_condition == "" and shown["assistant"].default_condition == "GPT4 Correct"
    plain = templates.load("zephyr_mistral")
    assert templates.with_conditions(plain, "both").role_prefix("user", "A") == "<|user|>\n"


def test_data_round_trip():
    for template in map(templates.load, templates.names()):
        assert templates.Template.from_dict(template.to_dict()) == template


def test_a_user_defined_template(tmp_path, small):
    path = tmp_path / "mine.toml"
    data = 'context = 10\nprefix = "<|im_start|>{role}: "\neot = "<|im_end|>"\nspecial_tokens = ["<|im_start|>"]\n'
    path.write_text(data + 'bos = ""\n[roles]\nuser = "Q"\nassistant = "A"\n')
    tokenizer = small["gpt2"]
    ids, _ = templates.load(path).encode(Conversation((Message("user", "x"),), "c"), tokenizer)
    start, end = tokenizer.special_tokens["<|im_start|>"], tokenizer.special_tokens["<|im_end|>"]
    assert ids == [start, *tokenizer.encode("c Q: "), *tokenizer.encode("x"), end]


MISSING = object()  # as a manifest may lack a key, which is no template file


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"contxt": 3}, "unknown key 'contxt'; did you mean 'context'"),
        ({"context": "3"}, r"context = '3': expected a whole number"),
        ({"context": 0}, "context = 0: expected"),
        ({"prefix": "User:"}, "prefix must hold"),
        ({"eot": ""}, "eot = '': expected"),
        ({"roles": {"user": "U"}}, "roles needs user and assistant"),
        ({"roles": {"user": "U", "assistant": " "}}, "must not be blank"),
        ({"roles": {"user": "U", "assistant": "A", "tool": ""}}, r"roles\.tool must not be blank"),
        ({"roles": {"user": "U", "assistant": "A", "critic": "C"}}, "may have system and tool; it has .*critic"),
        ({"roles": {"user": "U", "assistant": 3}}, r"roles\.assistant = 3: expected a string"),
        ({"condition_roles": "user"}, "condition_roles = 'user': expected one of"),
        ({"special_tokens": ["<|x|>"]}, "is not in prefix"),
        *[({key: MISSING}, f"{key} is missing") for key in ("name", "context", "roles", "prefix", "eot")],
        ({"eot": "<|end_of_turn|>\n"}, r'eot = "<\|end_of_turn\|>", suffix = "\\n"'),
        ({"chat_template": "{{ messages }}"}, 'chat_template needs tokenize = "rendered"'),
        ({"tokenize": "rendered", "prefix": MISSING, "roles": MISSING}, "chat_template is missing"),
        ({"tokenize": "rendered", "chat_template": "{{ 1 }}"}, "chat_template writes prefix"),
        ({"tokenize": "rendered", "chat_template": "{% x %}", "prefix": MISSING}, "line 1: .*unknown tag 'x'"),
    ],
)
def test_faulty_templates_are_refused(change, message):
    data = templates.load("openchat_v3.2").to_dict() | change
    with pytest.raises(ConfigError, match=f"mine: .*{message}"):
        templates.Template.from_dict({key: value for key, value in data.items() if value is not MISSING}, "mine")


def test_unknown_names_and_missing_tokens(tmp_path):
    with pytest.raises(ConfigError, match=r"did you mean 'openchat_3.6'\? known: .*zephyr_mistral"):
        templates.load("openchat_3_6")
    tokenizer = tokenizers.load(text_kit.small_folder("llama", tmp_path))
    tokens = r"'<\|eot_id\|>' '<\|start_header_id\|>' '<\|end_header_id\|>'"
    for name, wanted in (("openchat_v3.2", r"'<\|end_of_turn\|>'"), ("openchat_3.6", tokens)):
        with pytest.raises(ConfigError, match=rf"init-base --hf BASE OUT --add-token {wanted}$"):
            templates.load(name).encode(Conversation((Message("user", "x"),)), tokenizer)


BOS_RULES = {  # kind, tokenizer_config.json, whether the post-processor writes BOS -> whether new data begins with it
    "named alone": ("gpt2", {"bos_token": "<|endoftext|>"}, False, False),
    "written by the post-processor": ("gpt2", {"bos_token": "<|endoftext|>"}, True, True),
    "said not to be added": ("gpt2", {"bos_token": "<|endoftext|>", "add_bos_token": False}, True, False),
    "said to be added": ("gpt2", {"bos_token": "<|endoftext|>", "add_bos_token": True}, False, True),
    "not named": ("gpt2", {"add_bos_token": True}, False, False),
    "SentencePiece": ("llama", None, False, True),
    "SentencePiece, said not to be added": ("llama", {"add_bos_token": False}, False, False),
    "SentencePiece, said nothing": ("llama", {"bos_token": "<s>"}, False, True),
}


@pytest.mark.parametrize("name", BOS_RULES)
def test_new_data_begins_with_bos_where_the_tokenizer_says_so(name, tmp_path):
    """The export says so too; a template that is written down already keeps its BOS."""
    kind, settings, has_processor, expected = BOS_RULES[name]
    folder = text_kit.small_folder(kind, tmp_path / "base")
    if settings is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if has_processor:
        model = tokenizers.load(folder).model
        model.post_processor = processors.TemplateProcessing("<|endoftext|> $A", None, [("<|endoftext|>", 0)])
        model.save(str(folder / "tokenizer.json"))
    tokenizer = tokenizers.load(folder, MARKS)
    again = pickle.loads(pickle.dumps(tokenizer))
    tokenizer.save(tmp_path / "out", chat_template="", eos_token="<|im_end|>")
    conversation = Conversation((Message("user", "x"),))
    old = templates.load("chatml_8192")
    for each in (tokenizer, again, tokenizers.load(tmp_path / "out")):
        ids, _ = templates.with_bos_of(old, each).encode(conversation, each)
        assert (ids[0] != each.special_tokens["<|im_start|>"]) == expected
    ids, _ = old.encode(conversation, tokenizer)
    assert (ids[0] == tokenizer.bos_id) == (tokenizer.bos is not None)
    fixed = replace(old, bos="<|im_end|>")
    assert templates.with_bos_of(fixed, tokenizer) == fixed
