"""Whole state dictionaries in Hugging Face's names and in ours, to compare with a peer; the product goes part by part.

to_hf(config, ours) -> theirs;  from_hf(config, theirs) -> ours
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ochat.model import hf
from ochat.model.config import ModelConfig


def to_hf(config: ModelConfig, named_tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Our (name, tensor) pairs, split into Hugging Face's; the results are views."""
    parts, state = hf.parameter_parts(config), {}
    for name, whole in named_tensors:
        pieces = whole.split([part.shape[0] for part in parts[name]])
        state |= {part.name: piece for part, piece in zip(parts[name], pieces, strict=True)}
    return state


def from_hf(config: ModelConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Hugging Face's tensors, fused into our parameters."""
    return {ours: torch.cat([state[part.name] for part in parts]) for ours, parts in hf.parameter_parts(config).items()}
