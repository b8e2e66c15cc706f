"""Weights that the model's own probabilities change: a step is that of float64, the same on any number of processes and
after a stop, also where a second stage begins; and negative weights need not diverge.

pytest tests/train/test_dynamic_weights.py
"""

import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from ochat_kernels import Dynamic

from ochat.config import ClassConfig, LossConfig, StageConfig
from ochat.data.dataset import TokenDataset
from ochat.model import hf
from ochat.plan import tables
from ochat.train.loss import dynamic_at, has_dynamic
from tests import tiny

KINDS = ("dft", "eaft", "unlikelihood")
CLASSES = {"GPT4": ClassConfig(weight=0.7), "GPT3": ClassConfig(weight=-0.3)}
WEIGHTS = [f"--classes.{name}.weight={each.weight}" for name, each in CLASSES.items()]
STAGES = ["--loss.dynamic=dft", "--loss.stage2.from=0.5", "--loss.stage2.dynamic=eaft", "--loss.stage2.eaft_alpha=2"]
SAVED = ["--data.max_steps=8", "--checkpoint.every=3", "--checkpoint.keep=0"]
TOLERANCE = 1e-6  # relative, in norm, as in tests/laws/test_exactness.py


@pytest.fixture(scope="module")
def sure(tmp_path_factory):
    """A world whose model is sure of what it says, so that an entropy is below that of 20 equal choices."""
    return tiny.make(tmp_path_factory.mktemp("sure"), model={"initializer_range": 0.6})


def test_the_stage_of_a_step_follows_from_its_number():
    both = LossConfig("dft", stage2=StageConfig("eaft", 2.0, from_=0.8))
    assert [dynamic_at(both, step, 10) for step in (0, 7, 8, 9)] == [Dynamic("dft")] * 2 + [Dynamic("eaft", 2.0)] * 2
    assert dynamic_at(LossConfig("eaft", 0.5), 9, 10) == Dynamic("eaft", 0.5)
    assert dynamic_at(LossConfig(stage2=StageConfig("dft", from_=0.0)), 0, 10) == Dynamic("dft")
    assert dynamic_at(LossConfig(), 3, 10) is None and not has_dynamic(LossConfig())
    assert has_dynamic(LossConfig(stage2=StageConfig("dft", from_=0.5)))


def row_terms(logits, labels, weights, kind, alpha):
    """(what is minimised, |w'|) of rows in float64, from the definitions."""
    log_p = logits.log_softmax(-1)
    nll = F.nll_loss(log_p, labels, reduction="none")
    factor = torch.ones_like(nll)
    if kind == "dft":
        factor = (-nll).exp()
    if kind == "eaft":
        entropy = -(log_p.exp() * log_p).sum(-1)
        factor = (entropy / math.log(20)).clamp_max(1) ** alpha
    loss = weights * factor * nll
    if kind == "unlikelihood":
        loss = torch.where(weights < 0, -weights * -torch.log1p(-(-nll).exp()), loss)
    return loss, (weights * factor).abs()


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_that_of_float64_on_whole_conversations(sure, tmp_path, kind):
    """The loss that is minimised and what becomes of each class's weights, of one step over all data; the other numbers
    are as without."""
    options = ["--data.bins_per_step=64", *WEIGHTS, "--loss.eaft_alpha=1.7"]
    (line,) = tiny.train(sure, tmp_path / "run", *options, f"--loss.dynamic={kind}")
    (plain,) = tiny.train(sure, tmp_path / "plain", *options)
    model = hf.load(sure.base, dtype="float32").double()
    total, sums = 0.0, {name: [0.0, 0.0] for name in CLASSES}
    for example in TokenDataset(sure.data, classes=CLASSES):
        ids, weights = (torch.from_numpy(each[1:]) for each in (example.input_ids, example.loss_weights))
        (logits,) = model.logits([example.input_ids.tolist()])
        loss, effective = row_terms(logits[:-1].double(), ids, weights.double(), kind, 1.7)
        total += float(loss.sum())
        for i, each in enumerate((effective, weights.abs())):
            sums[example.condition][i] += float(each.sum())
    assert line["loss"] == pytest.approx(total / sum(static for _, static in sums.values()), rel=1e-5)
    for name, (effective, static) in sums.items():
        found = line["classes"][name]
        assert found.pop("effective_weight") == pytest.approx(effective / static, rel=1e-5)
        assert effective < 0.9 * static or kind == "unlikelihood"
        assert found == plain["classes"][name]
    assert line["accuracy"] == plain["accuracy"] and line["loss"] != plain["loss"]


def test_none_is_a_run_without_the_section_to_the_bit(world, alone, tmp_path):
    lines = tiny.train(world, tmp_path / "run", "--data.epochs=2", "--loss.dynamic=none", "--loss.stage2.from=0.5")
    assert tiny.curve(lines) == tiny.curve(alone)
    assert tiny.is_equal(tiny.state(tmp_path / "run", len(alone)), tiny.state(world.folder / "alone", len(alone)))


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_take_the_steps_of_one(sure, tmp_path, kind):
    weights = WEIGHTS if kind == "unlikelihood" else ["--classes.GPT4.weight=0.7", "--classes.GPT3.weight=0.3"]
    options = [*weights, f"--loss.dynamic={kind}", "--data.max_steps=6"]  # no sums that cancel
    ours = tiny.train(sure, tmp_path / "one", *options)
    tiny.train_on_ranks(sure, tmp_path / "two", 2, *options)
    curves = [torch.tensor([line["loss"] for line in lines]) for lines in (ours, tiny.metrics(tmp_path / "two"))]
    assert (curves[0] - curves[1]).norm() <= TOLERANCE * curves[0].norm()
    for one, two in zip(ours, tiny.metrics(tmp_path / "two"), strict=True):
        for name in CLASSES:
            weights = [each["classes"][name]["effective_weight"] for each in (one, two)]
            assert weights[0] == pytest.approx(weights[1], rel=1e-5)


