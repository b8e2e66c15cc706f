"""The whole step's benchmark: all train the same thing, rates by hand, what a failure leaves, what fits a card."""

import dataclasses
import math
import time
from operator import attrgetter
from types import SimpleNamespace

import pytest
import torch

from benchmarks import step_cases, step_peers, step_worker, train_step
from benchmarks.step_cases import PEERS, PHASES, Case, Peer, World
from benchmarks.step_peers import Ours, Packed, Padded, pad, padded_batches
from benchmarks.step_worker import Session, Start, Taken, Worker, WorkerFailed
from ochat import config as configuration
from ochat.data.batch import IGNORE_INDEX
from ochat.model import hf
from ochat.plan import memory
from ochat.plan.gpus import GPUS
from ochat.train.build import CPU_MULTIPLE

CPU = torch.device("cpu")
CASE = Case("tiny", 512, 2, longest=256)
STEPS = 3


def session(folder, **changes):
    made = Session(CPU, folder, folder, 2, 1, 1, 1, math.inf, "float32", 1e-2, 1e9, {})
    return dataclasses.replace(made, **changes)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return step_cases.make_world(CASE, tmp_path_factory.mktemp("world"), CPU, STEPS)


def config(world, run_dir):
    (run_dir / "run.toml").touch()
    settings = f"--base.path={world.base} --data.path={world.data} --run.dir={run_dir / 'run'} --data.bins_per_step=2 "
    settings += f"--data.token_budget=512 --data.max_steps={STEPS} --optim.lr=1e-2 --train.dtype=float32"
    return configuration.load(run_dir / "run.toml", [*settings.split(), "--train.device=cpu", *world.options])


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory):
    """Name -> (losses, counts, parameters by their Hugging Face names) after the same steps."""
    results = {}
    for kind in (Ours, Padded, Packed):
        runner = kind(config(world, tmp_path_factory.mktemp(kind.__name__)), CPU, Peer())
        counts = [runner.step() for _ in range(STEPS)]
        model = runner.trainer.model if kind is Ours else runner.model
        parameters = {name: p.detach() for name, p in model.named_parameters()}
        if kind is not Ours:
            parts = hf.parameter_parts(world.model).items()
            parameters = {name: torch.cat([parameters[each.name] for each in joined]) for name, joined in parts}
        results[kind.__name__] = runner.losses(), counts, parameters
    return results


@pytest.mark.parametrize("peer", ["Padded", "Packed"])
def test_everyone_trains_the_same_thing_and_only_the_padded_peer_pads(trained, peer):
    """Losses, and every parameter's whole update, to the rounding of fp32: AdamW's first steps divide by the gradient,
    so a parameter whose gradient is nearly nothing may differ by a part of the update."""
    losses, counts, parameters = trained[peer]
    expected_losses, expected_counts, expected = trained["Ours"]
    assert losses == pytest.approx(expected_losses, rel=2e-5)
    of_data = attrgetter("tokens", "supervised", "square_lengths")
    assert list(map(of_data, counts)) == list(map(of_data, expected_counts))
    real, padded = (sum(getattr(count, name) for count in counts) for name in ("tokens", "padded"))
    assert all(0 <= count.padded - count.tokens < 2 * CPU_MULTIPLE for count in expected_counts)
    assert padded == real if peer == "Packed" else padded > 1.1 * real
    assert parameters.keys() == expected.keys()
    for name, parameter in parameters.items():
        assert (parameter - expected[name]).abs().mean() < 1e-5, name  # of updates of about 1e-2 a step


