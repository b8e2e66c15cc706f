"""What backward makes again in a run: `train.recompute = "auto"`, settled for the cards that the run is on.

    config, why = recompute.settle(config, model_config, ranks, kernels="triton")

The first of forecast.POLICIES whose memory, as `ochat plan` predicts it, every card has.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from msgspec import structs

from ochat.config import Config
from ochat.distributed.processes import Ranks
from ochat.errors import ConfigError
from ochat.model.config import ModelConfig
from ochat.plan.forecast import Run, with_policy
from ochat.plan.lengths import LengthCounts
from ochat.plan.memory import CONTEXT_BYTES, GIB
from ochat.plan.roofline import Workload


def settle(config: Config, model: ModelConfig, ranks: Ranks, kernels: str) -> tuple[Config, str]:
    """The configuration without "auto", the same on every rank, and what was decided and why, in words.

    Raises: ConfigError where the compiler could not do as it is told.
    """
    asked = config.train.recompute
    if asked == "elementwise" and config.train.compile and kernels == "triton":
        raise ConfigError(
            "train.recompute = 'elementwise' beside train.compile = true and Triton kernels, into which a compiler "
            "does not see; set train.kernels = 'reference' or train.compile = false"
        )
    if asked != "auto":
        return config, asked
    is_free = ranks.device.type != "cuda" and not config.train.offload_activations
    policy, why = ("none", "on a CPU memory is seldom short") if is_free else _least(config, model, ranks, kernels)
    train = structs.replace(config.train, recompute=policy)
    return structs.replace(config, train=train), f"{policy}, chosen: {why}"


def _least(config: Config, model: ModelConfig, ranks: Ranks, kernels: Any) -> tuple[str, str]:
    """The policy, and what it and those before it are predicted to need where every token is supervised."""
    budget = config.data.token_budget
    config = structs.replace(config, train=structs.replace(config.train, kernels=kernels))
    run = Run(model, config, Workload(LengthCounts.of(np.array([budget])), supervised_share=1.0), num_steps=0)
    room = min(record["room"] for record in ranks.all_gather_json({"room": _room(ranks.device)}))
    cut = run.cut(ranks.world, ranks.world)
    policy = run.settled(cut, room).recompute
    tried = run.policies[: run.policies.index(policy) + 1]
    needs = [f"{each} needs {run.memory(with_policy(cut, each)).total / GIB:,.1f}" for each in tried]
    return policy, f"{', '.join(needs)} of {room / GIB:,.1f} GiB, as ochat plan predicts"


def _room(device: torch.device) -> float:
    """Bytes that a step can have on the card, CUDA's own included; on a CPU there is no limit to go by."""
    if device.type != "cuda":
        return float("inf")
    free, total = torch.cuda.mem_get_info(device)
    return min(free + CONTEXT_BYTES, total)
