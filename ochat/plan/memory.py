"""Predict the memory that a step needs on one GPU: every tensor that the model's code keeps, at the fullest moment.

    use = predict(model, Layout(token_budget=8192, supervised=4096, recompute="block", ranks=8, shard=8))
    use = predict(model, Layout(token_budget=4096, supervised=2048, recompute="block", lora=LoraConfig(rank=16)))
    use.total / GIB, use.activations

forecast.py makes the Layout of a configuration; tables.py writes the result as the table "planned memory of a GPU".

Letters: T token_budget, R of them supervised, H hidden, F FFN, N and K query and key/value heads, D head dim, V
vocabulary, L blocks, P parameters, B those of one block, E = V H, A parameters of all adapters, s GPUs that share a
copy of the model, e bytes of an activation.

What backward keeps of a block (the operators of kernels/ochat_kernels, torch's varlen attention; flex keeps no more):
  norms      e T 2H + 4 T 2      their inputs and rstd: the two streams before the branches, what the branches gave
                                 after them; twice that where a block has both
  matmuls    e T (2H + F)        inputs of qkv, gate_up and down; that of `out` is attention's output
  attention  e T ((N + 2K) + N) D + 4 T N + 16    q and k after RoPE and v (in a layer without RoPE the matmul's output
                                 itself), the output of attention, its logsumexp, a random state
  MLP        e T 2F              the input of SwiGLU or GeGLU
  qk norms   e T (N + 2K) D      the matmul's output, which they read (without RoPE, or with norms over all heads, it
                                 holds v: e T (N + K) D); their rstd, 4 T (N + K), or 4 T 2 of norms over all heads
  weights    e B                 only where blocks are recomputed on one process: casts of the block's fp32 masters
  fp8        4 (2H + 2F + (N + 2K) D)    where linears are "fp8", the scales of their weights' rows; they read the
                                 masters, so there are neither casts nor copies of these
After attention the last block computes R rows only; the rows that it picks are a copy of attention's output.
recompute = "elementwise" does not keep the matmuls' inputs, e T (2H + F) less, or e T F where there are no norms before
the branches, whose inputs are then the streams; with qk norms it keeps the matmul's output alone, and not q, k and v.
"block" keeps e T 2H, the block's inputs (nothing on the GPU if they are offloaded), and all of the above for the one
block in backward.
Outside the blocks: 8 T ids, 4 T D angles of each kind of rotation (where only a part of a head rotates, of that); the
last norm's e R H + 4 R; the head's dhidden e R H, and its gradient 4 E, which forward makes.
On one process each fp32 master that a matmul or a norm reads has a bf16 copy at every moment, but no untied embedding;
with recompute = "block" there are none, and each use casts.

With adapters (LoRA) the frozen weights have the dtype of the computation, e P / s, and matmuls read them: no casts, no
gradients, no dW. Backward also keeps x A^T of each adapted linear and the casts of its A and its block-diagonal B, but
not the input of a linear without adapter. With base.quantize = "nf4" the blocks' linears are 33/64 + 1/4096 bytes a
weight, gathered ones too, and each product dequantises its own, e + 1/16 bytes a weight. Loading needs less: beside
what it has quantised it holds one linear of the files at a time, e bytes a weight.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass

from ochat.config import LoraConfig
from ochat.model import lora, nf4
from ochat.model.config import ModelConfig

GIB = 2**30
CONTEXT_BYTES = 1.0 * GIB  # assumed: CUDA's context, kernels, workspaces of matmuls
NCCL_BYTES = 1.0 * GIB  # assumed: buffers of the collectives, with more than one GPU
FRAGMENTATION = 0.04  # share of a step's allocations lost between the allocator's blocks: an upper bound
STAGES = ("activation", "gate_up", "attention", "end")  # of a block's backward, where it may need most
DEQUANTISING = 4 / nf4.BLOCK  # bytes a weight: the scales of blocks in fp32
ADAPTED_TOKENS = 4  # assumed: rows of embedding and head that are trained with adapters


@dataclass(frozen=True)
class Layout:
    """A run on so many GPUs. Names that the configuration has mean the same here."""

    token_budget: int  # T, tokens of a micro-batch
    bins_per_step: int = 1
    recompute: str = "none"  # "auto" is resolved before anything is predicted
    ranks: int = 1  # S; more than one: FSDP
    shard: int = 1  # s, ranks that share a copy of the model
    gpus_per_node: int = 8  # G
    supervised: int = 0  # R, rows of a micro-batch that reach the head; for memory only
    lora: LoraConfig = LoraConfig()  # of rank 0: every parameter is trained
    quantize: str = "none"  # base.quantize
    linear: str = "bf16"
    itemsize: int = 2  # e, bytes of an activation; 4: train.dtype = "float32"
    master_itemsize: int = 4  # 2: optim.master_dtype = "bfloat16"
    state_itemsize: int = 4  # of each moment; 2: optim.moment_dtype = "bfloat16"
    reduce_itemsize: int = 4
    reshard: str = "block"
    reduce: str = "step"
    offload: str = "none"
    offload_activations: bool = False
    attention: str = "auto"  # the backend; for time only
    in_backward: bool = False
    ema: bool = False  # whether there is an average of the weights

    @property
    def micro_batches(self) -> int:
        """Of a GPU in a step."""
        return max(round(self.bins_per_step / self.ranks), 1)

    @property
    def reduces(self) -> int:
        """How often a step sums gradients over ranks."""
        return 1 if self.reduce == "step" else self.micro_batches

    @property
    def adds_up(self) -> bool:
        """Whether whole gradients are summed over micro-batches before they are reduced or applied."""
        return self.micro_batches > 1 and (self.ranks == 1 or self.reduce == "step")

    @property
    def gradient_itemsize(self) -> int:
        """Bytes of a gradient that the optimizer reads: fp32 also where one process adds up micro-batches."""
        return 4 if self.ranks == 1 and self.micro_batches > 1 else self.master_itemsize

    @property
    def has_copies(self) -> bool:
        """Whether masters have copies in the dtype of the computation; under FSDP gathered weights take their place."""
        return self.is_narrow and self.ranks == 1 and self.recompute != "block"

    @property
    def casts(self) -> bool:
        """Whether each use of a master casts it."""
        return self.is_narrow and self.ranks == 1 and self.recompute == "block"

    @property
    def is_narrow(self) -> bool:
        return self.itemsize < self.master_itemsize and not self.lora.rank

    @property
    def is_fp8(self) -> bool:
        """Whether the blocks' linears multiply e4m3 rows."""
        return self.linear == "fp8"

    @property
    def is_nf4(self) -> bool:
        """Whether the blocks' linears are stored in NF4."""
        return self.quantize == "nf4"

    @property
    def gathers_once(self) -> bool:
        """Whether the whole model's weights stay gathered through a step."""
        return self.ranks > 1 and self.reshard == "step"

    @property
    def matmuls_of_weight(self) -> int:
        """Forward, the gradient of the input, and that of the weight where it has one."""
        return 2 if self.lora.rank else 3

    def adapters(self, model: ModelConfig) -> int:
        """A, parameters of all adapters."""
        return lora.num_parameters(model, self.lora)

    def trained(self, model: ModelConfig) -> int:
        """Parameters that the optimizer updates."""
        return self.adapters(model) or model.num_parameters()


