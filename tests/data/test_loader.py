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
from tests.tiny_text import conversations


@pytest.fixture(scope="module")
def data(prepare_into, tmp_path_factory):
    return TokenDataset(prepare_into(tmp_path_factory.mktemp("loader") / "data", conversations(7, 150)).output)


def load(data, **options):
    return Loader(data, **({"token_budget": 512, "bins_per_step": 4, "seed": 1, "epochs": 2} | options))


def equal(first, second):
    tensors = [name for name, value in vars(first).items() if torch.is_tensor(value)]
    same = all(torch.equal(getattr(first, name), getattr(second, name)) for name in tensors)
    return same and first.sequences == second.sequences and first.weight_sum == second.weight_sum


@pytest.mark.parametrize("pad", [False, True])
def test_an_epoch_holds_every_conversation_once(data, pad):
    loader = load(data, pad=pad)
    for epoch in range(2):
        seen, tokens, supervised = [], 0, 0
        for step in range(loader.num_steps):
            if loader.position(step)[0] == epoch:
                for batch in loader.step(step):
                    seen += batch.sequences
                    tokens += batch.num_tokens
                    supervised += batch.num_supervised
                    assert len(batch.input_ids) <= 512 and (not pad or len(batch.input_ids) == 512)
        assert sorted(seen) == list(range(len(data)))
        assert tokens == data.lengths.sum() and supervised == data.supervised.sum()


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_share_the_steps_of_one_process(data, world):
    alone = load(data)
    ranks = [load(data, rank=rank, world=world) for rank in range(world)]
    assert {rank.num_steps for rank in ranks} == {alone.num_steps}
    for step in range(alone.num_steps):
        shares = [rank.step(step) for rank in ranks]
        together = [shares[b % world][b // world] for b in range(4)]
        assert all(equal(a, b) for a, b in zip(together, alone.step(step), strict=True))


def test_a_step_depends_on_its_number_alone(data):
    loader = load(data)
    late = list(load(data).iterate(start_step=loader.num_steps - 2))
    assert [step for step, _ in late] == [loader.num_steps - 2, loader.num_steps - 1]
    for step, batches in late:
        assert all(equal(a, b) for a, b in zip(batches, loader.step(step), strict=True))


def test_epochs_and_seeds_differ(data):
    loader = load(data)
    second = loader.steps_per_epoch[0]
    assert loader.step(0)[0].sequences != loader.step(second)[0].sequences
    assert loader.step(0)[0].sequences != load(data, seed=2).step(0)[0].sequences


def test_positions_and_epoch_ends(data):
    loader = load(data, epochs=3)
    expected = [(epoch, step) for epoch in range(3) for step in range(loader.steps_per_epoch[epoch])]
    assert [loader.position(step) for step in range(loader.num_steps)] == expected
    ends = [step for step in range(loader.num_steps) if loader.epoch_end(step)]
    assert [loader.position(step)[0] for step in ends] == [0, 1, 2] and ends[-1] == loader.num_steps - 1
    for outside in (-1, loader.num_steps):
        with pytest.raises(IndexError):
            loader.position(outside)


def test_epochs_of_unequal_length_keep_their_ends(data, monkeypatch):
    whole = multipack.plan

    def halved(lengths, *, token_budget, epoch, **options):
        return whole(lengths, token_budget=token_budget if epoch else 2 * token_budget, epoch=epoch, **options)

    monkeypatch.setattr(multipack, "plan", halved)
    loader = load(data)
    first, second = loader.steps_per_epoch
    assert first < second
    assert [step for step in range(loader.num_steps) if loader.epoch_end(step)] == [first - 1, first + second - 1]
    assert loader.position(first) == (1, 0)


def test_max_steps_cuts_the_run(data):
    whole = load(data)
    assert load(data, max_steps=3).num_steps == 3 == len(list(load(data, max_steps=3).iterate()))
    assert load(data, max_steps=10_000).num_steps == whole.num_steps


def test_stats_are_the_batches(data):
    loader = load(data, epochs=1)
    stats = loader.stats()
    tokens = sum(batch.num_tokens for step in range(loader.num_steps) for batch in loader.step(step))
    assert stats.num_tokens == tokens and stats.num_sequences == len(data)
    assert stats.fill == tokens / (loader.num_steps * 4 * 512) and stats.steps_per_epoch == (loader.num_steps,)
    assert stats.tokens_per_step == tokens / loader.num_steps
    assert 1 <= stats.imbalance_mean <= stats.imbalance_worst


def test_fewer_conversations_than_bins_still_make_a_step(data):
    loader = load(data, token_budget=int(data.lengths.sum()) + 1, bins_per_step=400, epochs=1)
    batches = loader.step(0)
    assert loader.num_steps == 1 and sum(len(batch.sequences) for batch in batches) == len(data)
    assert [len(batch.input_ids) for batch in batches[-250:]] == [1] * 250


def test_padded_batches_have_the_shapes_of_a_run_that_never_recompiles(data):
    loader = load(data, pad=True, epochs=3)
    batches = [batch for step in range(loader.num_steps) for batch in loader.step(step)]
    assert {(*batch.input_ids.shape, *batch.cu_seqlens.shape) for batch in batches} == {(512, loader.num_documents + 1)}
    assert {batch.max_seqlen for batch in batches} <= {256, 512}  # padding's documents have 256
    fullest = max(np.count_nonzero(batch.lengths) for batch in batches)
    assert fullest <= loader.num_documents < fullest + 64
    for batch in batches:
        assert batch.max_seqlen >= max(batch.lengths) and sum(batch.lengths) == 512
        assert batch.cu_seqlens.tolist() == np.cumsum([0, *batch.lengths]).tolist()
    ranks = [load(data, pad=True, epochs=3, rank=rank, world=4) for rank in range(4)]
    assert {rank.num_documents for rank in ranks} == {loader.num_documents}


def test_a_budget_that_is_no_power_of_two_bounds_max_seqlen(data):
    budget = int(data.lengths.max()) + 3
    loader = load(data, pad=True, token_budget=budget)
    longest = [max(batch.lengths) for step in range(loader.num_steps) for batch in loader.step(step)]
    found = [batch.max_seqlen for step in range(loader.num_steps) for batch in loader.step(step)]
    assert max(longest) <= budget and all(a <= b <= budget for a, b in zip(longest, found, strict=True))


def test_going_on_reads_nothing_of_earlier_steps(data, monkeypatch):
    whole = load(data)
    late = load(data)
    read = []
    monkeypatch.setattr(data, "batch", lambda indices, **_: read.append(tuple(indices)))
    start = whole.steps_per_epoch[0] + 3
    assert [step for step, _ in late.iterate(start)] == list(range(start, whole.num_steps))
    first = 4 * (start - whole.steps_per_epoch[0])
    assert read == [tuple(whole.plan(1).bin(first + b)) for b in range(len(read))] and len(read) % 4 == 0


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
    batches = load(data, pin=True).step(0)
    assert len(pinned) == 7 * len(batches)
    assert equal(batches[0], load(data).step(0)[0])


def test_leaving_early_ends_the_thread(data):
    before = threading.active_count()
    steps = load(data).iterate()
    next(steps)
    assert threading.active_count() == before + 1
    steps.close()
    assert threading.active_count() == before


def test_an_error_in_the_thread_reaches_the_caller(data, monkeypatch):
    loader = load(data)
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
