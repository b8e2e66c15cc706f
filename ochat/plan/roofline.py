"""How fast a step would be on a card: FLOPs and bytes over the rates in cards.py. A prediction, not a measurement.

    speed = predict(model, CARDS["H200"], workload, Cut(token_budget=8192, bins_per_step=64, ranks=8, shard=8))
    speed.tokens_per_s, speed.mfu

Letters as in memory.py; R supervised rows of a micro-batch, S ranks, s those that share a copy, G GPUs of a node.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ochat.model.config import ModelConfig
from ochat.plan.gpus import Card, attention_rate
from ochat.plan.lengths import LengthCounts

OVERLAP = 0.9  # assumed: share of the communication that can hide behind computation
HOST_BANDWIDTH = 25e9  # assumed: bytes/s to and from pinned host memory, of PCIe 4
LAUNCHES_OF_BLOCK = 50  # counted: operators of a block, forward and backward
HOP_SECONDS = 4e-6  # assumed: what a ring adds for each further rank, whatever the message
LAUNCH_SECONDS = 10e-6  # assumed: what the host needs for one of them
MORE_LAUNCHES = {"none": 1, "elementwise": 1.1, "block": 4 / 3}  # counted: four more of 50, with a third of forward


@dataclass(frozen=True)
class Workload:
    """What the data set makes of a micro-batch, whatever its size."""

    lengths: LengthCounts
    supervised_share: float  # of the tokens
    fill: float = 1.0  # real tokens over token_budget
    imbalance: float = 1.0  # largest over mean work among the bins of a step: the others wait

    def attention_per_token(self, model: ModelConfig) -> float:
        """FLOPs of causal attention, forward and backward, an average token."""
        return _attention(model, self.lengths, np.ones(self.lengths.longest + 1))

    def attention_seconds(self, model: ModelConfig, card: Card) -> float:
        """The same at the card's rate for each document's length, for an average token; 7 FLOPs are done for 6."""
        rates = attention_rate(card, np.arange(self.lengths.longest + 1))
        return _attention(model, self.lengths, 7 / 6 / (rates * 1e12))


@dataclass(frozen=True)
class Cut:
    """How the run is cut into micro-batches and over GPUs."""

    token_budget: int  # T
    bins_per_step: int
    recompute: str = "none"  # never "auto"
    ranks: int = 1  # S
    shard: int = 1  # s
    gpus_per_node: int = 8  # G
    itemsize: int = 2
    adapters: int = 0  # A parameters that are trained while all others are frozen; 0: all are trained

    reshard: str = "block"  # as parallel.reshard, the next ones likewise
    reduce: str = "step"
    reduce_itemsize: int = 4
    offload: str = "none"
    offload_activations: bool = False
    master_itemsize: int = 4  # 2: optim.master_dtype = "bfloat16"
    state_itemsize: int = 4  # of each moment, likewise

    @property
    def products_of_weight(self) -> int:
        """Forward, the gradient of the input, and that of the weight where it has one."""
        return 2 if self.adapters else 3

    @property
    def micro_batches(self) -> int:
        """Of a GPU in a step."""
        return max(round(self.bins_per_step / self.ranks), 1)

    @property
    def reduces(self) -> int:
        """How often a step sums gradients."""
        return 1 if self.reduce == "step" else self.micro_batches

    def trained(self, model: ModelConfig) -> int:
        return self.adapters or model.num_parameters()


@dataclass(frozen=True)
class Speed:
    """Seconds of an optimizer step by what they go to, and what follows from them."""

    products: float
    attention: float
    head: float
    moved: float  # memory-bound operators and casts
    again: float  # recompute
    launches: float  # what the host needs beyond the card's time
    communication: float  # what does not hide behind computation
    optimizer: float
    waiting: float  # for the fullest bin of a step
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


PARTS = ("products", "attention", "head", "moved", "again", "launches", "communication", "optimizer", "waiting")


def predict(model: ModelConfig, card: Card, workload: Workload, cut: Cut) -> Speed:
    """The sum of what a step's parts take.

    A micro-batch of T tokens, all of them computed, `fill` of them real, R = supervised_share of those:
      products   6 T FLOPs a weight of the blocks at the rate of matrix products, but 6 R in the last block behind its
                 attention; never less than 3 reads of the weights
      attention  7 L N D len^2 a document at the rate for its length
      head       6 R E FLOPs, 3 e R V bytes, dW and its scaling (12 + e) E
      moved      a token and block e (16H + (6N + 8K) D + 8F) bytes; casts e + 4 a weight and direction, 12 to add up;
                 in the last block R for 8H + 8F, and e (T + 5R) (H + N D) to pick the rows and put gradients back
      again      under recompute = "block" the blocks' forward: a third of the products, 2/7 of attention, moved; under
                 "elementwise" a token and block e (4H + 2 (N + K) D + 3F) bytes
    and all wait for the rank with the fullest bin. Of each e P bytes FSDP gathers (s - 1) / s: the blocks' before
    forward and backward of each micro-batch, the embedding's before each forward, the head's once a step (reshard =
    "step": all once). It reduces 4 P of gradients once a step (reduce = "micro_batch": in each). Both over NVLink
    inside a node, over G network cards between nodes, and a ring of s ranks takes s - 1 hops for each block, the
    embedding and the head; a share of OVERLAP hides. AdamW moves 28 P / s bytes, the norm
    4 P / s (14 and 2 where masters and moments are bf16, which are not cast either, save for what one process adds up);
    moments on the host cross the bus, 16 P / s (8), and so do the inputs of blocks, 4 e T H L.
    With A parameters of adapters instead: 4 for each 6 FLOPs, 6 T A more, no dW and no casts of weights, and A for P in
    gradients and optimizer.
    """
    count = cut.micro_batches
    parts = _micro_batch(model, card, workload, cut, count)
    device = sum(parts.values())
    host = model.num_layers * LAUNCHES_OF_BLOCK * LAUNCH_SECONDS * MORE_LAUNCHES[cut.recompute]
    parts["launches"] = max(host - device, 0.0)
    busy = device + parts["launches"]
    parts["communication"] = _exposed(_gather_seconds(model, card, cut, count), busy)
    parts["waiting"] = (workload.imbalance - 1) * device
    step = {name: count * seconds for name, seconds in parts.items()}
    step["communication"] += cut.reduces * _exposed(_reduce_seconds(model, card, cut), busy)
    update = _update_bytes(cut, count) / card.copy_bandwidth + _moments_over_bus(cut)
    step["optimizer"] = cut.trained(model) / cut.shard * update
    real = workload.fill * cut.token_budget * count * cut.ranks
    flops = model.flops_per_step(1, 0, 0) * real + model.flops_per_step(0, 0, 1) * real * workload.supervised_share
    flops = flops * cut.products_of_weight / 3 + 6 * cut.adapters * real
    flops += workload.attention_per_token(model) * real
    return Speed(
        **step, tokens_per_step=real, flops_per_step=flops, peak_flops=card.peak_tflops * 1e12 * cut.ranks
    )  # fmt: skip


def message_bytes(model: ModelConfig, cut: Cut) -> float:
    """What a GPU receives and sends in a step: weights that it gathers, gradients that it gives to be summed."""
    return cut.micro_batches * _gathered(model, cut, cut.micro_batches) + cut.reduces * sum(_reduced(model, cut))


def _micro_batch(model: ModelConfig, card: Card, workload: Workload, cut: Cut, count: int) -> dict[str, float]:
    """Seconds of the card's own work on one micro-batch."""
    T, E, e = cut.token_budget, model.head_params(), cut.itemsize
    real, rate, bandwidth = workload.fill * T, card.matmul_tflops * 1e12, card.copy_bandwidth
    rows = real * workload.supervised_share
    times, weights = cut.products_of_weight, model.matmul_params()
    flops = (2 * times * weights + 6 * cut.adapters) * T - 2 * times * _behind_attention(model) * (T - rows)
    products = max(flops / rate, times * e * weights / bandwidth)
    attention = workload.attention_seconds(model, card) * real
    dw = 0 if cut.adapters else (12 + e) * E
    head = 2 * times * rows * E / rate + (times * e * rows * model.vocab_size + dw) / bandwidth
    behind = model.hidden_size + model.intermediate_size  # of what is moved, an eighth
    picks = (T + 5 * rows) * (model.hidden_size + model.num_heads * model.head_dim) - 8 * behind * (T - rows)
    passes = e * (T * model.num_layers * _moved_per_token(model) + picks) / bandwidth
    casts = _cast_bytes(model, cut, count) / bandwidth
    forward = products / times + attention * 2 / 7 + passes * 0.4
    again = 0.0
    if cut.recompute == "block":
        again = forward + (casts / 3 if cut.ranks == 1 else 0)
    if cut.recompute == "elementwise":
        again = e * T * model.num_layers * _remade_per_token(model) / bandwidth
    if cut.offload_activations:  # each way beside what is computed meanwhile: forward, then all of it
        bus = 2 * e * T * model.hidden_size * model.num_layers / HOST_BANDWIDTH
        again += max(bus - forward, 0.0) + max(bus - products - attention - passes, 0.0)
    return {"products": products, "attention": attention, "head": head, "moved": passes + casts, "again": again}


