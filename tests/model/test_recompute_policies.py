"""Every recompute policy computes the same, and elementwise repeats no matrix product; the last block does no more than
needed for rows that are not supervised: pytest tests/model/test_recompute_policies.py

What each policy keeps is known to the byte in tests/plan/test_memory.py. Supervised rows alone are held against the
plain path, in which every row goes through the whole block and the head leaves out what it does not want.
"""

import dataclasses
from collections import Counter
from functools import partial
from itertools import product
from types import SimpleNamespace

import ochat_kernels
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ochat.config import LoraConfig, ParallelConfig, TrainConfig
from ochat.data.batch import Example, pack
from ochat.distributed.processes import Ranks
from ochat.model import lora
from ochat.model.attention.packed import PackedAttention
from ochat.model.config import ModelConfig
from ochat.model.transformer import RECOMPUTE, Transformer, pack_ids
from ochat.train import sharding
from ochat.train.loss import head_loss

CONFIG = ModelConfig("qwen3", 67, 24, 40, 3, 4, 2, 8, qk_norm="head", windows=(None, 6, 6), tie_embeddings=True)
PLAIN = dataclasses.replace(CONFIG, model_type="llama", qk_norm="", qkv_bias=True, mlp_bias=True, windows=())
IDS = [[i % 67 for i in range(start, start + length)] for start, length in ((3, 9), (5, 1), (7, 30), (9, 9))]
ROWS = torch.tensor([1, 2, 11, 30, 48])


def build(config=CONFIG, kernels="reference", dtype=torch.float32, adapters=False) -> Transformer:
    model = Transformer(config, ochat_kernels.load(kernels))
    model.initialize(seed=1)
    if adapters:
        lora.attach(model, LoraConfig(rank=4, targets=("q_proj", "o_proj", "down_proj")), ())
        for name, parameter in model.named_parameters():
            if ".lora." in name:
                torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    model.compute_dtype = dtype
    return model


def gradients(model: Transformer) -> list[torch.Tensor]:
    model.zero_grad()
    model(*pack_ids(model, IDS), rows=ROWS).float().square().mean().backward()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


INTERPRETED = [("triton", CONFIG, torch.bfloat16, False), ("triton", PLAIN, torch.float32, True)]  # seconds each
PLAINLY = product(["reference"], [CONFIG, PLAIN], [torch.float32, torch.bfloat16], [False, True])


@pytest.mark.parametrize(("kernels", "config", "dtype", "adapters"), [*PLAINLY, *INTERPRETED])
def test_gradients_are_bitwise_those_of_keeping_everything(kernels, config, dtype, adapters):
    model, found = build(config, kernels, dtype, adapters), {}
    for model.recompute in RECOMPUTE:
        found[model.recompute] = gradients(model)
    assert len(found["none"]) == sum(parameter.requires_grad for parameter in model.parameters())
    for policy in RECOMPUTE[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[policy], found["none"], strict=True)), policy


def test_a_graph_that_is_kept_can_be_used_again():
    model, found = build(), []
    model.recompute = "elementwise"
    loss = model(*pack_ids(model, IDS)).square().mean()
    for keeps in (True, False):
        model.zero_grad()
        loss.backward(retain_graph=keeps)
        found.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_elementwise_repeats_no_product_and_block_repeats_those_of_forward():
    model, flops = build(), {}
    for model.recompute in RECOMPUTE:
        with FlopCounterMode(display=False) as counter:
            gradients(model)
        flops[model.recompute] = counter.get_total_flops()
    assert flops["elementwise"] == flops["none"]
    assert 1.15 * flops["none"] < flops["block"] < 4 / 3 * flops["none"]


@pytest.mark.parametrize("config", [PLAIN, CONFIG], ids=["plain", "norms of heads"])
@pytest.mark.parametrize(("policy", "times"), [("none", 1), ("elementwise", 2), ("block", 2)])
def test_an_operator_runs_once_more_however_many_documents_ask_for_its_result(policy, times, config, monkeypatch):
    """But for RoPE without norms, whose results elementwise recompute keeps in place of the product."""
    model, calls = build(config), Counter()

    def counting(name, *arguments):
        calls[name] += 1
        return getattr(ochat_kernels.load("reference"), name)(*arguments)

    names = ("rms_norm", "add_rms_norm", "qkv_rope", "qkv_norm_rope", "swiglu")
    monkeypatch.setattr(model.ops, "ops", SimpleNamespace(**{name: partial(counting, name) for name in names}))
    model.recompute = policy
    gradients(model)
    blocks = config.num_layers
    assert calls["swiglu"] == times * blocks
    assert calls["qkv_norm_rope"] == times * blocks * (config is CONFIG)
    assert calls["qkv_rope"] == (1 if policy == "elementwise" else times) * blocks * (config is PLAIN)
    assert calls["rms_norm"] + calls["add_rms_norm"] == times * 2 * blocks + 1  # and the model's last