def test_padded_batches_hold_each_conversation_of_the_step_once(world, tmp_path):
    runner = Packed(config(world, tmp_path), CPU, Peer())
    packed = runner.loader.step(1)
    batches = padded_batches(packed, 1)
    assert sorted(i for batch in batches for i in batch) == sorted(i for batch in packed for i in batch.sequences)
    assert batches == padded_batches(packed, 1) != padded_batches(packed, 2)
    tensors = [pad([runner.data[i] for i in batch]) for batch in batches]
    for name, filler in (("labels", IGNORE_INDEX), ("loss_weights", 0.0)):
        kept = torch.cat([x[name][x[name] != filler] for x in tensors]).sort().values
        whole = torch.cat([getattr(batch, name)[getattr(batch, name) != filler] for batch in packed]).sort().values
        assert torch.equal(kept, whole)
    assert sum(int(x["attention_mask"].sum()) for x in tensors) == sum(batch.num_tokens for batch in packed)


COUNTS = {"tokens": 100, "supervised": 40, "padded": 160, "square_lengths": 900}


def test_rates_by_hand(tmp_path, world):
    """Rounds of two steps in 1, 2 and 4 s with 100 real tokens of 160: medians, spread, MFU by the model's FLOPs."""
    taken = ((1.0, 3.0), (2.0, 1.0), (4.0, 2.0))
    answers = [COUNTS | {"seconds": s, "cpu_seconds": 2 * s, "peak_gib": gib} for s, gib in taken]
    rates = step_worker.rates(answers, session(tmp_path, steps=2), world.model)
    assert (rates["step_s"], rates["tokens_per_s"], rates["supervised_tokens_per_s"]) == (1.0, 50.0, 20.0)
    assert (rates["padded_tokens_per_s"], rates["peak_gib"], rates["cpu_s"]) == (80.0, 3.0, 2.0)
    assert rates["tokens_per_s_p20"] == pytest.approx(35.0) and rates["tokens_per_s_p80"] == pytest.approx(80.0)
    assert rates["mfu"] == pytest.approx(world.model.flops_per_step(100, 900, 40) / 2.0 / 1e9)


def taken(losses):
    answers = [COUNTS | {"seconds": 1.0, "cpu_seconds": 1.0, "peak_gib": 1.0} | {"losses": [loss]} for loss in losses]
    return Taken("", [answers[0] | {"seconds": 100.0}, *answers[1:]])  # the first round compiles and warms up


@pytest.mark.parametrize(
    ("name", "losses", "status"),
    [("padded", [2.0, 1.0], "ok"), ("padded", [2.0, 1.0002], "disagrees"), ("padded", [2.0, math.nan], "disagrees"),
     ("liger", [2.0, 1.5], "unweighted")],
)  # fmt: skip
def test_who_trains_something_else_is_marked(tmp_path, world, name, losses, status):
    who = Start(name, CASE, world, tmp_path)
    row = train_step.describe(who, taken(losses), taken([2.0, 1.0]), session(tmp_path))
    assert row["status"] == status and row["compared_steps"] == 2 and row["ours_is_faster"] == 1.0
    assert row["step_s"] == 1.0 and row["rounds"] == 1
    assert set(row) <= set(train_step.COLUMNS)


def outcome(cases, session, world):
    """Whether the run is a success, and the row of each implementation."""
    rows = []
    is_good = train_step.run([cases], session, world, SimpleNamespace(add=rows.append))
    return is_good, {row["implementation"]: row for row in rows}


def test_a_failure_is_a_row_and_ours_a_fault(tmp_path, world, monkeypatch):
    """Who gave no timed round has a reason; without ours, or with a peer that disagrees, the run is no success. Without
    time all are skipped."""
    case, late = dataclasses.replace(CASE, implementations=PEERS), session(tmp_path, deadline=time.monotonic() - 1.0)
    is_good, rows = outcome([case], late, world)
    assert is_good and [row["status"] for row in rows.values()] == ["skipped"] * len(PEERS)
    results = {"ours": taken([2.0, 1.0]), "padded": Taken("", [], "ModuleNotFoundError: no peer")}
    monkeypatch.setattr(train_step, "take_turns", lambda starts, session: [results[who.name] for who in starts])
    pair = [dataclasses.replace(CASE, implementations=("ours", "padded"))]
    is_good, rows = outcome(pair, session(tmp_path), world)
    assert is_good and rows["padded"]["status"] == "failed" and rows["padded"]["note"] == "ModuleNotFoundError: no peer"
    for wrong in ({"padded": taken([2.0, 3.0])}, {"ours": Taken("", [], "out of memory"), "padded": taken([2.0, 1.0])}):
        results |= wrong
        assert not outcome(pair, session(tmp_path), world)[0]


