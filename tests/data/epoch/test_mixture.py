"""Laws of a mixture: what an epoch takes of each set, over any number of epochs:
pytest tests/data/epoch/test_mixture.py"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.step_cases import END_OF_TURN, write_bytes_tokenizer
from ochat import config as configuration
from ochat.config import ClassConfig, MixConfig
from ochat.data.dataset import TokenDataset
from ochat.data.epoch.mixture import Mixture, stretch, token_budgets
from ochat.data.loader import Loader
from ochat.data.prepare import prepare
from ochat.errors import ConfigError
from ochat.model.config import ModelConfig
from ochat.plan import tables
from ochat.train import build
from tests import tiny
from tests.data.conftest import examples, places
from tests.tiny import mixed_conversations

LENGTHS = st.lists(st.integers(1, 50), min_size=1, max_size=30).map(np.array)


def epochs_of(lengths, budget, count, seed=(0, 1)):
    return [stretch(lengths, round(k * budget), round((k + 1) * budget), seed) for k in range(count)]


@settings(deadline=None)
@given(LENGTHS, st.floats(0.05, 3.5) | st.sampled_from([1.0, 2.0, 3.0]), st.integers(1, 6))
def test_every_epoch_takes_its_tokens_and_none_comes_again_before_all_came_as_often(lengths, passes, num_epochs):
    counts, budget = np.zeros(len(lengths), int), passes * lengths.sum()
    for taken in epochs_of(lengths, budget, num_epochs):
        np.add.at(counts, taken, 1)
        assert np.ptp(counts) <= 1 and abs(lengths[taken].sum() - budget) < lengths.max() + 1
        if passes.is_integer():
            assert np.bincount(taken, minlength=len(lengths)).tolist() == [passes] * len(lengths)
    assert abs((counts * lengths).sum() - num_epochs * budget) < lengths.max()


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 10**9), st.floats(0.01, 100)), min_size=1, max_size=5))
def test_rates_are_kept_until_the_first_set_is_used_up(sets):
    totals = {str(i): total for i, (total, _) in enumerate(sets)}
    budgets = token_budgets(totals, {str(i): MixConfig("x", ratio=rate) for i, (_, rate) in enumerate(sets)})
    per_rate = [budgets[str(i)] / rate for i, (_, rate) in enumerate(sets)]
    assert per_rate == pytest.approx([per_rate[0]] * len(sets))
    assert max(budgets[name] / totals[name] for name in totals) == pytest.approx(1)


def test_a_half_is_another_half_in_the_next_epoch_and_with_another_seed():
    lengths = np.full(100, 7)
    first, second, third, fourth = map(sorted, epochs_of(lengths, 350, 4))
    assert sorted(first + second) == sorted(third + fourth) == list(range(100)) and len(first) == 50
    assert third not in (first, second) and first != sorted(epochs_of(lengths, 350, 1, seed=(1, 1))[0])


@pytest.fixture(scope="module")
def folders(prepare_into, tmp_path_factory):
    """Two sets over one base; the second has a class that the first does not know."""
    folder = tmp_path_factory.mktemp("mixture")
    for name, seed, count, names in (("chat", 1, 90, ("GPT4", "GPT3")), ("code", 2, 60, ("coder", "GPT4"))):
        records = mixed_conversations(seed, count)
        for record in records:
            record["condition"] = names[record["condition"] == "GPT3"]
        prepare_into(folder / name, records, f"{name}.jsonl")
    return {name: folder / name for name in ("chat", "code")}


def mix(folders, options):
    return {name: MixConfig(str(path), **options.get(name, {})) for name, path in folders.items()}


def test_several_sets_are_one_after_the_other_with_classes_united_by_name(folders):
    data, apart = TokenDataset(folders), [TokenDataset(path) for path in folders.values()]
    assert data.class_names[:2] == apart[0].class_names and set(data.class_names) == {"GPT4", "GPT3", "coder"}
    assert data.sets == {"chat": slice(0, 90), "code": slice(90, 150)}
    assert examples(data) == [example for each in apart for example in examples(each)]
    assert places(data) == [place for each in apart for place in places(each)]
    expected = [data.class_names.index(data[i].condition) for i in (0, 120) for _ in range(data.supervised[i])]
    assert data.batch([0, 120]).supervised_classes.tolist() == expected
    assert len({data.fingerprint, *(each.fingerprint for each in apart)}) == 3


def test_weights_and_selection_hold_across_sets(folders):
    table = {name: ClassConfig(weight=weight) for name, weight in (("GPT4", 1.0), ("GPT3", 0.1), ("coder", 0.5))}
    data = TokenDataset(folders, classes=table, only_class="GPT4", subsample={"GPT4": 0.5}, seed=3)
    whole = TokenDataset(folders)
    assert {example.condition for example in data} == {"GPT4"}
    assert {float(w) for example in data for w in example.loss_weights} == {0.0, 1.0}
    for name, part in data.sets.items():
        inside = whole.sets[name]
        taken = data.indices[part]
        assert len(taken) and inside.start <= taken.min() <= taken.max() < inside.stop
    half = round(0.5 * (whole.class_ids == whole.class_names.index("GPT4")).sum())
    assert sum(part.stop - part.start for part in data.sets.values()) == len(data) == half
    mixture = Mixture(data, mix(folders, {"chat": {"epochs": 2}}))
    assert np.bincount(mixture(0)).tolist() == [2] * data.sets["chat"].stop + [1] * (len(data) - data.sets["chat"].stop)


def test_a_set_without_a_conversation_and_an_epoch_without_one_are_named(folders):
    with pytest.raises(ConfigError, match="data.mix.code: only_class and subsample leave no conversation of it"):
        Mixture(TokenDataset(folders, only_class="GPT3"), mix(folders, {}))
    mixture = Mixture(TokenDataset(folders), mix(folders, {"chat": {"epochs": 1e-9}, "code": {"epochs": 1e-9}}))
    with pytest.raises(ConfigError, match="epoch 2 takes no conversation"):
        mixture(1)


def test_what_is_taken_of_a_set_depends_on_no_other(folders):
    shares = mix(folders, {"chat": {"epochs": 0.4}, "code": {"epochs": 0.7}})
    alone = TokenDataset({"chat": folders["chat"]})
    ours = Mixture(TokenDataset(folders), shares, seed=5)(1)
    assert ours[ours < 90].tolist() == Mixture(alone, {"chat": shares["chat"]}, seed=5)(1).tolist()


MIXES = [{}, {"chat": {"epochs": 0.5}, "code": {"epochs": 2.0}}]
MIXES += [{"chat": {"tokens": 900}}, {"chat": {"ratio": 3}, "code": {"ratio": 1}}]


@pytest.mark.parametrize("options", MIXES)
def test_the_loader_trains_on_the_mixture(folders, options):
    data = TokenDataset(folders)
    mixture, costs = Mixture(data, mix(folders, options), seed=1), data.lengths * 2.0
    loader = Loader(data, token_budget=512, bins_per_step=2, seed=1, epochs=3, mixture=mixture, costs=costs)
    seen = {epoch: [] for epoch in range(3)}
    for step, batches in loader.iterate():
        seen[loader.position(step)[0]] += [i for batch in batches for i in batch.sequences]
    assert all(sorted(seen[epoch]) == sorted(mixture(epoch).tolist()) for epoch in range(3))
    assert loader.stats().num_tokens == data.lengths[seen[0]].sum()
    assert loader.stats().num_supervised == data.supervised[seen[0]].sum()
    assert (sorted(seen[0]) == sorted(seen[1])) == (options == {})


@pytest.mark.parametrize("what", ["tokenizer", "template"])
def test_sets_prepared_otherwise_are_refused_by_name(world, tmp_path, what):
    base, conditions = world.base, "ignore" if what == "template" else "both"
    if what == "tokenizer":
        base = tmp_path / "base"
        base.mkdir()
        write_bytes_tokenizer(base, END_OF_TURN, "<|another|>")
    source = world.folder / "conversations.jsonl"
    prepare([source], base, "openchat_v3.2", tmp_path / "odd", conditions=conditions, progress=False)
    with pytest.raises(ConfigError, match=rf"data\.mix\.odd .*odd\): prepared with another {what}.*data\.mix\.mine"):
        TokenDataset({"mine": world.data, "odd": tmp_path / "odd"})


def mixed_options(world, *more):
    return ["--data.path=", f"--data.mix.one.path={world.data}", f"--data.mix.two.path={world.data}", *more]


def test_a_run_trains_on_a_mixture_and_goes_on_where_it_stopped(world, tmp_path):
    options = mixed_options(world, "--data.mix.two.epochs=0.5", "--data.epochs=2", "--checkpoint.every=3")
    whole = tiny.train(world, tmp_path / "whole", *options, "--checkpoint.keep=0")
    saved = tmp_path / "whole" / "checkpoints" / "step_3"
    again = tiny.train(world, tmp_path / "again", *options, f"--run.resume={saved}")
    assert [line["loss"] for line in again] == [line["loss"] for line in whole[3:]] and again
    config = configuration.load(tmp_path / "whole" / "config.toml")
    assert config.data.mix["two"] == MixConfig(str(world.data), epochs=0.5) and not config.data.path


def test_a_plan_has_a_row_for_each_set(world):
    options = mixed_options(world, "--data.mix.one.tokens=300", "--data.mix.two.epochs=2")
    config = configuration.load(world.config, options)
    data = build.open_dataset(config)
    loader = build.open_loader(config, data, ModelConfig.load(world.base))
    rows = tables.describe_sets(loader)
    total = data.lengths[data.sets["two"]].sum()
    assert rows["set two"] == f"60 conversations, {total:,} tokens; an epoch takes 120, {2 * total:,} tokens: 2 passes"
    assert rows["set one"].startswith(f"60 conversations, {total:,} tokens; an epoch takes ")
    facts = tables.describe(loader, ModelConfig.load(world.base), config.data, weights_source="auto", lr_reason="set")
    assert rows.items() <= facts.items() and f"{loader.stats().num_tokens:,} tokens" in facts["data"]
