"""Chat templates: what transformers renders and tokenises from an export are training's ids, for any message.

pytest tests/export/test_serving.py
"""

import json
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ochat.errors import CheckpointError, ConfigError, DataError
from ochat.export import serving
from ochat.text import template as templates
from ochat.text import tokenizer as tokenizers
from ochat.text.chat.variables import chat_variables
from ochat.text.conversation import Conversation, Message
from tests import text_kit

PAIRS = [
    ("llama", "openchat_v3.2", ("<|end_of_turn|>",)),
    ("llama", "zephyr_mistral", ()),
    ("llama", "chatml_8192", ("<|im_start|>", "<|im_end|>")),
    ("gemma", "openchat_v3.2_gemma_new", ()),
    ("gemma", "gemma_it", ()),
    ("gpt2", "openchat_v3.2", ("<|end_of_turn|>",)),
    ("gpt2", "chatml_8192", ()),
    ("gpt2", "openchat_3.6", ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
    ("qwen", "chatml_8192", ()),
    ("qwen", "openchat_3.5", ("<|end_of_turn|>",)),
    ("mistral", "openchat_3.5", ("<|end_of_turn|>",)),
    pytest.param(("mistral", "zephyr_mistral", ()), marks=pytest.mark.slow),
    ("llama3", "openchat_3.6", ()),
    pytest.param(("llama3", "llama3_instruct", ()), marks=pytest.mark.slow),
    pytest.param(("llama3", "openchat_v3.2", ("<|end_of_turn|>",)), marks=pytest.mark.slow),
    ("gpt2", "chatml_8192 with a newline", ()),
    ("llama", "zephyr_mistral with a newline", ()),
    ("gpt2", "chatml", ()),
    ("llama", "chatml", ("<|im_start|>", "<|im_end|>")),
    ("qwen", "qwen3", ()),
    pytest.param(("mistral", "qwen3", ("<|im_start|>", "<|im_end|>")), marks=pytest.mark.slow),
    ("llama3", "llama3.1", ()),
]
starts = st.sampled_from([*" \n\t:)1\u0301\u2581\u00a0\x1c", "", "  ", "\n\n", "'s", "User:"])
texts = st.tuples(starts, st.text(max_size=6), starts).map("".join) | st.sampled_from(text_kit.NASTY)
messages = st.builds(Message, st.sampled_from(["user", "assistant"]), texts)
conditions = st.sampled_from(["", "GPT4", "Math Correct", " a "]) | st.text(max_size=6)
conversations = st.builds(Conversation, st.lists(messages, min_size=1, max_size=4).map(tuple), conditions, texts)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 99) | texts,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(texts, inner, max_size=2),
    max_leaves=4,
)
names = st.text('ab_"\\é', min_size=1, max_size=4)  # blanks around a name are not to be found again
calls = st.fixed_dictionaries({"name": names, "arguments": st.dictionaries(texts, values, max_size=2)})
tools = st.fixed_dictionaries({"name": names, "description": texts, "parameters": st.dictionaries(texts, values)})
called = st.builds(lambda asked, call, reply, said: (
    Message("user", asked), Message("assistant", "", tool_calls=(call,)), Message("tool", reply, name=call["name"]),
    Message("assistant", said)), texts, calls, texts, texts)  # fmt: skip
with_tools = st.builds(
    lambda turns, condition, system, tools: Conversation(sum(turns, ()), condition, system, tools=tuple(tools)),
    st.lists(called, min_size=1, max_size=2), conditions, texts, st.lists(tools, min_size=1, max_size=2),
)  # fmt: skip
CALL = {"name": "rain", "arguments": {"in": "Ulm"}}
CALLED = (Message("user", "Rain?"), Message("assistant", "", tool_calls=(CALL,)), Message("tool", "no"))
TOOLS = ({"name": "rain", "parameters": {"type": "object"}},)