@dataclass(frozen=True)
class MemoryUse:
    """Bytes on one GPU at one moment, by purpose."""

    masters: float  # the parameters, fp32 or bf16
    moments: float  # AdamW's two, likewise
    average: float  # of the trained weights, fp32
    gradients: float  # fp32, or of bf16 parameters bf16
    weights: float  # what matmuls read: copies or casts of the masters, or gathered blocks
    activations: float  # kept for backward
    working: float  # logits, dW and dhidden of the head; gradients in flight within a block
    allowance: float  # assumed, not derived: the constants above

    @property
    def total(self) -> float:
        return sum(dataclasses.astuple(self))


def predict(model: ModelConfig, layout: Layout) -> MemoryUse:
    """Memory of the fullest of five moments of a step, with an allowance for what is not derived.

    At every moment: masters 4 P / s, moments 8 P / s, unless they are on the host; half of each in bf16; with optim.ema
    4 P / s where the masters are; on one process the masters' copies, e P less an untied embedding. Gradients on one
    process: 4 P once there are any; of bf16 masters in one micro-batch 2 a parameter, but fp32 for embedding and head;
    with updates in backward those two alone. Under FSDP 4 P / s (2 P / s) at every moment, and the whole model's 4 P
    while a rank adds up micro-batches before it reduces them (reduce = "step").
      head    all activations; the head's cast e E where each use casts; its gradient, two streams 2 e R H (three where
              logits are scaled), and the logits of a chunk of rows
      block   backward of the last block, of the one before it, which has T rows, or of the first one, when all other
              gradients exist: activations up to it, e T (2F + H) of gradients within it, and what it recomputes: e T H,
              its output, or e T F, SwiGLU's; e T F more where `down` is frozen and has no adapter, e T H less with
              norms after the branches; in fp8 a gradient in e4m3 and its weight, 2F (T + H) at the fullest
      end     all gradients; those of T rows of the embeddings, (e + 4) T H
    FSDP gathers: in `head` e E, which stay until the step's last micro-batch, else 3 e B (this block, the next, a
    buffer) and 8 B of gradients being reduced, and those of embedding or head, 4 E; with reshard = "step" e P at any
    time. Tied embeddings stay gathered, e E.
    With adapters, at every moment: e P / s + 4 A / s, moments 8 A / s, gradients 4 A. `head` needs the larger of the
    logits of a chunk of rows and, for the rows of tokens, 2 e R H of hidden states and of the labels' weights; `block`
    no gradients of weights, 3 e B gathered; `end` does not occur.
    """
    last = model.num_layers - 1
    moments = [head_moment(model, layout)]
    for stage in STAGES:
        moments += [block_moment(model, layout, layer, stage) for layer in {last, max(last - 1, 0), 0}]  # the fullest
    moments += [] if layout.lora.rank else [end_moment(model, layout)]
    return max(moments, key=lambda use: use.total)


