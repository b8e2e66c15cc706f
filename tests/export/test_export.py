"""An exported run is what transformers sees too: the same logits, the same ids for a chat under any condition, the
same answers."""

import json
import shutil

import pytest
import torch
from jinja2 import meta, nodes
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.chat_template_utils import _compile_jinja_template

from ochat.commands import generate
from ochat.commands.generate import GenerateOptions
from ochat.errors import CheckpointError, ConfigError
from ochat.export.hf_folder import export
from ochat.model import hf
from ochat.text import template as templates
from ochat.text import tokenizer as tokenizers
from ochat.text.conversation import Conversation, Message
from tests import tiny


def test_transformers_loads_it_and_computes_the_same_logits(exported):
    theirs = AutoModelForCausalLM.from_pretrained(exported, dtype="float32")
    ours = hf.load(exported, dtype="float32")
    sequences = [[256, 5, 9, 7], [3], list(range(60))]
    for ids, logits in zip(sequences, ours.logits(sequences), strict=True):
        with torch.no_grad():
            expected = theirs(torch.tensor([ids])).logits[0]
        assert (logits - expected).abs().max() <= 2e-4 * expected.abs().max()


def test_the_export_holds_the_trained_weights_not_the_base(world, exported):
    trained, base = hf.load(exported, dtype="float32"), hf.load(world.base, dtype="float32")
    newest = world.folder / "alone" / (world.folder / "alone" / "latest").read_text().strip()
    masters = load_file(newest / "weights-00001-of-00001.safetensors")
    for (name, a), b in zip(trained.named_parameters(), base.parameters(), strict=True):
        assert torch.equal(a, masters[name]), name
        assert not torch.equal(a, b), name


def test_generate_answers_like_transformers_generate(exported):
    tokenizer = AutoTokenizer.from_pretrained(exported)
    model = AutoModelForCausalLM.from_pretrained(exported, dtype="float32")
    for condition in ("GPT4", "GPT3"):
        messages = [{"role": "user", "content": "7+8"}]
        ids = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, condition=condition, return_tensors="pt", return_dict=False
        )
        expected = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
        options = GenerateOptions(exported, ("7+8", "1+1"), condition=condition, max_new_tokens=12, dtype="float32")
        assert tiny.generated(options)[0] == tokenizer.decode(expected, skip_special_tokens=True)


def test_openchat_json_names_the_template_and_the_step(world, exported, alone, tmp_path):
    """Of an earlier checkpoint too, where that is exported."""
    export(world.folder / "alone" / "checkpoints" / "step_5", tmp_path / "five")
    for folder, step in ((exported, len(alone)), (tmp_path / "five", 5)):
        content = json.loads((folder / "openchat.json").read_text())
        assert content["model_type"] == "openchat_v3.2" and content["step"] == step
    settings = json.loads((exported / "generation_config.json").read_text())
    assert settings["eos_token_id"] == [258, 257] and settings["bos_token_id"] == 256  # the base's 257 too
    assert hf.load(tmp_path / "five").embed.weight.dtype == torch.bfloat16


def test_a_checkpoint_is_enough_wherever_it_lies(world, alone, exported, tmp_path):
    copy = tmp_path / "elsewhere"
    shutil.copytree(world.folder / "alone" / "checkpoints" / f"step_{len(alone)}", copy)
    (tmp_path / "out").mkdir()  # an empty folder is not in the way
    assert export(copy, tmp_path / "out", dtype="float32") == len(alone)
    ours = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert ours == {path.name: path.read_bytes() for path in exported.iterdir()}


def test_the_default_condition_is_a_class_that_was_trained(tmp_path):
    """The template's own default where the data has it, else the class of the largest weight."""
    world = tiny.make(tmp_path, tiny.conversations(classes=("weak", "good")))
    tiny.train(world, tmp_path / "run", "--data.max_steps=1")
    described = json.loads((tmp_path / "run" / "export" / "openchat.json").read_text())
    assert described["template"]["default_condition"] == "good" and set(described["classes"]) == {"weak", "good"}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "export")
    messages = [{"role": "user", "content": "1+1"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert "good User:" in text and text.endswith("good Assistant:")
    table = ["--classes.weak.weight=5", "--classes.good.weight=1"]
    tiny.train(world, tmp_path / "turned", "--data.max_steps=1", *table)
    turned = json.loads((tmp_path / "turned" / "export" / "openchat.json").read_text())
    assert turned["template"]["default_condition"] == "weak"


def test_the_class_passes_a_server_that_lets_through_only_what_a_template_names(exported):
    """As vLLM does with a request's chat_template_kwargs; and it looks whether a template takes content apart."""
    source = json.loads((exported / "tokenizer_config.json").read_text())["chat_template"]
    parsed = _compile_jinja_template(source).environment.parse(source)
    assert "condition" in meta.find_undeclared_variables(parsed)
    assert not any("content" in repr(loop.iter) for loop in parsed.find_all(nodes.For))  # so content stays a string


@pytest.mark.parametrize("condition", ["GPT4", "GPT3", ""])
def test_another_class_can_be_baked_in(world, alone, exported, tmp_path, condition):
    """It is what the chat template and `ochat generate` take where none is named, and nothing else changes; nothing at
    all for the expert class."""
    folder = tmp_path / "baked"
    export(world.folder / "alone", folder, dtype="float32", condition=condition)
    changed = {path.name for path in folder.iterdir() if path.read_bytes() != (exported / path.name).read_bytes()}
    assert changed == ({"tokenizer_config.json", "openchat.json", "SHA256SUMS"} if condition != "GPT4" else set())
    served, tokenizer = AutoTokenizer.from_pretrained(folder), tokenizers.load(folder)
    messages = [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2."}]
    for named, more in ((condition, {}), ("GPT4", {"condition": "GPT4"}), ("GPT3", {"condition": "GPT3"})):
        items = (Message("user", "1+1"), Message("assistant", "2."))
        ours, _ = templates.load("openchat_v3.2").encode(Conversation(items, named), tokenizer)
        assert served.apply_chat_template(messages, return_dict=False, **more) == ours, named
    options = GenerateOptions(folder, ("1+1",), max_new_tokens=9, dtype="float32")
    asked = GenerateOptions(exported, ("1+1",), condition=condition, max_new_tokens=9, dtype="float32")
    assert tiny.generated(options) == tiny.generated(asked)


def test_what_cannot_be_exported_is_refused(world, alone, exported, tmp_path):
    with pytest.raises(CheckpointError, match="neither a checkpoint nor a run folder"):
        export(tmp_path, tmp_path / "out")
    with pytest.raises(ConfigError, match="add --overwrite"):
        export(world.folder / "alone", exported)
    with pytest.raises(ConfigError, match="spells a special token"):
        export(world.folder / "alone", tmp_path / "out", condition="a<|end_of_turn|>b")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(ConfigError, match="not an exported model"):
        export(world.folder / "alone", tmp_path / "mine", overwrite=True)
    assert not list(tmp_path.glob("out*")) and not list(tmp_path.glob(".*"))
    with pytest.raises(ConfigError, match="--prompt"):
        generate.answer(GenerateOptions(exported))
