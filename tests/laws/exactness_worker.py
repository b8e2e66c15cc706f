"""Trains many cases in one group of processes, as the trainer does, and notes what its metrics do not say.

    pool.run(4, "tests.laws.exactness_worker:main", "CASES.json")

A case is a configuration, options, and `split`: the micro-batches that a rank makes of its sequences of a step; 0: its
bins. Each leaves RUN/gradients.safetensors, those of the first step, and RUN/notes.json: how often each group of
weights was gathered in the second step (`gathers`; the root's is ""), the ranks whose part of some step had nothing
supervised (`idle`), and how full each step was, in bins (`bins`).
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from pathlib import Path
from unittest import mock

import numpy as np
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile

from ochat import config as configuration
from ochat.distributed import processes
from ochat.distributed.processes import Ranks
from ochat.train import optim, resolve
from ochat.train.trainer import Trainer

UPDATE = optim.update
GATHER = re.compile(r"FSDP::all_gather(?: \((.*)\))?")


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
    """One case from its start to its export."""
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


def main(path: str) -> None:
    """Every case of the file, on the ranks of this process group."""
    cases = json.loads(Path(path).read_text())
    configs = [configuration.load(case["config"], case["options"]) for case in cases]
    ranks = processes.start(configs[0].train, configs[0].parallel)
    for config, case in zip(configs, cases, strict=True):
        replicate = config.parallel.replicate
        mesh = init_device_mesh("cpu", (replicate, ranks.world // replicate), mesh_dim_names=("replicate", "shard"))
        run(config, dataclasses.replace(ranks, mesh=mesh), case.get("split", 0))
    processes.stop()