def _moved_per_token(model: ModelConfig) -> int:
    """Elements that the memory-bound operators of a block read and write for a token, forward and backward: two norms
    with their residual 16 H, RoPE 4 (N + K) D, gradients of q, k and v side by side 2 (N + 2K) D, SwiGLU 8 F."""
    heads = 6 * model.num_heads + 8 * model.num_kv_heads
    return 16 * model.hidden_size + heads * model.head_dim + 8 * model.intermediate_size


def _remade_per_token(model: ModelConfig) -> int:
    """Elements that norms, RoPE and SwiGLU read and write once more for a token of a block."""
    heads = model.num_heads + model.num_kv_heads
    return 4 * model.hidden_size + 2 * heads * model.head_dim + 3 * model.intermediate_size


def _behind_attention(model: ModelConfig) -> int:
    """Weights of a block's out, gate, up and down."""
    return model.hidden_size * (model.num_heads * model.head_dim + 3 * model.intermediate_size)


def _cast_bytes(model: ModelConfig, cut: Cut, count: int) -> float:
    """Of weights into the computation's dtype and of gradients back, added up over micro-batches; FSDP casts shards
    and adds up whole gradients."""
    P, e = model.num_parameters(), cut.itemsize
    adds = 12 * cut.trained(model) * (count - 1) / count
    if cut.adapters:
        return adds + (4 * e * P if cut.ranks > 1 else 0)
    weights = 4 + e if cut.master_itemsize > e else 0
    if cut.ranks == 1:
        gradients = 4 + e if _gradient_itemsize(cut, count) > e else 0
        return (weights + gradients) * P + adds
    return weights * P / cut.shard + 4 * e * P + adds


