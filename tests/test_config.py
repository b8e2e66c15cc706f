"""Configuration: what is written is read back; everything unknown, mistyped or meaningless is refused by name."""

import inspect
import re

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ochat import config as configuration
from ochat import overrides
from ochat.config import BaseConfig, ClassConfig, Config, DataConfig, EvalConfig, MixConfig, RunConfig, SamplesConfig
from ochat.errors import ConfigError

MIX = "--data.path= --data.mix.A.path=a"
IN_BACKWARD = "--optim.in_backward=true --optim.clip=0 --data.bins_per_step=1"
MINIMAL = '[base]\npath = "base"\n[data]\npath = "data"\n'


@pytest.fixture
def toml(tmp_path):
    path = tmp_path / "config.toml"
    return lambda text="": path.write_text(MINIMAL + text) and path


def test_options_win_over_the_file(toml):
    path = toml('token_budget = 7\n[optim]\nlr = "auto"\n[classes.GPT4]\nreward = 1\n')
    options = ["--optim.lr=2e-5", "--run.dir=runs/a b", "--optim.betas=[0.8, 0.9]", "--classes.GPT3.weight=0.1"]
    config = configuration.load(path, options)
    assert (config.data.token_budget, config.optim.lr, config.run.dir) == (7, 2e-5, "runs/a b")
    assert config.optim.betas == (0.8, 0.9)
    assert config.classes == {"GPT4": ClassConfig(reward=1.0), "GPT3": ClassConfig(weight=0.1)}


@pytest.mark.parametrize(
    ("option", "section", "key", "value"),
    [
        ("--run.dir=2024", "run", "dir", "2024"),
        ("--base.path=true", "base", "path", "true"),
        ('--data.path="a b"', "data", "path", "a b"),
        ("--data.path=1979-05-27", "data", "path", "1979-05-27"),
        ("--optim.lr=1", "optim", "lr", 1.0),
        ("--train.compile=true", "train", "compile", True),
        ("--train.offload_activations=true", "train", "offload_activations", True),
        ("--parallel.offload=true", "parallel", "offload", "all"),
        ("--parallel.offload=optimizer", "parallel", "offload", "optimizer"),
        ('--samples.prompts=["a, b", "2"]', "samples", "prompts", ("a, b", "2")),
        ("--data.subsample.GPT3=0.5", "data", "subsample", {"GPT3": 0.5}),
    ],
)
def test_a_value_is_toml_or_else_text(toml, option, section, key, value):
    config = configuration.load(toml(), [option])
    assert getattr(getattr(config, section), key) == value
    assert configuration.from_tree(overrides.tomllib.loads(configuration.dump(config))) == config


def test_new_tables_are_made_by_options_and_names_with_dots_are_quoted(toml):
    options = ['--classes."gpt-3.5 turbo".weight=0.1', "--classes.GPT4 Correct.weight=1", "--data.path="]
    config = configuration.load(toml(), [*options, "--data.mix.A.path=a", "--data.mix.A.ratio=2"])
    assert config.classes.keys() == {"gpt-3.5 turbo", "GPT4 Correct"}
    assert config.data.mix == {"A": MixConfig("a", ratio=2.0)}


def test_a_command_line_is_split_into_own_arguments_and_options():
    line = ["--profile", "--optim.lr", "2e-5", "a.b.toml", "--run.dir=x", "--optim.clip", "-1", "--gpus", "8"]
    own, options = overrides.split(line)
    assert own == ["--profile", "a.b.toml", "--gpus", "8"]
    assert options == ["--optim.lr=2e-5", "--run.dir=x", "--optim.clip=-1"]
    for without_value in (["--optim.lr"], ["--optim.lr", "--run.dir=x"]):
        with pytest.raises(ConfigError, match=r"--optim\.lr = '': expected a value"):
            overrides.split(without_value)


def test_every_key_of_another_trainer_leads_to_one_of_ours():
    for key in configuration.ELSEWHERE.values():
        section, name = key.split(".")
        assert hasattr(getattr(Config(), section), name), key


