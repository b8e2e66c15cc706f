"""A step is the same step everywhere: gradients and losses in fp32 on 1, 2, 4 and 8 processes, cut into any
micro-batches, sharded in any way; and two runs of one kind are bitwise one run. pytest tests/laws/test_exactness.py

On data with fractional and negative weights, of which much is not supervised: there are bins and processes without a
supervised token in a step, and each epoch's last step lacks bins.
"""

import dataclasses
import json
import os
import random
import re
import shutil
from collections import Counter
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile

from ochat import config as configuration
from ochat.distributed import processes
from ochat.distributed.processes import Ranks
from ochat.errors import ConfigError
from ochat.train import optim, resolve
from ochat.train.trainer import Trainer
from tests import pool, tiny

STEPS, BINS = 20, 4
TOLERANCE = 1e-6  # relative, in norm: sums of fp32 in another order differ by some 1e-7
ALONE = Ranks(0, 1, torch.device("cpu"), None)
WEIGHTS = ["--classes.right.weight=0.73", "--classes.wrong.weight=-0.21", "--classes.silent.weight=0"]
UPDATE = optim.update
GATHER = re.compile(r"FSDP::all_gather(?: \((.*)\))?")
BITWISE = "--run.deterministic=true"
CASES = {  # processes -> name -> (micro-batches that a process makes of its part of a step; 0: its bins, options)
    2: {
        "again": (0, [BITWISE]),
        "bins": (0, [BITWISE]),
        "one": (1, ["--parallel.reshard=block", "--parallel.offload=all", "--train.recompute=elementwise"]),
        "three": (3, ["--parallel.reshard=block", "--train.recompute=block", "--train.offload_activations=true"]),
    },
    4: {
        "bins": (0, ["--parallel.reduce=micro_batch", "--parallel.offload=optimizer"]),
        "three": (3, ["--parallel.reshard=block", "--parallel.reduce=micro_batch", "--parallel.replicate=2"]),
        "rounded": (2, ["--parallel.reduce=micro_batch", "--parallel.reduce_dtype=bfloat16", "--parallel.replicate=2"]),
    },
    8: {"bins": (0, ["--data.bins_per_step=8", "--data.token_budget=96"])},
}
EXACT = [(processes, name) for processes in (2, 4) for name in CASES[processes] if name != "rounded"]


class WatchedTrainer(Trainer):
    """A trainer that looks at its first steps."""

    def watch(self, split: int) -> None:
        self.gradients, self.gathers, self.idle = {}, Counter(), False
        if split:
            self.loader.step = lambda step: self.resplit(step, split)

    def resplit(self, step: int, split: int) -> list:
        """This rank's sequences of a step in `split` micro-batches."""
        loader = self.loader
        epoch, number = loader.position(step)
        first = number * loader.bins_per_step
        bins = range(first + loader.rank, first + loader.bins_per_step, loader.world)
        indices = np.concatenate([loader.plan(epoch).bin(b) for b in bins])
        return [loader.dataset.batch(part) for part in np.array_split(indices, split)]

    def step(self, step: int, batches: list) -> None:
        self.idle |= not any(batch.num_supervised for batch in batches)
        if step != 1 or self.ranks.rank or self.ranks.world == 1:
            return super().step(step, batches)
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            super().step(step, batches)
        found = [GATHER.fullmatch(event.name) for event in seen.events() or ()]
        self.gathers = Counter(match[1] or "" for match in found if match)

    def keep_gradients(self, optimizer, **options):
        """In place of optim.update: keeps whole gradients of the first step, then updates."""
        for name, parameter in self.model.named_parameters() if not self.gradients else ():
            gradient = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
            self.gradients[name] = gradient.clone()
        return UPDATE(optimizer, **options)


