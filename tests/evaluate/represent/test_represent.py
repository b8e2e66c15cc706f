"""`ochat represent` end to end: states are transformers', a conversation's do not depend on its neighbours, files are
written, what cannot be compared is named: pytest tests/evaluate/represent"""

from __future__ import annotations

import json
import xml.etree.ElementTree
from collections import Counter
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
from ochat.evaluate.represent import (
    compared_models,
    hidden_states,
    measure,
    sample,
)
from ochat.export.hf_folder import export
from ochat.model import hf
from ochat.text import template as templates
from ochat.text import tokenizer as tokenizers
from tests import tiny

for package in represent_module.PACKAGES:
    pytest.importorskip(package, reason="the extra `report` is not installed")


@pytest.fixture(scope="module")
def small(world, alone, tmp_path_factory):
    """A run with classes, one without them, and conversations as they were given and prepared."""
    folder = tmp_path_factory.mktemp("represent")
    chats = world.folder / "conversations.jsonl"
    prepare([chats], world.base, "openchat_v3.2", folder / "plain", conditions="ignore", progress=False)
    sft = folder / "sft"
    tiny.train(world, sft, f"--data.path={folder / 'plain'}", "--data.max_steps=4", "--weights.source=none")
    export(sft, folder / "exported", dtype="float32")
    return SimpleNamespace(
        chats=chats, plain=folder / "plain", crlft=world.folder / "alone", sft=folder / "exported", folder=folder
    )


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """UMAP takes ten seconds to compile; test_probe.py has it for real."""
    monkeypatch.setattr(measure, "umap", lambda found, distance, seed: found[:, :2] + seed)


def read(world, chats, per_class=20, classes=()):
    tokenizer, template = tokenizers.load(world.base), templates.load("openchat_v3.2")
    drawn = sample.draw(held_out.read_held_out(chats, template, tokenizer), classes, per_class, seed=0)
    return drawn, *drawn.written("GPT4", template, tokenizer), template, tokenizer


def test_states_are_the_mean_of_transformers_last_hidden_states(world, small):
    transformers = pytest.importorskip("transformers")
    _, own, _, _, _ = read(world, small.chats)
    found = hidden_states.pooled(hf.load(world.base, dtype="float32"), own)
    assert found["all"].shape == found["answers"].shape == (40, 32) and found["all"].dtype == np.float32
    theirs = transformers.AutoModelForCausalLM.from_pretrained(world.base, dtype=torch.float32)
    for row, example in enumerate(own):  # each alone
        with torch.no_grad():
            out = theirs(torch.from_numpy(example.input_ids)[None], output_hidden_states=True)
        hidden = out.hidden_states[-1][0].double().numpy()
        is_answer = example.loss_weights != 0
        assert is_answer.any() and not is_answer.all()
        for tokens, wanted in (("all", hidden.mean(0)), ("answers", hidden[is_answer].mean(0))):
            assert np.abs(found[tokens][row] - wanted).max() < 2e-5 * np.abs(hidden).max()


def test_packed_is_alone(world, small, monkeypatch):
    _, own, _, _, _ = read(world, small.chats)
    model = hf.load(world.base, dtype="float32")
    monkeypatch.setattr("ochat.evaluate.swap.TOKENS_PER_PASS", 300)  # several to a pass, and several passes
    counts: list[int] = []
    packed = hidden_states.pooled(model, own, counts.append)
    assert sum(counts) == 40 and 1 < len(counts) < 40
    for row, example in enumerate(own):
        alone = hidden_states.pooled(model, [example])
        for tokens in hidden_states.TOKENS:
            assert np.abs(packed[tokens][row] - alone[tokens][0]).max() < 1e-5


def test_words_are_the_answers_and_nothing_else(world, small):
    _, own, one, _, tokenizer = read(world, small.chats)
    model = hf.load(world.base, dtype="float32")
    found = hidden_states.words(model, own)
    assert (found == hidden_states.words(model, one)).all()
    weight = model.embed.weight.detach().numpy()
    example = own[3]
    ids = example.input_ids[example.loss_weights != 0]
    text = tokenizer.decode(ids.tolist())
    assert ":" not in text and "+" not in text and any(figure in text for figure in "0123456789"), text
    assert np.allclose(found[3], weight[ids].mean(0), atol=1e-6)


def test_only_the_prefix_changes_between_own_and_one(world, small):
    drawn, own, one, template, tokenizer = read(world, small.chats)
    for label, mine, shared in zip(drawn.labels, own, one, strict=True):
        texts = [tokenizer.decode(each.input_ids.tolist()) for each in (mine, shared)]
        name = drawn.classes[label]
        assert f"{name} Assistant:" in texts[0]
        assert texts[1] == texts[0].replace(f"{name} ", "GPT4 ")
        answers = [each.input_ids[each.loss_weights != 0].tolist() for each in (mine, shared)]
        assert answers[0] == answers[1]


