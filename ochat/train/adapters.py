"""LoRA in a run: what is trained, how it starts, which base it belongs to, and how it is saved.

    adapters = Adapters.of(config.lora, base_path, model_config, template, tokenizer)
    adapters.attach(model, dtype);  checkpoint.load_base(folder, model);  adapters.start(model, seed)

A checkpoint of a run with adapters holds only them, and an adapter_config.json in PEFT's format that names base, rank
and targets.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from msgspec import structs
from torch import Tensor

from ochat.checkpoint.manifest import BASE
from ochat.config import LoraConfig
from ochat.distributed.local_shards import local_shard, row_range, trainable_parameters
from ochat.model import hf, lora, peft
from ochat.model.config import ModelConfig
from ochat.model.safetensors_files import TensorFiles
from ochat.model.transformer import Transformer
from ochat.text.template import Template
from ochat.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Adapters:
    """What LoRA means for one run. With lora.rank = 0 nothing is frozen and every method does nothing."""

    lora: LoraConfig
    base: Path
    model: ModelConfig
    token_ids: tuple[int, ...]  # tokens whose rows of embedding and head are trained

    @classmethod
    def of(
        cls, lora: LoraConfig, base_path: str, model: ModelConfig, template: Template, tokenizer: Tokenizer
    ) -> Adapters:
        """With lora.tokens = "template" the rows of the template's special tokens are trained too."""
        tokens = (template.eot, *template.special_tokens) if lora.tokens == "template" else ()
        return cls(lora, Path(base_path), model, tuple(sorted({tokenizer.special_tokens[token] for token in tokens})))

    @property
    def are_on(self) -> bool:
        return self.lora.rank > 0

    def attach(self, model: Transformer, dtype: torch.dtype) -> None:
        """Freeze the model, on the meta device, in the dtype of the computation, and add the adapters."""
        if self.are_on:
            lora.attach(model.to(dtype), self.lora, self.token_ids)

    @torch.no_grad()
    def start(self, model: Transformer, seed: int) -> None:
        """Initialize the adapters: B zero, A random, rows of tokens from the base."""
        if not self.are_on:
            return
        files = hf.open_tensors(self.base, self.model)
        for name, parameter in trainable_parameters(model).items():
            if ".lora." in name:
                value = lora.first_value(name, tuple(parameter.shape), seed)
            else:
                value = self._token_rows(files, name.replace("tokens.", ""))
            first, end = row_range(parameter)
            local_shard(parameter).copy_(value[first:end])

    def identity(self) -> dict[str, Any]:
        """What a checkpoint and the run that resumes from it must also have in common."""
        if not self.are_on:
            return {}
        changed = {"targets": sorted(self.lora.targets), "tokens": list(self.token_ids)}
        return {BASE: lora.base_digest(self.base, self.model), "lora": structs.asdict(self.lora) | changed}

    def write_config(self, folder: Path) -> None:
        """Write adapter_config.json; each checkpoint carries a copy."""
        if self.are_on:
            base, settings = str(self.base.resolve()), self.lora
            peft.AdapterConfig(base, settings.rank, settings.alpha, settings.targets, self.token_ids).write(
                folder, self.model
            )

    def facts(self, model: Transformer) -> dict[str, str]:
        """What is trained, as name -> text."""
        if not self.are_on:
            return {}
        count = sum(parameter.numel() for parameter in trainable_parameters(model).values())
        rows = f", and the rows of {len(self.token_ids)} tokens in embedding and head" if self.token_ids else ""
        return {"lora": f"{count:,} trained: rank {self.lora.rank} on {', '.join(self.lora.targets)}{rows}"}

    def flops_per_step(self, num_tokens: int, sum_len_sq: int, num_supervised: int) -> float:
        """Model FLOPs of a step, as ModelConfig.flops_per_step; less for frozen weights."""
        if not self.are_on:
            return self.model.flops_per_step(num_tokens, sum_len_sq, num_supervised)
        return lora.flops_per_step(self.model, self.lora, num_tokens, sum_len_sq, num_supervised)

    def _token_rows(self, files: TensorFiles, name: str) -> Tensor:
        """The tokens' rows of our parameter `name` in the base, (n, H)."""
        rows = (hf.read_rows(files, self.model, name, i, i + 1) for i in self.token_ids)
        return torch.cat([piece for pieces in rows for _, piece in pieces])
