"""Laws of dropout and cooldown: another condition gives the ids that prepare writes under it, draws are pure, lengths
exact, and without either all is as before: pytest tests/data/epoch/test_conditions.py"""

import json

import numpy as np
import pytest
import torch
from tokenizers import AddedToken

from ochat.config import ConditionConfig, MixConfig
from ochat.data import manifest
from ochat.data.dataset import TokenDataset
from ochat.data.epoch.conditions import ConditionDraws
from ochat.data.epoch.mixture import Mixture
from ochat.data.loader import Loader
from ochat.data.prepare import prepare
from ochat.errors import ConfigError, DataError
from ochat.text import tokenizer as tokenizers
from ochat.text.prefixes import NONE, OWN
from tests import text_kit, tiny
from tests.data.test_loader import batches, equal
from tests.tiny import mixed_conversations

OFF = ConditionConfig()


def with_turn_classes(records):
    """Some messages of some records have a class of their own, or none."""
    names = [None, "GPT4", "GPT3", "", "Math"]
    for i, record in enumerate(records):
        for j, message in enumerate(record["items"]):
            own = names[(i + 3 * j) % len(names)]
            message |= {} if own is None or i % 2 else {"condition": own}
    return records


def under(records, condition):
    """The records with this class on every turn."""
    return [
        record | {"condition": condition, "items": [m | {"condition": None} for m in record["items"]]}
        for record in records
    ]


@pytest.fixture(scope="module")
def records():
    return with_turn_classes(mixed_conversations(7, 150))


@pytest.fixture(scope="module")
def data(prepare_into, tmp_path_factory, records):
    return TokenDataset(prepare_into(tmp_path_factory.mktemp("conditions") / "data", records).output)


def load(data, condition=OFF, **options):
    draws = ConditionDraws(data, condition, 1) if condition != OFF else None
    shape = {"token_budget": 512, "bins_per_step": 4, "seed": 1, "epochs": 3, "conditions": draws}
    return Loader(data, **shape | options)


def same_tokens(ours, theirs):
    names = ("input_ids", "labels", "loss_weights", "position_ids", "cu_seqlens", "supervised_rows")
    return all(torch.equal(getattr(ours, name), getattr(theirs, name)) for name in names)


@pytest.mark.parametrize("mode", ["both", "assistant"])
@pytest.mark.parametrize("condition", ["", "GPT3"])
def test_another_condition_gives_what_prepare_writes_under_it(prepare_into, tmp_path, records, mode, condition):
    data = TokenDataset(prepare_into(tmp_path / "own", records, conditions=mode).output)
    other = TokenDataset(prepare_into(tmp_path / "other", under(records, condition), conditions=mode).output)
    number = data.class_names.index(condition) if condition else NONE
    chosen = np.arange(len(data))[::-1]
    exchanged = np.full(len(data), number, np.int32)
    assert same_tokens(data.batch(chosen, exchanged), other.batch(chosen))
    assert data.lengths_under(exchanged).tolist() == other.lengths.tolist() != data.lengths.tolist()
    some = np.where(np.arange(len(data)) % 3 == 0, number, OWN)
    assert data.lengths_under(some).tolist() == np.where(some == OWN, data.lengths, other.lengths).tolist()
    mixed = data.batch(np.arange(len(data)), some)
    expected = [(data if some[i] == OWN else other)[i].input_ids for i in range(len(data))]
    assert mixed.input_ids.tolist() == np.concatenate(expected).tolist()
    assert mixed.supervised_classes.tolist() == data.batch(np.arange(len(data))).supervised_classes.tolist()


def test_own_conditions_are_the_bits_of_before(data):
    chosen = np.arange(len(data))
    assert equal(data.batch(chosen, np.full(len(data), OWN, np.int32)), data.batch(chosen))
    plain, none = load(data), load(data, ConditionConfig(last=1e-9), max_steps=10**6)
    for step in range(none.cooldown):
        assert all(equal(a, b) for a, b in zip(plain.step(step), none.step(step), strict=True))


