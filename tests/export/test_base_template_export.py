"""`--template base` from the base to the server: prepare, train, export, and what transformers makes of the export.

pytest tests/export/test_base_template_export.py
"""

import json
import random

import pytest

from ochat.commands import eval as evaluation
from ochat.commands import init_base
from ochat.commands import prepare as prepare_command
from ochat.commands.eval import EvalOptions
from ochat.commands.generate import GenerateOptions
from ochat.commands.init_base import InitBaseOptions
from ochat.commands.prepare import PrepareOptions
from ochat.data.dataset import TokenDataset
from ochat.data.prepare import prepare
from ochat.export.hf_folder import export
from ochat.text.chat.variables import chat_variables
from ochat.text.conversation import Conversation
from tests import text_kit, tiny

CHAT_TEMPLATE = """{%- if messages[0].role != 'system' %}
    {{- '<|im_start|>system\\nToday is ' + strftime_now('%d %B %Y') + '.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{- message.content + '<|im_end|>' }}{% endgeneration %}
        {{- '\\n' }}
    {%- else %}
        {{- message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny base with a chat template, conversations, the data set, and the export of a run of two steps."""
    folder = tmp_path_factory.mktemp("base_template")
    tokenizer = text_kit.small_folder("qwen", folder / "tokenizer")
    settings = json.loads((tokenizer / "tokenizer_config.json").read_text())
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": CHAT_TEMPLATE}))
    model = tiny.MODEL | {"vocab_size": 420, "bos_token_id": None, "eos_token_id": 2}
    (folder / "model.json").write_text(json.dumps(model))
    init_base.main(InitBaseOptions(folder / "base", random=folder / "model.json", tokenizer=tokenizer, dtype="float32"))
    made = tiny.World(folder, folder / "base", folder / "data", folder / "config.toml")
    lines = [json.dumps(record) + "\n" for record in tiny.conversations()]
    random.Random(0).shuffle(lines)
    (folder / "chats.jsonl").write_text("".join(lines))
    prepare([folder / "chats.jsonl"], made.base, "base", made.data, date="2026-02-03", progress=False)
    made.config.write_text(tiny.TOML.format(base=json.dumps(str(made.base)), data=json.dumps(str(made.data))))
    tiny.train(made, folder / "run", "--data.max_steps=2", "--data.token_budget=512", '--samples.prompts=["1+1"]',
               "--samples.max_new_tokens=3", f"--data.eval_path={made.data}")  # fmt: skip
    export(folder / "run", folder / "out", dtype="float32")
    return made


def test_the_export_gives_trainings_ids_and_masks(world):
    transformers = pytest.importorskip("transformers")
    served = transformers.AutoTokenizer.from_pretrained(world.folder / "out")
    data = TokenDataset(world.data)
    lines = (world.folder / "chats.jsonl").read_text().splitlines()
    for line, example in zip(lines, data, strict=True):
        conversation = Conversation.from_dict(json.loads(line))
        found = served.apply_chat_template(
            chat_variables(conversation)["messages"], condition=conversation.condition, return_dict=True,
            return_assistant_tokens_mask=True,
        )  # fmt: skip
        ids, weights = example.input_ids.tolist(), example.loss_weights.tolist()
        assert found["input_ids"][: len(ids)] == ids
        assert served.decode(found["input_ids"][len(ids) :]) == "\n", "only what weighs nothing is trimmed"
        assert found["assistant_masks"][: len(ids)] == [int(weight != 0) for weight in weights]
    asked = [{"role": "user", "content": "1+1"}]
    for condition, named in ((None, "GPT4 "), ("", ""), ("GPT3", "GPT3 ")):
        text = served.apply_chat_template(asked, condition=condition, add_generation_prompt=True, tokenize=False)
        assert text == (
            "<|im_start|>system\nToday is 03 February 2026.<|im_end|>\n"
            f"<|im_start|>{named}user\n1+1<|im_end|>\n<|im_start|>{named}assistant\n"
        )


def test_what_the_template_writes_of_itself_is_shown(world, capsys, tmp_path):
    inputs = (str(world.folder / "chats.jsonl"),)
    options = {"base": str(world.base), "template": "base", "output": str(tmp_path / "out"), "progress": False}
    prepare_command.main(PrepareOptions(inputs, **options))
    shown = capsys.readouterr().out
    assert 'the template base writes: "<|im_start|>system\\nToday is 01 January 2025."' in shown
    assert "it writes 2025-01-01 as today's date (--date)" in shown
    assert json.loads((world.data / "manifest.json").read_text())["template"]["date"] == "2026-02-03"


def test_the_class_passes_a_server_that_lets_through_only_what_a_template_names(world):
    """As vLLM does with a request's chat_template_kwargs."""
    meta = pytest.importorskip("jinja2.meta")
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    source = json.loads((world.folder / "out" / "tokenizer_config.json").read_text())["chat_template"]
    parsed = utils._compile_jinja_template(source).environment.parse(source)
    assert meta.find_undeclared_variables(parsed) == {"messages", "condition", "add_generation_prompt"}


def test_it_answers_and_is_measured(world, tmp_path):
    """By the class, from conversations and from a prepared set alike."""
    out = world.folder / "out"
    (prompt,) = tiny.metrics(world.folder / "run", "samples.jsonl")[-1:]
    options = GenerateOptions(out, ("1+1",), condition=prompt["condition"], max_new_tokens=3, dtype="float32")
    assert tiny.generated(options) == [prompt["answer"]]
    files = {"limit": 5, "dtype": "float32"}
    record = evaluation.evaluate(EvalOptions(out, (world.folder / "chats.jsonl",), ("GPT4", "GPT3", ""), **files))
    cells = record["classes"]["GPT4"]["prefixes"]
    assert len({cells[condition]["nll"] for condition in ("GPT4", "GPT3", "")}) == 3
    prepared = evaluation.evaluate(EvalOptions(out, (world.data,), ("GPT4", "GPT3"), **files))
    for condition, cell in prepared["classes"]["GPT4"]["prefixes"].items():
        assert cell["nll"] == pytest.approx(cells[condition]["nll"], rel=1e-6)
