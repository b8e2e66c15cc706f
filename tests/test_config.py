"""The configuration: what is written is read back, and everything unknown, mistyped or meaningless is refused by
name."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ochat import config as configuration
from ochat.errors import ConfigError

MINIMAL = '[base]\npath = "base"\n[data]\npath = "data"\n'


@pytest.fixture
def toml(tmp_path):
    def write(text=""):
        path = tmp_path / "config.toml"
        path.write_text(MINIMAL + text)
        return path

    return write


def test_options_win_over_the_file(toml):
    path = toml('token_budget = 7\n[optim]\nlr = "auto"\n')
    config = configuration.load(path, ["--optim.lr=2e-5", "--run.dir=runs/a b", "--optim.betas=[0.8, 0.9]"])
    assert config.data.token_budget == 7
    assert config.optim.lr == 2e-5
    assert config.run.dir == "runs/a b"
    assert config.optim.betas == (0.8, 0.9)


def test_an_option_is_text_where_text_is_wanted(toml):
    config = configuration.load(toml(), ["--run.dir=2024", "--base.path=true", '--data.path="a b"', "--run.seed=7"])
    assert (config.run.dir, config.base.path, config.data.path, config.run.seed) == ("2024", "true", "a b", 7)


def test_a_class_with_dots_or_blanks_is_quoted(toml):
    options = ['--classes."gpt-3.5 turbo".weight=0.1', "--classes.GPT4 Correct.weight=1"]
    assert configuration.load(toml(), options).classes.keys() == {"gpt-3.5 turbo", "GPT4 Correct"}


def test_classes_come_from_tables_and_options(toml):
    path = toml("[classes.GPT4]\nreward = 1\n")
    config = configuration.load(path, ["--classes.GPT3.weight=0.1"])
    assert config.classes["GPT4"].reward == 1.0
    assert config.classes["GPT3"].weight == 0.1


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--optim.learning_rate=1", "optim.learning_rate"),
        ("--train.log_evry=1", "did you mean 'log_every'"),
        ("--optimizer.lr=1", "did you mean 'optim'"),
        ("--data.token_budget=8k", "data.token_budget = '8k': expected a whole number"),
        ("--data.token_budget=0", "data.token_budget = 0"),
        ("--data.token_budget=true", "expected a whole number"),
        ("--train.dtype=float16", "expected one of 'bfloat16', 'float32'"),
        ("--optim.lr=fast", "optim.lr = 'fast'"),
        ("--optim.lr=-1.0", "optim.lr = -1.0"),
        ("--optim.lr=nan", "optim.lr"),
        ("--optim.betas=[0.9]", "an array of 2"),
        ("--optim.betas=[0.9, 1.0]", "optim.betas[1] = 1.0"),
        ("--optim.warmup_ratio=5", "a share"),
        ("--data.subsample.GPT3=2", "data.subsample.GPT3"),
        ("--parallel.reduce_dtype=bfloat16", "parallel.reduce_dtype = 'bfloat16': expected \"float32\" beside"),
        ("--parallel.offload=moments", "parallel.offload = 'moments'"),
        ("--classes.GPT4.reward=1 ", None),
        ("--classes.GPT4={}", "either reward or weight"),
        ("--base.path=", "base.path"),
        ("optim.lr=1", "expected --section.key=value"),
        ("--verbose", "expected --section.key=value"),
    ],
)
def test_refusals_name_the_key(toml, option, message):
    if message is None:
        configuration.load(toml(), [option])
        return
    with pytest.raises(ConfigError) as error:
        configuration.load(toml(), [option])
    assert message in str(error.value)


@pytest.mark.parametrize("recompute", ["none", "elementwise"])
def test_inputs_of_blocks_wait_on_the_host_only_where_nothing_else_is_kept(toml, recompute):
    options = ["--train.offload_activations=true", f"--train.recompute={recompute}"]
    with pytest.raises(ConfigError, match="train.offload_activations = True: expected false beside"):
        configuration.load(toml(), options)
    assert configuration.load(toml(), options[:1]).train.recompute == "auto"


def test_missing_and_broken_files_are_named(tmp_path):
    with pytest.raises(ConfigError, match="no such configuration file"):
        configuration.load(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("[run\n")
    with pytest.raises(ConfigError, match=r"bad\.toml"):
        configuration.load(tmp_path / "bad.toml")


@pytest.mark.parametrize(("old", "name"), [("true", "all"), ("false", "none"), ("optimizer", "optimizer")])
def test_offload_has_names_and_still_reads_true_and_false(toml, old, name):
    config = configuration.load(toml(), [f"--parallel.offload={old}"])
    assert config.parallel.offload == name and f'offload = "{name}"' in configuration.dump(config)


@given(st.text(), st.text(min_size=1), st.floats(0.001, 1), st.booleans())
def test_dump_is_read_back_equal(tmp_path_factory, prompt, name, share, flag):
    prompt, name = (text.encode("utf-8", "replace").decode() for text in (prompt, name))
    original = configuration.Config(
        base=configuration.BaseConfig("b"),
        data=configuration.DataConfig("d", subsample={name: share}),
        classes={name: configuration.ClassConfig(reward=share)},
        samples=configuration.SamplesConfig(prompts=(prompt,)),
        run=configuration.RunConfig(deterministic=flag),
    )
    path = tmp_path_factory.mktemp("dump") / "config.toml"
    path.write_text(configuration.dump(original), encoding="utf-8", newline="")
    assert configuration.load(path) == original


def test_every_section_is_a_frozen_dataclass():
    for section in dataclasses.fields(configuration.Config):
        value = getattr(configuration.Config(), section.name)
        if section.name != "classes":
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(value, dataclasses.fields(value)[0].name, None)