@pytest.mark.parametrize(
    ("option", "needle"),
    [
        ("--optim.learning_rate=1", "unknown key 'optim.learning_rate'; did you mean --optim.lr?"),
        ("--train.lr=1", "unknown key 'train.lr'; did you mean --optim.lr?"),
        ("--train.save_steps=1", "unknown key 'train.save_steps'; did you mean --checkpoint.every?"),
        ("--optim.zzz=1", "unknown key 'optim.zzz'; known: lr, "),
        ("--train.log_evry=1", "unknown key 'train.log_evry'; did you mean 'log_every'?"),
        ("--optimizer.lr=1", "unknown section 'optimizer'; did you mean 'optim'?"),
        ("--classes.GPT4.rewards=1", "unknown key 'classes.GPT4.rewards'; did you mean 'reward'?"),
        ("--data.token_budget=8k", "data.token_budget = '8k': expected a whole number above 0"),
        ("--data.token_budget=0", "data.token_budget = 0: expected a whole number above 0"),
        (
            "--data.token_budget=1e12",
            "data.token_budget = 1000000000000.0: expected a whole number above 0 up to 16777216",
        ),
        (
            "--data.bins_per_step=1099511627776",
            "bins_per_step = 1099511627776: expected a whole number above 0 up to 1",
        ),
        ("--data.epochs=1099511627776", "data.epochs = 1099511627776: expected a whole number above 0 up to 10000"),
        ("--data.token_budget=true", "data.token_budget = True: expected a whole number"),
        ("--run.seed=-1", "run.seed = -1: expected a whole number from 0"),
        ("--data.verify=1", "data.verify = 1: expected true or false"),
        ("--train.dtype=float16", "train.dtype = 'float16': expected one of 'bfloat16', 'float32'"),
        ("--optim.lr=fast", "optim.lr = 'fast': expected a number above 0 or 'auto'"),
        ("--optim.lr=nan", "optim.lr = nan: expected"),
        ("--optim.betas=[0.9, 1.0]", "optim.betas[1] = 1.0: expected a number from 0 below 1"),
        ("--samples.prompts=Hi", "samples.prompts = 'Hi': expected an array, such as"),
        ("--lora.targets=[]", "lora.targets = []: expected an array of at least one"),
        ('--lora.targets=["q_proj", "x"]', "lora.targets[1] = 'x': expected one of 'down_proj', "),
        ("--data.subsample.GPT3=2", "data.subsample.GPT3 = 2: expected a number above 0 up to 1"),
        ("--classes.GPT4=1", "classes.GPT4 = 1: expected a table"),
        ("--classes.GPT4={}", "classes.GPT4 = {}: expected either reward or weight"),
        (
            "--parallel.reduce_dtype=bfloat16 --parallel.reduce=step",
            "parallel.reduce_dtype = 'bfloat16': expected \"float32\" with",
        ),
        ("--parallel.offload=moments", "parallel.offload = 'moments': expected one of 'all', 'none', "),
        ("--checkpoint.keep_best=true", "checkpoint.keep_best = True: expected false with no data.eval_path"),
        ("--train.stop_after=2", "train.stop_after = 2: expected 0 with no data.eval_path and no checkpoint.best"),
        ("--eval.A.task=exact", "eval.A.path = '': expected a data set, or for task exact a file"),
        ("--eval.held_out.path=x", "eval = 'held_out': expected another name"),
        ("--eval.A.path=x --eval.A.task=bleu", "eval.A.task = 'bleu': expected one of 'exact', 'loss'"),
        ('--eval.A.path=x --eval.A.conditions=["B"]', "eval.A.conditions = ('B',): expected none without task"),
        ("--data.mix.A.path=a", "data.path = 'data': expected \"\" with [data.mix]"),
        ("--data.path= --data.mix.A.epochs=1", "data.mix.A.path = '': expected the folder of a data set"),
        (f"{MIX} --data.mix.A.epochs=1 --data.mix.A.ratio=1", "expected at most one of epochs, tokens and ratio"),
        (f"{MIX} --data.mix.A.tokens=0", "data.mix.A.tokens = 0: expected a whole number above 0"),
        (f"{MIX} --data.mix.A.ratio=inf", "data.mix.A.ratio = inf: expected a number above 0"),
        (f"{MIX} --data.mix.A.epoch=1", "unknown key 'data.mix.A.epoch'; did you mean 'epochs'?"),
        ("--base.path=", "base.path = '': expected a path, for example --base.path=PATH"),
        ("--train.offload_activations=true --train.recompute=none", "offload_activations = True: expected false with"),
        ("--train.offload_activations=true --train.recompute=elementwise", "= True: expected false with"),
        ("--run.dir.x=1", "run.dir = {'x': 1}: expected a string"),
        ("--base.path.x=1", "path is a value, not a section"),
        ("--optim.in_backward=true", "optim.clip = 1.0: expected 0 "),
        (f"{IN_BACKWARD} --data.bins_per_step=2", "data.bins_per_step = 2: expected 1 "),
        (f"{IN_BACKWARD} --train.max_nonfinite_steps=1", "train.max_nonfinite_steps = 1: expected 0 "),
        (f"{IN_BACKWARD} --lora.rank=4", "lora.rank = 4: expected 0 "),
        (f"{IN_BACKWARD} --optim.ema=0.9", "optim.ema = 0.9: expected 0 with optim.in_backward"),
        ("--loss.dynamic=dpo", "loss.dynamic = 'dpo': expected one of 'dft', 'eaft', 'none', 'unlikelihood'"),
        ("--loss.eaft_alpha=0", "loss.eaft_alpha = 0: expected a number above 0"),
        ("--loss.stage2.from=1.5", "loss.stage2.from = 1.5: expected a number from 0 up to 1"),
        ("--loss.stage2.form=0.5", "unknown key 'loss.stage2.form'; did you mean 'from'?"),
        ("--loss.stage2.from_=0.5", "unknown key 'loss.stage2.from_'; did you mean 'from'?"),
        ("--loss.stage2.dynamic=dft", "loss.stage2.dynamic = 'dft': expected \"none\" with no loss.stage2.from"),
        (
            "--lora.rank=4 --loss.stage2.from=0.5 --loss.stage2.dynamic=unlikelihood",
            'lora.tokens = \'template\': expected "none" with lora.rank and loss.dynamic = "unlikelihood"',
        ),
        ("--optim.ema=1.0", "optim.ema = 1.0: expected a number from 0 below 1"),
        (
            "--weights.per_message_mean=true --weights.per_conversation_mean=true",
            "weights.per_message_mean = True: expected false with weights.per_conversation_mean",
        ),
        ("--optim.master_dtype=bfloat16 --train.dtype=float32", 'expected "float32" with train.dtype'),
        ("--optim.master_dtype=bfloat16 --lora.rank=4", 'expected "float32" with lora.rank'),
        ("--optim.master_dtype=bfloat16 --parallel.reduce=micro_batch", 'expected "float32" with parallel.reduce'),
        ("--optim.moment_dtype=bfloat16 --parallel.offload=all", "parallel.offload"),
        ("optim.lr=1", "expected --section.key=value"),
        ("--verbose", "expected --section.key=value"),
    ],
)
def test_refusals_name_key_value_and_expectation(toml, option, needle):
    with pytest.raises(ConfigError) as error:
        configuration.load(toml(), re.split(" (?=--)", option))
    assert needle in str(error.value)


