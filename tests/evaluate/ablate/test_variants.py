"""A variant differs from C-RLFT by exactly its switches, and trains on exactly the data that it names."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from ochat import cli
from ochat import config as configuration
from ochat.errors import ConfigError
from ochat.evaluate.ablate import variants
from ochat.evaluate.ablate.ablation_dir import AblationDir
from ochat.model.config import ModelConfig
from ochat.text.tokenizer import load as load_tokenizer
from ochat.train import build
from tests.evaluate.ablate.conftest import STEPS


def flat(config):
    return {f"{section}.{key}": value for section, values in msgspec.to_builtins(config).items()
            for key, value in values.items()}  # fmt: skip


def test_a_variant_is_exactly_its_switches(file):
    base, options = variants.read_config(file, ["--ablate.subsample=[0.6]"])
    runs = variants.runs(base, options)
    assert [run.seed for run in runs] == [3] * 8 + [5] * 8 and len({run.config.run.dir for run in runs}) == 16
    ours, *others = (flat(run.config) for run in runs[:8])
    assert ours["weights.source"] == "auto" and ours["classes.GPT3"]["weight"] == 0.1
    (tokens,) = {run.config.data.mix["all"].tokens for run in runs}
    assert tokens == STEPS * 2 * 192
    plain = {"path": ours["data.mix"]["all"]["path"].replace("condition", "plain")}
    plain = {"data.mix": {"all": ours["data.mix"]["all"] | plain}}
    switches = {
        "no-reward": {"weights.source": "none"},
        "no-condition": plain,
        "sft": plain | {"weights.source": "none"},
        "only-expert": {"data.only_class": "GPT4"},
        "only-suboptimal": {"data.only_class": "GPT3"},
        "c-rlft-expert-0.6": {"data.subsample": {"GPT4": 0.6}},
        "c-rlft-suboptimal-0.6": {"data.subsample": {"GPT3": 0.6}},
    }
    for run, other, (name, wanted) in zip(runs[1:8], others, switches.items(), strict=True):
        changed = {key: value for key, value in other.items() if value != ours[key] and key != "run.dir"}
        assert run.variant.name == name and changed == wanted
    for one, other in zip(runs[:8], runs[8:], strict=True):
        changed = {key for key, value in flat(one.config).items() if flat(other.config)[key] != value}
        assert changed == {"run.dir", "run.seed"}


def test_what_a_variant_trains_on(file, tmp_path):
    """Classes, weights and prefixes of every conversation, and the same number of full steps for all."""
    ablation = AblationDir(*variants.read_config(file, [f"--ablate.dir={tmp_path}"]))
    ablation.open()
    tokenizer = load_tokenizer(ablation.base.base.path)
    for run in ablation.runs[:6]:
        data, variant = build.open_dataset(run.config), run.variant
        classes = {"only-expert": {"GPT4"}, "only-suboptimal": {"GPT3"}}.get(variant.name, {"GPT3", "GPT4"})
        assert {example.condition for example in data} == classes
        for example in data:
            weights = set(example.loss_weights.tolist())
            assert weights == {0.0, np.float32(1.0 if not variant.has_reward or example.condition == "GPT4" else 0.1)}
            text = tokenizer.decode(example.input_ids.tolist())
            is_named = f"{example.condition} User:" in text and f"{example.condition} Assistant:" in text
            assert is_named == variant.has_condition and "User:" in text
        assert data.template.condition_roles == ("both" if variant.has_condition else "none")
        loader = build.open_loader(run.config, data, ModelConfig.load(run.config.base.path))
        filled = [sum(batch.num_tokens for batch in loader.step(step)) for step in range(loader.num_steps)]
        assert loader.num_steps == STEPS and min(filled) > 0.8 * 2 * 192


@pytest.mark.parametrize(
    ("more", "needle"),
    [
        ("--ablate.seed=[1]", "'ablate.seed'.*'seeds'"),
        ('--ablate.variants=["rlft"]', "ablate.variants.*'rlft'.*'c-rlft'"),
        ("--ablate.held_out=chats.jsonl", "ablate.held_out = 'chats.jsonl'"),
        ("--ablate.held_out=[]", "ablate.held_out"),
        ("--ablate.suboptimal=GPT4", "ablate.suboptimal"),
        ("--ablate.seeds=[1, 1]", "ablate.seeds"),
        ("--ablate.subsample=[1.0]", "ablate.subsample = 1.0"),
        ("--optim.lr=auto", "optim.lr = 'auto'"),
        ("--data.max_steps=0", "data.max_steps = 0"),
        ("--data.path=x", "data.path.*ochat ablate"),
        ("--run.dir=x", "run.dir.*ochat ablate"),
        ("--weights.source=none", "weights.source = 'none'"),
    ],
)
def test_wrong_options_are_named(file, more, needle):
    with pytest.raises(ConfigError, match=needle):
        variants.read_config(file, [more])


def test_the_section_belongs_to_ablate_alone(file, tmp_path):
    (tmp_path / "plain.toml").write_text(file.read_text().split("[ablate]")[0])
    for read, path in ((configuration.load, file), (variants.read_config, tmp_path / "plain.toml")):
        with pytest.raises(ConfigError, match=r"section \[ablate\]"):
            read(path)


def test_help_lists_the_keys_of_its_section(capsys):
    with pytest.raises(SystemExit):
        cli.call("ablate", ["--help-all"])
    shown = capsys.readouterr().out
    assert all(f"ablate.{key.name}" in shown for key in msgspec.structs.fields(variants.AblateConfig))