def test_a_worker_that_cannot_start_says_why(tmp_path):
    (tmp_path / "run.toml").touch()
    spec = {"implementation": "ours", "config": str(tmp_path / "run.toml"), "device": "cpu", "threads": 1, "peer": {}}
    worker = Worker(spec | {"options": ["--train.nonsense=1"], "num_steps": 1}, tmp_path / "log.txt")
    try:
        with pytest.raises(WorkerFailed, match="the time was out"):
            worker.ready(0.0)
        with pytest.raises(WorkerFailed, match="UnknownKey: unknown key .train.nonsense"):
            worker.ready(60.0)
    finally:
        worker.close()


def test_the_cases_fit_the_card_and_cover_what_was_asked():
    """Every model and every length of a bin; 8B, whole, leads; what the plan says of ours fits an H200."""
    ours, peers = PHASES["ours"], PHASES["peers"]
    assert (ours[0].model, ours[0].token_budget) == ("Llama-3-8B", 16384)
    assert {case.model for case in ours} == {"Llama-3-8B", "Llama-2-7B", "Llama-3.2-3B", "Llama-3.2-1B"}
    assert {case.token_budget for case in ours} == {8192, 16384, 32768}
    assert all(case.implementations[0] == "ours" for case in ours + peers)
    for case in ours + peers:
        expected = step_cases.predict(case, GPUS["H200"])
        assert expected.fits, f"{case.title}: {expected.use.total / memory.GIB:.0f} GiB"
        assert 0.3 < expected.speed.mfu < 0.75


def test_drawn_conversations(tmp_path, world):
    from ochat.data.dataset import TokenDataset

    data = TokenDataset(world.data)
    assert data.lengths.sum() >= STEPS * 1024 and data.lengths.max() == 256 and data.lengths.min() >= 64
    assert len(set(data.lengths.tolist())) > 10
    for share in (0.1, 0.9):
        case = dataclasses.replace(CASE, lengths="equal", supervised=share)
        made = TokenDataset(step_cases.make_world(case, tmp_path / str(share), CPU, 1).data)
        assert set(made.lengths.tolist()) == {256}
        assert made.supervised.sum() / made.lengths.sum() == pytest.approx(share, abs=0.05)


def test_scaling_changes_one_thing_at_a_time():
    for (_, name), cases in zip(step_cases.SCALING_AXES.items(), step_cases.scaling(quick=False), strict=True):
        varied = {f.name for f in dataclasses.fields(Case) if len({getattr(case, f.name) for case in cases}) > 1}
        assert len(cases) > 2 and varied == {name}


def test_the_peers_attention_is_the_first_that_is_there_and_works(monkeypatch):
    cases = ("234", "234", "3"), ("24", "24", "2"), ("24", "4", "4"), ("4", "", ""), ("", "234", "")
    for there, works, chosen in cases:
        monkeypatch.setattr(step_peers, "is_installed", lambda name, there=there: name[-1] in there)
        monkeypatch.setattr(step_peers, "attention_works", lambda name, device, works=works: name[-1] in works)
        expected = f"flash_attention_{chosen}" if chosen else "flex_attention"
        assert step_peers.choose_attention(torch.device("cuda"), otherwise="flex_attention") == expected
    assert step_peers.choose_attention(CPU, otherwise="flex_attention") == "sdpa"


def test_an_attention_that_fails_says_why(capsys):
    pytest.importorskip("transformers")
    assert not any(step_peers.is_installed(name) for name in step_peers.FLASH)
    assert not step_peers.attention_works("flash_attention_2", CPU) and step_peers.attention_works("sdpa", CPU)
    assert "transformers' flash_attention_2 does not work here: ImportError" in capsys.readouterr().out
