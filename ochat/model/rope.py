"""Rotary position embedding: settings from a `config.json`, frequencies, and the cos/sin tables of the kernels.

    rope = RopeConfig(theta=500000.0);  cos, sin = cos_sin(position_ids, inv_freq(rope, head_dim=128), rope)
A pair (i, i + d/2) of a head is rotated by position * inv_freq[i] (the "rotate halves" layout of Hugging Face), d being
the part of the head that rotates. Letters: T packed tokens, D head dim, d rotated dim.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ochat.errors import ConfigError
from ochat.files.bounded_json import REQUIRED, Fields, shown
from ochat.model.families import warn_once

DEFAULT_THETA = 10000.0
WHOLE = "original_max_position_embeddings"
SCALING_KEYS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", WHOLE),
    "yarn": ("factor", WHOLE, "attention_factor", "beta_fast", "beta_slow", "truncate"),
    "longrope": ("short_factor", "long_factor", WHOLE, "attention_factor"),
}
OPTIONAL = {"attention_factor": None, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": True}
OTHER_KEYS = {  # they become those above, or say nothing more
    "yarn": ("mscale", "mscale_all_dim", "attn_factor", "finetuned"), "longrope": ("factor",), "dynamic": (WHOLE,),
}  # fmt: skip


@dataclass(frozen=True)
class RopeConfig:
    """Base and scaling of the frequencies; `kind` decides which fields are used."""

    theta: float = DEFAULT_THETA
    kind: str = "default"  # a key of SCALING_KEYS
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    partial_rotary_factor: float = 1.0  # the share of each head's dimensions that rotates, its first ones
    attention_factor: float | None = None  # of cos and sin; None: derived from the factor
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factor: tuple[float, ...] = ()  # of each pair, in documents up to the original length
    long_factor: tuple[float, ...] = ()  # in longer ones


def from_hf(
    record: Mapping[str, Any],
    where: str = "config.json",
    theta: float = DEFAULT_THETA,
    layers: str | None = None,
    is_partial: bool = False,
) -> RopeConfig:
    """Read `rope_theta` + `rope_scaling` (old spelling) or `rope_parameters` (new).

    Args: theta: the base where the file has none; layers: "full_attention" or "sliding_attention" in families with a
    rotation for each (the old spelling gives the second a base alone, `rope_local_base_freq`); is_partial: whether the
    family can rotate a part of a head.
    Raises: ConfigError for another scaling type, a partial rotation that the family has not, an unknown setting, or
    spellings that disagree.
    """
    outer, is_local = Fields(record, where), layers == "sliding_attention"
    key = "rope_local_base_freq" if is_local else "rope_theta"
    tables = [_table(outer, "rope_scaling")] if record.get("rope_scaling") and not is_local else []
    if record.get("rope_parameters"):
        tables.append(_table(outer, "rope_parameters", layers))
    found = [_from_table(table, outer, key, theta) for table in tables or [Fields({}, where)]]
    if found[0] != found[-1]:
        raise outer.fail("rope_scaling", " and rope_parameters disagree; keep the right one")
    if (share := found[0].partial_rotary_factor) != 1.0 and not (is_partial and share < 1.0):
        expected = "a share of a head is at most 1" if is_partial else "this model type rotates whole heads"
        raise outer.fail("partial_rotary_factor", f" is {share}: {expected}")
    return found[0]


def to_hf(rope: RopeConfig, local: RopeConfig | None = None) -> dict[str, Any]:
    """The old spelling, which every version of transformers reads; `local`, of layers with a window, in both."""
    record: dict[str, Any] = {"rope_theta": rope.theta, "rope_scaling": _scaling(rope) or None}
    if rope.partial_rotary_factor != 1.0:
        record["partial_rotary_factor"] = rope.partial_rotary_factor
    if rope.kind == "longrope":
        record[WHOLE] = rope.original_max_position_embeddings
    if local is None:
        return record
    tables = {"full_attention": rope, "sliding_attention": local}
    both = {name: {"rope_type": "default", "rope_theta": x.theta, **_scaling(x)} for name, x in tables.items()}
    return record | {"rope_local_base_freq": local.theta, "rope_parameters": both}


def inv_freq(rope: RopeConfig, head_dim: int) -> Tensor:
    """Angle per position of each pair, fp32 on the CPU, in the order of operations that transformers uses: (d/2,), or
    for longrope (2, d/2), the factors of short documents and those of long ones.

    Raises: ConfigError for factors of another number of pairs.
    """
    dim = int(head_dim * rope.partial_rotary_factor)
    exponents = torch.arange(0, dim, 2, dtype=torch.int64, device="cpu").float() / dim
    for name in ("short_factor", "long_factor") if rope.kind == "longrope" else ():
        if (given := len(getattr(rope, name))) != len(exponents):
            raise ConfigError(f"rope_scaling: {name} has {given} numbers, but {len(exponents)} pairs of a head rotate")
    with torch.device("cpu"):  # also where a model is built on the meta device
        return FREQUENCIES[rope.kind](rope, exponents, dim)


def cos_sin(position_ids: Tensor, inv_freq: Tensor, rope: RopeConfig) -> tuple[Tensor, Tensor]:
    """cos, sin (T, d/2) fp32 of `position_ids` (T,) int64, times the attention factor of `rope`.

    Half precision would lose whole positions beyond 256.
    """
    if rope.kind == "longrope":
        is_long = document_lengths(position_ids) > rope.original_max_position_embeddings
        inv_freq = torch.where(is_long[:, None], inv_freq[1], inv_freq[0])  # (T, d/2)
    angles, factor = position_ids[:, None].float() * inv_freq, attention_factor(rope)
    return angles.cos() * factor, angles.sin() * factor


def document_lengths(position_ids: Tensor) -> Tensor:
    """(T,) int64: how long the document of each token is, for packed documents, which begin at position 0.

    Where none begins, each token is the last one of a document of its own (a step of generation with a cache). Without
    a host synchronisation.
    """
    index = torch.arange(len(position_ids), device=position_ids.device)
    is_first = position_ids == 0
    later = torch.where(is_first, index, len(index)).roll(-1)
    later[-1:] = len(index)
    ends = later.flip(0).cummin(0).values.flip(0)  # where the next document begins
    return torch.where(is_first.any(), position_ids + ends - index, position_ids + 1)


def turns_long(rope: RopeConfig, length: int) -> bool:
    """Whether a document's last token, at which it has this `length`, changes the rotation of all before it."""
    return rope.kind == "longrope" and length == rope.original_max_position_embeddings + 1