def test_the_sample_is_even_and_decided_by_the_seed(world, small):
    tokenizer, template = tokenizers.load(world.base), templates.load("openchat_v3.2")
    everything = held_out.read_held_out(small.chats, template, tokenizer)

    def ids(seed, **more):
        drawn = sample.draw(everything, (), more.get("per_class", 15), seed)
        return [tuple(each.input_ids) for each in drawn.conversations], drawn

    (first, drawn), (again, _), (other, _) = ids(0), ids(0), ids(1)
    assert first == again != other
    assert drawn.classes == ("GPT3", "GPT4") and (np.bincount(drawn.labels) == 15).all()
    assert Counter(each.condition for each in drawn.conversations) == {"GPT3": 15, "GPT4": 15}
    _, most = ids(0, per_class=500)
    assert (np.bincount(most.labels) == 20).all()  # the expert class has no more
    # the same prompts under the other class, and all of them after another system text
    records = [json.loads(line) for line in small.chats.read_text().splitlines()[:30]]
    twins = [record | {"condition": "GPT4" if record["condition"] == "GPT3" else "GPT3"} for record in records]
    everyone = records + twins + [record | {"system": "Be brief."} for record in records + twins]
    path = small.folder / "twins.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in everyone))
    for data in (path, _prepared(world, path)):
        drawn = sample.draw(held_out.read_held_out(data, template, tokenizer), (), 60, 0)
        assert len(drawn.labels) == 120
        keys = {(r["system"], r["items"][0]["content"]) for r in everyone}
        assert drawn.prompts.max() + 1 == len(keys)


def _prepared(world, path: Path) -> Path:
    output = path.with_suffix(".prepared")
    prepare([path], world.base, "openchat_v3.2", output, progress=False)
    return output


def run(models, data, **more):
    return represent(
        RepresentOptions(models[0], data, compare=tuple(models[1:]), **{"dtype": "float32", "permutations": 19, **more})
    )