def test_draws_are_a_pure_function_of_seed_epoch_and_index(data):
    draws = ConditionDraws(data, ConditionConfig(dropout=0.3), 5)
    first = draws(0)
    assert first.tolist() == ConditionDraws(data, ConditionConfig(dropout=0.3), 5)(0).tolist()
    assert set(first.tolist()) == {OWN, NONE} and 0.2 < (first == NONE).mean() < 0.4
    assert first.tolist() != draws(1).tolist() != ConditionDraws(data, ConditionConfig(dropout=0.3), 6)(1).tolist()
    more = ConditionDraws(data, ConditionConfig(dropout=0.6), 5)(0)
    assert ((more == NONE) | (first == OWN)).all(), "a larger share drops what a smaller one does"
    part = TokenDataset(data.path, only_class="GPT4")
    assert ConditionDraws(part, ConditionConfig(dropout=0.3), 5)(0).tolist() == first[part.indices].tolist()
    assert (ConditionDraws(data, ConditionConfig(dropout=1.0), 5)(0) == NONE).all()


@pytest.mark.parametrize(
    "condition", [ConditionConfig(0.4), ConditionConfig(last=0.3), ConditionConfig(0.4, 0.5), ConditionConfig(last=1.0)]
)
@pytest.mark.parametrize("max_steps", [0, 7])
def test_lengths_are_exact_and_the_last_steps_have_no_condition(data, condition, max_steps):
    loader = load(data, condition, max_steps=max_steps)
    without = data.lengths_under(np.full(len(data), NONE, np.int32))
    assert loader.num_steps == len(list(loader.iterate())) and (not max_steps or loader.num_steps <= max_steps)
    whole = load(data, without_last(condition), max_steps=max_steps)
    wanted = round(condition.last * whole.num_steps)
    assert loader.cooldown == whole.num_steps - wanted
    assert 0 <= wanted - (loader.num_steps - loader.cooldown) <= max(1, wanted // 10), "shorter prefixes, fewer steps"
    for step in range(loader.num_steps):
        epoch, in_epoch = loader.position(step)
        plan, made = loader.plan(epoch), loader.step(step)
        drawn = np.full(len(data), NONE) if step >= loader.cooldown else loader.conditions(epoch)
        for b, batch in enumerate(made):
            number = in_epoch * 4 + b
            lengths = np.where(drawn == NONE, without, data.lengths)[list(batch.sequences)]
            assert batch.num_tokens == plan.bin_tokens[number] == lengths.sum() <= 512
            assert batch.lengths[: len(lengths)] == tuple(lengths.tolist())
    if not max_steps:
        for epoch in range(3):
            assert sorted(loader.plan(epoch).indices.tolist()) == list(range(len(data)))


def without_last(condition):
    return ConditionConfig(condition.dropout)


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_the_steps_of_one_process(data, world):
    condition = ConditionConfig(0.4, 0.3)
    alone, ranks = load(data, condition), [load(data, condition, rank=rank, world=world) for rank in range(world)]
    assert {(rank.num_steps, rank.cooldown) for rank in ranks} == {(alone.num_steps, alone.cooldown)}
    for step in range(alone.num_steps):
        shares = [rank.step(step) for rank in ranks]
        together = [shares[b % world][b // world] for b in range(4)]
        assert all(equal(a, b) for a, b in zip(together, alone.step(step), strict=True))


def test_a_mixture_trains_what_it_takes(data):
    mixed = TokenDataset({"a": data.path})
    mixture = Mixture(mixed, {"a": MixConfig(str(data.path), epochs=1.5)}, 1)
    loader = load(mixed, ConditionConfig(0.4, 0.4), mixture=mixture, epochs=2)
    for epoch in range(2):
        assert sorted(loader.plan(epoch).indices.tolist()) == sorted(mixture(epoch).tolist())
    tokens = [sum(batch.num_tokens for batch in made) for _, made in loader.iterate()]
    assert sum(tokens) == sum(int(loader.plan(epoch).bin_tokens.sum()) for epoch in range(2))


def test_joined_shards_exchange_as_one(prepare_into, base, tmp_path, records):
    source = tiny.write_lines(tmp_path / "in.jsonl", records)
    options = {"progress": False, "workers": 0, "empty_answers": "keep"}
    whole = prepare([source], base, "openchat_v3.2", tmp_path / "whole", **options)
    parts = [tmp_path / f"part{i}" for i in (1, 2)]
    for i, part in enumerate(parts, 1):
        prepare([source], base, "openchat_v3.2", part, **options, shard=f"{i}/2")
    one, joined = TokenDataset(whole.output), TokenDataset(parts)
    places = {one.source_location(i): i for i in range(len(one))}
    order = [places[joined.source_location(i)] for i in range(len(joined))]
    for condition in ("GPT4", "GPT3", None):
        of_one, of_joined = (NONE if condition is None else s.class_names.index(condition) for s in (one, joined))
        ours = joined.batch(np.arange(len(joined)), np.full(len(joined), of_joined))
        assert same_tokens(ours, one.batch(order, np.full(len(one), of_one)))


def test_what_cannot_be_exchanged_is_refused_with_the_way_out(prepare_into, tmp_path, records):
    old = tmp_path / "old"
    prepare_into(old, records)
    described = json.loads((old / "manifest.json").read_text())
    del described["prefixes"], described["digest"]
    manifest.write_manifest(old / "manifest.json", described)
    data = TokenDataset(old)
    assert len(batches(load(data))) > 3, "plain training reads it as before"
    for condition in (ConditionConfig(0.1), ConditionConfig(last=0.1)):
        with pytest.raises(DataError, match=r"condition\.\w+ = 0.1: .*old was prepared by .* prepare it again"):
            ConditionDraws(data, condition)
    ignored = TokenDataset(prepare_into(tmp_path / "ignored", records, conditions="ignore").output)
    with pytest.raises(ConfigError, match="writes no class"):
        ConditionDraws(ignored, ConditionConfig(0.1))


@pytest.mark.parametrize("context", [40, 60])
def test_longer_prefixes_push_the_end_out_of_the_context(prepare_into, tmp_path, records, context):
    long = "a longer class"
    data = TokenDataset(prepare_into(tmp_path / "own", [*records, *under(records[:1], long)], context=context).output)
    whole = TokenDataset(prepare_into(tmp_path / "whole", under([*records, records[0]], long), context=4096).output)
    wholes = {whole.source_location(i).rpartition(":")[2]: whole[i].input_ids.tolist() for i in range(len(whole))}
    exchanged = np.full(len(data), data.class_names.index(long), np.int32)
    exchanged[::5] = OWN
    lengths = data.lengths_under(exchanged)
    cut, most = data.count_cut(exchanged)
    assert 0 < cut < (lengths == context).sum() and 1 < most < 40 and lengths.max() == context
    batch = data.batch(np.arange(len(data)), exchanged)
    begins = np.cumsum(lengths) - lengths
    assert batch.lengths == tuple(lengths.tolist())
    for i, (begin, length) in enumerate(zip(begins, lengths, strict=True)):
        line = data.source_location(i).rpartition(":")[2]
        expected = data[i].input_ids.tolist() if exchanged[i] == OWN else wholes[line][:length]
        assert batch.input_ids[begin : begin + length].tolist() == expected


@pytest.fixture(scope="module")
def rendered_base(tmp_path_factory):
    return text_kit.small_folder("qwen", tmp_path_factory.mktemp("rendered") / "base")


@pytest.mark.parametrize("condition", ["", "GPT3"])
def test_what_a_chat_template_renders_is_exchanged_as_prepare_writes_it(rendered_base, tmp_path, condition):
    records = mixed_conversations(7, 150)
    records[3]["items"][0]["content"] = "<|im_start|>GPT4 user\nhi<|im_end|>"
    records[5]["condition"] = ""
    options = {"progress": False, "workers": 0, "empty_answers": "keep"}
    own, other = (
        TokenDataset(prepare([path], rendered_base, "chatml", path.with_suffix(""), **options).output)
        for path in (
            tiny.write_lines(tmp_path / "own.jsonl", records),
            tiny.write_lines(tmp_path / "other.jsonl", under(records, condition)),
        )
    )
    exchanged = np.full(len(own), own.class_names.index(condition) if condition else NONE, np.int32)
    chosen = np.arange(len(own))[::-1]
    assert same_tokens(own.batch(chosen, exchanged), other.batch(chosen))
    assert own.lengths_under(exchanged).tolist() == other.lengths.tolist() != own.lengths.tolist()
    assert load(own, ConditionConfig(0.3, 0.3)).num_steps > 3


def test_one_rendered_conversation_that_cannot_be_exchanged_refuses_its_data_set(rendered_base, tmp_path):
    base = tmp_path / "base"
    model = tokenizers.load(rendered_base).model
    model.add_tokens([AddedToken("user\nJOIN", normalized=False)])
    base.mkdir()
    model.save(str(base / "tokenizer.json"))
    records = mixed_conversations(7, 9)
    records[4]["items"][0]["content"] = "JOIN"
    source = tiny.write_lines(tmp_path / "in.jsonl", records)
    data = TokenDataset(
        prepare([source], base, "chatml", tmp_path / "a", progress=False, workers=0, empty_answers="keep").output
    )
    with pytest.raises(ConfigError, match=r"condition.dropout = 0.1: .*in.jsonl:5: under the class 'GPT\d', a token"):
        ConditionDraws(data, ConditionConfig(0.1))
    assert len(batches(load(data))) > 0


@pytest.mark.parametrize("change", ["missing", "short", "number"])
def test_damaged_prefixes_are_refused(prepare_into, tmp_path, records, change):
    folder = tmp_path / "data"
    prepare_into(folder, records)
    described = json.loads((folder / "manifest.json").read_text())
    del described["digest"]
    ids = described["prefixes"]["ids"]
    if change == "missing":
        del ids["GPT4"]
    elif change == "short":
        ids["GPT4"].pop()
    else:
        ids["GPT4"][0][0] = -1
    manifest.write_manifest(folder / "manifest.json", described)
    with pytest.raises(DataError, match=r"manifest.json: damaged .*prefixes"):
        TokenDataset(folder)


@pytest.fixture(scope="module")
def rewarded(prepare_into, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rewarded") / "data"
    made = [record | {"condition": "", "reward": float(i % 10)} for i, record in enumerate(mixed_conversations(3, 200))]
    return TokenDataset(prepare_into(folder, made, condition_from="reward", bins=(2.0, 5.0, 8.0, 20.0)).output)


def test_a_goal_is_drawn_among_the_own_level_and_the_lower_ones(rewarded):
    draws = ConditionDraws(rewarded, ConditionConfig(goals="at_least"), 3)
    assert rewarded.levels == ["reward:0", "reward:1", "reward:2", "reward:3"], "no record is in the highest bin"
    rank = np.array([rewarded.levels.index(name) for name in rewarded.class_names])
    own, drawn = rank[rewarded.class_ids], np.stack([rank[draws(epoch)] for epoch in range(400)])
    assert (drawn <= own).all()
    for level in range(4):
        counts = np.bincount(drawn[:, own == level].ravel(), minlength=4) / drawn[:, own == level].size
        assert counts == pytest.approx([1 / (level + 1)] * (level + 1) + [0] * (3 - level), abs=0.03)
    again = ConditionDraws(TokenDataset(rewarded.path), ConditionConfig(goals="at_least"), 3)
    assert draws(7).tolist() == again(7).tolist() != draws(8).tolist()
    both = ConditionDraws(rewarded, ConditionConfig(dropout=0.3, goals="at_least"), 3)(7)
    assert np.where(both == NONE, draws(7), both).tolist() == draws(7).tolist() and 0.2 < (both == NONE).mean() < 0.4


def test_goals_are_packed_with_their_exact_lengths(rewarded):
    condition = ConditionConfig(0.2, 0.3, "at_least")
    alone, ranks = load(rewarded, condition), [load(rewarded, condition, rank=r, world=2) for r in range(2)]
    for step in range(alone.num_steps):
        epoch, in_epoch = alone.position(step)
        made = alone.step(step)
        assert [b.num_tokens for b in made] == alone.plan(epoch).bin_tokens[in_epoch * 4 : in_epoch * 4 + 4].tolist()
        shares = [rank.step(step) for rank in ranks]
        assert all(equal(shares[b % 2][b // 2], batch) for b, batch in enumerate(made))


def test_goals_need_classes_of_rewards(data, rewarded, prepare_into, tmp_path):
    asked = ConditionConfig(goals="at_least")
    with pytest.raises(ConfigError, match="has no classes of rewards: prepare it with --condition-from reward"):
        ConditionDraws(data, asked)
    made = [record | {"condition": "", "reward": float(i)} for i, record in enumerate(mixed_conversations(3, 20))]
    other = prepare_into(tmp_path / "other", made, condition_from="reward", bins=(3.0,)).output
    with pytest.raises(ConfigError, match="the sets of .data.mix. have other classes of rewards"):
        ConditionDraws(TokenDataset({"a": rewarded.path, "b": other}), asked)