def test_missing_and_broken_files_are_named(tmp_path):
    with pytest.raises(ConfigError, match="no such configuration file"):
        configuration.load(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("[run\n")
    with pytest.raises(ConfigError, match=r"bad\.toml"):
        configuration.load(tmp_path / "bad.toml")


def test_a_configuration_of_an_earlier_version_is_read(toml):
    old = '[data.mix.A]\npath = "a"\nrate = 2.0\n[optim]\nmaster = "float32"\nstate = "bfloat16"\n[run]\n'
    path = toml(f'{old}resume_anyway = true\n[train]\nmax_bad_steps = 3\nattention = "flash2"\n')
    path.write_text(path.read_text().replace('path = "data"', 'path = ""'))
    config = configuration.load(path)
    assert (config.optim.moment_dtype, config.run.resume_mismatched) == ("bfloat16", True)
    assert (config.train.max_nonfinite_steps, config.data.mix["A"].ratio) == (3, 2.0)
    assert not configuration.load(path, ["--run.resume_anyway=false"]).run.resume_mismatched
    assert config.train.attention == configuration.load(path, ["--train.attention=flash2"]).train.attention == "flash"


@given(st.text(), st.text(min_size=1), st.floats(0.001, 1), st.booleans())
def test_dump_is_read_back_equal(tmp_path_factory, prompt, name, share, flag):
    prompt, name = (text.encode("utf-8", "replace").decode() for text in (prompt, name))
    original = Config(
        base=BaseConfig("b"),
        data=DataConfig("d", subsample={name: share}),
        classes={name: ClassConfig(reward=share)},
        samples=SamplesConfig(prompts=(prompt,)),
        run=RunConfig(deterministic=flag),
    )
    path = tmp_path_factory.mktemp("dump") / "config.toml"
    path.write_text(configuration.dump(original), encoding="utf-8", newline="")
    assert configuration.load(path) == original


SECTIONS = [field.type for field in msgspec.structs.fields(Config)]


@pytest.mark.parametrize("section", [*filter(inspect.isclass, SECTIONS), ClassConfig, EvalConfig, MixConfig])
def test_a_section_is_frozen_and_explains_every_key(section):
    explained = configuration.explanations(section)
    assert list(explained) == list(section.__struct_fields__) and all(len(text) > 5 for text in explained.values())
    with pytest.raises(AttributeError):
        setattr(section(), section.__struct_fields__[0], None)
