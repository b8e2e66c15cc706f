"""Weights and moments of bf16: the loss of fp32's, bits that follow from the place in the model alone, checkpoints.
Updates inside backward: bit for bit the ordinary step without clipping, one gradient at a time.

pytest tests/train/test_fused_adamw.py
"""

from dataclasses import replace

import ochat_kernels
import pytest
import torch
import torch.nn.functional as F
from msgspec import structs
from ochat_kernels import reference_adamw
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from ochat.checkpoint import manifest
from ochat.config import OptimConfig, ParallelConfig, TrainConfig
from ochat.distributed import local_shards
from ochat.distributed.processes import Ranks
from ochat.errors import CheckpointError, ConfigError
from ochat.model.config import ModelConfig
from ochat.model.transformer import Transformer, pack_ids
from ochat.train import optim, sharding
from tests import pool, tiny
from tests.train.test_optim import GOOD, give_gradients

BF16 = torch.bfloat16
REFERENCE = ochat_kernels.load("reference")
MODEL = ModelConfig("llama", 260, 32, 48, 2, 4, 2, 8, initializer_range=0.1)
NARROW = OptimConfig(master_dtype="bfloat16", moment_dtype="bfloat16")
ONE_BIN = ("--optim.clip=0", "--data.bins_per_step=1", "--data.max_steps=6", "--checkpoint.every=3")
BOTH = ("--train.dtype=bfloat16", "--optim.master_dtype=bfloat16", "--optim.moment_dtype=bfloat16")


def small_model(dtype, seed=0, tied=False):
    model = Transformer(replace(MODEL, tie_embeddings=tied), REFERENCE)
    model.initialize(seed)
    model.compute_dtype = BF16
    return model.to(dtype)


def build(model, config=NARROW, **more):
    return optim.build(model, config, REFERENCE, seed=3, **more)


def everything(model, optimizer):
    states = [optimizer.state[p][moment] for p in model.parameters() for moment in manifest.MOMENTS]
    return [t.detach() for t in (*model.parameters(), *states)]


def final_loss(config, steps=50, lr=1e-4):
    """After overfitting one batch with updates smaller than half the distance between two bf16 numbers."""
    model = small_model(getattr(torch, config.master_dtype))
    optimizer = build(model, config)
    ids = torch.randint(260, (4, 24), generator=torch.Generator().manual_seed(1)).tolist()
    input_ids, position_ids, attend = pack_ids(model, ids)
    loss = GOOD
    for _ in range(steps):
        loss = F.cross_entropy(model(input_ids, position_ids, attend), input_ids.roll(-1))
        loss.backward()
        optim.update(optimizer, lr=lr, clip=1.0, loss=loss.detach())
    return float(loss.detach())


def test_bf16_learns_what_fp32_learns_and_only_with_stochastic_rounding(monkeypatch):
    start, exact = final_loss(OptimConfig(), steps=1), final_loss(OptimConfig())
    gained = start - exact
    assert gained > 0.5
    assert abs(final_loss(OptimConfig(moment_dtype="bfloat16")) - exact) < 0.02 * gained
    assert abs(final_loss(NARROW) - exact) < 0.02 * gained
    monkeypatch.setattr(reference_adamw, "stochastic_round", lambda x, bits: x.to(BF16))
    assert final_loss(NARROW) - exact > 0.5 * gained  # rounded to nearest, most updates are lost


