"""`ochat generate` names what cannot be, and takes prompts from everywhere.

pytest tests/infer/test_generate_command.py
"""

from __future__ import annotations

import io
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ochat.commands import generate as generation
from ochat.commands.chat import ChatOptions, open_chat
from ochat.commands.generate import GenerateOptions, answer
from ochat.console import stdout
from ochat.errors import ConfigError, DataError
from ochat.evaluate import prompts
from ochat.evaluate.model_client import LocalAnswerer
from ochat.export.hf_folder import export
from ochat.files.checksums import SUMS
from ochat.model.device import find_device
from ochat.text import tokenizer as tokenizers
from ochat.text.openchat_json import load_template
from tests import tiny


@pytest.fixture
def model(world, tmp_path):
    """model(content) -> a folder with the tiny base, and openchat.json of this content."""
    for file in world.base.iterdir():
        (tmp_path / file.name).symlink_to(file)

    def describe(content):
        (tmp_path / "openchat.json").write_text(content if isinstance(content, str) else json.dumps(content))
        return tmp_path

    return describe


def options(folder, **more):
    return GenerateOptions(folder, ("1+1",), max_new_tokens=2, dtype="float32", **more)


def test_devices_that_are_there(monkeypatch):
    assert find_device("cpu") == "cpu"
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert find_device("auto") == "cpu"
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    assert [find_device(name) for name in ("cuda", "cuda:1", "auto")] == ["cuda", "cuda:1", "cuda"]
    with pytest.raises(ConfigError, match="--device cuda:2.* cpu, cuda, cuda:0, cuda:1"):
        find_device("cuda:2")


DEVICES = ["foo", "", "cuda:7", "cpu:1", "meta", *([] if torch.cuda.is_available() else ["cuda"])]
PLAIN = {"model_type": "openchat_v3.2"}


@pytest.mark.parametrize(
    ("content", "more", "needle"),
    [
        *((PLAIN, {"device": name}, f"--device {name}: .*cpu") for name in DEVICES),
        ('"openchat_v3.2"', {}, "object"),
        ("{bad", {}, "JSON"),
        ({}, {}, "--template"),
        ({"step": 3}, {}, "model_type"),
        ({"model_type": "openchat_v9"}, {}, "'openchat_v9'.*openchat_v3.2"),
        ({"model_type": "x", "template": "openchat_v3.2"}, {}, "template"),
        ({"model_type": "x", "template": {"context": "y"}}, {}, "template: "),
    ],
)
def test_a_bad_device_or_description_is_named(model, content, more, needle):
    folder = model(content)
    with pytest.raises(ConfigError, match=needle) as error:
        answer(options(folder, **more))
    assert more or str(folder) in str(error.value)


def test_a_described_template_needs_no_name_of_its_own_and_a_missing_folder_says_how_to_get_one(model):
    tokenizer = tokenizers.load(model(PLAIN))
    described = load_template(model(PLAIN), None, tokenizer).to_dict()
    del described["name"]
    assert load_template(model({"model_type": "mine", "template": described}), None, tokenizer).name == "mine"
    with pytest.raises(ConfigError, match="hf download org/model --local-dir"):
        answer(options(Path("org/model")))


@pytest.mark.parametrize(
    ("classes", "condition", "said"),
    [
        (["good", ""], None, "WARNING the model was not trained on the class 'GPT4'; it knows 'good', none"),
        (["GPT4", "GPT3"], "GPT3", ""),
        (["GPT4", "GPT3"], "", ""),
        ([], "Math [x]", ""),  # as in models that do not say what they were trained with
    ],
)
def test_the_class_is_one_of_the_models_any_where_it_names_none_and_the_default_is_warned_of(
    model, capsys, classes, condition, said
):
    generation.main(options(model(PLAIN | ({"classes": classes} if classes else {})), condition=condition))
    shown = capsys.readouterr()
    errors = [line for line in shown.err.splitlines() if "cut short" not in line]
    assert shown.out and "WARNING" not in shown.out and errors == [said] * bool(said)


