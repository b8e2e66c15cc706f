"""An exponential moving average of the trained weights, fp32 and sharded as they are (optim.ema).

    average = WeightAverage(model, 0.999);  average.start()
    average.update(is_applied)      # after each step of the optimizer

a = decay a + (1 - decay) w after every step that was applied, from a = w before the first one, of which decay^n is left
after n steps. Training, evaluations and samples never read it; checkpoints hold it, and `ochat export --ema` writes it.
In bf16 most of its steps would be smaller than half the distance between two numbers, and lost.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn

from ochat.checkpoint.manifest import Manifest
from ochat.distributed.local_shards import local_shard, trainable_parameters

log = logging.getLogger(__name__)


class WeightAverage:
    """The average of a model's trained parameters; `values`: parameter -> this rank's rows, fp32."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, parameters = decay, trainable_parameters(model).values()
        self.values: dict[Tensor, Tensor] = {
            p: torch.empty_like(local_shard(p).detach(), dtype=torch.float32) for p in parameters
        }

    @torch.no_grad()
    def start(self) -> None:
        """Begin with the weights as they are."""
        for parameter, value in self.values.items():
            value.copy_(local_shard(parameter))

    @torch.no_grad()
    def update(self, is_applied: Tensor) -> None:
        """Take the weights in, where `is_applied` () bool: else no bit changes.

        Costs: 3 FLOPs and 12 bytes a parameter (10 where masters are bf16), a launch for each; no sync.
        """
        share = torch.where(is_applied, 1 - self.decay, 0.0)
        for parameter, value in self.values.items():
            value.lerp_(local_shard(parameter).float(), share)

    def fact(self, num_steps: int) -> str:
        """What the run will average, in words."""
        left = self.decay**num_steps
        return f"{self.decay:g} of the average stays at each step; {left:.2g} of the first weights is left at the end"


def take_up(average: WeightAverage | None, found: Manifest | None) -> None:
    """Start the average from the weights, unless the checkpoint `found`, which they are of, has filled it."""
    if average is None:
        if found and found.ema:
            what = "optim.ema = 0: the average of weights in %s ends there; set it to %g to go on"
            log.warning(what, found.folder, found.ema)
        return
    if found is None or not found.ema:
        average.start()
    if found and not found.ema:
        log.info("%s holds no average of weights: optim.ema starts from its weights", found.folder)