def run(config: configuration.Config, ranks: Ranks, split: int = 0) -> None:
    """One case from its start to its export; `split`: the micro-batches that a rank makes of its sequences of a step,
    0: its bins. Leaves RUN/gradients.safetensors, those of the first step, and RUN/notes.json: how often each group of
    weights was gathered in the second step (`gathers`; the root's is ""), the ranks whose part of some step had nothing
    supervised (`idle`), and how full each step was, in bins (`bins`)."""
    resolve.determinism(config.run.deterministic)
    trainer = WatchedTrainer(config, ranks)
    trainer.watch(split)
    with mock.patch.object(optim, "update", trainer.keep_gradients):
        trainer.run()
    idle = [rank for rank, record in enumerate(ranks.all_gather_json({"idle": trainer.idle})) if record["idle"]]
    if ranks.is_first:
        save_file(trainer.gradients, Path(config.run.dir) / "gradients.safetensors")
        plans = [trainer.loader.plan(epoch) for epoch in range(config.data.epochs)]
        bins = [int(n) for plan in plans for n in (plan.bin_tokens > 0).reshape(plan.num_steps, -1).sum(1)]
        notes = {"gathers": trainer.gathers, "idle": idle, "bins": bins}
        (Path(config.run.dir) / "notes.json").write_text(json.dumps(notes))