def make_batch(share: float):
    """Documents of which about this share of the tokens is supervised."""
    draw, examples, lengths = torch.Generator().manual_seed(0), [], (9, 1, 30, 4)
    for length in lengths:
        ids = torch.randint(0, 67, (length,), generator=draw)
        weights = torch.randn(length, generator=draw) * (torch.rand(length, generator=draw) < share)
        examples.append(Example(ids.numpy(), weights.numpy(), ""))
    return pack(examples, range(len(lengths)), [0] * len(lengths), pad_to=50)


def loss_and_gradients(model: Transformer, batch, *, picks: bool):
    attend = PackedAttention(batch.cu_seqlens, batch.max_seqlen, "sdpa", batch.lengths)
    head = head_loss(ochat_kernels.load("reference"), model, batch)
    picked = slice(None) if picks else batch.supervised_rows
    out = model(
        batch.input_ids, batch.position_ids, attend, rows=batch.supervised_rows if picks else None,
        head=lambda hidden, weight: head(hidden[picked], weight),
    )  # fmt: skip
    model.zero_grad()
    out.loss_sum.backward()
    return out, {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("tied", [False, True])
def test_supervised_rows_alone_give_loss_and_gradients_of_the_plain_path(tied, recompute):
    model, batch = build(dataclasses.replace(CONFIG, tie_embeddings=tied), dtype=None).double(), make_batch(0.4)
    model.recompute = recompute
    assert 0 < batch.num_supervised < 0.5 * batch.num_tokens
    (ours, found), (plain, wanted) = (loss_and_gradients(model, batch, picks=picks) for picks in (True, False))
    torch.testing.assert_close(ours.loss_sum, plain.loss_sum, rtol=1e-12, atol=0)
    assert torch.equal(ours.correct, plain.correct)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-10, atol=1e-14, msg=name)


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_without_a_supervised_row_every_parameter_has_a_gradient_and_it_is_zero(recompute):
    """Other processes wait for it."""
    model = build()
    model.recompute = recompute
    out, gradients = loss_and_gradients(model, make_batch(0.0), picks=True)
    assert out.loss_sum == 0 and out.nll.shape == (0,)
    for name, gradient in gradients.items():
        assert gradient is not None and not gradient.any(), name


def test_other_rows_are_spared_the_products_after_the_last_blocks_attention():
    batch, spared = make_batch(0.4), []
    for picks in (True, False):
        with FlopCounterMode(display=False) as counter:
            loss_and_gradients(build(), batch, picks=picks)
        spared.append(counter.get_total_flops())
    rows = batch.input_ids.shape[0] - batch.num_supervised
    weights = CONFIG.hidden_size * (CONFIG.num_heads * CONFIG.head_dim + 3 * CONFIG.intermediate_size)
    assert spared[1] - spared[0] == 6 * weights * rows


@pytest.fixture
def compiled():
    """compiled(policy): the model as a run wraps it."""

    def wrap(policy) -> Transformer:
        torch._dynamo.reset()
        model = build(PLAIN)
        train = TrainConfig(recompute=policy, compile=True)
        sharding.wrap(model, Ranks(0, 1, torch.device("cpu"), None), train, ParallelConfig(), torch.float32)
        return model

    yield wrap
    wrap("none")  # the compiler's setting is the process's


@pytest.mark.slow
def test_compiled_blocks_compute_the_same_under_every_policy_and_keep_less(compiled):
    wanted, kept = gradients(build(PLAIN)), {}
    for policy in RECOMPUTE:
        model, held = compiled(policy), {}

        def pack(tensor, held=held):
            held[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(*pack_ids(model, IDS), rows=ROWS).float().square().mean()
        loss.backward()
        own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        kept[policy] = sum(storage.nbytes() for key, storage in held.items() if key not in own)
        for parameter, gradient in zip(model.parameters(), wanted, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-7)
    assert kept["block"] < kept["elementwise"] < 0.85 * kept["none"], kept
