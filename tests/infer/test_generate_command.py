"""`ochat generate`: what cannot be is named: pytest tests/infer/test_generate_command.py"""

from __future__ import annotations

import json

import pytest
import torch

from ochat.commands import generate as generation
from ochat.commands.generate import GenerateOptions, answer
from ochat.errors import ConfigError
from ochat.model.device import find_device
from ochat.text.openchat_json import load_template


@pytest.fixture
def model(world, tmp_path):
    """model(content) -> a folder with the tiny base, and openchat.json of this content (None: without)."""
    for file in world.base.iterdir():
        (tmp_path / file.name).symlink_to(file)

    def describe(content):
        if content is not None:
            (tmp_path / "openchat.json").write_text(content if isinstance(content, str) else json.dumps(content))
        return tmp_path

    return describe


def options(folder, **more):
    return GenerateOptions(folder, ("1+1",), max_new_tokens=2, dtype="float32", **more)


@pytest.mark.parametrize("name", ["cuda", "cuda:7", "foo", "", "cpu:1", "meta"])
def test_a_device_that_is_not_there_is_named(world, name):
    if name == "cuda" and torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ConfigError, match=f"--device {name}: no such device here; there is cpu"):
        answer(options(world.base, template="openchat_v3.2", device=name))


def test_devices_that_are_there(monkeypatch):
    assert find_device("cpu") == "cpu"
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert find_device("auto") == "cpu"
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    assert [find_device(name) for name in ("cuda", "cuda:1", "auto")] == ["cuda", "cuda:1", "cuda"]
    with pytest.raises(ConfigError, match="--device cuda:2: .* there is cpu, cuda, cuda:0, cuda:1"):
        find_device("cuda:2")


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ('"openchat_v3.2"', "a JSON object is expected, not str"),
        ("{bad", "not valid JSON"),
        ({}, "--template NAME"),
        ({"step": 3}, "model_type must name a template"),
        ({"model_type": "openchat_v9"}, "model_type: template 'openchat_v9': no such name.*openchat_v3.2"),
        ({"model_type": "x", "template": "openchat_v3.2"}, "template describe it"),
        ({"model_type": "x", "template": {}}, "template: context is missing"),
        ({"model_type": "x", "template": {"context": "y"}}, "template: context has the wrong type"),
    ],
)
def test_a_description_that_names_no_template(model, content, named):
    folder = model(content)
    with pytest.raises(ConfigError, match=named) as error:
        answer(options(folder))
    assert str(folder) in str(error.value)


def test_a_folder_that_is_none_says_how_to_get_one(tmp_path):
    with pytest.raises(ConfigError, match="org/model is not a folder.*hf download org/model --local-dir DIR"):
        answer(GenerateOptions(generation.Path("org/model"), ("hi",)))


def test_a_described_template_needs_no_name_of_its_own(model):
    described = load_template(model({"model_type": "openchat_v3.2"}), None).to_dict()
    del described["name"]
    assert load_template(model({"model_type": "mine", "template": described}), None).name == "mine"


@pytest.mark.parametrize(
    ("content", "condition", "warned"),
    [
        ({"model_type": "openchat_v3.2", "classes": ["GPT4", "GPT3"]}, "A [x]", "'A [x]'; it knows 'GPT4', 'GPT3'"),
        ({"model_type": "openchat_v3.2", "classes": ["good", ""]}, None, "'GPT4'; it knows 'good', none"),
        ({"model_type": "openchat_v3.2", "classes": ["GPT4", "GPT3"]}, "GPT3", ""),
        ({"model_type": "openchat_v3.2", "classes": ["GPT4", "GPT3"]}, "", ""),
    ],
)  # fmt: skip
def test_an_unknown_class_is_warned_of_on_stderr_and_answered(model, capsys, content, condition, warned):
    generation.main(options(model(content), condition=condition))
    shown = capsys.readouterr()
    assert shown.out and "WARNING" not in shown.out
    assert warned in shown.err and bool(warned) == ("WARNING" in shown.err)