def run_cases(path: str) -> None:
    """Every case of the file, each a configuration, options and `split`, on the ranks of this process group."""
    cases = json.loads(Path(path).read_text())
    configs = [configuration.load(case["config"], case["options"]) for case in cases]
    ranks = processes.start(configs[0].train, configs[0].parallel)
    for config, case in zip(configs, cases, strict=True):
        replicate = config.parallel.replicate
        mesh = init_device_mesh("cpu", (replicate, ranks.world // replicate), mesh_dim_names=("replicate", "shard"))
        run(config, dataclasses.replace(ranks, mesh=mesh), case["split"])
    processes.stop()


@pytest.fixture(scope="module")
def sparse(tmp_path_factory):
    """A world of whose answers many have no weight."""
    draw = random.Random(3)
    return tiny.make(tmp_path_factory.mktemp("sparse"), [conversation(draw) for _ in range(68)])


def conversation(draw):
    items = []
    for _ in range(draw.choice((1, 1, 2))):
        items.append({"role": "user", "content": f"{draw.randrange(50)}+{draw.randrange(50)}"})
        items.append({"role": "assistant", "content": str(draw.randrange(100))})
    return {"items": items, "condition": draw.choices(("right", "wrong", "silent"), (3, 1, 3))[0]}


def options(world, name, *more):
    common = ["--data.epochs=2", f"--data.max_steps={STEPS}", "--checkpoint.every=1000", "--optim.lr=1e-3"]
    return [f"--run.dir={world.folder / name}", *WEIGHTS, *common, *more]


def run_alone(world, name, split=0, *more):
    run(configuration.load(world.config, options(world, name, *more)), ALONE, split)
    return world.folder / name


@pytest.fixture(scope="module")
def reference(sparse):
    """The run folder of one process."""
    return run_alone(sparse, "alone", 0, BITWISE)


@pytest.fixture(scope="module")
def launched(sparse):
    """launched(processes): every case of so many, in one group of processes; the folder of a case by its name."""
    done = set()

    def launch(processes):
        folder = sparse.folder / str(processes)
        if processes not in done:
            cases = [
                {"config": str(sparse.config), "split": split, "options": options(sparse, f"{processes}/{name}", *more)}
                for name, (split, more) in CASES[processes].items()
            ]
            folder.mkdir()
            (folder / "cases.json").write_text(json.dumps(cases))
            pool.run(processes, "tests.laws.test_exactness:run_cases", str(folder / "cases.json"))
            done.add(processes)
        return folder

    return launch


def notes(folder):
    return json.loads((folder / "notes.json").read_text())


def curve(folder):
    return torch.tensor([line["loss"] for line in tiny.metrics(folder)], dtype=torch.float64)


def gradients(folder):
    """Those of the first step, of all parameters in one vector."""
    found = load_file(folder / "gradients.safetensors")
    return torch.cat([found[name].flatten().double() for name in sorted(found)])


def distance(ours, theirs):
    assert ours.shape == theirs.shape and theirs.norm() > 0
    return float((ours - theirs).norm() / theirs.norm())


def test_the_data_has_what_the_laws_are_about(reference, launched):
    assert len(curve(reference)) == STEPS
    assert notes(reference)["bins"][-1] < BINS and (curve(reference) < 0).any()  # a partial step; negative weights
    assert notes(launched(2) / "bins")["idle"] and notes(launched(4) / "bins")["idle"]


def assert_same_steps(ours, theirs):
    assert distance(gradients(ours), gradients(theirs)) < TOLERANCE
    assert distance(curve(ours), curve(theirs)) < TOLERANCE


@pytest.mark.parametrize("split", [1, 9])
def test_micro_batches_of_one_process_add_up_to_the_same_step(sparse, reference, split):
    assert_same_steps(run_alone(sparse, f"split {split}", split), reference)


@pytest.mark.parametrize(("processes", "name"), EXACT)
def test_a_step_is_the_same_on_any_processes_and_micro_batches(reference, launched, processes, name):
    assert_same_steps(launched(processes) / name, reference)


def test_eight_processes_take_the_steps_of_one(sparse, launched):
    """Of eight bins a step: a bin to each."""
    assert_same_steps(launched(8) / "bins", run_alone(sparse, "eight bins", 0, *CASES[8]["bins"][1]))


def test_gradients_that_are_summed_in_bfloat16_are_rounded_and_no_more(reference, launched):
    folder = launched(4) / "rounded"
    assert TOLERANCE < distance(gradients(folder), gradients(reference)) < 2**-7  # half a bit of each summand


def test_the_head_is_gathered_once_a_step_and_what_need_not_be_gathered_is_not(launched):
    """Three micro-batches: a block before each forward and each backward, the embedding before each forward."""
    counts = notes(launched(2) / "three")["gathers"]
    assert counts == {"embed": 3, "blocks.0": 6, "blocks.1": 6, "head": 1, "": 1}
    assert set(notes(launched(2) / "bins")["gathers"].values()) == {1}  # a CPU keeps what it has gathered


def test_two_deterministic_runs_are_bitwise_equal(sparse, reference, launched):
    pairs = {1: (reference, run_alone(sparse, "alone again", 0, BITWISE))}
    pairs[2] = launched(2) / "bins", launched(2) / "again"
    for folders in pairs.values():
        curves = [tiny.curve(tiny.metrics(folder)) for folder in folders]
        assert curves[0] == curves[1]
        assert tiny.is_equal(*(load_file(folder / "export" / "model.safetensors") for folder in folders))


@pytest.fixture
def clean(monkeypatch):
    """The process and its environment as they were."""
    for name in resolve.DETERMINISTIC:
        monkeypatch.delenv(name, raising=False)
    before = torch.are_deterministic_algorithms_enabled()
    yield monkeypatch
    torch.use_deterministic_algorithms(before)
    torch.utils.deterministic.fill_uninitialized_memory = True


def test_a_deterministic_run_sets_what_cuda_needs_or_says_what_is_in_the_way(clean):
    resolve.determinism(True)
    assert torch.are_deterministic_algorithms_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8" and os.environ["NCCL_NVLS_ENABLE"] == "0"
    clean.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    with pytest.raises(ConfigError, match="CUBLAS_WORKSPACE_CONFIG=:0:0; unset it, or set :4096:8 or :16:8"):
        resolve.determinism(True)
    resolve.determinism(False)
    assert not torch.are_deterministic_algorithms_enabled()


def test_moments_in_host_memory_are_saved_and_taken_up_again(sparse):
    more = ["--parallel.offload=optimizer", "--checkpoint.every=8", "--checkpoint.keep=0"]
    whole = run_alone(sparse, "whole", 0, *more)
    shutil.copytree(whole, sparse.folder / "resumed")
    for step in (16, STEPS):
        shutil.rmtree(sparse.folder / "resumed" / "checkpoints" / f"step_{step}")
    resumed = run_alone(sparse, "resumed", 0, *more)
    assert torch.equal(curve(resumed), curve(whole)) and len(curve(whole)) == STEPS


def test_all_on_the_host_is_refused_on_one_process(sparse):
    with pytest.raises(ConfigError, match="parallel.offload = 'all' needs more than one process; .* 'optimizer'"):
        tiny.train(sparse, sparse.folder / "refused", "--parallel.offload=true")
