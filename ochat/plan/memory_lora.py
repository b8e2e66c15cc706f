"""Predict the memory of a step that trains adapters (LoRA); memory.py predicts a step that trains every weight.

    use = predict(model, Layout(token_budget=4096, supervised=2048, recompute="block"), LoraConfig(rank=16))

Letters as in memory.py; r rank, A parameters of all adapters.

The frozen weights have the dtype of the computation, e P / s, and matmuls read them: no casts, no gradients, no dW.
Of a block backward keeps what memory.py lists, without casts, and of each adapted linear x A^T and the casts of its A
and its block-diagonal B; the input of a linear without adapter is not kept.
"""

from __future__ import annotations

from ochat.config import LoraConfig
from ochat.model import lora
from ochat.model.config import ModelConfig
from ochat.plan.layout import Layout
from ochat.plan.memory import (
    CONTEXT_BYTES,
    FRAGMENTATION,
    NCCL_BYTES,
    MemoryUse,
    block_saved_bytes,
    chunk_bytes,
    fullest_layers,
    passing_bytes,
)

TOKENS = 4  # assumed: rows of embedding and head that are trained


def predict(model: ModelConfig, at: Layout, settings: LoraConfig) -> MemoryUse:
    """Memory of the fullest of four moments of a step, with memory.py's allowance.

    At every moment: e P / s + 4 A / s and AdamW's 8 A / s; 4 A of gradients.
      head    all activations; the larger of the logits of a chunk of rows and, for the rows of tokens, 2 e R H of
              hidden states and of the labels' weights; two streams 2 e R H
      block   backward of the last block, of the one before it, which has T rows, or of the first: activations up to it,
              e T (2F + H) of gradients within it, and what it recomputes: e T H, its output, or e T F, SwiGLU's
    FSDP gathers 3 e B, the head's e E, or with reshard = "step" e P.
    """
    layers = fullest_layers(model)
    return max(
        (_head(model, at, settings), *(_block(model, at, settings, layer) for layer in layers)),
        key=lambda use: use.total,
    )


def saved_bytes(model: ModelConfig, at: Layout, settings: LoraConfig) -> float:
    """Bytes held between forward and backward of a micro-batch on one process, without parameters and the batch."""
    stream = at.token_budget * model.hidden_size * at.itemsize
    first = stream if at.recompute == "block" else 0  # the first block has no residual yet
    return _kept(model, at, settings, model.num_layers) - first + _outside(model, at)


def _head(model: ModelConfig, at: Layout, settings: LoraConfig) -> MemoryUse:
    rows = at.itemsize * at.supervised * model.hidden_size
    working = max(chunk_bytes(model, at.supervised, at.itemsize), 2 * rows) + 2 * rows
    weights = at.itemsize * model.head_params() if at.ranks > 1 else 0
    kept = 0.0 if at.offload_activations else _kept(model, at, settings, model.num_layers)
    return _use(model, at, settings, weights, kept + _outside(model, at), working)


def _block(model: ModelConfig, at: Layout, settings: LoraConfig, layer: int) -> MemoryUse:
    """Memory in the backward of one block, after the backward of all later blocks."""
    is_last = layer == model.num_layers - 1
    kept = _kept(model, at, settings, min(layer, 1) if at.offload_activations else layer)
    activations = kept + _kept_inside(model, at, settings, is_last=is_last)
    activations += at.token_budget * (8 + 4 * model.head_dim)
    weights = 3 * at.itemsize * model.matmul_params() / model.num_layers if at.ranks > 1 else 0
    return _use(model, at, settings, weights, activations, passing_bytes(model, at, is_last=is_last))


def _use(
    model: ModelConfig, at: Layout, settings: LoraConfig, weights: float, activations: float, working: float
) -> MemoryUse:
    """A moment with what exists at every moment, and the allowance."""
    trained = _trained(model, settings)
    if at.gathers_once:
        weights = at.itemsize * model.num_parameters()
    on_card = at.offload != "all"
    gradients = 4 * trained / (at.shard if at.reduce == "micro_batch" or at.micro_batches == 1 else 1)
    lost = FRAGMENTATION * (gradients + weights + activations + working)
    return MemoryUse(
        masters=(at.itemsize * model.num_parameters() + 4 * trained) / at.shard * on_card,
        moments=2 * at.state_itemsize * trained / at.shard * (at.offload == "none"),
        gradients=gradients, weights=weights, activations=activations, working=working,
        allowance=CONTEXT_BYTES + NCCL_BYTES * (at.ranks > 1) + lost,
    )  # fmt: skip


def _trained(model: ModelConfig, settings: LoraConfig) -> float:
    rows = TOKENS * model.hidden_size * (1 if model.tie_embeddings else 2) * (settings.tokens == "template")
    return lora.num_parameters(model, settings) + rows


def _kept(model: ModelConfig, at: Layout, settings: LoraConfig, num_blocks: int) -> float:
    """Bytes kept of the first blocks."""
    if at.recompute == "block":
        return num_blocks * 2 * at.token_budget * model.hidden_size * at.itemsize
    last = num_blocks == model.num_layers  # among them
    inside = (num_blocks - last) * _kept_inside(model, at, settings) if num_blocks > last else 0.0
    return inside + (_kept_inside(model, at, settings, is_last=True) if last else 0.0)


def _kept_inside(model: ModelConfig, at: Layout, settings: LoraConfig, *, is_last: bool = False) -> float:
    """What backward needs of one block."""
    found = lora.adapted_parts(model, settings.targets)
    inputs = {"attn.qkv": model.hidden_size, "mlp.gate_up": model.hidden_size, "mlp.down": model.intermediate_size}
    wide = small = 0
    for name in ("attn.qkv", "attn.out", "mlp.gate_up", "mlp.down"):
        rows = at.supervised if is_last and name != "attn.qkv" else at.token_budget
        parts = found.get(f"blocks.0.{name}", [])
        columns = settings.rank * sum(part.is_adapted for part in parts)
        size_in = inputs.get(name, model.num_heads * model.head_dim)
        if parts:
            wide += rows * columns
        elif name == "attn.out":  # attention keeps its output anyway, but not the rows picked from it
            wide -= rows * size_in * is_last
        elif at.recompute != "elementwise":
            wide -= rows * size_in
        small += columns * (size_in + sum(part.rows for part in parts))
    return block_saved_bytes(model, at, is_last=is_last) + at.itemsize * (wide + small)


def _outside(model: ModelConfig, at: Layout) -> float:
    """Ids, angles, the last norm's stream and rstd, and dhidden."""
    rows = at.supervised * (4 + 2 * at.itemsize * model.hidden_size)
    return at.token_budget * (8 + 4 * model.head_dim) + rows
