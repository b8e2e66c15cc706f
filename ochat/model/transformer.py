"""The decoder over packed tokens, in small classes in order of use: embedding, norm, attention, MLP, block, head.

    model = hf.load("path/to/base");  logits = model.logits([[1, 5, 9], [1, 7]])
Operators come from `ochat_kernels.load(...)`, attention from the batch's `attend`: no module knows its backend.
Parameters may be wider than the computation (fp32 masters, bf16 products): linear.py says how they are read.
Letters: T packed tokens, H hidden, N query heads, K key/value heads, D head dim, F FFN, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from types import ModuleType
from typing import Any

import torch
from ochat_kernels.reference_loss import soft_cap
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ochat.errors import DataError
from ochat.model import fp8, linear, nf4, rope
from ochat.model.attention.backends import Needs
from ochat.model.attention.packed import Attend, PackedAttention, default_backend
from ochat.model.attention.sdpa import Scores
from ochat.model.config import ModelConfig
from ochat.model.fp8 import Fp8Rows
from ochat.model.saved_tensors import ActivationOffload, SelectiveRecompute

Rotation = tuple[Tensor, Tensor]  # cos and sin, (T, d/2) fp32 each
HeadFunction = Callable[[Tensor, Tensor], Any]  # (hidden (T, H), weight (V, H), the head's parameter) -> anything
RECOMPUTE = ("none", "elementwise", "block")


class Embedding(nn.Module):
    """(T,) int64 -> (T, H), times a scale that is rounded to the dtype of the result, as Gemma's makers have it."""

    def __init__(self, num_rows: int, size: int, scale: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_rows, size))
        self.scale = scale
        self.tokens: Any = None  # lora.TokenRows where all other rows are frozen

    def forward(self, input_ids: Tensor, dtype: torch.dtype) -> Tensor:
        found = linear.look_up(input_ids, self.weight, dtype)
        found = found if self.tokens is None else self.tokens.look_up(input_ids, found)
        return found if self.scale == 1.0 else found * torch.tensor(self.scale, dtype=dtype).item()


class Linear(nn.Module):
    """(T, in) -> (T, out): x @ weight.T + bias; x may be Fp8Rows. Only training multiplies in fp8. A frozen weight may
    be stored in NF4: it is read by way of `nf4`."""

    def __init__(self, size_in: int, size_out: int, has_bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size_out, size_in))
        self.bias = nn.Parameter(torch.empty(size_out)) if has_bias else None
        self.lora: Any = None  # lora.Adapter where weight and bias are frozen
        self.fp8: ModuleType | None = None  # the operators where products are of e4m3
        self.nf4: nf4.Packing | None = None  # what the bytes of `weight` stand for (lora.quantize)

    def forward(self, x: Tensor | Fp8Rows) -> Tensor:
        values = x.values if isinstance(x, Fp8Rows) else x
        if self.nf4 is not None:
            y = nf4.linear(values, self.weight, self.bias, self.nf4)
        elif self.fp8 is None or not torch.is_grad_enabled():  # evaluations measure the model that is exported
            y = linear.linear(values, self.weight, self.bias)
        else:
            y = fp8.linear(x, self.weight, self.bias, self.fp8)
        return y if self.lora is None else self.lora(values, y)


class RMSNorm(nn.Module):
    """Scale each row to a root mean square of 1, then by offset + weight; a residual is added first. Gives (y, sum), y
    as Fp8Rows where `feeds_fp8`."""

    def __init__(self, size: int, config: ModelConfig, ops: SelectiveRecompute) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps, self.offset, self.ops = config.norm_eps, config.norm_offset, ops
        self.feeds_fp8 = False

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Any, Tensor]:
        weight = linear.cast(self.weight, x.dtype)
        if self.feeds_fp8:
            if residual is None:
                return self.ops.rms_norm_fp8(x, weight, self.eps, self.offset), x
            return self.ops.add_rms_norm_fp8(x, residual, weight, self.eps, self.offset)
        if residual is None:
            return self.ops.rms_norm(x, weight, self.eps, self.offset), x
        return self.ops.add_rms_norm(x, residual, weight, self.eps, self.offset)


