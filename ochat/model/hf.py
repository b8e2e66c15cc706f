"""Load and save models under Hugging Face's tensor names: our fused parameters are theirs concatenated along rows.

    model = load("path/to/base", dtype="float32");  save("out", model.config, model.named_parameters(), "bfloat16")
`parameter_parts` is the one table of names: blocks.0.attn.qkv.weight = q_proj, k_proj, v_proj;
blocks.0.mlp.gate_up.weight = gate_proj, up_proj; everything else has one part.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import ochat_kernels
import torch
from torch import Tensor

from ochat.errors import CheckpointError
from ochat.files import atomic, checksums
from ochat.model.config import ModelConfig
from ochat.model.safetensors_files import TensorFiles, check_finite, torch_dtype, write_shards
from ochat.model.transformer import Transformer

NAMES_SHOWN = 5


class HFTensor(NamedTuple):
    """One tensor of a Hugging Face folder."""

    name: str
    shape: tuple[int, ...]


def load(
    directory: str | Path,
    *,
    dtype: str | torch.dtype = "bfloat16",
    device: str | torch.device = "cpu",
    kernels: str = "reference",
) -> Transformer:
    """The model of a Hugging Face folder. Checks every tensor's name and shape before reading one, and the files'
    checksums if there are any.

    Raises: ConfigError for a config or a folder that cannot be used, CheckpointError naming file and tensor for wrong
    weights.
    """
    config, target = ModelConfig.load(directory), torch_dtype(dtype)
    files = read_tensors(directory, config)
    checksums.compare(checksums.expected(Path(directory)))
    values = ((name, read_parameter(files, config, name)) for name in parameter_parts(config))
    return build(config, values, dtype=target, device=device, kernels=kernels)


@torch.no_grad()
def build(
    config: ModelConfig,
    named_values: Iterable[tuple[str, Tensor]],
    *,
    dtype: str | torch.dtype,
    device: str | torch.device,
    kernels: str = "reference",
) -> Transformer:
    """A model with the values of all its parameters, which may come one at a time. Raises: ConfigError for a dtype."""
    with torch.device("meta"):
        model = Transformer(config, ochat_kernels.load(kernels))
    model.to(torch_dtype(dtype)).to_empty(device=device)
    parameters = dict(model.named_parameters())
    for name, value in named_values:
        parameters[name].copy_(value)
    return model


def read_tensors(directory: str | Path, config: ModelConfig) -> TensorFiles:
    """Map a folder's weights and check them against `config`; only headers are read, and a tied head if stored.

    Raises: as TensorFiles.open; CheckpointError naming tensors that are missing, left over, quantised or misshapen.
    """
    files = open_tensors(directory, config)
    _check_tied_head(files, config, 0, config.vocab_size)
    return files


def check_weights(directory: str | Path, config: ModelConfig) -> None:
    """Refuse a folder whose weights cannot be loaded. Costs: reads its files' headers.

    Raises: as read_tensors; an untied head under a config that ties it is found by read_tensors alone.
    """
    open_tensors(directory, config)


def open_tensors(directory: str | Path, config: ModelConfig) -> TensorFiles:
    """The folder's files, checked to have the names, shapes and dtypes that `config` asks for. Raises: as
    check_weights."""
    files = TensorFiles.open(directory)
    wanted = {part.name: part.shape for parts in parameter_parts(config).values() for part in parts}
    found = {name for name in files.files if not name.endswith("rotary_emb.inv_freq")}  # computed, never read
    if config.tie_embeddings:
        found.discard("lm_head.weight")
    if missing := wanted.keys() - found:
        raise CheckpointError(f"{directory} lacks {_list(missing)}, which its config.json asks for")
    if unexpected := found - wanted.keys():
        raise CheckpointError(f"{directory} holds {_list(unexpected)}, which its config.json has no place for")
    for name, shape in wanted.items():
        _check_tensor(files, name, shape)
    return files


def read_parameter(files: TensorFiles, config: ModelConfig, name: str) -> Tensor:
    """One of our parameters, fused from its parts: a CPU tensor in the files' dtype, a map of the file if unfused.

    Raises: CheckpointError where a value is NaN or infinite.
    """
    parts = [check_finite(files.read(part.name), files.location(part.name)) for part in parameter_parts(config)[name]]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def read_rows(
    files: TensorFiles, config: ModelConfig, name: str, start: int, stop: int
) -> Iterator[tuple[int, Tensor]]:
    """(offset from `start`, CPU tensor) of the pieces of our parameter's rows, each a map of its part's file.

    Of a tied head that is stored too, the same rows are compared. Raises: CheckpointError where they differ, or a value
    is NaN or infinite.
    """
    if name == "embed.weight":
        _check_tied_head(files, config, start, stop)
    first = 0  # row of the part in our parameter
    for part in parameter_parts(config)[name]:
        low, high = max(start, first), min(stop, first + part.shape[0])
        if low < high:
            rows = files.rows(part.name, low - first, high - first)
            yield low - start, check_finite(rows, files.location(part.name))
        first += part.shape[0]


def save(
    directory: str | Path,
    config: ModelConfig,
    named_tensors: Iterable[tuple[str, Tensor]],
    dtype: str | torch.dtype,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write config.json and model*.safetensors from our (name, whole tensor) pairs, which may come one at a time.

    Pairs in the order of named_parameters() are written as they come; at most one shard is held. Raises:
    CheckpointError for missing, unknown or misshapen tensors, or a folder that holds weights already.
    """
    directory, target = Path(directory), torch_dtype(dtype)
    if stale := sorted(path.name for path in directory.glob("model*.safetensors*")):
        raise CheckpointError(f"{directory} holds {stale[0]} already; choose a new folder or remove its weights")
    directory.mkdir(parents=True, exist_ok=True)
    plan = _plan_shards(config, target.itemsize, max_shard_bytes)
    write_shards(directory, _fill_shards(config, plan, named_tensors, target), len(plan))
    atomic.write_json(
        directory / "config.json", dataclasses.replace(config, dtype=str(target).removeprefix("torch.")).to_hf()
    )


