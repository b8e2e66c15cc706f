"""Rotary position embedding: settings from a `config.json`, frequencies, and the cos/sin tables of the kernels.

    cos, sin = cos_sin(position_ids, inv_freq(RopeConfig(theta=500000.0), head_dim=128))
A pair (i, i + D/2) of a head is rotated by position * inv_freq[i] (the "rotate halves" layout of Hugging Face).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ochat.files.bounded_json import Fields, shown

DEFAULT_THETA = 10000.0
WHOLE = "original_max_position_embeddings"  # the one setting that is no fraction
SCALING_KEYS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", WHOLE),
}


@dataclass(frozen=True)
class RopeConfig:
    """Base and scaling of the frequencies; `kind` decides which fields are used."""

    theta: float = DEFAULT_THETA
    kind: str = "default"  # a key of SCALING_KEYS
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


def from_hf(record: Mapping[str, Any], where: str = "config.json") -> RopeConfig:
    """Read `rope_theta` + `rope_scaling` (old spelling) or `rope_parameters` (new).

    Raises: ConfigError for another scaling type, partial rotation, an unknown setting, or spellings that disagree.
    """
    fields = Fields(record, where)
    _refuse_partial_rotation(fields)
    found = [_from_table(fields, key) for key in ("rope_scaling", "rope_parameters") if record.get(key)]
    if len(found) == 2 and found[0] != found[1]:
        raise fields.fail("rope_scaling", " and rope_parameters disagree; keep the right one")
    return found[0] if found else RopeConfig(fields.number("rope_theta", DEFAULT_THETA))


def to_hf(rope: RopeConfig) -> dict[str, Any]:
    """The old spelling, which every version of transformers reads."""
    if rope.kind == "default":
        return {"rope_theta": rope.theta, "rope_scaling": None}
    scaling = {key: getattr(rope, key) for key in SCALING_KEYS[rope.kind]}
    return {"rope_theta": rope.theta, "rope_scaling": {"rope_type": rope.kind, **scaling}}


def inv_freq(rope: RopeConfig, head_dim: int) -> Tensor:
    """Angle per position of each pair: (D/2,) fp32 on the CPU, in the order of operations that transformers uses."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64, device="cpu").float() / head_dim
    frequencies = 1.0 / (rope.theta**exponents)
    if rope.kind == "linear":
        return frequencies / rope.factor
    return _llama3(frequencies, rope) if rope.kind == "llama3" else frequencies


def cos_sin(position_ids: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
    """cos, sin (T, D/2) fp32 of `position_ids` (T,) int64. Half precision would lose whole positions beyond 256."""
    angles = position_ids[:, None].float() * inv_freq[None, :]
    return angles.cos(), angles.sin()


def _llama3(frequencies: Tensor, rope: RopeConfig) -> Tensor:
    """Llama 3.1: long waves are slowed by `factor`, short ones kept, those between mixed."""
    context, low, high = rope.original_max_position_embeddings, rope.low_freq_factor, rope.high_freq_factor
    wavelengths = 2 * math.pi / frequencies
    slowed = torch.where(wavelengths > context / low, frequencies / rope.factor, frequencies)
    share = (context / wavelengths - low) / (high - low)
    mixed = (1 - share) * slowed / rope.factor + share * slowed
    is_between = ~(wavelengths < context / high) & ~(wavelengths > context / low)
    return torch.where(is_between, mixed, slowed)


def _from_table(outer: Fields, key: str) -> RopeConfig:
    """One of the two tables; `rope_theta` may be in it or at the top level."""
    table = outer.record[key]
    if not isinstance(table, dict) or any(isinstance(value, dict) for value in table.values()):
        raise outer.fail(key, f" is {shown(table)}; expected one table of numbers for all layers")
    fields = Fields(table, f"{outer.where}: {key}")
    kind = _kind(fields)
    _refuse_partial_rotation(fields)
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor", *SCALING_KEYS[kind]}
    for name in table.keys() - known:
        if table[name] is not None:
            raise fields.fail(name, f" = {shown(table[name])} is not implemented for rope type {kind!r}")
    scaling: dict[str, Any] = {
        name: (fields.integer if name == WHOLE else fields.number)(name) for name in SCALING_KEYS[kind]
    }
    rope = RopeConfig(_theta(fields, outer), kind, **scaling)
    if rope.kind == "llama3" and rope.high_freq_factor <= rope.low_freq_factor:
        raise fields.fail("high_freq_factor", f" = {rope.high_freq_factor} must be larger than low_freq_factor")
    return rope


def _kind(fields: Fields) -> str:
    given = [fields.record[key] for key in ("rope_type", "type") if fields.record.get(key) is not None] or ["default"]
    if given[0] != given[-1]:
        raise fields.fail("rope_type", f" and type disagree: {shown(given)}; keep the right one")
    if not isinstance(given[0], str) or given[0] not in SCALING_KEYS:
        raise fields.fail("rope_type", f" is {shown(given[0])}: not implemented ({', '.join(SCALING_KEYS)} are)")
    return given[0]


def _theta(fields: Fields, outer: Fields) -> float:
    inside, outside = fields.record.get("rope_theta"), outer.record.get("rope_theta")
    if inside is not None and outside is not None and inside != outside:
        raise fields.fail("rope_theta", f" is {shown(inside)}, the top level says {shown(outside)}; keep the right one")
    return (fields if inside is not None else outer).number("rope_theta", DEFAULT_THETA)


def _refuse_partial_rotation(fields: Fields) -> None:
    if fields.number("partial_rotary_factor", 1.0) != 1.0:
        share = fields.record["partial_rotary_factor"]
        raise fields.fail("partial_rotary_factor", f" is {shown(share)}: rotating a part of a head is not implemented")
