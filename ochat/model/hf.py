"""Load and save models under Hugging Face's tensor names: our fused parameters are theirs concatenated along rows.

    model = load("path/to/base", dtype="float32");  save("out", model.config, model.named_parameters(), "bfloat16")
`parameter_parts` is the one table of names: blocks.0.attn.qkv.weight = q_proj, k_proj, v_proj;
blocks.0.mlp.gate_up.weight = gate_proj, up_proj; everything else has one part. Files of a wrapped model (compiled,
multimodal, without its head) are read by the same names (stored_names.py).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import ochat_kernels
import torch
from torch import Tensor

from ochat.errors import CheckpointError, ConfigError
from ochat.files import atomic, bounded_json, checksums
from ochat.files.safetensors_file import StoredTensor
from ochat.model import families
from ochat.model.config import ModelConfig
from ochat.model.safetensors_files import check_finite, open_folder, torch_dtype, write_shards
from ochat.model.stored_names import EMBEDDING, HEAD, VISION, by_plain_names, listed, misfit
from ochat.model.transformer import Transformer

# our norms of a block -> theirs, by ModelConfig.norm_placement
NORMS = {
    "before": {"norm1": "input_layernorm", "norm2": "post_attention_layernorm"},
    "after": {"attn_norm": "post_attention_layernorm", "mlp_norm": "post_feedforward_layernorm"},
    "both": {
        "norm1": "input_layernorm", "attn_norm": "post_attention_layernorm",
        "norm2": "pre_feedforward_layernorm", "mlp_norm": "post_feedforward_layernorm",
    },
}  # fmt: skip
log = logging.getLogger(__name__)


class HFTensor(NamedTuple):
    """One tensor of a Hugging Face folder."""

    name: str
    shape: tuple[int, ...]


class Readable(Protocol):
    """A tensor that is read when it is needed."""

    def read(self) -> Tensor: ...


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
    config, parameters = read_model(directory)
    return build(config, parameters, dtype=dtype, device=device, kernels=kernels)


def read_model(directory: str | Path) -> tuple[ModelConfig, Iterator[tuple[str, Tensor]]]:
    """The configuration and the parameters, one at a time, of a Hugging Face folder. Raises: as load."""
    config = ModelConfig.load(directory)
    stored = open_tensors(directory, config)
    checksums.compare(checksums.expected(Path(directory)))
    return config, read_parameters(stored, config)


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


def open_tensors(directory: str | Path, config: ModelConfig) -> dict[str, StoredTensor]:
    """Map a folder's weights, by their plain names, and check that they have the names, shapes and dtypes that `config`
    asks for. Of a multimodal model the vision tensors are left out, with a note. Costs: reads the files' headers.

    Raises: as open_folder; CheckpointError naming tensors that are missing, left over, quantised or misshapen, or two
    that have the same plain name.
    """
    wanted = {part.name: part.shape for parts in parameter_parts(config).values() for part in parts}
    stored = by_plain_names(open_folder(directory), wanted.keys() | {HEAD})
    # frequencies of the rotation are computed, never read
    left_over = {name for name in stored.keys() - wanted.keys() if "rotary_emb" not in name}
    if config.tie_embeddings:
        left_over.discard(HEAD)
    vision = {name for name in left_over if not VISION.isdisjoint(name.split("."))}
    if vision and is_multimodal(directory):
        _note_vision(directory, len(vision), listed(vision))
        left_over -= vision
    if left_over or not wanted.keys() <= stored.keys():
        raise CheckpointError(f"{directory} {misfit(wanted.keys() - stored.keys(), left_over)}")
    for tensor, shape in ((stored[name], shape) for name, shape in wanted.items()):
        if tensor.shape != shape:
            raise CheckpointError(f"{tensor} has shape {tensor.shape}, but config.json asks for {shape}")
        if tensor.dtype not in ("F32", "BF16", "F16"):
            raise CheckpointError(
                f"{tensor} is {tensor.dtype}; expected F32, BF16 or F16 (quantised weights are not read: take the "
                f"model that they were made from)"
            )
    return stored


def is_multimodal(directory: str | Path) -> bool:
    """Whether a folder holds a multimodal model, of which the text model is read. Raises: ConfigError for a damaged
    config.json."""
    path = Path(directory) / "config.json"
    return path.is_file() and families.is_multimodal(bounded_json.read_object(path, ConfigError, "fetch it again"))


def read_parameters(stored: Mapping[str, Readable], config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """(name, CPU tensor in the files' dtype) of each of our parameters, fused from its parts; a map of the file if
    unfused.

    Raises: CheckpointError where a value is NaN or infinite, or a tied head that is stored too differs.
    """
    _check_tied_head(stored, config, 0, config.vocab_size)
    for name, parts in parameter_parts(config).items():
        read = [check_finite(stored[part.name].read(), stored[part.name]) for part in parts]
        yield name, read[0] if len(read) == 1 else torch.cat(read)


def read_rows(
    stored: Mapping[str, StoredTensor], config: ModelConfig, name: str, start: int, stop: int
) -> Iterator[tuple[int, Tensor]]:
    """(offset from `start`, CPU tensor) of the pieces of our parameter's rows, each a map of its part's file.

    Of a tied head that is stored too, the same rows are compared. Raises: CheckpointError where they differ, or a value
    is NaN or infinite.
    """
    if name == "embed.weight":
        _check_tied_head(stored, config, start, stop)
    first = 0  # row of the part in our parameter
    for part in parameter_parts(config)[name]:
        low, high = max(start, first), min(stop, first + part.shape[0])
        if low < high:
            tensor = stored[part.name]
            yield low - start, check_finite(tensor.rows(low - first, high - first), tensor)
        first += part.shape[0]


def save(
    directory: str | Path,
    config: ModelConfig,
    named_tensors: Iterable[tuple[str, Tensor]],
    dtype: str | torch.dtype,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write config.json and model*.safetensors from our (name, whole tensor) pairs, in the order of parameter_parts,
    which may come one at a time.

    At most one shard is held. Raises: CheckpointError for missing, unknown or misshapen tensors, or a folder that holds
    weights already.
    """
    directory, target = Path(directory), torch_dtype(dtype)
    if stale := sorted(path.name for path in directory.glob("model*.safetensors*")):
        raise CheckpointError(f"{directory} holds {stale[0]} already; choose a new folder or remove its weights")
    directory.mkdir(parents=True, exist_ok=True)
    plan = _plan_shards(config, target.itemsize, max_shard_bytes)
    write_shards(directory, _fill_shards(plan, named_tensors, target), len(plan))
    record = dataclasses.replace(config, dtype=str(target).removeprefix("torch.")).to_hf()
    atomic.write_json(directory / "config.json", record)


def parameter_parts(config: ModelConfig) -> dict[str, tuple[HFTensor, ...]]:
    """Every parameter of ours, in the order of Transformer.named_parameters(), and the Hugging Face tensors whose
    concatenation along dimension 0 it is."""
    hidden, ffn, vocab = config.hidden_size, config.intermediate_size, config.vocab_size
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    qkv = {"self_attn.q_proj": q, "self_attn.k_proj": kv, "self_attn.v_proj": kv}
    gate_up = {"mlp.gate_proj": ffn, "mlp.up_proj": ffn}
    if config.fused_files:
        qkv, gate_up = {"self_attn.qkv_proj": q + 2 * kv}, {"mlp.gate_up_proj": 2 * ffn}
    heads = {"": {}, "head": {"q": config.head_dim, "k": config.head_dim}, "full": {"q": q, "k": kv}}[config.qk_norm]
    norms = NORMS[config.norm_placement]

    def norm(name: str) -> list[tuple[str, dict[str, int], tuple[()], bool]]:
        return [(name, {norms[name]: hidden}, (), False)] if name in norms else []

    # our module, the rows of each of its parts, the columns (none of a norm), whether it has a bias
    block = (
        *norm("norm1"),
        ("attn.qkv", qkv, (hidden,), config.qkv_bias),
        *((f"attn.{x}_norm", {f"self_attn.{x}_norm": size}, (), False) for x, size in heads.items()),
        ("attn.out", {"self_attn.o_proj": hidden}, (q,), config.out_bias),
        *norm("attn_norm"),
        *norm("norm2"),
        ("mlp.gate_up", gate_up, (hidden,), config.mlp_bias),
        ("mlp.down", {"mlp.down_proj": hidden}, (ffn,), config.mlp_bias),
        *norm("mlp_norm"),
    )
    parts: dict[str, tuple[HFTensor, ...]] = {"embed.weight": (HFTensor(EMBEDDING, (vocab, hidden)),)}
    for layer, (module, pieces, columns, has_bias) in itertools.product(range(config.num_layers), block):
        for kind, size in (("weight", columns), ("bias", ()))[: 1 + has_bias]:
            theirs = [(f"model.layers.{layer}.{name}.{kind}", (rows, *size)) for name, rows in pieces.items()]
            parts[f"blocks.{layer}.{module}.{kind}"] = tuple(HFTensor(*tensor) for tensor in theirs)
    parts["norm.weight"] = (HFTensor("model.norm.weight", (hidden,)),)
    if not config.tie_embeddings:
        parts["head.weight"] = (HFTensor(HEAD, (vocab, hidden)),)
    return parts


def _plan_shards(config: ModelConfig, itemsize: int, max_shard_bytes: int) -> list[dict[str, tuple[HFTensor, ...]]]:
    """Our parameters of each file, in order, so that the number of files is known before the first is written."""
    shards, used = [{}], 0
    for ours, parts in parameter_parts(config).items():
        size = sum(math.prod(part.shape) for part in parts) * itemsize
        if shards[-1] and used + size > max_shard_bytes:
            shards, used = [*shards, {}], 0
        shards[-1][ours] = parts
        used += size
    return shards


def _fill_shards(
    plan: list[dict[str, tuple[HFTensor, ...]]], named_tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype
) -> Iterator[dict[str, Tensor]]:
    """Yields the tensors of one file after the other."""
    pairs = iter(named_tensors)
    for shard in plan:
        tensors = {}
        for ours, parts in shard.items():
            sizes = [part.shape[0] for part in parts]
            name, whole = next(pairs, ("nothing", torch.empty(0)))
            found, wanted = tuple(whole.shape), (sum(sizes), *parts[0].shape[1:])
            if (name, found) != (ours, wanted):
                raise CheckpointError(f"cannot save the model: {name} {found} was given for {ours} {wanted}")
            for part, piece in zip(parts, whole.detach().split(sizes), strict=True):
                tensors[part.name] = piece.to("cpu", dtype, copy=True).contiguous()
        yield tensors
    if left := [name for name, _ in pairs]:
        raise CheckpointError(f"cannot save the model: {listed(left)} given twice or unknown")


@functools.cache  # once: a run opens its base several times
def _note_vision(directory: str | Path, count: int, names: str) -> None:
    log.info("%s: %d vision tensors are left out of the text model: %s", directory, count, names)


def _check_tied_head(stored: Mapping[str, Any], config: ModelConfig, start: int, stop: int) -> None:
    if not config.tie_embeddings or HEAD not in stored:
        return
    if not torch.equal(stored[HEAD].rows(start, stop), stored[EMBEDDING].rows(start, stop)):
        raise CheckpointError(
            f"{stored[HEAD]} differs from {EMBEDDING}, but config.json ties them; "
            f"set tie_word_embeddings to false or remove {HEAD}"
        )