def test_a_resumed_run_draws_the_same_bits_also_after_a_bad_step():
    def step(model, optimizer, number):
        give_gradients(model, number)
        optim.update(optimizer, lr=1e-3, clip=1.0, loss=GOOD if number != 2 else GOOD * torch.nan)

    whole = small_model(BF16)
    optimizer = build(whole)
    saved = []
    for number in range(1, 7):
        step(whole, optimizer, number)
        if number == 3:
            saved = [t.clone() for t in everything(whole, optimizer)]
    again = small_model(BF16, seed=1)
    its_optimizer = build(again)
    optim.start_state(its_optimizer, 3, skipped=1)
    for target, source in zip(everything(again, its_optimizer), saved, strict=True):
        target.copy_(source)
    for number in range(4, 7):
        step(again, its_optimizer, number)
    for ours, theirs in zip(everything(again, its_optimizer), everything(whole, optimizer), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_shard_is_rounded_as_within_the_whole(rank):
    """On any number of processes the same gradient makes the same weights, bit for bit."""
    whole, model = small_model(BF16), small_model(BF16)
    with pool.in_name_only(rank, 3) as ranks:
        sharding.wrap(model, ranks, TrainConfig(recompute="none"), ParallelConfig(), BF16)
        optimizer, its_optimizer = build(whole), build(model)
        for number in (1, 2):
            give_gradients(whole, number)
            for ours, theirs in zip(model.parameters(), whole.parameters(), strict=True):
                local, sizes = theirs.grad[held(ours)].contiguous(), {"shape": ours.shape, "stride": ours.stride()}
                ours.grad = DTensor.from_local(local, ours.device_mesh, ours.placements, **sizes)
            for each in (optimizer, its_optimizer):
                optim.begin(each, lr=1e-3)
                each.step(GOOD)
        for ours, theirs in zip(everything(model, its_optimizer), everything(whole, optimizer), strict=True):
            assert torch.equal(local_shards.local_shard(ours), theirs[held(ours)])


def held(tensor):
    """The rows of a sharded tensor that this process has."""
    return slice(*local_shards.row_range(tensor))


def test_the_norm_of_bf16_gradients_is_not_rounded():
    model = small_model(BF16)
    optimizer = build(model)
    give_gradients(model, 1)
    exact = torch.cat([p.grad.flatten().double() for p in model.parameters()]).norm()
    norm = optim.update(optimizer, lr=1e-3, clip=1.0, loss=GOOD)
    torch.testing.assert_close(norm.double(), exact, rtol=1e-6, atol=0)


def test_gradients_of_several_micro_batches_are_added_up_in_fp32():
    model = small_model(BF16)
    ranks = Ranks(0, 1, torch.device("cpu"), None)
    sharding.prepare_weights(model, ranks, TrainConfig(recompute="none"), ParallelConfig(), micro_batches=2)
    weight = model.blocks[0].mlp.down.weight
    parts = [torch.randn(weight.shape, generator=torch.Generator().manual_seed(i)).to(BF16) for i in range(3)]
    for part in parts:
        (weight * part).sum().backward()
    assert weight.grad.dtype == torch.float32
    torch.testing.assert_close(weight.grad, sum(part.float() for part in parts), rtol=1e-6, atol=0)


def test_a_run_is_saved_and_exported_in_its_dtypes_of_which_only_that_of_moments_may_change(world, tmp_path):
    folder, more = tmp_path / "narrow", ["--data.max_steps=6", "--train.dtype=bfloat16"]
    lines, saved = tiny.train(world, folder, *more, "--checkpoint.every=3", *BOTH), tiny.state(folder, 6)
    assert len(lines) == 6 and {tensor.dtype for tensor in saved.values()} == {BF16}
    exported = load_file(folder / "export" / "model.safetensors")
    assert torch.equal(exported["model.embed_tokens.weight"], saved["embed.weight"])
    more.append(f"--run.resume={folder / 'checkpoints' / 'step_3'}")
    assert len(tiny.train(world, tmp_path / "wide", *more, "--optim.master_dtype=bfloat16")) == 3
    with pytest.raises(CheckpointError, match="is bfloat16 .* there and float32 .* in this model.* optim.master_dtype"):
        tiny.train(world, tmp_path / "other", *more)


def learn(config, *, tied=False, recompute="none", host_moments=False):
    """Three steps; the weights and moments after them, the norms, and the most gradients that were there at once."""
    model = small_model(getattr(torch, config.master_dtype), tied=tied)
    model.recompute = recompute
    optimizer = build(model, config, host_moments=host_moments)
    there, norms = [], []
    for parameter in model.parameters():  # before it is added to .grad
        parameter.register_hook(lambda _: there.append(sum(p.grad is not None for p in model.parameters())))
    input_ids, position_ids, attend = pack_ids(model, [[1, 5, 9, 200, 3], [4, 4, 8]])
    for lr in (1e-3, 2e-3, 3e-3):
        optim.begin(optimizer, lr=lr)
        F.cross_entropy(model(input_ids, position_ids, attend), input_ids.roll(-1)).backward()
        norms.append(optim.update(optimizer, lr=lr, clip=0.0, loss=GOOD))
        assert all(p.grad is None for p in model.parameters())
    return everything(model, optimizer), torch.stack(norms), max(there)


@pytest.mark.parametrize(
    "more",
    [{}, {"tied": True}, {"recompute": "block"}, {"recompute": "elementwise"}, {"host_moments": True}],
    ids=str,
)
@pytest.mark.parametrize("config", [OptimConfig(), NARROW], ids=["fp32", "bf16"])
def test_in_backward_is_the_ordinary_step_bit_for_bit_with_one_gradient_at_a_time(config, more):
    plain, norms, most = learn(config, **more)
    ours, its_norms, its_most = learn(structs.replace(config, in_backward=True), **more)
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))
    torch.testing.assert_close(its_norms, norms, rtol=1e-6, atol=0)
    assert its_most == 0 and most > 10  # none is left when the next one comes


def test_in_backward_is_refused_on_several_processes():
    with pytest.raises(ConfigError, match="optim.in_backward = true needs one process, and these are 2"):
        optim.check(OptimConfig(in_backward=True), 2)


def test_a_run_in_backward_is_that_of_ordinary_updates_and_goes_on_after_a_stop(world, tmp_path):
    """In bf16; in fp32 the ordinary steps are those of torch's AdamW."""
    own, resume = "--optim.in_backward=true", f"--run.resume={tmp_path / 'ours' / 'checkpoints' / 'step_3'}"
    runs = {"plain": [], "ours": [own], "again": [own, resume]}
    lines = {name: tiny.train(world, tmp_path / name, *ONE_BIN, *BOTH, *more) for name, more in runs.items()}
    assert tiny.curve(lines["again"]) == tiny.curve(lines["ours"])[3:]
    ends = [tiny.state(tmp_path / name, 6) for name in runs]
    assert tiny.is_equal(ends[0], ends[1]) and tiny.is_equal(ends[2], ends[1])
    for ours, plain in zip(lines["ours"], lines["plain"], strict=True):
        assert ours["loss"] == plain["loss"] and ours["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-5)


def test_a_gradient_that_is_not_finite_updates_nothing_of_its_weight():
    layer = torch.nn.Linear(3, 3)
    optimizer = build(layer, OptimConfig(in_backward=True))
    before = [p.detach().clone() for p in layer.parameters()]
    optim.begin(optimizer, lr=0.1)
    (layer.weight.sum() * torch.nan + layer.bias.sum()).backward()
    assert torch.equal(layer.weight, before[0]) and not torch.equal(layer.bias, before[1])
    assert optim.update(optimizer, lr=0.1, clip=0.0, loss=GOOD).isnan()