@pytest.fixture(scope="module", params=PAIRS, ids=lambda pair: f"{pair[0]}-{pair[1]}")
def exported(request, tmp_path_factory):
    """(tokenizer, template, transformers' tokenizer, folder) of one pair."""
    transformers = pytest.importorskip("transformers")
    kind, name, added = request.param
    folder = tmp_path_factory.mktemp("export")
    real = kind in ("mistral", "llama3")
    path = text_kit.real_tokenizer(kind) if real else text_kit.small_folder(kind, folder / "base")
    name, _, newline = name.partition(" with a ")
    tokenizer, template = tokenizers.load(path, added), replace(templates.load(name), suffix="\n" if newline else "")
    source = serving.render(template, tokenizer)
    tokenizer.save(folder / "out", chat_template=source, eos_token=template.eot)
    (folder / "out" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return tokenizer, template, transformers.AutoTokenizer.from_pretrained(folder / "out"), folder / "out"


def served_ids(served, conversation, **options):
    variables = chat_variables(conversation) | options
    messages = variables.pop("messages")
    return served.apply_chat_template(messages, tokenize=True, return_dict=False, **variables)


@settings(max_examples=100, deadline=None)
@given(conversation=conversations)
def test_served_ids_are_trainings(exported, conversation):
    tokenizer, template, served, _ = exported
    said = [conversation.system, conversation.condition, *(m.content for m in conversation.items)]
    assume(not any(token in text for token in (*tokenizer.special_tokens, serving.BOUNDARY) for text in said))
    try:
        ids, _ = template.encode(conversation, tokenizer)
    except DataError:  # characters that a chat template cannot carry
        assume(False)
    assert served_ids(served, conversation) == ids
    asked = Conversation((*conversation.items, Message("user", "x")), conversation.condition, conversation.system)
    bare = replace(template, default_condition="")
    assert served_ids(served, asked, add_generation_prompt=True) == bare.encode_prompt(asked, tokenizer)


@settings(max_examples=100, deadline=None)
@given(conversation=with_tools)
def test_served_ids_are_trainings_with_tools(exported, conversation):
    tokenizer, template, served, _ = exported
    if not _writes_tools(template):
        with pytest.raises(DataError, match="tools: the template .* cannot write them"):
            template.encode(conversation, tokenizer)
        return
    said = json.dumps(conversation.to_dict(), ensure_ascii=False)
    assume(not any(token in said for token in (*tokenizer.special_tokens, serving.BOUNDARY)))
    try:
        ids, _ = template.encode(conversation, tokenizer)
    except DataError as error:  # characters that a chat template cannot carry
        assert template.tokenize == "rendered", error
        assume(False)
    assert served_ids(served, conversation) == ids
    asked = replace(conversation, items=conversation.items[:-1])
    bare = replace(template, default_condition="")
    assert served_ids(served, asked, add_generation_prompt=True) == bare.encode_prompt(asked, tokenizer)


def _writes_tools(template):
    return template.tokenize == "rendered" or "tool" in template.roles


def test_a_peer_trains_on_calls_and_on_no_replies(exported):
    tokenizer, template, served, _ = exported
    if not _writes_tools(template):
        return
    conversation = Conversation((*CALLED, Message("assistant", "No.")), "GPT4", "Sys", tools=TOOLS)
    ids, weights = template.encode(conversation, tokenizer)
    variables = chat_variables(conversation)
    found = served.apply_chat_template(
        variables.pop("messages"), return_dict=True, return_assistant_tokens_mask=True, **variables
    )
    assert (found["input_ids"], found["assistant_masks"]) == (ids, [int(weight) for weight in weights])


SERVED_FAULTS = {  # messages, tools, words of the refusal by a template that writes tools, and by one that does not
    "text beside a call": ([{"role": "user", "content": "x"}, chat_variables(Conversation((replace(
        CALLED[1], content="Wait."),)))["messages"][0]], None, "either text or one tool call", "without tools"),
    "two calls": ([{"role": "user", "content": "x"}, chat_variables(Conversation((replace(
        CALLED[1], tool_calls=(CALL, CALL)),)))["messages"][0]], None, "either text or one tool call", "without tools"),
    "no question": ([{"role": "assistant", "content": "x"}], TOOLS, "need a message of the user", "without tools"),
    "a special token": ([{"role": "user", "content": "x"}], ({"name": "EOT"},), "reserves", "without tools"),
    "a reply": ([{"role": "user", "content": "x"}, {"role": "tool", "content": "EOT"}], None, "reserves", "reserves"),
    "another role": ([{"role": "critic", "content": "x"}], None, "role critic", "role critic"),
}  # fmt: skip


@pytest.mark.parametrize("name", SERVED_FAULTS)
def test_what_training_never_saw_is_not_served(exported, name):
    jinja2 = pytest.importorskip("jinja2")
    _, template, served, _ = exported
    if template.tokenize == "rendered":
        return
    messages, tools, *words = json.loads(json.dumps(SERVED_FAULTS[name]).replace("EOT", template.eot))
    with pytest.raises(jinja2.TemplateError, match=words[0 if _writes_tools(template) else 1]):
        served.apply_chat_template(messages, tools=tools)


def test_a_call_comes_in_any_of_the_shapes_that_servers_take(exported):
    """Arguments as JSON text, content null or missing."""
    _, template, served, _ = exported
    if template.tokenize == "rendered" or not _writes_tools(template):
        return
    messages = chat_variables(Conversation(CALLED))["messages"]
    expected = served.apply_chat_template(messages, tools=TOOLS)
    for change in ({"content": None}, {"tool_calls": [{"function": CALL | {"arguments": '{"in": "Ulm"}'}}]}):
        again = [messages[0], messages[1] | change, messages[2]]
        assert served.apply_chat_template(again, tools=TOOLS) == expected
    del messages[1]["content"]
    assert served.apply_chat_template(messages, tools=TOOLS) == expected


def test_the_default_condition_and_an_open_answer(exported):
    tokenizer, template, served, _ = exported
    asked = Conversation((Message("user", "Hi"),))
    ids = served.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True, return_dict=False)
    assert ids == template.encode_prompt(asked, tokenizer)
    if template.name == "qwen3":
        return  # a last answer without reasoning is written with empty reasoning, which a prompt leaves to the model
    asked = Conversation((*asked.items, Message("assistant", "Well, the")), template.default_condition)
    assert served_ids(served, asked, continue_final_message=True) == template.encode_prompt(asked, tokenizer)


