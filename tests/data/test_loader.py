"""Laws of the loader: same steps on any number of ranks, resume by step number: pytest tests/data/test_loader.py"""

import threading

import numpy as np
import pytest
import torch

from ochat.data.dataset import TokenDataset
from ochat.data.loader import Loader
from ochat.errors import ConfigError, DataError
from ochat.packing import multipack
from ochat.packing.multipack import EpochPlanCache
from tests.tiny import mixed_conversations


@pytest.fixture(scope="module")
def data(prepare_into, tmp_path_factory):
    return TokenDataset(prepare_into(tmp_path_factory.mktemp("loader") / "data", mixed_conversations(7, 150)).output)


def load(data, **options):
    return Loader(data, **({"token_budget": 512, "bins_per_step": 4, "seed": 1, "epochs": 2} | options))


def equal(first, second):
    tensors = [name for name, value in vars(first).items() if torch.is_tensor(value)]
    same = all(torch.equal(getattr(first, name), getattr(second, name)) for name in tensors)
    return same and first.sequences == second.sequences and first.weight_sum == second.weight_sum


def batches(loader):
    return [batch for step in range(loader.num_steps) for batch in loader.step(step)]


@pytest.mark.parametrize("pad", [False, True])
def test_an_epoch_holds_every_conversation_once(data, pad):
    loader = load(data, pad=pad)
    both, first = batches(loader), 4 * loader.steps_per_epoch[0]
    for epoch in (both[:first], both[first:]):
        assert sorted(i for batch in epoch for i in batch.sequences) == list(range(len(data)))
        assert sum(batch.num_tokens for batch in epoch) == data.lengths.sum()
        assert sum(batch.num_supervised for batch in epoch) == data.supervised.sum()
        assert all(len(batch.input_ids) == 512 if pad else len(batch.input_ids) <= 512 for batch in epoch)
    assert both[0].sequences != both[first].sequences
    assert both[0].sequences != load(data, seed=2).step(0)[0].sequences


