"""Predict the time of a step and its MFU: FLOPs and bytes over the rates of gpus.py. Nothing here is measured.

    speed = predict(model, GPUS["H200"], workload, Layout(token_budget=8192, bins_per_step=64, ranks=8, shard=8))
    speed.tokens_per_s, speed.mfu

Letters as in memory.py; R supervised rows of a micro-batch, S ranks, s ranks that share a copy, G GPUs of a node.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ochat.model.config import ModelConfig
from ochat.plan.gpus import GpuSpec, attention_rate
from ochat.plan.lengths import LengthCounts
from ochat.plan.memory import DEQUANTISING, Layout, block_bytes, frozen_bytes

OVERLAP = 0.9  # assumed: share of the communication that can overlap with computation
HOST_BANDWIDTH = 25e9  # assumed: bytes/s to and from pinned host memory, of PCIe 4
LAUNCHES_OF_BLOCK = 50  # counted: operators of a block, forward and backward
HOP_SECONDS = 4e-6  # assumed: latency that each further rank adds to a ring, for any message size
LAUNCH_SECONDS = 10e-6  # assumed: host time of one launch
MORE_LAUNCHES = {"none": 1, "elementwise": 1.1, "block": 4 / 3}  # counted: four more of 50, with a third of forward


@dataclass(frozen=True)
class Workload:
    """The data of an average micro-batch, independent of its size."""

    lengths: LengthCounts
    supervised_share: float  # of the tokens
    fill: float = 1.0  # real tokens over token_budget
    imbalance: float = 1.0  # largest over mean work among the bins of a step

    def attention_per_token(self, model: ModelConfig, cost: np.ndarray | float = 1.0) -> float:
        """FLOPs of causal attention, forward and backward, an average token; of each length times its `cost`."""
        squares = np.arange(self.lengths.longest + 1, dtype=np.float64) ** 2
        return model.flops_per_step(0, 1, 0) * float(self.lengths.counts @ (squares * cost)) / self.lengths.num_tokens

    def attention_seconds(self, model: ModelConfig, gpu: GpuSpec, backend: str) -> float:
        """Seconds of attention, an average token, at the rate for each document's length; 7 FLOPs are done for 6."""
        rates = attention_rate(gpu, np.arange(self.lengths.longest + 1), backend)
        return self.attention_per_token(model, 7 / 6 / (rates * 1e12))


@dataclass(frozen=True)
class Speed:
    """Seconds of an optimizer step by part, with the rates and the MFU that follow."""

    matmul: float
    attention: float
    head: float
    memory_bound: float  # norms, RoPE, SwiGLU, residuals and casts
    recompute: float
    launches: float  # host time of launches beyond the GPU's time
    communication: float  # what does not overlap with computation
    optimizer: float
    imbalance: float  # waiting for the fullest bin of a step
    tokens_per_step: float  # real ones
    flops_per_step: float
    peak_flops: float  # of all GPUs

    @property
    def step_seconds(self) -> float:
        return sum(getattr(self, name) for name in PARTS)

    @property
    def tokens_per_s(self) -> float:
        """Real tokens a second, of all GPUs together."""
        return self.tokens_per_step / self.step_seconds

    @property
    def mfu(self) -> float:
        return self.flops_per_step / self.step_seconds / self.peak_flops


PARTS = (
    "matmul", "attention", "head", "memory_bound", "recompute", "launches", "communication", "optimizer", "imbalance"
)  # fmt: skip


