"""LoRA in a run: what is trained, how it starts, which base it belongs to, and how it is saved.

    adapters = Adapters.of(config.lora, config.base, model_config, template, tokenizer)
    lora.attach(model, config.lora, adapters.token_ids);  checkpoint.load_base(folder, model)
    adapters.start(model, seed)

A checkpoint of a run with adapters holds only them, and an adapter_config.json in PEFT's format that names base, rank
and targets.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from msgspec import structs

from ochat.checkpoint.manifest import BASE
from ochat.config import BaseConfig, LoraConfig
from ochat.distributed.local_shards import local_shard, row_range, trainable_parameters
from ochat.model import hf, lora, peft
from ochat.model.config import ModelConfig
from ochat.model.transformer import Transformer
from ochat.text.template import Template
from ochat.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Adapters:
    """What LoRA means for one run with lora.rank > 0."""

    lora: LoraConfig
    base: Path
    quantize: str  # how the run holds its frozen linears
    model: ModelConfig
    token_ids: tuple[int, ...]  # tokens whose rows of embedding and head are trained

    @classmethod
    def of(
        cls, lora: LoraConfig, base: BaseConfig, model: ModelConfig, template: Template, tokenizer: Tokenizer
    ) -> Adapters:
        """With lora.tokens = "template" the rows of the template's special tokens are trained too."""
        tokens = (template.eot, *template.special_tokens) if lora.tokens == "template" else ()
        token_ids = tuple(sorted({tokenizer.special_tokens[token] for token in tokens}))
        return cls(lora, Path(base.path), base.quantize, model, token_ids)

    @torch.no_grad()
    def start(self, model: Transformer, seed: int) -> None:
        """Initialize the adapters: B zero, A random, rows of tokens from the base."""
        stored = hf.open_tensors(self.base, self.model)
        for name, parameter in trainable_parameters(model).items():
            if ".lora." in name:
                value = lora.first_value(name, tuple(parameter.shape), seed)
            else:
                whole = name.replace("tokens.", "")
                rows = (hf.read_rows(stored, self.model, whole, i, i + 1) for i in self.token_ids)
                value = torch.cat([piece for pieces in rows for _, piece in pieces])  # (n, H)
            local_shard(parameter).copy_(value[slice(*row_range(parameter))])

    def identity(self) -> dict[str, Any]:
        """What a checkpoint and the run that resumes from it must also have in common."""
        changed = {"targets": sorted(self.lora.targets), "tokens": list(self.token_ids)}
        changed |= {"base.quantize": self.quantize} if self.quantize != "none" else {}
        return {BASE: lora.base_digest(self.base, self.model), "lora": structs.asdict(self.lora) | changed}

    def write_config(self, folder: Path) -> None:
        """Write adapter_config.json; each checkpoint carries a copy."""
        base, settings = str(self.base.resolve()), self.lora
        config = peft.AdapterConfig(base, settings.rank, settings.alpha, settings.targets, self.token_ids)
        config.write(folder, self.model)

    def facts(self, model: Transformer) -> dict[str, str]:
        """What is trained, as name -> text."""
        count = sum(parameter.numel() for parameter in trainable_parameters(model).values())
        rows = f", and the rows of {len(self.token_ids)} tokens in embedding and head" if self.token_ids else ""
        base = "" if self.quantize == "none" else f"; frozen linears in {self.quantize}"
        return {"lora": f"{count:,} trained: rank {self.lora.rank} on {', '.join(self.lora.targets)}{rows}{base}"}
