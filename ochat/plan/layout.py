"""How a run is divided: micro-batches, ranks, shards, and what is kept in which precision where.

    Layout(token_budget=8192, bins_per_step=64, recompute="block", ranks=8, shard=8)

memory.py and roofline.py predict from a Layout and the model's shape.
"""

from __future__ import annotations

from dataclasses import dataclass

from ochat.config import LoraConfig
from ochat.model import lora
from ochat.model.config import ModelConfig


@dataclass(frozen=True)
class Layout:
    """A run on so many GPUs. Names that the configuration has mean the same here."""

    token_budget: int  # T, tokens of a micro-batch
    bins_per_step: int = 1
    recompute: str = "none"  # "auto" is resolved before anything is predicted
    ranks: int = 1  # S; more than one: FSDP
    shard: int = 1  # s, ranks that share a copy of the model
    gpus_per_node: int = 8  # G
    supervised: int = 0  # R, rows of a micro-batch that reach the head; for memory only
    lora: LoraConfig = LoraConfig()  # of rank 0: every parameter is trained
    itemsize: int = 2  # e, bytes of an activation; 4: train.dtype = "float32"
    master_itemsize: int = 4  # 2: optim.master_dtype = "bfloat16"
    state_itemsize: int = 4  # of each moment; 2: optim.moment_dtype = "bfloat16"
    reduce_itemsize: int = 4
    reshard: str = "block"
    reduce: str = "step"
    offload: str = "none"
    offload_activations: bool = False
    in_backward: bool = False

    @property
    def micro_batches(self) -> int:
        """Of a GPU in a step."""
        return max(round(self.bins_per_step / self.ranks), 1)

    @property
    def reduces(self) -> int:
        """How often a step sums gradients over ranks."""
        return 1 if self.reduce == "step" else self.micro_batches

    @property
    def gradient_itemsize(self) -> int:
        """Bytes of a gradient that the optimizer reads: fp32 also where one process adds up micro-batches."""
        return 4 if self.ranks == 1 and self.micro_batches > 1 else self.master_itemsize

    @property
    def has_casts(self) -> bool:
        """Whether matmuls read copies of the masters."""
        return self.itemsize < self.master_itemsize

    @property
    def gathers_once(self) -> bool:
        """Whether the whole model's weights stay gathered through a step."""
        return self.ranks > 1 and self.reshard == "step"

    @property
    def matmuls_of_weight(self) -> int:
        """Forward, the gradient of the input, and that of the weight where it has one."""
        return 2 if self.lora.rank else 3

    def adapters(self, model: ModelConfig) -> int:
        """A, parameters of all adapters."""
        return lora.num_parameters(model, self.lora)

    def trained(self, model: ModelConfig) -> int:
        """Parameters that the optimizer updates."""
        return self.adapters(model) or model.num_parameters()