def saved_bytes(model: ModelConfig, at: Layout) -> int:
    """Bytes held between forward and backward of a micro-batch on one process, without parameters and the batch."""
    first = at.token_budget * model.hidden_size * at.itemsize if at.recompute == "block" else 0  # has no residual yet
    kept = _kept(model, at, model.num_layers) - first + _kept_outside(model, at)
    return kept if at.lora.rank else kept + 4 * model.head_params()


def block_saved_bytes(model: ModelConfig, at: Layout, *, is_rotated: bool = True, is_last: bool = False) -> int:
    """What backward keeps of one block, without weights; with recompute = "block", while that block is in backward."""
    q, kv = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    H, remakes = model.hidden_size, at.recompute == "elementwise"
    has_before = model.norm_placement != "after"
    read = H * (1 + (not remakes)) if has_before else H  # the stream, and its norm that a branch reads
    before = (
        read + (q + 2 * kv) + _normed_elements(model, is_rotated) * (not remakes) + q
    )  # attention and what precedes
    narrow = has_before + model.num_heads
    narrow += {"": 0, "head": model.num_heads + model.num_kv_heads, "full": 2}[model.qk_norm]
    rows = at.supervised if is_last else at.token_budget
    picked = at.itemsize * q * rows * is_last
    inside = at.token_budget * (at.itemsize * before + 4 * narrow) + 16 + picked
    inside += _after_attention_bytes(model, at, rows) + _scale_bytes(model) * at.is_fp8
    return inside + at.itemsize * (_adapter_elements(model, at, is_last=is_last) if at.lora.rank else 0)


def _scale_bytes(model: ModelConfig) -> int:
    """Of a scale for each row of a block's weights."""
    qkv = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    return 4 * (qkv + 2 * model.hidden_size + 2 * model.intermediate_size)


def _normed_elements(model: ModelConfig, is_rotated: bool) -> int:
    """Of a token's q and k, and v where one operator makes all three, beside the matmul's output, which norms read."""
    is_fused = is_rotated and model.qk_norm == "head"
    heads = model.num_heads + model.num_kv_heads * (2 if is_fused else 1)
    return heads * model.head_dim * bool(model.qk_norm)


