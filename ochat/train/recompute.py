"""Resolve `train.recompute = "auto"`: the first of forecast.POLICIES that the plan predicts to fit every rank's GPU.

config, why = resolve_recompute(config, model_config, ranks, kernels="triton")
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
from ochat.plan.forecast import PlanInputs, with_policy
from ochat.plan.lengths import LengthCounts
from ochat.plan.memory import CONTEXT_BYTES, GIB
from ochat.plan.roofline import Workload


def resolve_recompute(config: Config, model: ModelConfig, ranks: Ranks, kernels: str) -> tuple[Config, str]:
    """The configuration without "auto", the same on every rank, and the decision with its reason.

    Raises: ConfigError for "elementwise" where the compiler cannot do it.
    """
    asked = config.train.recompute
    if asked == "elementwise" and config.train.compile and kernels == "triton":
        raise ConfigError(
            "train.recompute = 'elementwise' with train.compile = true and Triton kernels, into which a compiler "
            "does not see; set train.kernels = 'reference' or train.compile = false"
        )
    if asked != "auto":
        return config, asked
    is_free = ranks.device.type != "cuda" and not config.train.offload_activations
    policy, why = ("none", "on a CPU memory is seldom short") if is_free else _first_fit(config, model, ranks, kernels)
    train = structs.replace(config.train, recompute=policy)
    return structs.replace(config, train=train), f"{policy}, chosen: {why}"


def _first_fit(config: Config, model: ModelConfig, ranks: Ranks, kernels: Any) -> tuple[str, str]:
    """The policy, and what it and those before it are predicted to need if every token is supervised."""
    workload = Workload(LengthCounts.of(np.array([config.data.token_budget])), supervised_share=1.0)
    train = structs.replace(config.train, kernels=kernels)
    inputs = PlanInputs(model, workload, 0, config.data, train, config.optim, config.parallel, config.lora)
    room = min(record["room"] for record in ranks.all_gather_json({"room": free_bytes(ranks.device)}))
    layout = inputs.layout(ranks.world, ranks.world)
    policy = inputs.resolve_recompute(layout, room).recompute
    tried = inputs.policies[: inputs.policies.index(policy) + 1]
    needs = [f"{each} needs {inputs.memory(with_policy(layout, each)).total / GIB:,.1f}" for each in tried]
    return policy, f"{', '.join(needs)} of {room / GIB:,.1f} GiB, as ochat plan predicts"


def free_bytes(device: torch.device) -> float:
    """Bytes that a step can use on the GPU, CUDA's own context included; unlimited on a CPU."""
    if device.type != "cuda":
        return float("inf")
    free, total = torch.cuda.mem_get_info(device)
    return min(free + CONTEXT_BYTES, total)
