"""Linears of e4m3 rows: as near to the exact ones as the numbers allow, no row touching another, in every policy, with
adapters and shards; and what cannot have them is refused. pytest tests/model/test_fp8.py
"""

import dataclasses
from types import SimpleNamespace

import ochat_kernels
import pytest
import torch
from ochat_kernels import reference

from ochat import config as configuration
from ochat.config import LoraConfig
from ochat.errors import ConfigError
from ochat.model import fp8, linear, lora
from ochat.model.config import ModelConfig
from ochat.model.transformer import RECOMPUTE, Transformer, pack_ids
from ochat.train import resolve
from tests import tiny
from tests.numerics import relative_error

BF16, FP32 = torch.bfloat16, torch.float32
CONFIG = ModelConfig("qwen3", 67, 32, 48, 3, 4, 2, 16, qk_norm="head", qkv_bias=True, tie_embeddings=True)
KINDS = {
    "before": CONFIG,
    "after": dataclasses.replace(CONFIG, norm_placement="after", mlp_bias=True),
    "both": dataclasses.replace(CONFIG, norm_placement="both", norm_offset=1.0, activation="gelu_tanh"),
}
IDS = [[i % 67 for i in range(start, start + length)] for start, length in ((3, 9), (5, 1), (7, 30), (9, 9))]
FEWER_BITS = 2 * 16
ROWS = torch.tensor([1, 2, 11, 30, 48])


def build(config=CONFIG, kernels="reference", uses=True, dtype=FP32) -> Transformer:
    """A model whose weights are alike whatever else is asked, in fp32 or rounded."""
    model = Transformer(config, ochat_kernels.load(kernels))
    model.initialize(seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 if parameter.dim() == 1 else 5)  # logits of order 1
    model.compute_dtype = BF16
    if uses:
        model.use_fp8()
    return model.to(dtype)


def logits(model: Transformer, ids=IDS) -> torch.Tensor:
    """As training computes them."""
    return model(*pack_ids(model, ids)).detach()


def gradients(model: Transformer, rows=ROWS) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(*pack_ids(model, IDS), rows=rows).float().square().mean().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients_are_near_those_of_fp32(kind):
    """e4m3 has 4 bits fewer than bf16, so errors are 16 times those of bf16."""
    exact = build(KINDS[kind], uses=False)
    exact.compute_dtype = FP32
    ours, narrow = build(KINDS[kind]), build(KINDS[kind], uses=False)
    error, usual = (relative_error(logits(model), logits(exact)) for model in (ours, narrow))
    assert 4 * usual < error < FEWER_BITS * usual
    truth, got, plain = (gradients(model) for model in (exact, ours, narrow))
    assert got.keys() == truth.keys()
    for name, gradient in got.items():
        assert relative_error(gradient, truth[name]) < FEWER_BITS * relative_error(plain[name], truth[name]), name


def test_both_kernels_are_one_model(kernels=("triton", "reference")):
    """In the interpreter: e4m3 numbers have the same bits unless what they round differs in the last of bf16."""
    models = [build(kernels=name) for name in kernels]
    grads = [gradients(model) for model in models]
    assert relative_error(*map(logits, models)) < 0.03
    for name in grads[0]:
        assert relative_error(grads[0][name], grads[1][name]) < 0.1, name


def test_rows_are_quantised_by_themselves():
    """Packed logits are those of each sequence alone."""
    model = build()
    for packed, ids in zip(logits(model).split([len(ids) for ids in IDS]), IDS, strict=True):
        torch.testing.assert_close(packed, logits(model, [ids]), rtol=0, atol=2e-2)


def test_an_evaluation_is_that_of_the_exported_model():
    ours, plain = build(), build(uses=False)
    assert all(map(torch.equal, ours.logits(IDS), plain.logits(IDS)))
    assert not torch.equal(logits(ours), logits(plain))


def test_what_feeds_a_linear_quantises(monkeypatch):
    """Forward quantises a block's four weights and attention's output by themselves, backward four gradients."""
    seen = []
    counting = SimpleNamespace(**vars(reference))

    def quantize_rows(x, factors=None):
        seen.append((tuple(x.shape), factors is not None))
        return reference.quantize_rows(x, factors)

    counting.quantize_rows = quantize_rows
    model = Transformer(CONFIG, counting)  # type: ignore[arg-type]
    model.initialize(seed=1)
    model.compute_dtype = BF16
    model.use_fp8()
    loss = model(*pack_ids(model, IDS)).float().square().mean()
    T, weights = sum(map(len, IDS)), [(128, 32), (32, 64), (96, 32), (32, 48)]
    forward = [((128, 32), False), ((T, 64), False), *((shape, False) for shape in weights[1:])]
    assert seen == forward * CONFIG.num_layers
    seen.clear()
    loss.backward()
    assert seen == [((T, size), True) for size in (32, 96, 32, 128)] * CONFIG.num_layers


@pytest.mark.parametrize("kernels", ["reference", "triton"])
def test_gradients_are_bitwise_the_same_in_every_recompute_policy(kernels):
    model, found = build(kernels=kernels), {}
    for model.recompute in RECOMPUTE:
        found[model.recompute] = gradients(model)
    for policy in RECOMPUTE[1:]:
        assert all(torch.equal(found[policy][name], found["none"][name]) for name in found["none"]), policy