def attention_factor(rope: RopeConfig) -> float:
    """What cos and sin are multiplied by: the setting, or what YaRN and LongRoPE derive from the factor."""
    if rope.attention_factor is not None or rope.kind not in ("yarn", "longrope") or rope.factor <= 1:
        return 1.0 if rope.attention_factor is None else rope.attention_factor
    if rope.kind == "yarn":
        return _yarn_factor(rope.factor)
    return math.sqrt(1 + math.log(rope.factor) / math.log(rope.original_max_position_embeddings))


def _plain(rope: RopeConfig, exponents: Tensor, dim: int) -> Tensor:
    return 1.0 / (rope.theta**exponents)


def _linear(rope: RopeConfig, exponents: Tensor, dim: int) -> Tensor:
    return _plain(rope, exponents, dim) / rope.factor


def _llama3(rope: RopeConfig, exponents: Tensor, dim: int) -> Tensor:
    """Llama 3.1: long waves are slowed by `factor`, short ones kept, those between mixed."""
    frequencies = _plain(rope, exponents, dim)
    context, low, high = rope.original_max_position_embeddings, rope.low_freq_factor, rope.high_freq_factor
    wavelengths = 2 * math.pi / frequencies
    slowed = torch.where(wavelengths > context / low, frequencies / rope.factor, frequencies)
    share = (context / wavelengths - low) / (high - low)
    mixed = (1 - share) * slowed / rope.factor + share * slowed
    is_between = ~(wavelengths < context / high) & ~(wavelengths > context / low)
    return torch.where(is_between, mixed, slowed)


