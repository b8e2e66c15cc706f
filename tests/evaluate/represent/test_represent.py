"""`ochat represent`: states are transformers', a conversation's do not depend on its neighbours, files are written, bad
input is named: pytest tests/evaluate/represent"""

from __future__ import annotations

import json
import xml.etree.ElementTree
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ochat import cli
from ochat.commands import represent as represent_module
from ochat.commands.represent import RepresentOptions, represent
from ochat.data.prepare import prepare
from ochat.errors import ConfigError, DataError
from ochat.evaluate import held_out
from ochat.evaluate.represent import compared, measure
from ochat.model import hf
from ochat.text import template as templates
from ochat.text import tokenizer as tokenizers
from tests import tiny
from tests.evaluate.conftest import read_lines
from tests.tiny import write_lines

for package in represent_module.PACKAGES:
    pytest.importorskip(package, reason="the extra `report` is not installed")
OTHER = 'context = 99\nprefix = "[{role}]"\neot = "<|end_of_turn|>"\nroles = {user = "U", assistant = "A"}'


@pytest.fixture(scope="module")
def small(world, alone, chats, tmp_path_factory):
    """The run with classes, one without them, data prepared without them and by another template, and a base."""
    folder = tmp_path_factory.mktemp("represent")
    (folder / "mine.toml").write_text(OTHER)
    prepare([chats], world.base, "openchat_v3.2", folder / "plain", conditions="ignore", progress=False)
    prepare([chats], world.base, str(folder / "mine.toml"), folder / "other-data", progress=False)
    options = (f"--data.path={folder / 'plain'}", "--data.max_steps=4", "--weights.source=none")
    tiny.train(world, folder / "sft", *options)
    return SimpleNamespace(folder=folder, crlft=world.folder / "alone", sft=folder / "sft", base=world.base)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """UMAP takes ten seconds to compile; test_probe.py has it for real."""
    monkeypatch.setattr(measure, "umap", lambda found, distance, seed: found[:, :2] + seed)


@pytest.fixture(scope="module")
def read(world, chats):
    """Twenty conversations of each class, written under their own class and under GPT4, and the base."""
    tokenizer, template = tokenizers.load(world.base), templates.load("openchat_v3.2")
    conversations = held_out.read_held_out(chats, template, tokenizer)
    drawn = compared.draw(conversations, (), 20, seed=0)
    own, one = drawn.written("GPT4", template, tokenizer)
    model, both = hf.load(world.base, dtype="float32"), {"template": template, "tokenizer": tokenizer}
    return SimpleNamespace(all=conversations, drawn=drawn, own=own, one=one, model=model, **both)


def test_states_are_the_mean_of_transformers_last_hidden_states_packed_or_alone(world, read, monkeypatch):
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr("ochat.evaluate.swap.TOKENS_PER_PASS", 300)  # several to a pass, and several passes
    counts: list[int] = []
    found = measure.pooled(read.model, read.own, counts.append)
    assert sum(counts) == 40 and 1 < len(counts) < 40
    assert found["all"].shape == found["answers"].shape == (40, 32) and found["all"].dtype == np.float32
    theirs = transformers.AutoModelForCausalLM.from_pretrained(world.base, dtype=torch.float32)
    for row, example in enumerate(read.own):
        with torch.no_grad():
            out = theirs(torch.from_numpy(example.input_ids)[None], output_hidden_states=True)
        hidden = out.hidden_states[-1][0].double().numpy()
        is_answer = example.loss_weights != 0
        assert is_answer.any() and not is_answer.all()
        for tokens, wanted in (("all", hidden.mean(0)), ("answers", hidden[is_answer].mean(0))):
            assert np.abs(found[tokens][row] - wanted).max() < 2e-5 * np.abs(hidden).max()