def predict(model: ModelConfig, gpu: GpuSpec, workload: Workload, layout: Layout) -> Speed:
    """Seconds of each part of a step.

    A micro-batch of T tokens, all of them computed, `fill` of them real, R = supervised_share of those:
      matmul        6 T FLOPs a weight of the blocks at the rate of large matmuls, but 6 R after the last block's
                    attention; never less than 3 reads of the weights; in fp8 4 of the 6 at the rate of e4m3 rows
      attention     7 L N D len^2 a document at the rate for its length
      head          6 R E FLOPs, 3 e R V bytes, dW and its scaling (12 + e) E
      memory_bound  a token and block e (16H + (6N + 8K) D + 8F) bytes; in the last block R for 8H + 8F, and
                    e (T + 5R) (H + N D) to pick rows and put gradients back; _weight_bytes of weights and gradients,
                    and casts, e + 4 a weight, where there are no copies; in fp8 what _quantised_bytes says
      recompute     "block": the blocks' forward, a third of matmul, 2/7 of attention, memory-bound operators and casts;
                    "elementwise": a token and block e (4H + 2 (N + K) D + 3F) bytes
    and all wait for the rank with the fullest bin. Of each e P bytes FSDP gathers (s - 1) / s: the blocks' before
    forward and backward of each micro-batch, the embedding's before each forward, the head's once a step (reshard =
    "step": all once). It reduces 4 P of gradients once a step (reduce = "micro_batch": in each). Both over NVLink
    inside a node, over G network cards between nodes, and a ring of s ranks takes s - 1 hops for each block, the
    embedding and the head; a share of OVERLAP overlaps with computation. AdamW moves 28 P / s bytes, the norm 4 P / s
    (14 and 2 where masters and moments are bf16), and e more to write the copies; an average of the weights 12 (10);
    moments on the host cross the bus, 16 P / s (8), and so do offloaded inputs of blocks, 4 e T H L.
    These are Llama's operators; _moved_per_token and _recomputed_per_token count those of other norms and scales.
    With A parameters of adapters instead: 4 for each 6 FLOPs, 6 T A more, no dW and no casts of weights, and A for P in
    gradients and optimizer. In NF4 a product takes as long as one in bf16 and waits for its weight, which is
    dequantised in forward, in backward, and where a block is recomputed: e + 0.64 bytes a weight, at the rate of a copy
    (assumed); gathers move what is stored.
    """
    count = layout.micro_batches
    parts = _micro_batch(model, gpu, workload, layout, count)
    device = sum(parts.values())
    host = model.num_layers * LAUNCHES_OF_BLOCK * LAUNCH_SECONDS * MORE_LAUNCHES[layout.recompute]
    parts["launches"] = max(host - device, 0.0)
    busy = device + parts["launches"]
    parts["communication"] = _exposed(_gather_seconds(model, gpu, layout, count), busy)
    parts["imbalance"] = (workload.imbalance - 1) * device
    step = {name: count * seconds for name, seconds in parts.items()}
    scattered, summed = _reduce_seconds(model, gpu, layout)
    sums = layout.reduces if layout.reduce_itemsize == 2 else 1  # over groups, where partial sums are rounded each time
    step["communication"] += layout.reduces * _exposed(scattered, busy) + sums * _exposed(summed, busy)
    moved = 2 * layout.master_itemsize + 4 * layout.state_itemsize + 2 * layout.gradient_itemsize  # bytes a parameter
    copied = 1 - layout.is_fp8 * model.matmul_params() / model.num_parameters()
    moved += layout.itemsize * layout.has_copies * copied + (8 + layout.master_itemsize) * layout.ema
    over_bus = 4 * layout.state_itemsize / HOST_BANDWIDTH if layout.offload == "optimizer" else 0.0  # there and back
    update = moved / gpu.copy_bandwidth + over_bus
    step["optimizer"] = layout.trained(model) / layout.shard * update
    real = workload.fill * layout.token_budget * count * layout.ranks
    flops = model.flops_per_step(1, 0, 0) * real + model.flops_per_step(0, 0, 1) * real * workload.supervised_share
    flops = flops * layout.matmuls_of_weight / 3 + 6 * layout.adapters(model) * real
    flops += workload.attention_per_token(model) * real
    return Speed(
        **step, tokens_per_step=real, flops_per_step=flops, peak_flops=gpu.peak_tflops * 1e12 * layout.ranks
    )  # fmt: skip