def test_the_command_draws_writes_and_shows(world, small, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    png, svg, again, numbers = (small.folder / name for name in ("map.png", "map.SVG", "again.svg", "map.json"))
    line = [str(small.sft), str(world.data), "--compare", str(small.crlft), "--labels", "only SFT", "C-RLFT <$1$>"]
    line += ["--per-class", "10", "--permutations", "19", "--dtype", "float32"]
    cli.run("represent", [*line, "--output", str(png), str(svg), "--numbers", str(numbers)])
    shown, record = capsys.readouterr().out, json.loads(numbers.read_text())
    from PIL import Image

    with Image.open(png) as image:
        assert image.width > 600 and image.height > 600
    assert xml.etree.ElementTree.parse(svg).getroot().tag == "{http://www.w3.org/2000/svg}svg"
    assert [model["label"] for model in record["models"]] == ["only SFT", "C-RLFT <$1$>"]
    assert record["sample"] == {"classes": ["GPT3", "GPT4"], "per_class": 10, "prompts": record["sample"]["prompts"]}
    assert [model["names_classes"] for model in record["models"]] == [False, True]
    assert "only SFT" in shown and "C-RLFT <$1$>" in shown and shown.count("* ") == 2  # two rows and the legend
    for model in record["models"]:
        for view, found in model["views"].items():
            low, high = found["probe"]["interval"]
            assert 0 <= low <= found["probe"]["accuracy"] <= high <= 1 and found["probe"]["p_value"] >= 1 / 20
            if model["names_classes"] or not view.startswith("one"):
                assert f"{found['silhouette']:.3f}" in shown
        assert np.array(model["points"]["pca"]).shape == np.array(model["points"]["umap"]).shape == (20, 2)
    sft = record["models"][0]["views"]
    assert sft["own_all"] == sft["one_all"] and sft["own_answers"] == sft["one_answers"]
    assert record["models"][1]["views"]["own_all"] != record["models"][1]["views"]["one_all"]
    # the same command gives the same numbers and the same picture
    cli.run("represent", [*line, "--output", str(again), "--numbers", str(small.folder / "again.json")])
    assert json.loads((small.folder / "again.json").read_text()) == record and again.read_bytes() == svg.read_bytes()


def test_conversations_and_prepared_data_are_read_alike(world, small):
    """Also data prepared without classes: prefixes are the model's, not the data's."""

    def written(models, data, template=None):
        (model, *_), tokenizer = compared_models.find_models(models, ["a"], template, data)
        drawn = sample.draw(held_out.read_held_out(data, model.template, tokenizer), (), 15, 0)
        return [
            example.input_ids.tolist() for each in drawn.written("GPT3", model.template, tokenizer) for example in each
        ]

    by_run = [written([small.crlft], data) for data in (small.chats, world.data, small.plain)]
    assert by_run[0] == by_run[1] == by_run[2]
    assert written([world.base], small.chats, "openchat_v3.2") == written([world.base], world.data)


@pytest.mark.parametrize(
    ("more", "error", "named"),
    [
        ({"labels": ("a", "b")}, ConfigError, "--labels: 2 for 1 models"),
        ({"output": (Path("map.pdf"),)}, ConfigError, "map.pdf: expected a name that ends in .png or .svg"),
        ({"numbers": Path("/nowhere/x.json")}, ConfigError, "/nowhere/x.json: cannot be written"),
        ({"permutations": 5}, ConfigError, "--permutations 5"),
        ({"seed": -1}, ConfigError, "--seed -1"),
        ({"template": "openchat_v3.2"}, ConfigError, "--template openchat_v3.2: every model here has"),
        ({"per_class": 3}, ConfigError, "--per-class 3"),
        ({"classes": ("GPT4", "GPT5")}, ConfigError, r"GPT5.*it has GPT3 \(40\), GPT4 \(20\)"),
        ({"classes": ("GPT4",)}, DataError, "two classes are needed"),
        ({"one_prefix": "a<|end_of_turn|>"}, ConfigError, "spells a special token"),
        ({"device": "cuda:9"}, ConfigError, "--device cuda:9"),
    ],
)
def test_what_cannot_be_is_named_before_a_model_is_loaded(small, monkeypatch, more, error, named):
    monkeypatch.setattr("ochat.export.open_model.open_model", lambda *_, **__: pytest.fail("too late"))
    with pytest.raises(error, match=named):
        run([small.sft], small.chats, **more)


def test_too_few_answers_and_missing_packages_are_named(world, small, monkeypatch):
    few = small.folder / "few.jsonl"
    lines = small.chats.read_text().splitlines()
    few.write_text("\n".join([line for line in lines if "GPT3" in line] + [lines[0]]))
    with pytest.raises(DataError, match="class 'GPT4' has 1 conversations"):
        run([small.sft], few)
    asked = [json.loads(line) | {"system": ""} for line in lines]
    for place, record in enumerate(asked):
        record["items"][0]["content"] = f"prompt {place % 4}"
    few.write_text("\n".join(map(json.dumps, asked)))
    with pytest.raises(DataError, match="answer 4 different prompts, and 5 are needed"):
        run([small.sft], few)
    monkeypatch.setitem(represent_module.PACKAGES, "no_such_module", "no-such-package")
    with pytest.raises(ConfigError, match=r"no-such-package: pip install 'ochat-crlft\[report\]'"):
        run([small.sft], small.chats)


def test_models_that_cannot_stand_side_by_side_are_refused(world, small, tmp_path):
    tiny.write_base(tmp_path, tmp_path / "other", {"vocab_size": 261})
    tokenizer = json.loads((tmp_path / "other" / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append(tokenizer["added_tokens"][-1] | {"content": "<more>", "id": 259})
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ConfigError, match="other: has another tokenizer than"):
        run([small.sft, tmp_path / "other"], small.chats)
    with pytest.raises(ConfigError, match="has no openchat.json"):
        run([small.sft, world.base], small.chats)
    (tmp_path / "mine.toml").write_text(
        'context = 99\nprefix = "[{role}]"\neot = "<|end_of_turn|>"\nroles = {user = "U", assistant = "A"}'
    )
    with pytest.raises(ConfigError, match="speaks another template"):
        run([small.sft, world.base], small.chats, template=str(tmp_path / "mine.toml"))
    with pytest.raises(ConfigError, match="speaks another template .* than the data"):
        prepare([small.chats], world.base, str(tmp_path / "mine.toml"), tmp_path / "data", progress=False)
        run([small.sft], tmp_path / "data")


def test_the_one_prefix_is_the_class_that_models_answer_as(world, small):
    found, tokenizer = compared_models.find_models([small.sft, small.crlft], ["a", "b"], None, small.chats)
    assert compared_models.one_prefix(None, found, ("x", "y"), tokenizer) == "GPT4"
    assert compared_models.one_prefix(None, found[:1], ("x", "y"), tokenizer) == "x"
    assert compared_models.one_prefix("y", found, ("x", "y"), tokenizer) == "y"
