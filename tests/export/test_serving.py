"""Chat templates: what transformers renders and tokenises from an export are training's ids, for any message.

pytest tests/export/test_serving.py
"""

import json
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ochat.errors import CheckpointError, DataError
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
    for role, content in (("tool", "x"), ("user", None)):
        with pytest.raises(jinja2.TemplateError):
            served.apply_chat_template([{"role": role, "content": content}])


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