def test_only_the_prefix_changes_between_own_and_one_and_words_are_the_answers(read):
    found = measure.words(read.model, read.own)
    assert (found == measure.words(read.model, read.one)).all()
    for label, mine, shared, words in zip(read.drawn.labels, read.own, read.one, found, strict=True):
        texts = [read.tokenizer.decode(each.input_ids.tolist()) for each in (mine, shared)]
        name = read.drawn.classes[label]
        assert f"{name} Assistant:" in texts[0] and texts[1] == texts[0].replace(f"{name} ", "GPT4 ")
        answers, ids = (each.input_ids[each.loss_weights != 0].tolist() for each in (mine, shared))
        said = read.tokenizer.decode(ids)
        assert answers == ids and ":" not in said and "+" not in said
        assert np.allclose(words, read.model.embed.weight.detach().numpy()[ids].mean(0), atol=1e-6)


def test_the_sample_is_even_and_decided_by_the_seed(world, chats, read, tmp_path):
    first, again, other = (compared.draw(read.all, (), 15, seed) for seed in (0, 0, 1))
    ids = [[tuple(each.input_ids) for each in drawn.conversations] for drawn in (first, again, other)]
    assert ids[0] == ids[1] != ids[2] and (np.bincount(first.labels) == 15).all()
    assert [each.condition for each in first.conversations] == ["GPT3"] * 15 + ["GPT4"] * 15
    assert (np.bincount(compared.draw(read.all, (), 500, 0).labels) == 20).all()  # the expert class has no more
    # the same prompts under the other class, and all of them after another system text
    records = read_lines(chats)[:30]
    records += [record | {"condition": "GPT4" if record["condition"] == "GPT3" else "GPT3"} for record in records]
    records += [record | {"system": "Be brief."} for record in records]
    path = write_lines(tmp_path / "twins.jsonl", records)
    prepare([path], world.base, "openchat_v3.2", tmp_path / "prepared", progress=False)
    for data in (path, tmp_path / "prepared"):
        drawn = compared.draw(held_out.read_held_out(data, read.template, read.tokenizer), (), 60, 0)
        assert len(drawn.labels) == 120
        assert drawn.prompts.max() + 1 == len({(r["system"], r["items"][0]["content"]) for r in records})


