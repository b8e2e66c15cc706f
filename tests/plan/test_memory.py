"""The memory that a plan predicts is what the model's own code keeps: pytest tests/plan/test_memory.py"""

import dataclasses
import importlib.util
import weakref
from types import SimpleNamespace
from typing import Any
from unittest import mock

import ochat_kernels
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp import FSDPModule
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ochat.checkpoint import manifest
from ochat.config import LoraConfig, OptimConfig, ParallelConfig, TrainConfig
from ochat.distributed import local_shards
from ochat.distributed.processes import Ranks
from ochat.model import linear, lora, nf4
from ochat.model.attention.packed import PackedAttention
from ochat.model.config import ModelConfig
from ochat.model.rope import RopeConfig
from ochat.model.transformer import RECOMPUTE, Transformer
from ochat.plan import memory
from ochat.plan.memory import Layout
from ochat.train import optim, sharding
from ochat.train.loss import head_loss
from tests import pool

# Real widths, few blocks.
LLAMA_8B = ModelConfig("llama", 128256, 4096, 14336, 6, 32, 8, 128)
LLAMA_1B = ModelConfig("llama", 128256, 2048, 8192, 5, 32, 8, 64, tie_embeddings=True)
QWEN3 = ModelConfig("qwen3", 151936, 1024, 3072, 6, 16, 8, 128, tie_embeddings=True, qk_norm="head")
SMALL_VOCABULARY = ModelConfig("qwen2", 1000, 1024, 3072, 4, 16, 8, 64, qkv_bias=True)
GEMMA3 = ModelConfig(  # Gemma 2's blocks but for its capped attention, which torch's varlen attention does not have
    "gemma3_text", 262144, 2560, 10240, 6, 8, 4, 256, tie_embeddings=True, activation="gelu_tanh", norm_offset=1.0,
    norm_placement="both", qk_norm="head", windows=(1024,) * 5 + (None,), rope=RopeConfig(1e6), local_rope=RopeConfig(),
    embedding_scale=2560**0.5, attention_scale=1 / 16,
)  # fmt: skip
OLMO2 = ModelConfig("olmo2", 100352, 4096, 11008, 5, 32, 8, 128, norm_placement="after", qk_norm="full")
SMOLLM3 = ModelConfig(
    "smollm3", 128256, 2048, 11008, 6, 16, 4, 128, tie_embeddings=True,
    rope_layers=(True, True, True, False, True, False),
)  # fmt: skip
GRANITE = ModelConfig(
    "granite", 49155, 4096, 12800, 5, 32, 8, 128, tie_embeddings=True, embedding_scale=12.0, residual_scale=0.22,
    logits_scale=1 / 16, attention_scale=1 / 128,
)  # fmt: skip
PHI4 = ModelConfig(
    "phi3", 200064, 3072, 8192, 5, 24, 8, 128, tie_embeddings=True, fused_files=True,
    rope=RopeConfig(partial_rotary_factor=0.75),
)  # fmt: skip
MODELS = {
    "8B": LLAMA_8B, "1B": LLAMA_1B, "qwen3": QWEN3, "small vocabulary": SMALL_VOCABULARY, "gemma3": GEMMA3,
    "olmo2": OLMO2, "smollm3": SMOLLM3, "granite": GRANITE, "phi4": PHI4,
}  # fmt: skip
CU_SEQLENS = 4 * 3  # the batch's own
UNTIED = ModelConfig("llama", 512, 64, 96, 2, 4, 2, 16)
REFERENCE = ochat_kernels.load("reference")
LLAMA_8B_WHOLE = dataclasses.replace(LLAMA_8B, num_layers=32)
ADAPTERS = [LoraConfig(rank=16), LoraConfig(rank=64, targets=("q_proj", "k_proj", "v_proj"))]
WITH_ADAPTERS = ("8B", "gemma3", "olmo2")
ADAPTERS_TOLERANCE = 0.01  # the first block, and what few tokens' rows take, are followed roughly
GRADIENT_TOLERANCE = 0.02  # of the peak: the order in which backward frees a block's tensors is followed roughly