@pytest.mark.parametrize(
    ("condition", "needle"),
    [
        ("gpt3", "--condition: the model has no class 'gpt3'; did you mean 'GPT3'\\? known: 'GPT4', 'GPT3', none"),
        ("Math [x]", "--condition: the model has no class 'Math \\[x\\]'; known: 'GPT4'"),
    ],
)
def test_a_class_that_does_not_exist_is_refused_in_every_command(model, tmp_path, condition, needle):
    folder = model(PLAIN | {"classes": ["GPT4", "GPT3", ""]})
    with pytest.raises(ConfigError, match=needle):
        answer(options(folder, condition=condition))
    with pytest.raises(ConfigError, match=needle):
        open_chat(ChatOptions(folder, condition))
    settings = {"max_new_tokens": 1, "seed": 0, "template": None, "dtype": "float32", "device": "cpu", "base": ""}
    with pytest.raises(ConfigError, match=needle):
        LocalAnswerer(folder, condition=condition, **settings)


def test_export_refuses_a_class_that_was_not_trained(world, alone, tmp_path):
    with pytest.raises(ConfigError, match="--condition: the model has no class 'gpt3'; did you mean 'GPT3'"):
        export(world.folder / "alone", tmp_path / "out", condition="gpt3")
    assert not (tmp_path / "out").exists()


def test_prompts_come_from_stdin_and_files_and_answers_go_to_a_file(model, monkeypatch, capsys, tmp_path):
    """The same answers however the prompts come, more of them than a batch holds."""
    folder = model(PLAIN)
    monkeypatch.setattr(prompts, "PROMPTS_PER_BATCH", 2)
    asked = ["1+1", "é 2", "3+3"]
    text = tmp_path / "prompts.txt"
    text.write_text("1+1\n\n é 2 \n3+3", "utf-8")
    records = tmp_path / "prompts.jsonl"
    chat = {"messages": [{"role": "user", "content": "é 2"}, {"role": "assistant", "content": "dropped"}]}
    tiny.write_lines(records, [{"prompt": "1+1"}, chat, {"prompt": "3+3"}])

    def shown(**more):
        generation.main(GenerateOptions(folder, max_new_tokens=2, dtype="float32", **more))
        return capsys.readouterr()

    wanted = shown(prompt=tuple(asked))
    assert [line for line in wanted.out.splitlines() if line.startswith("> ")] == [f"> {each}" for each in asked]
    assert shown(prompts=text).out == shown(prompts=records).out == wanted.out
    stdin(monkeypatch, "1+1\né 2\n3+3\n")
    assert shown(prompts=Path("-")).out == wanted.out
    stdin(monkeypatch, "1+1\n\n2")
    whole = shown(prompt=("-",))
    assert whole.out == shown(prompt=("1+1\n\n2",)).out and "WARNING the answer is cut short" in whole.err
    assert f"{text}:3: the answer is cut short by --max-new-tokens 2" in shown(prompts=text).err
    output = tmp_path / "answers.jsonl"
    told = shown(prompts=records, output=output, condition="GPT3", system="Add.")
    found = [json.loads(line) for line in output.read_text("utf-8").splitlines()]
    assert "3 answers" in told.err and not told.out
    assert [each["items"][0]["content"] for each in found] == asked and found[1]["source"] == f"{records}:2"
    assert {(each["condition"], each["system"], len(each["items"]), each["is_cut"]) for each in found} == {
        ("GPT3", "Add.", 2, True)
    }
    again = shown(prompt=tuple(asked), condition="GPT3", system="Add.").out
    assert again == "".join(f"> {each['items'][0]['content']}\n{each['items'][1]['content']}\n" for each in found)


def test_answers_are_printed_to_the_letter(monkeypatch, capsys, model):
    said = ":smile: [bold]x[/] \x1b[31m\tred\x07" + "long " * 50
    monkeypatch.setattr(prompts, "complete", lambda *_, **__: [(said, False)])
    generation.main(options(model(PLAIN)))
    assert capsys.readouterr().out == said + "\n"
    monkeypatch.setattr(stdout, "_force_terminal", True)
    generation.main(options(model(PLAIN)))
    assert capsys.readouterr().out == said.replace("\x1b", "").replace("\x07", "") + "\n"


