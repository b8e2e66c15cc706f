"""LoRA in a run: what is trained, where it starts, which base it belongs to, and its way out.

    adapters = Adapters.of(config, model_config, template, tokenizer)
    adapters.attach(model);  checkpoint.load_base(folder, model);  adapters.start(model)

A checkpoint of a run with adapters holds these alone, and an
adapter_config.json in PEFT's format that names base, rank and targets.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from msgspec import structs
from torch import Tensor

from ochat.checkpoint.manifest import BASE
from ochat.config import Config
from ochat.distributed import local_shards
from ochat.export import serving
from ochat.model import hf, lora, peft
from ochat.model.config import ModelConfig
from ochat.model.lora import digest
from ochat.model.safetensors_files import TensorFiles
from ochat.model.transformer import Transformer
from ochat.text.template import Template
from ochat.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Adapters:
    """What LoRA means for one run. With lora.rank = 0 nothing is frozen and every method does nothing."""

    config: Config
    model: ModelConfig
    ids: tuple[int, ...]  # of the tokens whose rows of embedding and head are trained

    @classmethod
    def of(cls, config: Config, model: ModelConfig, template: Template, tokenizer: Tokenizer) -> Adapters:
        """The rows are those of the template's special tokens, the end of a turn among them."""
        tokens = (template.eot, *template.special_tokens) if config.lora.tokens == "template" else ()
        return cls(config, model, tuple(sorted({tokenizer.special_tokens[token] for token in tokens})))

    @property
    def are_on(self) -> bool:
        return self.config.lora.rank > 0

    def attach(self, model: Transformer) -> None:
        """Freezes the model, on the meta device, in the dtype of the computation, and adds what is trained."""
        if self.are_on:
            lora.attach(model.to(getattr(torch, self.config.train.dtype)), self.config.lora, self.ids)

    @torch.no_grad()
    def start(self, model: Transformer) -> None:
        """Fills the adapters for a first step: B zero, A drawn, rows of tokens as the base has them."""
        if not self.are_on:
            return
        files = hf.open_tensors(self.config.base.path, self.model)
        for name, parameter in local_shards.trainable_parameters(model).items():
            if ".lora." in name:
                value = lora.first_value(name, tuple(parameter.shape), self.config.run.seed)
            else:
                value = self._rows(files, name.replace("tokens.", ""))
            first, end = local_shards.row_range(parameter)
            local_shards.local_shard(parameter).copy_(value[first:end])

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must share with the run that goes on from it, beside what every one must."""
        if not self.are_on:
            return {}
        settings = structs.asdict(self.config.lora) | {
            "targets": sorted(self.config.lora.targets),
            "tokens": list(self.ids),
        }
        return {BASE: digest(Path(self.config.base.path), self.model), "lora": settings}

    def describe(self, run_dir: Path) -> None:
        """Writes adapter_config.json among the run's files that each checkpoint carries."""
        if self.are_on:
            base, settings = str(Path(self.config.base.path).resolve()), self.config.lora
            peft.AdapterConfig(base, settings.rank, settings.alpha, settings.targets, self.ids).write(
                run_dir / serving.FOLDER, self.model
            )

    def facts(self, model: Transformer) -> dict[str, str]:
        """What is trained, as name -> text."""
        if not self.are_on:
            return {}
        count = sum(parameter.numel() for parameter in local_shards.trainable_parameters(model).values())
        rows = f", and the rows of {len(self.ids)} tokens in embedding and head" if self.ids else ""
        settings = self.config.lora
        return {"lora": f"{count:,} trained: rank {settings.rank} on {', '.join(settings.targets)}{rows}"}

    def flops_per_step(self, num_tokens: int, sum_len_sq: int, num_supervised: int) -> float:
        """Model FLOPs of a step, as ModelConfig.flops_per_step; less for frozen weights."""
        if not self.are_on:
            return self.model.flops_per_step(num_tokens, sum_len_sq, num_supervised)
        return lora.flops_per_step(self.model, self.config.lora, num_tokens, sum_len_sq, num_supervised)

    def _rows(self, files: TensorFiles, name: str) -> Tensor:
        """The tokens' rows of our parameter `name`, (n, H)."""
        return torch.cat([piece for i in self.ids for _, piece in hf.read_rows(files, self.model, name, i, i + 1)])