def _after_attention_bytes(model: ModelConfig, at: Layout, rows: int) -> int:
    """What backward keeps of a block's MLP and the norms around it."""
    H, F, remakes = model.hidden_size, model.intermediate_size, at.recompute == "elementwise"
    has_before, has_after = model.norm_placement != "after", model.norm_placement != "before"
    read = H * (1 + (not remakes)) if has_before else H
    elements = read + 2 * H * has_after + F * (2 if remakes else 3)
    return rows * (at.itemsize * elements + 4 * (has_before + 2 * has_after))


def _adapter_elements(model: ModelConfig, at: Layout, *, is_last: bool) -> int:
    """What backward keeps of a block's adapters, less the inputs of linears without one."""
    adapted, count, attended = lora.adapted_parts(model, at.lora.targets), 0, model.num_heads * model.head_dim
    sizes = {"attn.qkv": model.hidden_size, "attn.out": attended, "mlp.gate_up": model.hidden_size}
    for name, size_in in (sizes | {"mlp.down": model.intermediate_size}).items():
        rows = at.supervised if is_last and name != "attn.qkv" else at.token_budget
        parts = adapted.get(f"blocks.0.{name}", [])
        columns = at.lora.rank * sum(part.is_adapted for part in parts)
        count += columns * (rows * bool(parts) + size_in + sum(part.rows for part in parts))
        if not parts:  # attention keeps its output anyway, but not the rows picked from it
            is_remade = at.recompute == "elementwise" and (name == "mlp.down" or model.norm_placement != "after")
            count -= rows * size_in * (is_last if name == "attn.out" else not is_remade)
    return count


def copy_bytes(model: ModelConfig, at: Layout) -> int:
    """Copies of all masters but an untied embedding, whose rows are cast, and weights that are quantised."""
    apart = model.head_params() * (not model.tie_embeddings) + model.matmul_params() * at.is_fp8
    return at.itemsize * (model.num_parameters() - apart) * at.has_copies


def cast_bytes(model: ModelConfig, at: Layout) -> int:
    """One block's matrices and norms in the dtype of the computation, where each use casts."""
    return at.itemsize * (_block_matrices(model) * (not at.is_fp8) + model.block_norm_params()) * at.casts


