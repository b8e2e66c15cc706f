"""What a plan says of 8, 64 and 512 GPUs: pytest tests/plan/test_plan_scaling.py"""

import dataclasses

import pytest

from ochat.commands import plan
from ochat.plan import plan_scaling, roofline
from ochat.plan.forecast import forecast
from ochat.plan.gpus import CARDS
from ochat.plan.memory import GIB
from ochat.plan.roofline import Cut
from tests.plan.test_forecast import LLAMA_1B, LLAMA_8B, make_run

H200 = CARDS["H200"]
BLOCKS, EMBEDDING = (
    32 * 218_112_000,
    128256 * 4096,
)  # weights of 8B: a block's are 4096 (4096 + 2 1024 + 4096 + 3 14336 + 2)


def test_eight_gpus_are_what_the_forecast_says():
    row = plan_scaling.scale(make_run(recompute="auto"), H200)[0]
    said = forecast(make_run(recompute="auto"), H200, gpus=8, nodes=1)
    assert (row.ranks, row.speed, row.cut.recompute) == (8, said.speed, said.recompute)


def test_messages_are_the_weights_gathered_and_the_gradients_summed():
    assert LLAMA_8B.num_parameters() == BLOCKS + 2 * EMBEDDING + 4096
    cut = Cut(8192, 64, ranks=64, shard=64)  # a micro-batch each
    gathered = 2 * (2 * (BLOCKS + 4096) + 2 * EMBEDDING)
    summed = 4 * LLAMA_8B.num_parameters()
    assert roofline.message_bytes(LLAMA_8B, cut) == pytest.approx((gathered + summed) * 63 / 64, rel=1e-12)
    twice = dataclasses.replace(cut, bins_per_step=128)  # the head is gathered once a step, gradients too
    more = roofline.message_bytes(LLAMA_8B, twice) - roofline.message_bytes(LLAMA_8B, cut)
    assert more == pytest.approx(2 * (2 * (BLOCKS + 4096) + EMBEDDING) * 63 / 64, rel=1e-12)
    replicas = dataclasses.replace(cut, shard=8)
    summed = 4 * LLAMA_8B.num_parameters() * (7 / 8 + 2 / 8 * 7 / 8)
    assert roofline.message_bytes(LLAMA_8B, replicas) == pytest.approx(gathered * 7 / 8 + summed, rel=1e-12)


def test_a_step_is_shared_while_it_has_bins_and_grows_beyond():
    rows = plan_scaling.scale(make_run(bins=64), H200)
    assert [row.cut.bins_per_step for row in rows] == [64, 64, 512]
    assert rows[1].speed.tokens_per_step == rows[0].speed.tokens_per_step
    assert rows[1].speed.step_seconds < rows[0].speed.step_seconds / 6


def test_replicas_are_tried_where_the_network_is_slow_and_taken_where_they_fit():
    slow = dataclasses.replace(H200, network_bandwidth=H200.network_bandwidth / 100)
    rows = plan_scaling.scale(make_run(LLAMA_1B, bins=512), slow)
    assert [row.replicate for row in rows] == [1, 8, 64] and [row.cut.shard for row in rows] == [8, 8, 8]
    small = dataclasses.replace(
        slow, memory_gib=rows[0].cut.ranks
    )  # too small for an eighth of 8B, beside its gradients
    assert plan_scaling.scale(make_run(bins=512), small) == []


def test_a_rate_is_compared_with_that_on_eight_or_not_at_all():
    def shares(memory_gib: float) -> list[list[str]]:
        rows = plan_scaling.scale(make_run(bins=512), dataclasses.replace(H200, memory_gib=memory_gib))
        columns = {str(column.header): list(map(str, column.cells)) for column in plan_scaling.table(rows).columns}
        return [columns["GPUs"], columns["of 8's"]]

    gpus, all_fit = shares(H200.memory_gib)
    assert gpus == ["8", "64", "512"] and all_fit[0] == "100%"
    needed = make_run(bins=512).memory(plan_scaling.scale(make_run(bins=512), H200)[0].cut).total / GIB
    gpus, some_fit = shares(needed - 1)
    assert gpus == ["64", "512"] and some_fit == ["-", "-"]


def test_more_hops_take_longer_and_hide_behind_enough_work():
    def exposed(ranks: int, budget: int) -> float:
        run = make_run(LLAMA_1B, bins=ranks, budget=budget, shard=ranks)
        cut = run.cut(ranks, 8)
        return roofline.predict(run.model, H200, run.workload, cut).communication

    assert exposed(4096, 8192) > 4 * exposed(512, 8192)
    hops = 2 * 16 + 2 + 16 + 2  # rings of a step: gathers of 16 blocks twice, embedding and head; sums
    least = hops * 4095 * roofline.HOP_SECONDS * (1 - roofline.OVERLAP)
    assert exposed(4096, 8192) > least


def test_no_table_is_shown_where_nothing_fits(world, capsys, monkeypatch):
    monkeypatch.setattr(plan_scaling, "scale", lambda *_: [])
    plan.main([str(world.config), "--train.dtype=bfloat16"])
    assert "on more GPUs" not in capsys.readouterr().out


def test_the_table_is_shown_where_no_machine_is_named(world, capsys):
    def said(*options: str) -> str:
        plan.main([str(world.config), "--train.dtype=bfloat16", *options])
        return " ".join(capsys.readouterr().out.split())

    assert "on more GPUs, 8 a node" in said() and "512 H200" in said()
    assert "512 A100" not in said("--card=H100")
    for options in (
        ("--gpus=8",),
        ("--nodes=2",),
        ("--optim.in_backward=true", "--optim.clip=0", "--data.bins_per_step=1"),
    ):
        assert "on more GPUs" not in said(*options)