def _micro_batch(model: ModelConfig, gpu: GpuSpec, workload: Workload, layout: Layout, count: int) -> dict[str, float]:
    """Seconds of the GPU's own work on one micro-batch."""
    T, E, e = layout.token_budget, model.head_params(), layout.itemsize
    real, rate, bandwidth = workload.fill * T, gpu.matmul_tflops * 1e12, gpu.copy_bandwidth
    rows = real * workload.supervised_share
    times, weights = layout.matmuls_of_weight, model.matmul_params()
    product = 2 * (weights * T - _after_attention(model) * (T - rows))  # FLOPs of one of `times`
    narrow_rate = (layout.is_fp8 and gpu.fp8_tflops * 1e12) or rate  # forward, and for gradients of inputs
    adapted = 6 * layout.adapters(model) * T / rate
    matmul = max(2 * product / narrow_rate + (times - 2) * product / rate + adapted, times * e * weights / bandwidth)
    attention = workload.attention_seconds(model, gpu, layout.attention) * real
    dw = 0 if layout.lora.rank else (12 + e) * E
    head = 2 * times * rows * E / rate + (times * e * rows * model.vocab_size + dw) / bandwidth
    after = model.hidden_size + model.intermediate_size  # an eighth of the elements moved after attention
    picks = (T + 5 * rows) * (model.hidden_size + model.num_heads * model.head_dim) - 8 * after * (T - rows)
    passes = e * (T * model.num_layers * _moved_per_token(model) + picks) / bandwidth
    weights = _weight_bytes(model, layout, count) / bandwidth
    casts = (4 + e) * (model.num_parameters() - model.matmul_params() * layout.is_fp8) * layout.casts / bandwidth
    quantised, again = (each * layout.is_fp8 / bandwidth for each in _quantised_bytes(model, layout))
    if layout.is_nf4:
        again = model.num_layers * block_bytes(model, layout) / bandwidth
        again += model.matmul_params() * (e + 2 * DEQUANTISING) / bandwidth
        quantised = 2 * again
    forward = product / narrow_rate + adapted / times + attention * 2 / 7 + passes * 0.4 + again
    recompute = 0.0
    if layout.recompute == "block":
        recompute = forward + casts
    if layout.recompute == "elementwise":
        recompute = e * T * model.num_layers * _recomputed_per_token(model) / bandwidth
    if layout.offload_activations:  # each way overlaps: with forward, then with forward and backward
        bus = 2 * e * T * model.hidden_size * model.num_layers / HOST_BANDWIDTH
        recompute += max(bus - forward, 0.0) + max(bus - matmul - attention - passes, 0.0)
    return {
        "matmul": matmul, "attention": attention, "head": head,
        "memory_bound": passes + weights + casts + quantised, "recompute": recompute,
    }  # fmt: skip


def _moved_per_token(model: ModelConfig) -> int:
    """Elements that the memory-bound operators of a block read and write for a token, forward and backward: two norms
    with their residual 16 H, the split and RoPE of q, k and v 4 (N + 2K) D, SwiGLU or GeGLU 8 F.

    A norm after a branch is 5 H, a residual that no norm adds 6 H, a scale of a branch 4 H; norms of the heads of q and
    k are one read more, (N + K) D; norms over all their heads 5 (N + K) D, with RoPE 4 (N + K) D and the gradients of
    q, k and v in one tensor 2 (N + 2K) D."""
    streams = {"before": 16, "both": 26, "after": 22}[model.norm_placement] + 8 * (model.residual_scale != 1.0)
    q, kv = {"": (4, 8), "head": (5, 9), "full": (11, 13)}[model.qk_norm]
    heads = q * model.num_heads + kv * model.num_kv_heads
    return streams * model.hidden_size + heads * model.head_dim + 8 * model.intermediate_size


def _quantised_bytes(model: ModelConfig, layout: Layout) -> tuple[int, int]:
    """Bytes that a micro-batch moves to quantise, and those of them in forward. Norms before a branch and activations
    write 1 a number more; the other inputs and the gradients are read again, and each weight forward and backward."""
    H, F, q = model.hidden_size, model.intermediate_size, model.num_heads * model.head_dim
    gradients = q + 2 * model.num_kv_heads * model.head_dim + 2 * H + 2 * F
    again = layout.itemsize + 1  # read and written
    inputs = F + again * q + 2 * H * (again if model.norm_placement == "after" else 1)
    weight = 1 + (layout.master_itemsize if layout.ranks == 1 and not layout.lora.rank else layout.itemsize)
    forward = layout.token_budget * model.num_layers * inputs + weight * model.matmul_params()
    backward = layout.token_budget * model.num_layers * again * gradients + weight * model.matmul_params()
    return forward + backward, forward