def _yarn(rope: RopeConfig, exponents: Tensor, dim: int) -> Tensor:
    """YaRN (arXiv:2309.00071): pairs that turn more than beta_fast times in the trained length are kept, those below
    beta_slow turns slowed by `factor`, those between mixed by a ramp over their index."""

    def pair(turns: float) -> float:
        waves = math.log(rope.original_max_position_embeddings / (turns * 2 * math.pi))
        return (dim * waves) / (2 * math.log(rope.theta))

    low, high = pair(rope.beta_fast), pair(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high += 0.001 * (low == high)
    kept = 1 - ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    periods = rope.theta**exponents
    return 1.0 / (rope.factor * periods) * (1 - kept) + 1.0 / periods * kept


def _longrope(rope: RopeConfig, exponents: Tensor, dim: int) -> Tensor:
    factors = torch.tensor([rope.short_factor, rope.long_factor], dtype=torch.float32)
    return 1.0 / (factors * rope.theta**exponents)


FREQUENCIES = {  # dynamic NTK changes the base beyond max_position_embeddings, where training refuses documents
    "default": _plain, "linear": _linear, "dynamic": _plain, "llama3": _llama3, "yarn": _yarn, "longrope": _longrope,
}  # fmt: skip


def _yarn_factor(factor: float, scale: float = 1.0) -> float:
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _scaling(rope: RopeConfig) -> dict[str, Any]:
    """The `rope_scaling` table; empty for the plain rotation."""
    if rope.kind == "default":
        return {}
    if rope.kind == "longrope":  # transformers 4 wants this `type`, with the original length outside
        table: dict[str, Any] = {"type": rope.kind}
    else:
        table = {"rope_type": rope.kind}
    for name in SCALING_KEYS[rope.kind]:
        value = getattr(rope, name)
        if value != OPTIONAL.get(name, REQUIRED) and not (rope.kind == "longrope" and name == WHOLE):
            table[name] = list(value) if isinstance(value, tuple) else value
    if rope.kind == "yarn" and rope.attention_factor is not None:
        table["attn_factor"] = rope.attention_factor / _yarn_factor(rope.factor)  # of vLLM before 2026
    return table


def _table(outer: Fields, key: str, layers: str | None = None) -> Fields:
    """One table of settings; in `rope_parameters` of families with two rotations, that of `layers`."""
    table, where = outer.record[key], f"{outer.where}: {key}"
    if layers and key == "rope_parameters":
        is_nested = isinstance(table, dict) and isinstance(table.get(layers), dict)
        key, table, where = (layers, table[layers], f"{where}: {layers}") if is_nested else (key, None, where)
        if not is_nested:
            raise outer.fail(
                "rope_parameters", f" has no table {layers}; expected full_attention and sliding_attention"
            )
    if not isinstance(table, dict) or any(isinstance(value, dict) for value in table.values()):
        raise outer.fail(key, f" is {shown(table)}; expected one table of numbers for all layers")
    return Fields(table, where)


def _from_table(fields: Fields, outer: Fields, theta_key: str, theta: float) -> RopeConfig:
    """One table; base, share and original length may be in it or at the top level."""
    kind = _kind(fields)
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    known |= {*SCALING_KEYS[kind], *OTHER_KEYS.get(kind, ())}
    for name in fields.record.keys() - known:
        if fields.record[name] is not None:
            raise fields.fail(name, f" = {shown(fields.record[name])} is not implemented for rope type {kind!r}")
    settings = {name: _setting(fields, outer, name) for name in SCALING_KEYS[kind]}
    if kind == "longrope":
        settings["factor"] = _longrope_factor(fields, outer, settings[WHOLE])
    if kind == "yarn":
        settings["attention_factor"] = _yarn_attention(fields, settings)
    if kind == "llama3" and settings["high_freq_factor"] <= settings["low_freq_factor"]:
        raise fields.fail("high_freq_factor", f" = {settings['high_freq_factor']} must be larger than low_freq_factor")
    place, key = _place(fields, outer, "rope_theta", theta_key)
    if kind == "yarn" and place.number(key, theta) <= 1:
        raise place.fail(key, f" is {shown(place.record[key])}; YaRN needs a base > 1")
    share, name = _place(fields, outer, "partial_rotary_factor")
    return RopeConfig(place.number(key, theta), kind, partial_rotary_factor=share.number(name, 1.0), **settings)


def _setting(fields: Fields, outer: Fields, name: str) -> Any:
    if name == WHOLE:
        place, key = _place(fields, outer, name)
        if _kind(fields) == "yarn" and place.record.get(key) is None:  # as transformers
            place, key = outer, "max_position_embeddings"
        return place.integer(key, least=2)  # LongRoPE divides by its logarithm
    if name == "truncate":
        return fields.flag(name, True)
    if name not in ("short_factor", "long_factor"):
        default = OPTIONAL.get(name, REQUIRED)
        return default if default is not REQUIRED and fields.record.get(name) is None else fields.number(name)
    values = fields.value(name, REQUIRED)
    if not isinstance(values, list):
        raise fields.fail(name, f" is {shown(values)}; expected a list of numbers")
    return tuple(Fields({name: value}, fields.where).number(name) for value in values)


def _longrope_factor(fields: Fields, outer: Fields, original: int) -> float:
    factor = outer.integer("max_position_embeddings") / original
    if fields.number("factor", factor) != factor:
        given = fields.record["factor"]
        raise fields.fail("factor", f" is {shown(given)}, but max_position_embeddings / {WHOLE} is {factor}")
    return factor


def _yarn_attention(fields: Fields, settings: dict[str, Any]) -> float | None:
    """YaRN's attention factor, None where it is the one derived. `attn_factor`, which DeepSeek wrote for the servers of
    its time, is passed over with a warning, as transformers and today's servers do."""
    factor, derived = settings["factor"], _yarn_factor(settings["factor"])
    found = settings["attention_factor"]
    if found is None and fields.value("attn_factor", None) is not None:
        meant = fields.number("attn_factor") * derived
        warn_once(
            f"{fields.where}: attn_factor is not read, as in transformers and vLLM: cos and sin are multiplied by "
            f"{derived:.4g}; for {meant:.4g}, as older vLLM had it, write attention_factor = {meant:.10g} instead"
        )
    if found is None and all(fields.value(name, 0) for name in ("mscale", "mscale_all_dim")):
        found = _yarn_factor(factor, fields.number("mscale")) / _yarn_factor(factor, fields.number("mscale_all_dim"))
    return None if found == derived else found


def _kind(fields: Fields) -> str:
    given = [fields.record[key] for key in ("rope_type", "type") if fields.record.get(key) is not None] or ["default"]
    if fields.record.get("short_factor"):  # Phi-3 called it "su" and "yarn" at first
        given = ["longrope" if name in ("su", "yarn") else name for name in given]
    if given[0] != given[-1]:
        raise fields.fail("rope_type", f" and type disagree: {shown(given)}; keep the right one")
    if not isinstance(given[0], str) or given[0] not in SCALING_KEYS:
        raise fields.fail("rope_type", f" is {shown(given[0])}: not implemented ({', '.join(SCALING_KEYS)} are)")
    return given[0]


def _place(fields: Fields, outer: Fields, key: str, outer_key: str | None = None) -> tuple[Fields, str]:
    """Where a setting stands that may be in the table or at the top level. Raises: ConfigError if in both, unlike."""
    outer_key = outer_key or key
    inside, outside = fields.record.get(key), outer.record.get(outer_key)
    if inside is not None and outside is not None and inside != outside:
        top = "top level" if outer_key == key else f"top level's {outer_key}"
        raise fields.fail(key, f" is {shown(inside)}, the {top} says {shown(outside)}; keep the right one")
    return (outer, outer_key) if inside is None else (fields, key)