@pytest.mark.parametrize("resumed_at", [3, 6])
@pytest.mark.parametrize("kind", [*KINDS, "stages"])
def test_a_run_goes_on_to_the_bit_before_and_after_its_second_stage_begins(sure, tmp_path, kind, resumed_at):
    """At step 5 of 8."""
    options = [*WEIGHTS, *SAVED, *(STAGES if kind == "stages" else [f"--loss.dynamic={kind}"])]
    whole = tiny.train(sure, tmp_path / "run", *options)
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    for step in {6, 8} if resumed_at == 3 else {8}:
        shutil.rmtree(tmp_path / "again" / "checkpoints" / f"step_{step}")
    assert tiny.curve(tiny.train(sure, tmp_path / "again", *options)) == tiny.curve(whole) and len(whole) == 8
    assert tiny.is_equal(tiny.state(tmp_path / "again", 8), tiny.state(tmp_path / "run", 8))


def test_a_second_stage_begins_at_its_step_and_evaluations_know_no_stage(world, tmp_path):
    common = [*WEIGHTS, "--data.max_steps=8", f"--data.eval_path={world.data}"]
    first = tiny.train(world, tmp_path / "first", *common, "--loss.dynamic=dft")
    both = tiny.train(world, tmp_path / "both", *common, "--loss.dynamic=dft", "--loss.stage2.from=0.5")
    assert tiny.curve(both)[:4] == tiny.curve(first)[:4] and tiny.curve(both)[4] != tiny.curve(first)[4]
    weights = [line["classes"]["GPT4"]["effective_weight"] for line in both]
    assert max(weights[:4]) < 0.9 and weights[4:] == [1.0] * 4
    tiny.train(world, tmp_path / "plain", *common)
    starts = [tiny.metrics(tmp_path / name, "eval.jsonl")[0] for name in ("both", "plain")]
    assert starts[0] == starts[1] and "effective_weight" not in starts[0]["classes"]["GPT4"]


def learn_500_steps(world, folder, dynamic):
    """(loss of each step, nll of each class at its steps) with the sub-optimal answers at -0.5."""
    options = ["--data.bins_per_step=1", "--data.epochs=50", "--data.max_steps=500", "--optim.min_lr_ratio=1"]
    options += ["--classes.GPT4.weight=1", "--classes.GPT3.weight=-0.5", "--checkpoint.every=1000"]
    lines = tiny.train(world, folder, *options, f"--loss.dynamic={dynamic}")
    assert len(lines) == 500
    losses = {name: [line["classes"][name]["loss"] for line in lines] for name in CLASSES}
    return [line["loss"] for line in lines], *([x for x in losses[name] if x is not None] for name in CLASSES)


def mean(values):
    return sum(values) / len(values)


def test_unlikelihood_learns_from_negative_weights_for_500_steps_where_plain_nll_diverges(world, tmp_path):
    losses, experts, others = learn_500_steps(world, tmp_path / "bounded", "unlikelihood")
    assert min(losses) >= 0 and mean(losses[-20:]) < 0.5
    assert mean(experts[-20:]) < 0.3 * mean(experts[:20]) and max(experts) < 6 and max(others) < 30
    losses, experts, others = learn_500_steps(world, tmp_path / "plain", "none")
    assert mean(losses[-20:]) < -50 and mean(others[-20:]) > 1.5 * mean(others[len(others) // 2 :][:20]) > 60
    assert max(experts) > 20  # it has to pay for what it gains from the others


def test_negative_weights_without_a_bound_are_warned_of_and_unlikelihood_without_them_is_said(world, tmp_path, capsys):
    def said(*options):
        tiny.train(world, tmp_path / "_".join(options).replace("/", ""), "--data.max_steps=1", *options)
        return " ".join(capsys.readouterr().out.split())

    warning = 'some weights are negative, and loss.dynamic = "none": their loss has no lower bound'
    assert warning in said(*WEIGHTS)
    assert "some weights" not in said(*WEIGHTS, "--loss.dynamic=unlikelihood") and "some weights" not in said()
    assert "no weight is negative, so unlikelihood changes nothing" in said("--loss.dynamic=unlikelihood")


def test_the_plan_and_the_run_say_which_weights_change_and_what_has_no_bound():
    both = LossConfig("eaft", 0.5, stage2=StageConfig("unlikelihood", from_=0.8))
    assert tables.describe_loss(both, True) == {
        "dynamic weights": "eaft, alpha 0.5; unlikelihood after 0.8 of the steps"
    }  # fmt: skip
    assert tables.describe_loss(LossConfig(), True) == {} and tables.loss_warnings(LossConfig(), False) == []
    (warning,) = tables.loss_warnings(both, True)
    assert 'loss.dynamic = "eaft"' in warning
    assert tables.loss_warnings(LossConfig("dft"), True) == []  # its gradient fades with p, too