def parameter_parts(config: ModelConfig) -> dict[str, tuple[HFTensor, ...]]:
    """Every parameter of ours, in the order of Transformer.named_parameters(), and the Hugging Face tensors whose
    concatenation along dimension 0 it is."""
    hidden, vocab = config.hidden_size, config.vocab_size
    parts = {"embed.weight": (HFTensor("model.embed_tokens.weight", (vocab, hidden)),)}
    for layer in range(config.num_layers):
        parts |= _block_parts(config, layer)
    parts["norm.weight"] = (HFTensor("model.norm.weight", (hidden,)),)
    if not config.tie_embeddings:
        parts["head.weight"] = (HFTensor("lm_head.weight", (vocab, hidden)),)
    return parts


def _block_parts(config: ModelConfig, layer: int) -> dict[str, tuple[HFTensor, ...]]:
    hidden, ffn, ours, theirs = config.hidden_size, config.intermediate_size, f"blocks.{layer}", f"model.layers.{layer}"
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    attn, mlp = f"{theirs}.self_attn", f"{theirs}.mlp"
    qkv = ((f"{attn}.q_proj", q), (f"{attn}.k_proj", kv), (f"{attn}.v_proj", kv))
    gate_up = ((f"{mlp}.gate_proj", ffn), (f"{mlp}.up_proj", ffn))
    parts = {f"{ours}.norm1.weight": (HFTensor(f"{theirs}.input_layernorm.weight", (hidden,)),)}
    parts |= _linear(f"{ours}.attn.qkv", qkv, hidden, config.qkv_bias)
    if config.qk_norm:
        for ours_norm, theirs_norm in (("q_norm", "q_norm"), ("k_norm", "k_norm")):
            parts[f"{ours}.attn.{ours_norm}.weight"] = (HFTensor(f"{attn}.{theirs_norm}.weight", (config.head_dim,)),)
    parts |= _linear(f"{ours}.attn.out", ((f"{attn}.o_proj", hidden),), q, config.out_bias)
    parts[f"{ours}.norm2.weight"] = (HFTensor(f"{theirs}.post_attention_layernorm.weight", (hidden,)),)
    parts |= _linear(f"{ours}.mlp.gate_up", gate_up, hidden, config.mlp_bias)
    return parts | _linear(f"{ours}.mlp.down", ((f"{mlp}.down_proj", hidden),), ffn, config.mlp_bias)


