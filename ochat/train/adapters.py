"""LoRA in a run: what is trained, where it starts, which base it belongs to, and its way out.

    adapters = Adapters.of(config, model_config, template, tokenizer)
    adapters.attach(model);  checkpoint.load_base(folder, model);  adapters.start(model)

A checkpoint of a run with adapters holds these alone, and an
adapter_config.json in PEFT's format that names base, rank and targets.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ochat.config import Config
from ochat.data.template import Template
from ochat.data.tokenizer import Tokenizer
from ochat.errors import CheckpointError, ConfigError
from ochat.model import hf, lora, peft
from ochat.model.config import ModelConfig
from ochat.model.safetensor_files import TensorFiles
from ochat.model.transformer import Transformer
from ochat.train import checkpoint, optim, parallel, serving
from ochat.train.manifest import Manifest

BASE = "base"  # a key of a run's identity


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
        for name, parameter in optim.trained(model).items():
            if ".lora." in name:
                value = lora.first_value(name, tuple(parameter.shape), self.config.run.seed)
            else:
                value = self._rows(files, name.replace("tokens.", ""))
            first, end = parallel.rows(parameter)
            optim.local(parameter).copy_(value[first:end])

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must share with the run that goes on from it, beside what every one must."""
        if not self.are_on:
            return {}
        settings = asdict(self.config.lora) | {"targets": sorted(self.config.lora.targets), "tokens": list(self.ids)}
        return {BASE: digest(Path(self.config.base.path), self.model), "lora": settings}

    def describe(self, run_dir: Path) -> None:
        """Writes adapter_config.json among the run's files that each checkpoint carries."""
        if self.are_on:
            base, settings = str(Path(self.config.base.path).resolve()), self.config.lora
            peft.Settings(base, settings.rank, settings.alpha, settings.targets, self.ids).write(
                run_dir / serving.FOLDER, self.model
            )

    def facts(self, model: Transformer) -> dict[str, str]:
        """What is trained, as name -> text."""
        if not self.are_on:
            return {}
        count = sum(parameter.numel() for parameter in optim.trained(model).values())
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


def digest(base: Path, model: ModelConfig) -> str:
    """Of a base's tensors: name, dtype, shape, first and last row of each. Costs: a page or two of each is read."""
    files, found = hf.open_tensors(base, model), hashlib.sha256()
    for part in (part for parts in hf.parameter_parts(model).values() for part in parts):
        found.update(f"{part.name} {files.dtype(part.name)} {part.shape}".encode())
        for row in (0, part.shape[0] - 1):
            found.update(files.read_rows(part.name, row, row + 1).contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def are_in(manifest: Manifest) -> bool:
    """Whether a checkpoint holds adapters instead of a whole model."""
    return BASE in manifest.identity


def merged(manifest: Manifest, model: ModelConfig, base: str) -> Iterator[tuple[str, Tensor]]:
    """(name, whole tensor) of each parameter of a checkpoint's adapters merged into their base, read where the run had
    it or at `base`.

    Raises: CheckpointError where another base lies there; ConfigError where none does.
    """
    settings = peft.Settings.read(manifest.folder)
    folder = Path(base or settings.base)
    if not folder.is_dir():
        raise ConfigError(f"{folder}: the base of {manifest.folder} is not there; say with --base where it is")
    found = digest(folder, model)
    if found != manifest.identity[BASE]:
        raise CheckpointError(
            f"{folder}: not the base of {manifest.folder} (its weights' digest is {found}, not "
            f"{manifest.identity[BASE]}); name the right folder with --base"
        )
    adapter = dict(checkpoint.iterate_parameters(manifest))
    yield from peft.merged(hf.read_tensors(folder, model), model, settings, adapter)