def test_a_multiple_makes_few_shapes(data):
    for batch in batches(load(data, multiple=64)):
        assert len(batch.input_ids) % 64 == len(batch.supervised_rows) % 64 == 0


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_share_the_steps_of_one_process(data, world):
    alone = load(data)
    ranks = [load(data, rank=rank, world=world) for rank in range(world)]
    assert {rank.num_steps for rank in ranks} == {alone.num_steps}
    for step in range(alone.num_steps):
        shares = [rank.step(step) for rank in ranks]
        together = [shares[b % world][b // world] for b in range(4)]
        assert all(equal(a, b) for a, b in zip(together, alone.step(step), strict=True))


def test_positions_and_ends_of_epochs_of_unequal_length(data, monkeypatch):
    whole = multipack.plan

    def halved(lengths, *, token_budget, epoch, **options):
        return whole(lengths, token_budget=token_budget if epoch else 2 * token_budget, epoch=epoch, **options)

    monkeypatch.setattr(multipack, "plan", halved)
    loader = load(data, epochs=3)
    counts = loader.steps_per_epoch
    assert counts[0] < counts[1]
    expected = [(epoch, step) for epoch in range(3) for step in range(counts[epoch])]
    assert [loader.position(step) for step in range(loader.num_steps)] == expected
    ends = [step for step in range(loader.num_steps) if loader.epoch_end(step)]
    assert ends == [counts[0] - 1, counts[0] + counts[1] - 1, loader.num_steps - 1]
    for outside in (-1, loader.num_steps):
        with pytest.raises(IndexError):
            loader.position(outside)


def test_max_steps_cuts_the_run(data):
    assert load(data, max_steps=3).num_steps == 3 == len(list(load(data, max_steps=3).iterate()))
    assert load(data, max_steps=10_000).num_steps == load(data).num_steps


def test_stats_are_the_batches(data):
    loader = load(data, epochs=1)
    stats, tokens = loader.stats(), sum(batch.num_tokens for batch in batches(loader))
    assert stats.num_tokens == tokens and stats.num_sequences == len(data)
    assert stats.fill == tokens / (loader.num_steps * 4 * 512) and stats.steps_per_epoch == (loader.num_steps,)
    assert stats.tokens_per_step == tokens / loader.num_steps
    assert 1 <= stats.imbalance_mean <= stats.imbalance_worst


def test_fewer_conversations_than_bins_still_make_a_step(data):
    loader = load(data, token_budget=int(data.lengths.sum()) + 1, bins_per_step=400, epochs=1)
    made = loader.step(0)
    assert loader.num_steps == 1 and sum(len(batch.sequences) for batch in made) == len(data)
    assert [len(batch.input_ids) for batch in made[-250:]] == [1] * 250


@pytest.mark.parametrize("is_power_of_two", [True, False])
def test_padded_batches_have_the_shapes_of_a_run_that_never_recompiles(data, is_power_of_two):
    budget = 512 if is_power_of_two else int(data.lengths.max()) + 3
    shape = {"pad": True, "fix_documents": True, "epochs": 3, "token_budget": budget}
    loader = load(data, **shape)
    made = batches(loader)
    assert {(*each.input_ids.shape, *each.cu_seqlens.shape) for each in made} == {(budget, loader.num_documents + 1)}
    assert {each.max_seqlen for each in made} <= {256, budget}  # padding's documents have 256
    fullest = max(np.count_nonzero(each.lengths) for each in made)
    assert fullest <= loader.num_documents < fullest + 64
    for each in made:
        assert budget >= each.max_seqlen >= max(each.lengths) and sum(each.lengths) == budget
        assert each.cu_seqlens.tolist() == np.cumsum([0, *each.lengths]).tolist()
    ranks = [load(data, **shape, rank=rank, world=4) for rank in range(4)]
    assert {rank.num_documents for rank in ranks} == {loader.num_documents}


def test_without_a_compiler_padded_batches_have_no_empty_documents(data):
    """Kernels launch blocks for each document and each 128 tokens of the longest."""
    shape = {"pad": True, "epochs": 1, "bins_per_step": 8}
    for each, fixed in zip(batches(load(data, **shape)), batches(load(data, **shape, fix_documents=True)), strict=True):
        real = len(each.lengths)
        assert min(each.lengths) > 0 and fixed.lengths[:real] == each.lengths and not any(fixed.lengths[real:])
        assert torch.equal(fixed.cu_seqlens[: real + 1], each.cu_seqlens) and len(each.cu_seqlens) == real + 1
        assert 0 <= each.max_seqlen - max(each.lengths) < 128 and each.max_seqlen <= fixed.max_seqlen
        tensors = [name for name, value in vars(each).items() if torch.is_tensor(value) and name != "cu_seqlens"]
        assert all(torch.equal(getattr(each, name), getattr(fixed, name)) for name in tensors)


def test_going_on_gives_the_same_steps_and_reads_nothing_of_earlier_ones(data, monkeypatch):
    whole, late = load(data), load(data)
    start = whole.steps_per_epoch[0] + 3
    expected = [(step, whole.step(step)) for step in range(start, whole.num_steps)]
    read, make = [], data.batch
    monkeypatch.setattr(
        data, "batch", lambda indices, *given, **shape: read.append(indices) or make(indices, *given, **shape)
    )
    for (step, made), (number, wanted) in zip(late.iterate(start), expected, strict=True):
        assert step == number and all(equal(a, b) for a, b in zip(made, wanted, strict=True))
    assert [tuple(bin) for bin in read] == [batch.sequences for _, made in expected for batch in made]


def test_the_next_epoch_is_planned_in_a_thread_and_two_plans_are_kept(data, monkeypatch):
    makers, make = [], multipack.plan

    def noted(lengths, *, epoch, **options):
        makers.append((epoch, threading.current_thread().name))
        return make(lengths, epoch=epoch, **options)

    monkeypatch.setattr(multipack, "plan", noted)
    loader = load(data, epochs=5)
    assert [epoch for epoch, _ in makers] == [4, 3, 2, 1, 0]  # for the number of steps; the first two stay
    makers.clear()
    assert len(list(loader.iterate())) == loader.num_steps
    assert makers == [(epoch, f"plan of epoch {epoch}") for epoch in (2, 3, 4)]
    assert [loader.plan(epoch).num_steps for epoch in (4, 3, 2)] and [epoch for epoch, _ in makers] == [2, 3, 4, 2]


def test_no_epoch_after_the_last_step_is_planned_again(data, monkeypatch):
    planned, into_the_second = [], load(data).steps_per_epoch[0] + 1
    loader = load(data, epochs=5, max_steps=into_the_second)
    monkeypatch.setattr(multipack, "plan", lambda *_, epoch, **__: planned.append(epoch))
    assert len(list(loader.iterate())) == into_the_second and planned == []


def test_a_plan_is_made_once_and_what_it_raises_reaches_who_asks():
    made, wanted = threading.Event(), []

    def make(epoch):
        made.wait(10)
        wanted.append(epoch)
        return 1 // epoch

    plans = EpochPlanCache(make)
    plans.start(1)
    threads = [threading.Thread(target=plans, args=(1,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    made.set()
    for thread in threads:
        thread.join()
    assert plans(1) == 1 and wanted == [1]
    with pytest.raises(ZeroDivisionError):
        plans(0)


def test_a_pinned_loader_pins_every_tensor(data, monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor)
    made = load(data, pin=True).step(0)
    assert len(pinned) == 7 * len(made) and equal(made[0], load(data).step(0)[0])


def test_the_thread_ends_when_it_is_left_and_hands_over_an_error(data, monkeypatch):
    before, loader = threading.active_count(), load(data)
    steps = loader.iterate()
    next(steps)
    assert threading.active_count() == before + 1
    steps.close()
    assert threading.active_count() == before
    good = loader.step
    monkeypatch.setattr(loader, "step", lambda n: good(n) if n < 2 else 1 / 0)
    steps = loader.iterate()
    assert [next(steps)[0], next(steps)[0]] == [0, 1]
    with pytest.raises(ZeroDivisionError):
        next(steps)


@pytest.mark.parametrize("options", [{"world": 3}, {"bins_per_step": 0, "world": 3}])
def test_bins_that_ranks_cannot_share_are_refused(data, options):
    with pytest.raises(ConfigError, match=r"bins_per_step is \d.*multiple of 3, such as 3"):
        load(data, **options)


def test_a_conversation_longer_than_a_bin_is_named(data):
    longest = int(data.lengths.argmax())
    with pytest.raises(DataError, match=rf"in\.jsonl:{longest + 1}: .*{data.lengths.max()} tokens.*token_budget = 50"):
        load(data, token_budget=50)