def _linear(
    ours: str, parts: tuple[tuple[str, int], ...], size_in: int, has_bias: bool
) -> dict[str, tuple[HFTensor, ...]]:
    linear = {f"{ours}.weight": tuple(HFTensor(f"{name}.weight", (rows, size_in)) for name, rows in parts)}
    if has_bias:
        linear[f"{ours}.bias"] = tuple(HFTensor(f"{name}.bias", (rows,)) for name, rows in parts)
    return linear


def _split(parts: Mapping[str, tuple[HFTensor, ...]], ours: str, whole: Tensor) -> Iterator[tuple[str, Tensor]]:
    if ours not in parts:
        raise CheckpointError(f"{ours} is no parameter of this model; expected names like {_list(parts)}")
    wanted = (sum(part.shape[0] for part in parts[ours]), *parts[ours][0].shape[1:])
    if tuple(whole.shape) != wanted:
        raise CheckpointError(f"{ours} has shape {tuple(whole.shape)}, but this model's is {wanted}")
    pieces = whole.split([part.shape[0] for part in parts[ours]])
    return ((part.name, piece) for part, piece in zip(parts[ours], pieces, strict=True))


def _plan_shards(config: ModelConfig, itemsize: int, max_shard_bytes: int) -> list[set[str]]:
    """Our names per file, in order, so that the number of files is known before the first is written."""
    shards, used = [set()], 0
    for ours, parts in parameter_parts(config).items():
        size = sum(torch.Size(part.shape).numel() for part in parts) * itemsize
        if shards[-1] and used + size > max_shard_bytes:
            shards, used = [*shards, set()], 0
        shards[-1].add(ours)
        used += size
    return shards


def _fill_shards(
    config: ModelConfig, plan: list[set[str]], named_tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype
) -> Iterator[dict[str, Tensor]]:
    """Yield each file's tensors once they and those of earlier files are known."""
    parts, pairs, waiting = parameter_parts(config), iter(named_tensors), dict[str, dict[str, Tensor]]()
    for shard in plan:
        while not shard <= waiting.keys():
            try:
                ours, whole = next(pairs)
            except StopIteration:
                raise CheckpointError(f"cannot save the model: {_list(shard - waiting.keys())} not given") from None
            pieces = _split(parts, ours, whole.detach())
            waiting[ours] = {name: piece.to("cpu", dtype, copy=True).contiguous() for name, piece in pieces}
        yield {name: piece for ours in sorted(shard) for name, piece in waiting.pop(ours).items()}
    if left := [ours for ours, _ in pairs]:
        raise CheckpointError(f"cannot save the model: {_list(left)} given twice or unknown")


def _check_tensor(files: TensorFiles, name: str, shape: tuple[int, ...]) -> None:
    location, found, dtype = files.location(name), files.shape(name), files.dtype(name)
    if found != shape:
        raise CheckpointError(f"{location} has shape {found}, but config.json asks for {shape}")
    if dtype not in ("F32", "BF16", "F16"):
        raise CheckpointError(f"{location} is {dtype}; expected F32, BF16 or F16 (quantised weights are not read)")


def _check_tied_head(files: TensorFiles, config: ModelConfig, start: int, stop: int) -> None:
    embed, head = "model.embed_tokens.weight", "lm_head.weight"
    if not config.tie_embeddings or head not in files.files:
        return
    if not torch.equal(files.rows(head, start, stop), files.rows(embed, start, stop)):
        raise CheckpointError(
            f"{files.location(head)} differs from {embed}, but config.json ties them; "
            f"set tie_word_embeddings to false or remove {head}"
        )


def _list(names: Iterable[str]) -> str:
    ordered = sorted(names)
    more = f" and {len(ordered) - NAMES_SHOWN} more" if len(ordered) > NAMES_SHOWN else ""
    return ", ".join(ordered[:NAMES_SHOWN]) + more