class Living(TorchDispatchMode):
    """Bytes of all storages that were made under it and are still held; the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self.known = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor.untyped_storage())
        self.peak = max(self.peak, self.bytes)
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        if storage in self.known:
            return
        self.known.add(storage)
        self.bytes += storage.nbytes()
        weakref.finalize(storage, self._gone, storage.nbytes())

    def _gone(self, size: int) -> None:
        self.bytes -= size


class FakeStep:
    """Forward and backward of one process over micro-batches of two documents each, laid out as a plan's Layout,
    without a card and without its memory: fake tensors that have shapes and nothing else. The real model, the Triton
    operators (their fake kernels) and torch's varlen attention run; every storage is counted."""

    def __init__(self, config: ModelConfig, at: Layout) -> None:
        self.at, self.mode, self.living = at, FakeTensorMode(), Living()
        self.ops = ochat_kernels.load("triton")
        with self.mode, self.living:
            torch.set_default_dtype(torch.bfloat16 if at.lora.rank or at.master_itemsize == 2 else torch.float32)
            try:
                self.model = Transformer(config, self.ops)
            finally:
                torch.set_default_dtype(torch.float32)
            if at.lora.rank:
                lora.attach(self.model, at.lora, (5,))
            if at.is_nf4:
                lora.quantize(self.model)
                self.living.peak = self.living.bytes  # a run builds it on the meta device
        self.model.compute_dtype, self.model.recompute = torch.bfloat16, at.recompute
        ranks, train = Ranks(0, 1, torch.device("cpu"), None), TrainConfig()
        with self.mode, self.living:
            if at.is_fp8:
                self.model.use_fp8()
            sharding.prepare_weights(self.model, ranks, train, ParallelConfig(), micro_batches=at.micro_batches)

    def forward(self) -> torch.Tensor:
        """The loss of one micro-batch."""
        tokens, cu_seqlens = self.at.token_budget, torch.zeros(3, dtype=torch.int32)
        ids = torch.zeros(tokens, dtype=torch.int64)
        rows = ids[: self.at.supervised]  # a view: nothing to count
        batch: Any = SimpleNamespace(supervised_labels=ids[rows], supervised_weights=torch.zeros(tokens)[rows])
        head = head_loss(self.ops, self.model, batch, step_weight=torch.ones(()))
        attend = PackedAttention(cu_seqlens, tokens // 2, "varlen", [tokens // 2] * 2)
        return self.model(ids, ids, attend, head=head, rows=rows).loss_sum

    def saved_bytes(self) -> int:
        """Storages that are there after forward and were not before, the loss apart."""
        with self.mode, self.living:
            before = self.living.bytes
            loss = self.forward()
            assert loss.requires_grad
            return self.living.bytes - before - loss.nbytes

    def peak_bytes(self) -> int:
        """The most that was held at any moment of all micro-batches, moments of AdamW apart; with updates in backward,
        where each gradient goes as soon as it is there."""
        for parameter in self.model.parameters():
            if self.at.in_backward:
                parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        # on a card one product, without a tensor of its own
        in_place = mock.patch.object(linear, "add_product", lambda total, *_, **__: total)
        levels = mock.patch.object(nf4, "_dequantize_levels", lambda *_: None)
        with in_place, levels, self.mode, self.living:
            for _ in range(self.at.micro_batches):
                self.forward().backward()
        return self.living.peak


@pytest.fixture
def derived_only(monkeypatch):
    """Without the allowance, and without logits: fake operators make none."""
    for name in ("CONTEXT_BYTES", "NCCL_BYTES", "FRAGMENTATION"):
        monkeypatch.setattr(memory, name, 0.0)
    monkeypatch.setattr(memory, "chunk_bytes", lambda *_: 0)


def assert_peak_is_predicted(model: ModelConfig, at: Layout, tolerance: float = GRADIENT_TOLERANCE) -> None:
    use = memory.predict(model, at)
    assert use.total - use.moments == pytest.approx(FakeStep(model, at).peak_bytes(), rel=tolerance)


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("name", MODELS)
def test_what_backward_keeps_is_known_to_the_byte(name, recompute):
    for tokens, rows in ((1024, 1024), (8192, 8192), (8192, 2458)):
        at = Layout(tokens, supervised=rows, recompute=recompute)
        assert FakeStep(MODELS[name], at).saved_bytes() == memory.saved_bytes(MODELS[name], at) + CU_SEQLENS


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("name", MODELS)
def test_the_peak_of_a_step_is_the_one_predicted(name, recompute, derived_only):
    for tokens, micro_batches, rows in ((1024, 1, 1024), (32768, 1, 32768), (32768, 2, 32768), (32768, 2, 9830)):
        assert_peak_is_predicted(MODELS[name], Layout(tokens, micro_batches, recompute, supervised=rows))


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("name", ["8B", "1B", "gemma3", "olmo2"])
def test_fp8_keeps_scales_and_no_copies_of_what_it_quantises(name, recompute, derived_only):
    model, at = MODELS[name], Layout(8192, supervised=2458, recompute=recompute, linear="fp8")
    assert FakeStep(model, at).saved_bytes() == memory.saved_bytes(model, at) + CU_SEQLENS
    for tokens, micro_batches, rows in ((1024, 1, 1024), (32768, 1, 32768), (32768, 2, 9830)):
        for masters in (2, 4):
            layout = Layout(tokens, micro_batches, recompute, supervised=rows, master_itemsize=masters, linear="fp8")
            assert_peak_is_predicted(model, layout)


@pytest.mark.parametrize("name", ["8B", "1B"])
def test_bf16_masters_have_no_casts_and_updates_in_backward_hold_no_gradients(name, derived_only):
    narrow = {"recompute": "block", "master_itemsize": 2, "state_itemsize": 2}
    for tokens, micro_batches, in_backward in ((1024, 1, False), (1024, 2, False), (1024, 1, True), (16384, 1, True)):
        layout = Layout(tokens, micro_batches, supervised=tokens, in_backward=in_backward, **narrow)
        assert_peak_is_predicted(MODELS[name], layout)
        assert memory.predict(MODELS[name], layout).moments == 4 * MODELS[name].num_parameters()
    assert_peak_is_predicted(MODELS[name], dataclasses.replace(layout, master_itemsize=4))


@pytest.mark.parametrize("tied", [False, True])
def test_masters_gradients_and_moments_are_those_of_a_built_trainer(tied, derived_only):
    config = dataclasses.replace(UNTIED, tie_embeddings=tied)
    model = Transformer(config, REFERENCE)
    optimizer = optim.build(model, OptimConfig())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    optimizer.step()
    use = memory.predict(config, Layout(64, 2, supervised=64))
    assert use.masters == sum(p.nbytes for p in model.parameters())
    assert use.gradients == gradients
    assert use.moments == sum(state[moment].nbytes for state in optimizer.state.values() for moment in manifest.MOMENTS)


@pytest.fixture
def shard_of_four():
    """This process as the first of four that exist in name only."""
    with pool.in_name_only(0, 4) as ranks:
        yield ranks


@pytest.mark.parametrize("reduce", ["step", "micro_batch"])
@pytest.mark.parametrize("reshard", ["block", "step"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_rank_holds_what_its_configuration_says(shard_of_four, derived_only, reduce, reshard, tied):
    """Shares of the masters always; gradients whole until they are reduced; weights gathered for as long as asked."""
    config = dataclasses.replace(UNTIED, tie_embeddings=tied)
    model, choice = Transformer(config, REFERENCE), ParallelConfig(reduce=reduce, reshard=reshard)
    model.initialize(0)
    model.compute_dtype = torch.bfloat16
    train = TrainConfig(recompute="none")
    sharding.wrap(model, shard_of_four, train, choice, torch.bfloat16)
    sharding.prepare_weights(model, shard_of_four, train, choice, micro_batches=2)
    layout = Layout(8, 8, supervised=8, ranks=4, shard=4, reduce=reduce, reshard=reshard)
    use = memory.predict(config, layout)
    assert sum(local_shards.local_shard(p).nbytes for p in model.parameters()) == use.masters
    ids = torch.arange(8)
    attend = PackedAttention(torch.tensor([0, 8], dtype=torch.int32), 8)
    shares = 4 * config.num_parameters() / 4
    for is_last, whole in ((False, use.gradients - shares), (True, 0)):
        sharding.begin_micro_batch(model, shard_of_four, choice, is_last=is_last)
        model(ids, ids, attend).sum().backward()
        norm = 2 * config.hidden_size  # the last one, in the root's group
        kept = 0 if is_last else memory.gathered_bytes(config, layout) + norm * (reshard == "block")
        assert held_by_fsdp(model) == (whole, kept)
    assert sum(local_shards.local_shard(p.grad).nbytes for p in model.parameters() if p.grad is not None) == shares


def held_by_fsdp(model: Transformer) -> tuple[int, int]:
    """Bytes of whole gradients that this rank adds up, and of gathered weights; there is no public way to ask."""
    states = [module._get_fsdp_state() for module in model.modules() if isinstance(module, FSDPModule)]
    groups = [state._fsdp_param_group for state in states if state._fsdp_param_group is not None]
    sums = [parameter._unsharded_param.grad for group in groups for parameter in group.fsdp_params]
    gathered = [p.unsharded_param.nbytes for group in groups if group.is_unsharded for p in group.fsdp_params]
    return sum(total.nbytes for total in sums if total is not None), sum(gathered)


def test_what_waits_on_the_host_or_with_another_rank_is_not_on_the_card(derived_only):
    def use(**changes):
        layout = Layout(4096, 8, "block", supervised=4096, ranks=4, shard=4)
        return memory.predict(LLAMA_8B, dataclasses.replace(layout, **changes))

    P, plain = LLAMA_8B.num_parameters(), use()
    assert (plain.masters, plain.moments, plain.gradients) == (P, 2 * P, 4 * P + P)  # whole, and shards
    assert dataclasses.replace(use(offload="optimizer"), moments=2 * P) == plain
    assert use(offload="all").masters == use(offload="all").moments == 0
    assert dataclasses.replace(use(ema=True), average=0.0) == plain and use(ema=True).average == P
    assert use(ema=True, offload="all").average == 0
    assert use(reduce="micro_batch").gradients == P and use(reduce="micro_batch", offload="all").gradients == 0
    assert use(reshard="step").weights == 2 * P
    inputs = 2 * 2 * 4096 * LLAMA_8B.hidden_size  # of a block, in bf16
    block = Layout(4096, recompute="block", supervised=4096)
    offloaded = dataclasses.replace(block, offload_activations=True)
    head, without = (memory.head_moment(LLAMA_8B, each) for each in (block, offloaded))
    assert head.activations - without.activations == inputs * LLAMA_8B.num_layers
    last = LLAMA_8B.num_layers - 1
    blocks = [memory.block_moment(LLAMA_8B, each, last, "activation") for each in (block, offloaded)]
    assert blocks[0].activations - blocks[1].activations == inputs * (last - 1)  # the next one is there


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("adapters", ADAPTERS)
@pytest.mark.parametrize("name", WITH_ADAPTERS)
def test_what_backward_keeps_of_adapters_is_what_the_model_keeps(name, adapters, recompute):
    at = Layout(4096, supervised=1024, recompute=recompute, lora=adapters)
    counted = FakeStep(MODELS[name], at).saved_bytes()
    assert memory.saved_bytes(MODELS[name], at) == pytest.approx(counted, rel=ADAPTERS_TOLERANCE)


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("adapters", ADAPTERS)
@pytest.mark.parametrize("name", WITH_ADAPTERS)
def test_the_peak_of_a_step_of_adapters_is_the_one_predicted(name, adapters, recompute, derived_only):
    at = Layout(16384, 2, recompute, supervised=8192, lora=adapters)
    assert_peak_is_predicted(MODELS[name], at, ADAPTERS_TOLERANCE)


@pytest.fixture
def nf4_library(monkeypatch):
    if importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("needs bitsandbytes")
    nf4.library()
    monkeypatch.setattr(nf4, "_code_of_scales", lambda device: torch.zeros(256))  # fake, so not to be kept


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize(("name", "adapters"), [("8B", ADAPTERS[0]), ("olmo2", ADAPTERS[1])])
def test_a_base_in_nf4_is_what_is_stored_and_the_weight_of_one_product(
    name, adapters, recompute, derived_only, nf4_library
):
    """At few tokens the weight is the larger part of what is in flight, at many a small one."""
    for tokens in (512, 4096):
        layout = Layout(tokens, 2, recompute, supervised=tokens // 2, lora=adapters, quantize="nf4")
        assert_peak_is_predicted(MODELS[name], layout)


def test_adapters_of_8b_train_on_a_gpu_of_24_gb():
    """With room for a micro-batch of 4096 tokens, all of them supervised; 23.6 GiB are what a process sees."""
    use = memory.predict(LLAMA_8B_WHOLE, Layout(4096, 8, "block", supervised=4096, lora=LoraConfig(rank=16)))
    assert 2 * LLAMA_8B_WHOLE.num_parameters() / memory.GIB < use.total / memory.GIB < 23.6