@pytest.mark.parametrize("master", [FP32, BF16])
def test_a_linear_adds_up_what_it_should(master):
    """dW is the bf16 product of the inputs themselves, added up in fp32; dx is that of the quantised weight."""
    weight = torch.nn.Parameter(torch.randn(48, 32, generator=torch.Generator().manual_seed(0)).to(master))
    bias = torch.nn.Parameter(torch.linspace(-1, 1, 48).to(master))
    weight.grad_dtype = bias.grad_dtype = FP32
    truth = torch.zeros(48, 32, dtype=torch.float64)
    for count in (7, 0, 20):
        generator = torch.Generator().manual_seed(count)
        x, dy = (torch.randn(count, n, generator=generator).to(BF16) for n in (32, 48))
        y = fp8.linear(x.requires_grad_(), weight, bias, reference)
        y.backward(dy)
        truth += dy.double().T @ x.detach().double()
        w8, scale = reference.quantize_rows(weight.detach())
        if count:
            assert relative_error(x.grad, dy.double() @ (w8.double() * scale.double())) < 0.04
            assert relative_error(y, torch.nn.functional.linear(x.double(), weight.double(), bias.double())) < 0.05
    assert weight.grad.dtype == FP32 and relative_error(weight.grad, truth) < 3e-3


def test_adapters_over_frozen_weights():
    model = build(uses=False, dtype=BF16)
    lora.attach(model, LoraConfig(rank=4), ())
    for name, parameter in model.named_parameters():
        if ".lora." in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    truth = gradients(model)
    model.use_fp8()
    got = gradients(model)
    assert got.keys() == truth.keys() and all(".lora." in name for name in got)
    for name, gradient in got.items():
        assert 0 < relative_error(gradient, truth[name]) < 0.4, name


FP8 = ["--train.linear=fp8", "--train.dtype=bfloat16", "--data.max_steps=3"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return tiny.make(tmp_path_factory.mktemp("fp8"))


def test_a_run_on_two_processes_is_the_run_on_one(world, tmp_path):
    one = tiny.train(world, tmp_path / "one", *FP8)
    tiny.train_on_ranks(world, tmp_path / "two", 2, *FP8, "--parallel.reshard=block")
    plain = tiny.train(world, tmp_path / "plain", *FP8[1:])
    for line, other, exact in zip(one, tiny.metrics(tmp_path / "two"), plain, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=5e-3)
        assert line["loss"] == pytest.approx(exact["loss"], rel=3e-2)
        assert line["loss"] != exact["loss"]


@pytest.mark.parametrize(
    "options", [["--optim.in_backward=true", "--optim.clip=0", "--data.bins_per_step=1"], ["--lora.rank=4"]]
)
def test_runs_of_other_kinds(world, tmp_path, options):
    lines = tiny.train(world, tmp_path / "run", *FP8, *options)
    assert len(lines) == 3 and all(0 < line["loss"] < 10 for line in lines)
    if "--lora.rank=4" not in options:
        assert lines[-1]["loss"] < lines[0]["loss"]


def test_no_copies_of_what_is_quantised(world, tmp_path):
    """A quantised weight is read from its masters: a bf16 copy would take memory and never be read."""

    def look(trainer):
        copied = {name for name, p in trainer.model.named_parameters() if linear.copy_of(p) is not None}
        assert copied and not any(part in name for name in copied for part in ("qkv", "out", "gate_up", "down"))

    from ochat.train.trainer import train

    file, *overrides = tiny.options(world, tmp_path / "run", *FP8)
    train(configuration.load(file, overrides), look)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--train.dtype=float32"], "train.dtype = .*float32.*expected .*bfloat16.* with train.linear = "),
        (["--train.dtype=bfloat16", "--train.compile=true"], "train.compile = True: expected false with train.linear"),
    ],
)
def test_options_that_exclude_it_are_refused(world, tmp_path, options, message):
    file, *overrides = tiny.options(world, tmp_path, "--train.linear=fp8", *options)
    with pytest.raises(ConfigError, match=message):
        configuration.load(file, overrides)


def test_a_model_or_card_without_such_products_is_refused(monkeypatch):
    cpu = torch.device("cpu")
    resolve.linear("fp8", cpu, CONFIG)
    odd = dataclasses.replace(CONFIG, intermediate_size=40)
    resolve.linear("bf16", cpu, odd)
    with pytest.raises(ConfigError, match="mlp.down of a block has 40 inputs and 32 outputs.* of 16: use 'bf16'"):
        resolve.linear("fp8", cpu, odd)
    with pytest.raises(ConfigError, match="attn.qkv of a block has 32 inputs and 104 outputs"):
        resolve.linear("fp8", cpu, dataclasses.replace(CONFIG, head_dim=13))
    capability = {"cuda": (9, 0)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability["cuda"])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    resolve.linear("fp8", torch.device("cuda"), CONFIG)
    capability["cuda"] = (8, 9)
    with pytest.raises(ConfigError, match="needs a Hopper GPU .* this is a NVIDIA A100.*use 'bf16'"):
        resolve.linear("fp8", torch.device("cuda"), CONFIG)