def test_an_answer_ends_where_generation_config_says_too(model, capsys):
    """As in servers: models still say the end of their base."""
    folder = model(PLAIN)
    whole = tiny.generated(GenerateOptions(folder, ("1+1",), max_new_tokens=6, dtype="float32"))[0]
    letter = next(each for each in whole if each.isascii())
    settings = folder / "generation_config.json"
    for path in (settings, folder / SUMS):  # links
        path.unlink(missing_ok=True)
    settings.write_text(json.dumps({"eos_token_id": [257, *tokenizers.load(folder).encode(letter)]}))
    asked = GenerateOptions(folder, ("1+1",), max_new_tokens=6, dtype="float32")
    ended = tiny.generated(asked)[0]
    chat = open_chat(ChatOptions(folder, max_new_tokens=6, dtype="float32"))
    assert ended == whole[: whole.index(letter)] == "".join(chat.ask("1+1"))
    generation.main(asked)
    assert "cut" not in capsys.readouterr().err


def test_guidance_leads_away_from_the_other_class_or_from_none(model, monkeypatch):
    monkeypatch.setattr(prompts, "PROMPTS_PER_BATCH", 1)
    folder = model(PLAIN | {"classes": ["GPT4", "GPT3"]})
    asked = GenerateOptions(folder, ("1+1", "22+2"), max_new_tokens=8, dtype="float32", condition="GPT4")

    def said(**more):
        return tiny.generated(replace(asked, **more))

    assert said(guidance=1.0) == said(guidance=1.0, against="none") == said()
    assert said(guidance=0.0) == said(guidance=0.0, against="GPT3") == said(condition="GPT3")
    assert said(guidance=0.0, against="none") == said(condition="")
    assert len({*map(tuple, (said(), said(guidance=40.0), said(guidance=40.0, against="none")))}) == 3


@pytest.mark.parametrize(
    ("classes", "more", "needle"),
    [
        (["GPT4", "GPT3", ""], {}, "--guidance needs --against CLASS, .*; the model knows 'GPT4', 'GPT3', none"),
        (["GPT4"], {}, "--guidance needs --against CLASS, .*; the model knows 'GPT4'"),
        ([], {}, "--against none for no class; the model does not say which classes it knows"),
        (["GPT4", "GPT3"], {"against": "gpt3"}, "--against: the model has no class 'gpt3'; did you mean 'GPT3'"),
        (["GPT4", "GPT3"], {"against": "GPT4"}, "--against GPT4: answers are asked of it"),
        (["GPT4", "GPT3"], {"against": "none", "condition": ""}, "--against none: answers are asked of it"),
    ],
)
def test_a_class_that_guidance_cannot_lead_away_from_is_refused(model, classes, more, needle):
    with pytest.raises(ConfigError, match=needle):
        answer(options(model(PLAIN | {"classes": classes}), guidance=1.5, **({"condition": "GPT4"} | more)))


def test_draws_of_later_batches_are_their_own(model, monkeypatch, capsys):
    monkeypatch.setattr(prompts, "PROMPTS_PER_BATCH", 1)
    many = GenerateOptions(model(PLAIN), ("1+1",) * 3, max_new_tokens=8, dtype="float32", temperature=2.0)
    _, batches = answer(many)
    assert len({text for [(_, text, _)] in batches}) == 3


def stdin(monkeypatch, text):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))


@pytest.mark.parametrize(
    ("more", "needle"),
    [
        ({}, "nothing to answer; give --prompt"),
        ({"prompt": ("1" * 600,)}, "prompt 1: the prompt has 6.. tokens, but the model's context is 512"),
        ({"prompts": Path("no.txt")}, "no.txt"),
        ({"prompts": Path("no.jsonl")}, "no.jsonl: no such file"),
        ({"prompt": ("a",), "output": Path("no/where")}, "no/where: cannot be written"),
        ({"prompt": ("a",), "template": "base"}, "chat.template"),
    ],
)
def test_what_cannot_be_asked_is_named(model, more, needle):
    with pytest.raises((ConfigError, DataError, OSError), match=needle):
        answer(GenerateOptions(model(PLAIN), dtype="float32", **more))