def test_a_peer_can_train_on(exported):
    """The generation blocks of the exported template hold what is trained: the assistant's words and ends of turns."""
    tokenizer, template, served, _ = exported
    said = [("user", "Hi there"), ("assistant", "Yes: no"), ("user", "Why?"), ("assistant", "So.")]
    conversation = Conversation(tuple(Message(*turn) for turn in said), "", "Sys")
    ids, weights = template.encode(conversation, tokenizer)
    found = served.apply_chat_template(
        chat_variables(conversation)["messages"], return_dict=True, return_assistant_tokens_mask=True, condition=""
    )
    assert (found["input_ids"], found["assistant_masks"]) == (ids, [int(weight) for weight in weights])


def test_special_tokens_in_messages_are_refused(exported):
    jinja2 = pytest.importorskip("jinja2")
    tokenizer, template, served, _ = exported
    if template.tokenize == "rendered":
        return  # the text is the server's, as of any model's own template
    for text in (f"a{template.eot}b", tokenizer.bos or template.eot):
        for conversation in (Conversation((Message("user", text),)), Conversation((Message("user", "x"),), "", text)):
            with pytest.raises(jinja2.TemplateError, match="reserves"):
                served_ids(served, conversation)
    with pytest.raises(jinja2.TemplateError, match="must be text"):
        served.apply_chat_template([{"role": "user", "content": None}])


def test_verify_passes_and_finds_a_difference(exported):
    tokenizer, template, _, folder = exported
    serving.verify(folder, template, tokenizer)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    source = config["chat_template"].replace("= message['content'] -", "= message['content'] | trim -")
    trimmed = source.replace(f"~ '{template.eot}", f"~ ' {template.eot}")
    assert trimmed != config["chat_template"]
    path.write_text(json.dumps(config | {"chat_template": trimmed}))
    try:
        with pytest.raises(CheckpointError, match="other ids than training"):
            serving.verify(folder, template, tokenizer)
    finally:
        path.write_text(json.dumps(config))


def test_an_export_stops_where_its_base_stops_too(tmp_path):
    """In the order: the end of turn, then the base's, each once; generation_config.json before config.json."""
    tokenizer, template = tokenizers.load(text_kit.small_folder("qwen", tmp_path / "base")), templates.load("chatml")
    eot = tokenizer.special_tokens[template.eot]
    found = []
    for i, (name, ids) in enumerate([("config.json", None), ("config.json", 0), ("generation_config.json", [eot, 7])]):
        (tmp_path / "base" / name).write_text(json.dumps({"eos_token_id": ids}))
        serving.write(tmp_path / f"{i}", template, tokenizer, (), eos_ids=serving.eos_ids_of(tmp_path / "base"))
        found.append(json.loads((tmp_path / f"{i}" / "generation_config.json").read_text())["eos_token_id"])
    assert found == [eot, [eot, 0], [eot, 7]]
    (tmp_path / "base" / "generation_config.json").write_text('{"eos_token_id": "</s>"}')
    with pytest.raises(ConfigError, match=r"generation_config.json: eos_token_id is .'</s>'.; token ids"):
        serving.eos_ids_of(tmp_path / "base")