def test_the_command_draws_writes_and_shows(world, small, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    png, svg, again, numbers = (tmp_path / name for name in ("map.png", "map.SVG", "again.svg", "map.json"))
    line = [str(small.sft), str(world.data), "--compare", str(small.crlft), "--labels", "only SFT", "C-RLFT <$1$>"]
    line += ["--per-class", "10", "--permutations", "19", "--dtype", "float32"]
    cli.run("represent", [*line, "--output", str(png), str(svg), "--numbers", str(numbers)])
    shown, record = capsys.readouterr().out, json.loads(numbers.read_text())
    from PIL import Image

    with Image.open(png) as image:
        assert image.width > 600 and image.height > 600
    assert xml.etree.ElementTree.parse(svg).getroot().tag == "{http://www.w3.org/2000/svg}svg"
    named = [(model["label"], model["names_classes"]) for model in record["models"]]
    assert named == [("only SFT", False), ("C-RLFT <$1$>", True)] and all(label in shown for label, _ in named)
    assert record["sample"] == {"classes": ["GPT3", "GPT4"], "per_class": 10, "prompts": record["sample"]["prompts"]}
    assert shown.count("* ") == 2  # two rows and the legend
    for model in record["models"]:
        for view, found in model["views"].items():
            low, high = found["probe"]["interval"]
            assert 0 <= low <= found["probe"]["accuracy"] <= high <= 1 and found["probe"]["p_value"] >= 1 / 20
            if model["names_classes"] or not view.startswith("one"):
                assert f"{found['silhouette']:.3f}" in shown
        assert np.array(model["points"]["pca"]).shape == np.array(model["points"]["umap"]).shape == (20, 2)
        is_alike = [model["views"][f"own_{name}"] == model["views"][f"one_{name}"] for name in ("all", "answers")]
        assert is_alike == [not model["names_classes"]] * 2
    # the same command gives the same numbers and the same picture
    cli.run("represent", [*line, "--output", str(again), "--numbers", str(numbers)])
    assert json.loads(numbers.read_text()) == record and again.read_bytes() == svg.read_bytes()


def test_conversations_and_prepared_data_are_read_alike(world, chats, small):
    """Also data prepared without classes: prefixes are the model's, not the data's."""

    def written(model, data, template=None):
        (model, *_), tokenizer = compared.find_models([model], ["a"], template, data)
        drawn = compared.draw(held_out.read_held_out(data, model.template, tokenizer), (), 15, 0)
        pairs = drawn.written("GPT3", model.template, tokenizer)
        return [example.input_ids.tolist() for each in pairs for example in each]

    by_run = [written(small.crlft, data) for data in (chats, world.data, small.folder / "plain")]
    assert by_run[0] == by_run[1] == by_run[2]
    assert written(small.base, chats, "openchat_v3.2") == written(small.base, world.data)


def few_of_a_class(records):
    return [record for record in records if record["condition"] == "GPT3"] + records[:1]


def few_prompts(records):
    items = [[{"role": "user", "content": f"{i % 4}"}, *record["items"][1:]] for i, record in enumerate(records)]
    return [record | {"system": "", "items": each} for record, each in zip(records, items, strict=True)]


@pytest.mark.parametrize(
    ("models", "more", "error", "needle"),
    [
        (["sft"], {"labels": ("a", "b")}, ConfigError, "--labels"),
        (["sft"], {"output": (Path("map.pdf"),)}, ConfigError, "map.pdf.*png"),
        (["sft"], {"numbers": Path("/nowhere/x.json")}, ConfigError, "/nowhere/x.json"),
        (["sft"], {"permutations": 5}, ConfigError, "--permutations 5"),
        (["sft"], {"seed": -1}, ConfigError, "--seed -1"),
        (["sft"], {"template": "openchat_v3.2"}, ConfigError, "--template openchat_v3.2"),
        (["sft"], {"per_class": 3}, ConfigError, "--per-class 3"),
        (["sft"], {"classes": ("GPT4", "GPT5")}, ConfigError, r"GPT5.*GPT3 \(40\), GPT4 \(20\)"),
        (["sft"], {"classes": ("GPT4",)}, DataError, "two classes"),
        (["sft"], {"one_prefix": "a<|end_of_turn|>"}, ConfigError, "--one-prefix"),
        (["sft"], {"device": "cuda:9"}, ConfigError, "--device cuda:9"),
        (["sft"], {"data": few_of_a_class}, DataError, "'GPT4' has 1 "),
        (["sft"], {"data": few_prompts}, DataError, "4 different prompts"),
        (["sft"], {"data": "other-data"}, ConfigError, "another template .* than the data"),
        (["sft", "other"], {}, ConfigError, "another tokenizer"),
        (["sft", "base"], {}, ConfigError, "openchat.json"),
        (["sft", "base"], {"template": "mine.toml"}, ConfigError, "another template"),
    ],
)
def test_bad_input_is_named_before_a_model_is_loaded(
    small, chats, other_base, tmp_path, monkeypatch, models, more, error, needle
):
    monkeypatch.setattr("ochat.export.open_model.open_model", lambda *_, **__: pytest.fail("too late"))
    data = more.get("data", chats)
    data = write_lines(tmp_path / "few.jsonl", data(read_lines(chats))) if callable(data) else small.folder / data
    more = {"dtype": "float32", "permutations": 19} | more | {"data": data}
    if more.get("template") == "mine.toml":
        more["template"] = str(small.folder / "mine.toml")
    first, *others = (other_base if name == "other" else getattr(small, name) for name in models)
    with pytest.raises(error, match=needle):
        represent(RepresentOptions(first, compare=tuple(others), **more))


def test_a_missing_package_is_named(small, chats, monkeypatch):
    monkeypatch.setitem(represent_module.PACKAGES, "no_such_module", "no-such-package")
    with pytest.raises(ConfigError, match=r"no-such-package.*pip install 'ochat-crlft\[report\]'"):
        represent(RepresentOptions(small.sft, chats))


def test_the_one_prefix_is_the_class_that_models_answer_as(small, chats):
    found, tokenizer = compared.find_models([small.sft, small.crlft], ["a", "b"], None, chats)
    for name, models, wanted in ((None, found, "GPT4"), (None, found[:1], "x"), ("y", found, "y")):
        assert compared.one_prefix(name, models, ("x", "y"), tokenizer) == wanted
