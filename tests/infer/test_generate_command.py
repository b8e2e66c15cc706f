"""`ochat generate` names what cannot be, and answers unknown classes: pytest tests/infer/test_generate_command.py"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ochat.commands import generate as generation
from ochat.commands.generate import GenerateOptions, answer
from ochat.errors import ConfigError
from ochat.model.device import find_device
from ochat.text import tokenizer as tokenizers
from ochat.text.openchat_json import load_template


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
    ("classes", "condition", "warned"),
    [
        (["GPT4", "GPT3"], "A [x]", "'A [x]'; it knows 'GPT4', 'GPT3'"),
        (["good", ""], None, "'GPT4'; it knows 'good', none"),
        (["GPT4", "GPT3"], "GPT3", ""),
        (["GPT4", "GPT3"], "", ""),
    ],
)
def test_an_unknown_class_is_warned_of_on_stderr_and_answered(model, capsys, classes, condition, warned):
    generation.main(options(model(PLAIN | {"classes": classes}), condition=condition))
    shown = capsys.readouterr()
    assert shown.out and "WARNING" not in shown.out
    assert warned in shown.err and bool(warned) == ("WARNING" in shown.err)