def chunk_bytes(model: ModelConfig, supervised: int, itemsize: int = 2) -> int:
    """The head's logits of one chunk of rows, with the rows' hidden states and their gradients."""
    from ochat_kernels.linear_cross_entropy import COLUMN_ALIGNMENT, chunk_size  # here: a CPU trains without triton

    rows = min(chunk_size(supervised, model.vocab_size, itemsize), max(supervised, 1))
    columns = -(-model.vocab_size // COLUMN_ALIGNMENT) * COLUMN_ALIGNMENT
    return itemsize * rows * (columns + 2 * model.hidden_size)


def head_moment(model: ModelConfig, at: Layout) -> MemoryUse:
    """Memory in the head, which makes its gradients in forward, when all activations exist."""
    E, stream = model.head_params(), at.supervised * model.hidden_size * at.itemsize
    streams = 2 + (model.logits_scale != 1.0)  # scaled hidden states are a copy
    chunk, read = chunk_bytes(model, at.supervised, at.itemsize), at.itemsize * E * (at.ranks > 1 or at.casts)
    if at.lora.rank:
        weights, working = read, max(chunk, 2 * stream)
    else:
        weights = gathered_bytes(model, at) if at.gathers_once else read + copy_bytes(model, at)
        working = chunk + _unreduced(model, at)
    kept = 0 if at.offload_activations else _kept(model, at, model.num_layers)
    activations = kept + _kept_outside(model, at)
    return _use(model, at, _gradients(model, at, E, 1), weights, activations, working + streams * stream)


def block_moment(model: ModelConfig, at: Layout, layer: int, stage: str) -> MemoryUse:
    """Memory at a stage of the backward of one block, after the backward of all later blocks."""
    E, B, later = model.head_params(), _block_matrices(model), model.num_layers - 1 - layer
    is_tied = model.tie_embeddings
    held = min(layer, 1) if at.offload_activations else layer  # offloaded: in backward the previous block is fetched
    own, inside, working = _stage(model, at, layer, stage)
    activations = _kept(model, at, held) + inside + at.token_budget * (8 + _angle_bytes(model))
    if at.lora.rank:
        weights = 3 * block_bytes(model, at) * (at.ranks > 1)
    elif at.ranks > 1:
        weights = gathered_bytes(model, at) if at.gathers_once else 3 * at.itemsize * B + gathered_bytes(model, at)
        working += 2 * at.reduce_itemsize * B + _unreduced(model, at) * is_tied
    else:
        weights = copy_bytes(model, at) + cast_bytes(model, at)
    tables = 1 if is_tied or not at.in_backward else 0  # an untied head's is applied and freed at once
    return _use(model, at, _gradients(model, at, E + later * B + own, tables), weights, activations, working)


def _stage(model: ModelConfig, at: Layout, layer: int, stage: str) -> tuple[int, float, float]:
    """In the backward of a block: its weights that have their gradient, what it still keeps, and gradients of
    activations in flight with what is recomputed for them, in bytes."""
    H, F, T, e = model.hidden_size, model.intermediate_size, at.token_budget, at.itemsize
    q, kv = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    is_last, is_rotated, remakes = layer == model.num_layers - 1, model.rope_of(layer) is not None, at.recompute
    rows = at.supervised if is_last else T
    kept = block_saved_bytes(model, at, is_rotated=is_rotated, is_last=is_last)
    kept -= e * T * H * (layer == 0 and remakes == "block")  # no sum of two streams
    dequantised = (e + DEQUANTISING) * at.is_nf4  # bytes a weight of the linear whose input gets its gradient
    again = e * {"none": 0, "elementwise": rows * F, "block": T * H}[remakes]
    if stage == "activation":
        if at.lora.rank and "down_proj" not in at.lora.targets and remakes != "elementwise":
            again += e * rows * F  # the gradient of what `down` reads, which else takes the place of what it read
        if model.norm_placement != "before":
            again -= e * rows * H  # what the last norm kept is gone
        again += max(dequantised * F * H - e * rows * F, 0)  # gone before the gradient of what the activation read
        return F * H, kept, e * (rows * 2 * F + T * H) + again
    if stage == "gate_up":
        unmade = 2 * F * H * at.gradient_itemsize * (at.ranks == 1 and not at.adds_up and not at.in_backward)
        again += max(2 * F * (rows + H) - unmade, 0) * at.is_fp8  # gone when the weight's gradient is made
        again += dequantised * 2 * F * H
        return 3 * F * H, kept - e * rows * F * (remakes != "elementwise"), e * (rows + T) * H + again
    if stage == "attention":
        again = e * T * {"none": 0, "elementwise": _normed_elements(model, is_rotated), "block": H}[remakes]
        again += max(dequantised * q * H - e * T * (q + 2 * kv), 0)  # gone before attention's backward
        return 3 * F * H + q * H, kept - _after_attention_bytes(model, at, rows), e * T * (2 * q + 2 * kv + H) + again
    remade = (q + 2 * kv) * ((T + H) * at.is_fp8 + H * dequantised)
    return _block_matrices(model), 0, e * T * (4 * H + q + 2 * kv) + remade


def end_moment(model: ModelConfig, at: Layout) -> MemoryUse:
    """Memory in the backward of the embeddings."""
    tables = 1 if model.tie_embeddings or at.in_backward else 2
    rows = (at.itemsize + 4 * (at.itemsize < 4)) * at.token_budget * model.hidden_size  # as they came, and in fp32
    weights = gathered_bytes(model, at) if at.ranks > 1 else copy_bytes(model, at)
    gradients = _gradients(model, at, model.num_parameters(), tables)
    return _use(model, at, gradients, weights, 0, rows + _unreduced(model, at))


def _use(
    model: ModelConfig,
    at: Layout,
    gradients: float,
    weights: float,
    activations: float,
    working: float,
) -> MemoryUse:
    """A moment with what exists at every moment, and the allowance."""
    trained, masters = model.num_parameters(), at.master_itemsize * model.num_parameters()
    if at.lora.rank:
        rows = ADAPTED_TOKENS * (1 if model.tie_embeddings else 2) * (at.lora.tokens == "template")
        trained = at.adapters(model) + rows * model.hidden_size
        masters = frozen_bytes(model, at) + 4 * trained
        gradients = 4 * trained / (at.shard if at.reduce == "micro_batch" or at.micro_batches == 1 else 1)
        weights = gathered_bytes(model, at) if at.gathers_once else weights
    lost = FRAGMENTATION * (gradients + weights + activations + working)
    return MemoryUse(
        masters=masters / at.shard * (at.offload != "all"),
        moments=2 * at.state_itemsize * trained / at.shard * (at.offload == "none"),
        average=4 * trained / at.shard * at.ema * (at.offload != "all"),
        gradients=gradients,
        weights=weights,
        activations=activations,
        working=working,
        allowance=CONTEXT_BYTES + NCCL_BYTES * (at.ranks > 1) + lost,
    )


def gathered_bytes(model: ModelConfig, at: Layout) -> float:
    """Bytes of weights that FSDP keeps between blocks: all, or the head's until the last micro-batch, or tied ones."""
    if at.gathers_once:
        return frozen_bytes(model, at)
    return at.itemsize * model.head_params() * (model.tie_embeddings or at.micro_batches > 1)


def frozen_bytes(model: ModelConfig, at: Layout) -> float:
    """All weights as products read them, or as they are stored in NF4."""
    return at.itemsize * (model.num_parameters() - model.matmul_params()) + model.num_layers * block_bytes(model, at)


def block_bytes(model: ModelConfig, at: Layout) -> float:
    """The matrices of a block, likewise."""
    if not at.is_nf4:
        return at.itemsize * _block_matrices(model)
    return sum(packing.nbytes for name, packing in lora.packings(model).items() if name.startswith("blocks.0."))


def _gradients(model: ModelConfig, at: Layout, done: float, tables: int) -> float:
    """Bytes of gradients once the last micro-batch has made those of `done` parameters, among them those of so many
    `tables` of the vocabulary, which are fp32.

    Under FSDP the shards occupy memory at every moment: they belong to the reducing stream, and the caching allocator
    does not share blocks across streams.
    """
    E = model.head_params()
    if at.in_backward:
        return 4 * E * tables
    whole = 4 * model.num_parameters() if at.adds_up else 0
    if at.ranks == 1:
        return whole or at.gradient_itemsize * (done - tables * E) + 4 * tables * E
    return whole + at.gradient_itemsize * model.num_parameters() / at.shard * (at.offload != "all")


def _unreduced(model: ModelConfig, at: Layout) -> float:
    """The whole gradient of a table of the vocabulary where FSDP reduces it at once."""
    return 4 * model.head_params() * (at.ranks > 1 and not at.adds_up)


def _kept(model: ModelConfig, at: Layout, num_blocks: int) -> int:
    """Bytes kept of the first blocks before their backward, without weights."""
    if at.recompute == "block":
        return num_blocks * 2 * at.token_budget * model.hidden_size * at.itemsize
    last = model.num_layers - 1
    kinds = Counter((model.rope_of(layer) is not None, layer == last) for layer in range(num_blocks))
    return sum(
        count * block_saved_bytes(model, at, is_rotated=is_rotated, is_last=is_last)
        for (is_rotated, is_last), count in kinds.items()
    )


def _kept_outside(model: ModelConfig, at: Layout) -> int:
    """Bytes kept outside the blocks, without dW."""
    cast = at.itemsize * model.hidden_size * at.casts
    T, R = at.token_budget, at.supervised
    return T * (8 + _angle_bytes(model)) + R * (4 + 2 * at.itemsize * model.hidden_size) + cast


def _block_matrices(model: ModelConfig) -> int:
    return model.matmul_params() // model.num_layers


def _angle_bytes(model: ModelConfig) -> int:
    """Of a token's cos and sin, in fp32, of every kind of rotation that the blocks use."""
    ropes = {model.rope_of(layer) for layer in range(model.num_layers)}
    return sum(4 * int(model.head_dim * rope.partial_rotary_factor) for rope in ropes if rope is not None)