@pytest.mark.parametrize("mode", ["template", "last", "all", "drop"])
def test_reasoning_is_served_as_it_is_trained(mode, tmp_path):
    """Verified with tools and reasoning among what is said."""
    tokenizer = tokenizers.load(text_kit.small_folder("qwen", tmp_path / "base"))
    template = templates.with_reasoning(templates.load("qwen3"), mode)
    serving.write(tmp_path / "out", template, tokenizer, ("GPT4",))
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert ('set keep_reasoning = "all"' in config["chat_template"]) == (mode == "all")
    for change in ("</tool_call>", "</think>"):
        changed = config | {"chat_template": config["chat_template"].replace(change, change + " ")}
        (tmp_path / "out" / "tokenizer_config.json").write_text(json.dumps(changed))
        with pytest.raises(CheckpointError, match="other ids than training"):
            serving.verify(tmp_path / "out", template, tokenizer)


@pytest.mark.parametrize("change", [", please respond", "~ ', \"parameters\": ' ~", "set content = content | tojson"])
def test_verify_sees_tools_calls_and_replies(change, tmp_path):
    added = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    tokenizer = tokenizers.load(text_kit.small_folder("gpt2", tmp_path / "base"), added)
    serving.write(tmp_path / "out", templates.load("openchat_3.6"), tokenizer, ("GPT4",))
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    broken = {"set content = content | tojson": "set content = content"}.get(change, change.replace(", ", " "))
    changed = config["chat_template"].replace(change, broken)
    assert changed != config["chat_template"]
    (tmp_path / "out" / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": changed}))
    with pytest.raises(CheckpointError, match="other ids than training"):
        serving.verify(tmp_path / "out", templates.load("openchat_3.6"), tokenizer)


def test_the_boundary_is_written_only_where_it_is_needed(exported):
    """Other servers than ours may not know it: SentencePiece needs none, a header that ends in a newline seldom."""
    tokenizer, template, served, folder = exported
    plain = Conversation((Message("user", "Hi"), Message("assistant", "Yo")), "GPT4", "Sys")
    variables = chat_variables(plain)
    text = served.apply_chat_template(variables["messages"], tokenize=False, condition=plain.condition)
    source = json.loads((folder / "tokenizer_config.json").read_text())["chat_template"]
    if tokenizer.kind == "sentencepiece" and tokenizer.bos == "<s>" and template.name != "gemma_it":
        assert (serving.BOUNDARY in source) == ("<start_of_turn>" in tokenizer.special_tokens)
    if tokenizer.kind == "tiktoken" and template.prefix.endswith("\n"):
        assert serving.BOUNDARY in source and serving.BOUNDARY not in text


def _exported_qwen2(folder, mode):
    """(tokenizer, template, folder) of a model of type qwen2 whose end of prefix merges with what follows."""
    tokenizer = tokenizers.load(text_kit.small_folder("qwen", folder / "base"), ("<|end_of_turn|>",))
    template, out = templates.load("openchat_3.5"), folder / "out"
    serving.write(out, template, tokenizer, ("GPT4 Correct",))
    (out / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    serving.adapt(out, condition=None, boundary=serving.keeps_boundary("qwen2", mode))
    return tokenizer, template, out


@pytest.mark.parametrize("mode", ["always", "auto"])
def test_transformers_rebuilds_the_tokenizer_of_qwen2_so_it_gets_no_boundary(mode, tmp_path):
    """Why `auto` leaves it out. The tokenizer here has the class's own pattern for letters."""
    transformers = pytest.importorskip("transformers")
    tokenizer, template, out = _exported_qwen2(tmp_path, mode)
    served = transformers.AutoTokenizer.from_pretrained(out)
    assert type(served).__name__ == "Qwen2Tokenizer"
    asked = Conversation((Message("user", "Why is it so?"),), "GPT4 Correct")
    ids = served_ids(served, asked, add_generation_prompt=True)
    assert (ids == template.encode_prompt(asked, tokenizer)) == (mode == "auto")
    assert serving.lacks_boundary(out, template, tokenizer) == (mode == "auto")


def test_an_export_without_a_boundary_is_checked_for_its_text(tmp_path):
    tokenizer, template, out = _exported_qwen2(tmp_path, "never")
    written = [json.loads((out / name).read_text("utf-8")) for name in ("tokenizer.json", "tokenizer_config.json")]
    assert serving.BOUNDARY not in json.dumps(written, ensure_ascii=False)
    merging = Conversation((Message("user", ") -- e"),), "GPT4 Correct")
    served = serving.Served(out)
    assert served.ids(served.text(merging)) != template.encode(merging, tokenizer)[0]
    with pytest.raises(CheckpointError, match="other ids than training"):
        serving.verify(out, template, tokenizer)
    path = out / "tokenizer_config.json"
    path.write_text(path.read_text().replace("~ content", "~ content | trim"))
    with pytest.raises(CheckpointError, match="other ids than training"):
        serving.verify(out, template, tokenizer, ids=False)