class Attention(nn.Module):
    """q, k and v by one product, norms of q and k, rotation, attention within each document, output projection."""

    def __init__(self, config: ModelConfig, layer: int, ops: SelectiveRecompute) -> None:
        super().__init__()
        self.layer, self.ops = layer, ops
        self.scores = Scores(config.window(layer), config.attention_scale, config.attention_softcap)
        self.head_dim, self.heads = config.head_dim, (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        self.qkv = Linear(config.hidden_size, sum(self.heads) * config.head_dim, config.qkv_bias)
        self.norms_heads = config.qk_norm == "head"
        self.q_norm = self.k_norm = None
        if config.qk_norm:
            heads = (1, 1) if self.norms_heads else self.heads
            self.q_norm, self.k_norm = (RMSNorm(count * config.head_dim, config, ops) for count in heads[:2])
        self.out = Linear(config.num_heads * config.head_dim, config.hidden_size, config.out_bias)

    def forward(
        self, x: Tensor | Fp8Rows, rotation: Rotation | None, attend: Attend, rows: Tensor | None = None
    ) -> Tensor:
        q, k, v = self._prepare(self.qkv(x), rotation)
        attended = attend(self.layer, q, k, v, self.scores)
        return self.out(_pick(attended.flatten(1), rows))

    def _prepare(self, qkv: Tensor, rotation: Rotation | None) -> tuple[Tensor, Tensor, Tensor]:
        """q (T, N, D) and k (T, K, D), normed and rotated, and v (T, K, D), of their product. Where one operator does
        all, no result is a view that keeps the whole product; elsewhere backward needs the product, or its views are
        all there is."""
        if rotation is not None and self.q_norm is None:
            return self.ops.qkv_rope(qkv, *rotation, *self.heads[:2])
        q, k, v = qkv.unflatten(-1, (-1, self.head_dim)).split(self.heads, dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            if self.norms_heads and rotation is not None:
                weights = linear.cast(self.q_norm.weight, qkv.dtype), linear.cast(self.k_norm.weight, qkv.dtype)
                options = (*self.heads[:2], self.q_norm.eps, self.q_norm.offset)
                return self.ops.qkv_norm_rope(qkv, *weights, *rotation, *options)
            start = 0 if self.norms_heads else 1  # the dimensions that are rows of the norm
            q, k = (
                norm(x.flatten(start, start + 1))[0].view(x.shape) for norm, x in ((self.q_norm, q), (self.k_norm, k))
            )
        return (q, k, v) if rotation is None else (*self.ops.rope(q, k, *rotation), v)


class MLP(nn.Module):
    """down(act(gate(x)) * up(x)), gate and up in one product: SwiGLU or GeGLU."""

    def __init__(self, config: ModelConfig, ops: SelectiveRecompute) -> None:
        super().__init__()
        self.gate_up = Linear(config.hidden_size, 2 * config.intermediate_size, config.mlp_bias)
        self.activation: Callable[[Tensor], Tensor | Fp8Rows] = ops.swiglu if config.activation == "silu" else ops.geglu
        self.down = Linear(config.intermediate_size, config.hidden_size, config.mlp_bias)

    def forward(self, x: Tensor | Fp8Rows) -> Tensor:
        return self.down(self.activation(self.gate_up(x)))


class Block(nn.Module):
    """Takes and returns (x, residual): the last branch's output, and the residual stream to which it is not yet added.

    The next norm adds them (one kernel); residual is None before the first block. With `rows` (R,), what follows
    attention is computed for these only, and both results are (R, H): of the other rows only keys and values are used.
    Each branch has a norm before it, after it, or both; a branch's output is scaled before it is added.
    """

    def __init__(self, config: ModelConfig, layer: int, ops: SelectiveRecompute) -> None:
        super().__init__()
        has_before, has_after = config.norm_placement != "after", config.norm_placement != "before"
        self.scale = config.residual_scale
        self.norm1 = RMSNorm(config.hidden_size, config, ops) if has_before else None
        self.attn = Attention(config, layer, ops)
        self.attn_norm = RMSNorm(config.hidden_size, config, ops) if has_after else None
        self.norm2 = RMSNorm(config.hidden_size, config, ops) if has_before else None
        self.mlp = MLP(config, ops)
        self.mlp_norm = RMSNorm(config.hidden_size, config, ops) if has_after else None

    def forward(
        self, x: Tensor, residual: Tensor | None, rotation: Rotation | None, attend: Attend, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        x, stream = _add(self.norm1, x, residual)
        x = self._finish(self.attn_norm, self.attn(x, rotation, attend, rows))
        x, stream = _add(self.norm2, x, _pick(stream, rows))
        return self._finish(self.mlp_norm, self.mlp(x)), stream

    def use_fp8(self, ops: SelectiveRecompute) -> None:
        """Make every product one of e4m3 rows; norms and the activation that feed one quantise what they give."""
        for each in (self.attn.qkv, self.attn.out, self.mlp.gate_up, self.mlp.down):
            each.fp8 = ops.ops
        for norm in filter(None, (self.norm1, self.norm2)):
            norm.feeds_fp8 = True
        self.mlp.activation = ops.swiglu_fp8 if self.mlp.activation == ops.swiglu else ops.geglu_fp8

    def _finish(self, norm: RMSNorm | None, x: Tensor) -> Tensor:
        """What a branch adds to the stream, from its last product."""
        x = x if norm is None else norm(x)[0]
        return x if self.scale == 1.0 else x * self.scale


def _add(norm: RMSNorm | None, x: Tensor, residual: Tensor | None) -> tuple[Any, Tensor]:
    """(what a branch reads, the stream): the stream is x + residual, or x at first."""
    if norm is not None:
        return norm(x, residual)
    stream = x if residual is None else x + residual
    return stream, stream


class Head(nn.Module):
    """Hidden states, scaled, to logits (T, V) fp32, or to the result of `function(hidden, weight)`, whose logits have
    no softcap yet.

    The function runs inside forward because FSDP gathers the weight around forward.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        self.scale, self.softcap = config.logits_scale, config.logit_softcap
        self.tokens: Any = None  # lora.TokenRows where all other rows are frozen

    def forward(self, hidden: Tensor, function: HeadFunction | None) -> Any:
        if self.tokens is not None:
            self.tokens.write(self.weight)
        hidden = hidden if self.scale == 1.0 else hidden * self.scale
        if function is not None:
            return function(hidden, self.weight)
        return soft_cap(linear.linear(hidden, self.weight).float(), self.softcap)


class Transformer(nn.Module):
    """Packed token ids to logits or a loss. Build it on the meta device, then materialise and fill it (see hf.load).

    `head.weight` is `embed.weight` itself where the config ties them: named_parameters() gives it once, as the latter.
    """

    def __init__(self, config: ModelConfig, ops: ModuleType) -> None:
        super().__init__()
        self.config = config
        # what backward recomputes. "elementwise": results of norms, RoPE and SwiGLU, no matrix product; "block":
        # everything except a block's inputs
        self.recompute = "none"
        self.offload_activations = False  # with "block": its inputs wait in (pinned) host memory
        self.activation_offload = ActivationOffload()
        self.compute_dtype: torch.dtype | None = None  # None: that of the parameters
        ropes = [config.rope_of(layer) for layer in range(config.num_layers)]
        self.ropes = ropes  # of each block
        # (d/2,) fp32 each; no buffers: to_empty() would wipe them
        self.inv_freq = {each: rope.inv_freq(each, config.head_dim) for each in ropes if each is not None}
        self.ops = SelectiveRecompute(ops)
        self.embed = Embedding(config.vocab_size, config.hidden_size, config.embedding_scale)
        self.blocks = nn.ModuleList(Block(config, layer, self.ops) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config, self.ops)
        self.head = Head(config)
        self._tie()

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attend: Attend,
        head: HeadFunction | None = None,
        rows: Tensor | None = None,
    ) -> Any:
        """Logits (T, V) fp32, or `head(hidden, weight)` where given: hidden (T, H) after the last norm, weight (V, H)
        the head's parameter.

        Args: input_ids and position_ids (T,) int64; attend: the batch's attention; rows (R,) int64, distinct: the only
        rows of the result, in this order. Costs: ModelConfig.flops_per_step, less the last block's
        out, gate, up and down for all other rows.
        """
        self.inv_freq = {each: frequencies.to(input_ids.device) for each, frequencies in self.inv_freq.items()}
        tables = {each: rope.cos_sin(position_ids, frequencies, each) for each, frequencies in self.inv_freq.items()}
        rotations = [None if each is None else tables[each] for each in self.ropes]
        x, residual = self.embed(input_ids, self.compute_dtype or self.embed.weight.dtype), None
        rows_of = [*[None] * (len(self.blocks) - 1), rows]  # only the last block's results are picked
        for i, (block, rotation, picked) in enumerate(zip(self.blocks, rotations, rows_of, strict=True)):
            x, residual = self._run(i, partial(block, rotation=rotation, attend=attend, rows=picked), x, residual)
        self.activation_offload.wait()
        return self.head(self.norm(x, residual)[0], head)

    def use_fp8(self) -> None:
        """Have the linears of blocks multiply e4m3 rows, forward and for the gradient of their input (fp8.py)."""
        for block in self.blocks:
            block.use_fp8(self.ops)  # type: ignore[operator]

    @torch.no_grad()
    def logits(self, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
        """[(len_i, V) fp32] of id lists, packed in one call. For tests: it holds all logits at once.

        Raises: DataError for an id outside the vocabulary.
        """
        if not any(len(sequence) for sequence in sequences):
            return [torch.empty(0, self.config.vocab_size) for _ in sequences]
        lengths = [len(sequence) for sequence in sequences]
        input_ids, position_ids, attend = pack_ids(self, sequences)
        return list(self(input_ids, position_ids, attend).split(lengths))

    @torch.no_grad()
    def initialize(self, seed: int) -> None:
        """Fill every parameter for training from nothing: normal(0, initializer_range), scales of norms 1, biases 0."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0 - self.config.norm_offset)
                continue
            drawn = torch.randn(parameter.shape, generator=generator) * self.config.initializer_range
            parameter.copy_(drawn)

    def _run(self, index: int, block: Callable[..., Any], x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """One block; with recompute = "block" only `x` and `residual` are kept for backward."""
        if self.recompute == "none" or not torch.is_grad_enabled():
            return block(x, residual)
        if self.recompute == "elementwise":
            with self.ops.recomputing():
                return block(x, residual)
        with self.activation_offload.block(index) if self.offload_activations else nullcontext():
            # a block draws no random numbers, so no generator state is kept
            return checkpoint(  # type: ignore[return-value]
                block, x, residual, use_reentrant=False, preserve_rng_state=False
            )

    def _tie(self) -> None:
        if self.config.tie_embeddings:
            self.head.weight = self.embed.weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Transformer:
        """Ties again: to(), to_empty() and the like give every module a new Parameter."""
        super()._apply(fn, recurse)
        self._tie()
        return self


def _pick(x: Tensor, rows: Tensor | None) -> Tensor:
    """x[rows] for x (T, n), by index_select, because the backward of x[rows] would sort the rows."""
    return x if rows is None else x.index_select(0, rows)


def pack_ids(
    model: Transformer, sequences: Sequence[Sequence[int]], device: torch.device | str | None = None
) -> tuple[Tensor, Tensor, PackedAttention]:
    """input_ids (T,), position_ids (T,) and the attention of packed id lists.

    `device`: of the results; default: that of the embeddings. Raises: DataError for an id outside the vocabulary.
    """
    for index, sequence in enumerate(sequences):
        for token in sequence:
            if not 0 <= token < model.config.vocab_size:
                last = model.config.vocab_size - 1
                raise DataError(f"sequence {index} has token id {token}, but the vocabulary ends at {last}")
    weight = model.embed.weight
    device = torch.device(device or weight.device)
    lengths = [len(sequence) for sequence in sequences]
    input_ids = torch.tensor([token for sequence in sequences for token in sequence], dtype=torch.int64)
    position_ids = torch.cat([torch.arange(length) for length in lengths])
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
    backend = default_backend(device, Needs.of(model.config, model.compute_dtype or weight.dtype))
    attend = PackedAttention(cu_seqlens, max(lengths), backend, lengths, model.config.windows)
    return input_ids.to(device), position_ids.to(device), attend
