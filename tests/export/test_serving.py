"""Chat templates: what transformers renders and tokenises from an export are training's ids, for any message.

pytest tests/export/test_serving.py
"""

import json
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ochat.errors import CheckpointError
from ochat.export import serving
from ochat.text import template as templates
from ochat.text import tokenizer as tokenizers
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
    tokenizer, template = tokenizers.load(path, added), templates.load(name)
    source = serving.render(template, tokenizer)
    tokenizer.save(folder / "out", chat_template=source, eos_token=template.eot)
    (folder / "out" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return tokenizer, template, transformers.AutoTokenizer.from_pretrained(folder / "out"), folder / "out"


def served_ids(served, conversation, **options):
    variables = serving.chat_variables(conversation) | options
    messages = variables.pop("messages")
    return served.apply_chat_template(messages, tokenize=True, return_dict=False, **variables)


@settings(max_examples=100, deadline=None)
@given(conversation=conversations)
def test_served_ids_are_trainings(exported, conversation):
    tokenizer, template, served, _ = exported
    said = [conversation.system, conversation.condition, *(m.content for m in conversation.items)]
    assume(not any(token in text for token in (*tokenizer.special_tokens, serving.BOUNDARY) for text in said))
    assert served_ids(served, conversation) == template.encode(conversation, tokenizer)[0]
    asked = Conversation((*conversation.items, Message("user", "x")), conversation.condition, conversation.system)
    bare = replace(template, default_condition="")
    assert served_ids(served, asked, add_generation_prompt=True) == bare.encode_prompt(asked, tokenizer)


def test_the_default_condition_and_an_open_answer(exported):
    tokenizer, template, served, _ = exported
    asked = Conversation((Message("user", "Hi"),))
    ids = served.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True, return_dict=False)
    assert ids == template.encode_prompt(asked, tokenizer)
    asked = Conversation((*asked.items, Message("assistant", "Well, the")), template.default_condition)
    assert served_ids(served, asked, continue_final_message=True) == template.encode_prompt(asked, tokenizer)


def test_special_tokens_in_messages_are_refused(exported):
    jinja2 = pytest.importorskip("jinja2")
    tokenizer, template, served, _ = exported
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
    trimmed = config["chat_template"].replace("= message['content'] -", "= message['content'] | trim -")
    assert trimmed != config["chat_template"]
    path.write_text(json.dumps(config | {"chat_template": trimmed}))
    try:
        with pytest.raises(CheckpointError, match="other ids than training"):
            serving.verify(folder, template, tokenizer)
    finally:
        path.write_text(json.dumps(config))


def test_the_boundary_is_written_only_where_it_is_needed(exported):
    """Other servers than ours may not know it: SentencePiece needs none, a header that ends in a newline seldom."""
    tokenizer, template, served, folder = exported
    plain = Conversation((Message("user", "Hi"), Message("assistant", "Yo")), "GPT4", "Sys")
    variables = serving.chat_variables(plain)
    text = served.apply_chat_template(variables["messages"], tokenize=False, condition=plain.condition)
    source = json.loads((folder / "tokenizer_config.json").read_text())["chat_template"]
    if tokenizer.kind == "sentencepiece" and tokenizer.bos == "<s>" and template.name != "gemma_it":
        assert (serving.BOUNDARY in source) == ("<start_of_turn>" in tokenizer.special_tokens)
    if tokenizer.kind == "tiktoken" and template.prefix.endswith("\n"):
        assert serving.BOUNDARY in source and serving.BOUNDARY not in text
