"""What a configuration means on these devices: which kernels and attention, which model, which optimizer.

kernels = assembly.kernels_name(config, device);  ops = ochat_kernels.load(kernels)
model = assembly.build_model(config, model_config, ops, ranks, adapters)
optimizer = assembly.build_optimizer(config, model, ops, ranks, kernels)
"""

from __future__ import annotations

import os
from types import ModuleType

import torch

from ochat.config import Config
from ochat.distributed.processes import Ranks
from ochat.errors import ConfigError
from ochat.model.attention import default_backend
from ochat.model.config import ModelConfig
from ochat.model.transformer import Transformer
from ochat.train import optim, sharding
from ochat.train.adapters import Adapters


def kernels_name(config: Config, device: torch.device) -> str:
    """The implementation of the operators, "triton" or "reference". Raises: ConfigError where it cannot run."""
    on_card = device.type == "cuda"
    if config.train.kernels == "auto":
        return "triton" if on_card else "reference"
    if config.train.kernels == "triton" and not on_card and os.environ.get("TRITON_INTERPRET") != "1":
        raise ConfigError(
            "train.kernels = 'triton', but the run is on a CPU, where Triton only runs in its slow interpreter "
            "(TRITON_INTERPRET=1); use 'auto' or 'reference'"
        )
    return config.train.kernels


def attention_name(config: Config, device: torch.device) -> str:
    """The backend of attention."""
    if config.train.attention != "auto":
        return config.train.attention
    return default_backend(device, getattr(torch, config.train.dtype))


def build_model(
    config: Config, model_config: ModelConfig, ops: ModuleType, ranks: Ranks, adapters: Adapters
) -> Transformer:
    """The model with its adapters, wrapped and in memory, its values not yet there."""
    dtype = getattr(torch, config.train.dtype)
    with torch.device("meta"):
        model = Transformer(model_config, ops).to(getattr(torch, config.optim.master_dtype))
    model.compute_dtype = dtype
    adapters.attach(model)
    sharding.wrap(model, ranks, config.train, config.parallel, dtype)
    return model.to_empty(device="cpu" if config.parallel.offload == "all" else ranks.device)


def build_optimizer(
    config: Config, model: Transformer, ops: ModuleType, ranks: Ranks, kernels: str
) -> torch.optim.AdamW | optim.FusedAdamW:
    """AdamW over what is trained: by our operator where it is faster or the only one that can, else by torch's.

    Raises: as optim.build.
    """
    offload = config.parallel.offload
    is_ours = kernels == "triton" and offload != "all"  # a kernel cannot reach host memory
    is_ours |= offload == "optimizer" or optim.needs_kernel(config.optim)
    return optim.build(
        model,
        config.optim,
        ops.adamw if is_ours else None,
        host_moments=offload == "optimizer",
        micro_batches=config.data.bins_per_step // ranks.world,
        seed=config.run.seed,
    )