def _recomputed_per_token(model: ModelConfig) -> int:
    """Elements that norms, RoPE and SwiGLU read and write again for a token of a block; what norms after the branches
    gave is not asked for."""
    q, kv = {"": (0, 0), "head": (1, 2), "full": (2, 2)}[model.qk_norm]  # without norms nothing of the product is kept
    heads = q * model.num_heads + kv * model.num_kv_heads
    streams = 0 if model.norm_placement == "after" else 4
    return streams * model.hidden_size + 2 * heads * model.head_dim + 3 * model.intermediate_size


def _after_attention(model: ModelConfig) -> int:
    """Weights of a block that come after attention: out, gate, up and down."""
    return model.hidden_size * (model.num_heads * model.head_dim + 3 * model.intermediate_size)


def _weight_bytes(model: ModelConfig, layout: Layout, count: int) -> float:
    """Bytes of weights and gradients that a micro-batch moves beside its products. A product that adds to a sum reads
    and writes it again, 8 a parameter; of adapters autograd adds, 12. FSDP casts its shard and copies what it gathered
    to its place, twice; it copies gradients into the buffer of the reduction, 8, and adds up reduced shards, 12."""
    P, e, later = model.num_parameters(), layout.itemsize, (count - 1) / count
    gathers = (1 / count if layout.gathers_once else 2) * (layout.ranks > 1)
    if layout.lora.rank:
        return 12 * layout.trained(model) * later + 2 * frozen_bytes(model, layout) * gathers
    shard = (4 + e) * P / layout.shard * (layout.master_itemsize > e)
    if layout.ranks == 1:
        return 8 * P * later
    if layout.adds_up:
        return (shard + 2 * e * P) * gathers + 8 * P * later + 8 * P / count
    return (shard + 2 * e * P) * gathers + 2 * layout.reduce_itemsize * P + 12 * P / layout.shard * later


def _gather_seconds(model: ModelConfig, gpu: GpuSpec, layout: Layout, count: int) -> float:
    """Seconds in which a GPU receives the weights of one of `count` micro-batches."""
    E, L, is_tied = model.head_params(), model.num_layers, model.tie_embeddings
    e, all_bytes = layout.itemsize, frozen_bytes(model, layout)
    if layout.reshard == "step":
        gathered, rings = all_bytes / count, (L + 2) / count
    else:
        gathered = 2 * (all_bytes - e * E * (1 if is_tied else 2)) + e * E / count + e * E * (not is_tied)
        rings = 2 * L + 1 + 1 / count
    size = gathered * (1 - 1 / layout.shard)
    return size / _link(gpu, layout, layout.shard) + rings * (layout.shard - 1) * HOP_SECONDS


def _reduce_seconds(model: ModelConfig, gpu: GpuSpec, layout: Layout) -> tuple[float, float]:
    """Seconds in which gradients are scattered over a group's ranks, and in which they are summed over the groups."""
    P, groups, rings = layout.trained(model), layout.ranks // layout.shard, model.num_layers + 2
    scattered = layout.reduce_itemsize * P * (1 - 1 / layout.shard) / _link(gpu, layout, layout.shard)
    summed = 2 * layout.reduce_itemsize * P / layout.shard * (1 - 1 / groups) / _link(gpu, layout, layout.ranks)
    hops = HOP_SECONDS * rings
    return scattered + hops * (layout.shard - 1), summed + hops * 2 * (groups - 1)


def _link(gpu: GpuSpec, layout: Layout, members: int) -> float:
    """Bytes/s of a collective of so many ranks: between nodes a ring crosses every network card of a node at once."""
    if members <= layout.gpus_per_node:
        return gpu.node_bandwidth
    return min(gpu.node_bandwidth, layout.gpus_per_node * gpu.network_bandwidth)


def _exposed(seconds: float, busy: float) -> float:
    return seconds - min(OVERLAP * seconds, busy)
