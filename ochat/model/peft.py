"""Write adapters as PEFT files (adapter_config.json, adapter_model.safetensors), or merge them into their base.

    adapter_config = AdapterConfig.read(folder);  save(out, model_config, adapter_config, adapter)
    hf.save(out, model_config, merged_parameters(stored_base, model_config, adapter_config, adapter), "bfloat16")
`adapter` holds the tensors of `lora.attach` under our names. A merged weight is W + (alpha / r) B A in fp32, rounded
once; any other weight is the base's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ochat.errors import CheckpointError
from ochat.files import atomic, bounded_json, safetensors_file
from ochat.files.safetensors_file import StoredTensor
from ochat.model import hf, lora
from ochat.model.config import ModelConfig

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model"
EMBEDDINGS = {"embed": "model.embed_tokens", "head": "lm_head"}


@dataclass(frozen=True)
class AdapterConfig:
    """What adapter_config.json says of an adapter."""

    base: str  # path of the base it was trained on
    rank: int
    alpha: float
    targets: tuple[str, ...]  # q_proj, ...
    token_ids: tuple[int, ...]  # whose rows of embedding and head were trained

    @classmethod
    def read(cls, folder: Path) -> AdapterConfig:
        """From the folder's adapter_config.json. Raises: CheckpointError."""
        path = folder / CONFIG
        try:
            record = bounded_json.read_object(path, CheckpointError, "take another adapter")
            tokens = (record["trainable_token_indices"] or {}).get("embed_tokens", [])
            return cls(
                str(record["base_model_name_or_path"]), int(record["r"]), float(record["lora_alpha"]),
                tuple(record["target_modules"]), tuple(tokens),
            )  # fmt: skip
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path}: not an adapter's configuration ({error!r}); take another one") from None

    def write(self, folder: Path, config: ModelConfig) -> None:
        """adapter_config.json into `folder`. Raises: OSError."""
        modules = ["embed_tokens"] if config.tie_embeddings else ["embed_tokens", "lm_head"]
        record = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": self.base,
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": 0.0,
            "bias": "none",
            "target_modules": list(lora.target_modules(config, self.targets)),
            "trainable_token_indices": dict.fromkeys(modules, list(self.token_ids)) if self.token_ids else None,
            "inference_mode": True,
        }
        atomic.write_json(folder / CONFIG, record)


def save(folder: Path, config: ModelConfig, adapter_config: AdapterConfig, adapter: Mapping[str, Tensor]) -> None:
    """Writes what PeftModel.from_pretrained loads, in fp32.

    Raises: KeyError for a tensor that `adapter` lacks; OSError.
    """
    tensors = {}
    for name, parts in lora.adapted_parts(config, adapter_config.targets).items():
        for part, _, a, b in _factors(parts, adapter, name, adapter_config.rank):
            tensors |= {f"{PREFIX}.{part}.lora_A.weight": a, f"{PREFIX}.{part}.lora_B.weight": b}
    for ours, theirs in EMBEDDINGS.items() if adapter_config.token_ids else ():
        if ours == "embed" or not config.tie_embeddings:
            rows = adapter[f"{ours}.tokens.weight"]
            tensors[f"{PREFIX}.{theirs}.token_adapter.trainable_tokens_delta"] = rows  # the rows themselves
    safetensors_file.write(folder / WEIGHTS, {name: tensor.contiguous() for name, tensor in tensors.items()})
    adapter_config.write(folder, config)


def merged_parameters(
    stored: Mapping[str, StoredTensor],
    config: ModelConfig,
    adapter_config: AdapterConfig,
    adapter: Mapping[str, Tensor],
) -> Iterator[tuple[str, Tensor]]:
    """(our name, whole tensor) of every parameter of the model with its adapter, one at a time.

    Raises: KeyError for a tensor that `adapter` lacks. Costs: 2 r FLOPs a weight; one parameter in fp32.
    """
    adapted = lora.adapted_parts(config, adapter_config.targets)
    for name, whole in hf.read_parameters(stored, config):
        module = name.removesuffix(".weight")
        if module in adapted and module != name:  # not its bias
            whole = whole.to(torch.float32, copy=True)
            for _, rows, a, b in _factors(adapted[module], adapter, module, adapter_config.rank):
                whole[rows].addmm_(b.float(), a.float(), alpha=adapter_config.alpha / adapter_config.rank)
        elif module in EMBEDDINGS and adapter_config.token_ids:
            rows = adapter[f"{module}.tokens.weight"].float()
            whole = whole.float().index_copy(0, torch.tensor(adapter_config.token_ids), rows)
        yield name, whole


def _factors(
    parts: Sequence[lora.TargetLinear], adapter: Mapping[str, Tensor], name: str, rank: int
) -> Iterator[tuple[str, slice, Tensor, Tensor]]:
    """(Hugging Face's name, its rows in our weight, A (r, in), B (rows, r)) of a linear's adapted parts."""
    rows = [part.rows for part in parts if part.is_adapted]
    pairs = zip(adapter[f"{name}.lora.a"].split(rank), adapter[f"{name}.lora.b"].split(rows), strict=True)
    start = 0
    for part in parts:
        if part.is_adapted:
            yield part.name, slice(start, start + part.rows), *next(pairs)
        start += part.rows
