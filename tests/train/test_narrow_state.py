"""Weights and moments of bf16: the loss of fp32's, bits that follow from the place in the model alone, checkpoints.

pytest tests/train/test_narrow_state.py
"""

import ochat_kernels
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ochat_kernels import reference_adamw
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from ochat.checkpoint import manifest
from ochat.config import OptimConfig, ParallelConfig, TrainConfig
from ochat.distributed import local_shards
from ochat.distributed.processes import Ranks
from ochat.errors import CheckpointError
from ochat.model.config import ModelConfig
from ochat.model.transformer import Transformer, pack_ids
from ochat.train import optim, sharding
from tests import tiny

BF16 = torch.bfloat16
REFERENCE = ochat_kernels.load("reference")
MODEL = ModelConfig("llama", 260, 32, 48, 2, 4, 2, 8, initializer_range=0.1)
NARROW = OptimConfig(master_dtype="bfloat16", moment_dtype="bfloat16")
GOOD = torch.tensor(1.0)
BOTH = ("--train.dtype=bfloat16", "--optim.master_dtype=bfloat16", "--optim.moment_dtype=bfloat16")


def small_model(dtype, seed=0):
    model = Transformer(MODEL, REFERENCE)
    model.initialize(seed)
    model.compute_dtype = BF16
    return model.to(dtype)


def build(model, config=NARROW, **more):
    return optim.build(model, config, REFERENCE.adamw, seed=3, **more)


def give_gradients(model, step):
    draw = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=draw).to(parameter.dtype)


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


def shard_of(rank, world):
    """A process group that exists in name only, of which this process is the given rank."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", (1, world), mesh_dim_names=("replicate", "shard"))
    return Ranks(rank, world, torch.device("cpu"), mesh)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_shard_is_rounded_as_within_the_whole(rank):
    """On any number of processes the same gradient makes the same weights, bit for bit."""
    whole, model = small_model(BF16), small_model(BF16)
    optimizer = build(whole)
    ranks = shard_of(rank, 3)
    try:
        sharding.wrap(model, ranks, TrainConfig(recompute="none"), ParallelConfig(), BF16)
        its_optimizer = build(model)
        for number in (1, 2):
            give_gradients(whole, number)
            for ours, theirs in zip(model.parameters(), whole.parameters(), strict=True):
                local = theirs.grad[slice(*local_shards.row_range(ours))].contiguous()
                ours.grad = DTensor.from_local(
                    local, ours.device_mesh, ours.placements, shape=ours.shape, stride=ours.stride()
                )
            for each in (optimizer, its_optimizer):
                optim.begin(each, lr=1e-3)
                each.step(GOOD)
        for ours, theirs in zip(model.parameters(), whole.parameters(), strict=True):
            rows = slice(*local_shards.row_range(ours))
            assert torch.equal(local_shards.local_shard(ours), theirs[rows])
            for moment in manifest.MOMENTS:
                assert torch.equal(
                    local_shards.local_shard(its_optimizer.state[ours][moment]), optimizer.state[theirs][moment][rows]
                )
    finally:
        dist.destroy_process_group()


def test_the_norm_of_bf16_gradients_is_not_rounded():
    model = small_model(BF16)
    optimizer = build(model)
    give_gradients(model, 1)
    exact = torch.cat([p.grad.flatten().double() for p in model.parameters()]).norm()
    norm = optim.update(optimizer, lr=1e-3, clip=1.0, loss=GOOD)
    torch.testing.assert_close(norm.double(), exact, rtol=1e-6, atol=0)


def test_gradients_of_several_micro_batches_are_added_up_in_fp32():
    model = small_model(BF16)
    build(model, micro_batches=2)
    weight = model.blocks[0].mlp.down.weight
    parts = [torch.randn(weight.shape, generator=torch.Generator().manual_seed(i)).to(BF16) for i in range(3)]
    for part in parts:
        (weight * part).sum().backward()
    assert weight.grad.dtype == torch.float32
    torch.testing.assert_close(weight.grad, sum(part.float() for part in parts), rtol=1e-6, atol=0)


@pytest.fixture(scope="module")
def narrow(world):
    """The lines of a run of bf16 with checkpoints after 3 and 6 steps."""
    folder = world.folder / "narrow"
    return folder, tiny.train(world, folder, "--data.max_steps=6", "--checkpoint.every=3", *BOTH)


def test_a_run_is_saved_in_its_dtypes_resumed_bitwise_and_exported(world, narrow, tmp_path):
    folder, lines = narrow
    saved = folder / "checkpoints" / "step_6"
    for kind in ("weights", "optimizer"):
        assert {t.dtype for t in load_file(saved / f"{kind}-00001-of-00001.safetensors").values()} == {BF16}
    resumed = ["--data.max_steps=6", "--checkpoint.every=3", f"--run.resume={folder / 'checkpoints' / 'step_3'}"]
    assert [line["loss"] for line in tiny.train(world, tmp_path / "run", *resumed, *BOTH)] == [
        line["loss"] for line in lines[3:]
    ]
    for kind in ("weights", "optimizer"):
        name = f"checkpoints/step_6/{kind}-00001-of-00001.safetensors"
        ours, theirs = load_file(tmp_path / "run" / name), load_file(folder / name)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    exported = load_file(folder / "export" / "model.safetensors")
    weights = load_file(saved / "weights-00001-of-00001.safetensors")
    assert torch.equal(exported["model.embed_tokens.weight"], weights["embed.weight"])


def test_moments_may_change_their_dtype_and_weights_may_not(world, narrow, tmp_path):
    folder, _ = narrow
    more = ["--data.max_steps=6", f"--run.resume={folder / 'checkpoints' / 'step_3'}", "--train.dtype=bfloat16"]
    assert len(tiny.train(world, tmp_path / "wide", *more, "--optim.master_dtype=bfloat16")) == 3
    with pytest.raises(CheckpointError, match="is bfloat16 .* there and float32 .* in this model.* optim.master_dtype"):
        tiny.train(world, tmp_path / "other", *more)