def _gradient_itemsize(cut: Cut, count: int) -> int:
    """Of what the optimizer reads: fp32 also where one process adds up micro-batches."""
    return 4 if cut.ranks == 1 and count > 1 else cut.master_itemsize


def _update_bytes(cut: Cut, count: int) -> int:
    """Of a parameter that AdamW reads and writes, with the norm's look at its gradient."""
    return 2 * cut.master_itemsize + 4 * cut.state_itemsize + 2 * _gradient_itemsize(cut, count)


def _moments_over_bus(cut: Cut) -> float:
    """Seconds a parameter, there and back."""
    return 4 * cut.state_itemsize / HOST_BANDWIDTH if cut.offload == "optimizer" else 0.0


def _gather_seconds(model: ModelConfig, card: Card, cut: Cut, count: int) -> float:
    L = model.num_layers
    rings = (L + 2) / count if cut.reshard == "step" else 2 * L + 1 + 1 / count
    return _gathered(model, cut, count) / _link(card, cut, cut.shard) + rings * (cut.shard - 1) * HOP_SECONDS


def _reduce_seconds(model: ModelConfig, card: Card, cut: Cut) -> float:
    scattered, summed = _reduced(model, cut)
    hops = cut.shard - 1 + 2 * (cut.ranks // cut.shard - 1)
    rings = (model.num_layers + 2) * hops * HOP_SECONDS
    return scattered / _link(card, cut, cut.shard) + summed / _link(card, cut, cut.ranks) + rings


def _gathered(model: ModelConfig, cut: Cut, count: int) -> float:
    """Bytes that a GPU receives in a micro-batch, where a step has `count` of them."""
    P, E, is_tied = model.num_parameters(), model.head_params(), model.tie_embeddings
    blocks = P - E * (1 if is_tied else 2)
    gathered = P / count if cut.reshard == "step" else 2 * blocks + E / count + E * (not is_tied)
    return cut.itemsize * gathered * (1 - 1 / cut.shard)


def _reduced(model: ModelConfig, cut: Cut) -> tuple[float, float]:
    """Bytes of gradients that a GPU sends: scattered over a group's ranks, then summed over the groups."""
    P, groups = cut.trained(model), cut.ranks // cut.shard
    scattered = cut.reduce_itemsize * P * (1 - 1 / cut.shard)
    return scattered, 2 * cut.reduce_itemsize * P / cut.shard * (1 - 1 / groups)


def _link(card: Card, cut: Cut, members: int) -> float:
    """Bytes/s of a collective of so many ranks: between nodes a ring crosses every network card of a node at once."""
    if members <= cut.gpus_per_node:
        return card.node_bandwidth
    return min(card.node_bandwidth, cut.gpus_per_node * card.network_bandwidth)


def _exposed(seconds: float, busy: float) -> float:
    return seconds - min(OVERLAP * seconds, busy)


def _attention(model: ModelConfig, lengths: LengthCounts, cost: np.ndarray) -> float:
    """Sum over documents of FLOPs(len) * cost[len], over the number of tokens."""
    squares = np.arange(lengths.longest + 1, dtype=np.float64) ** 2
    return model.flops_per_step(0, 1, 0) * float(lengths.counts @ (squares * cost)) / lengths.num_tokens
