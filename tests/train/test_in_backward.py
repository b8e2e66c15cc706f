"""Updates inside backward: bit for bit the ordinary step without clipping, one gradient at a time; what they refuse.

pytest tests/train/test_in_backward.py
"""

import ochat_kernels
import pytest
import torch
import torch.nn.functional as F
from msgspec import structs
from safetensors.torch import load_file

from ochat.checkpoint import load as checkpoint
from ochat.checkpoint import manifest
from ochat.config import OptimConfig
from ochat.errors import ConfigError, NonFiniteError
from ochat.model.config import ModelConfig
from ochat.model.transformer import Transformer, pack_ids
from ochat.run import layout
from ochat.train import optim
from tests import tiny

REFERENCE = ochat_kernels.load("reference")
GOOD = torch.tensor(1.0)
ONE_BIN = ("--optim.clip=0", "--data.bins_per_step=1", "--data.max_steps=6", "--checkpoint.every=3")
IN_BACKWARD = (*ONE_BIN, "--optim.in_backward=true")
KINDS = {
    "fp32": OptimConfig(clip=0.0),
    "bf16": OptimConfig(clip=0.0, master_dtype="bfloat16", moment_dtype="bfloat16"),
}


def learn(config, *, tied=False, recompute="none", host_moments=False, kernels="reference"):
    """Three steps; the weights and moments after them, the norms, and the most gradients that were there at once."""
    model = Transformer(ModelConfig("llama", 260, 32, 48, 2, 4, 2, 8, tie_embeddings=tied), REFERENCE)
    model.initialize(0)
    model.to(getattr(torch, config.master_dtype))
    model.compute_dtype, model.recompute = torch.bfloat16, recompute
    adamw = ochat_kernels.load(kernels).adamw
    optimizer = optim.build(model, config, adamw, host_moments=host_moments, seed=5)
    most, norms = 0, []

    def count(_):
        nonlocal most
        most = max(most, sum(p.grad is not None for p in model.parameters()))

    for parameter in model.parameters():
        parameter.register_hook(count)  # before it is added to .grad
    input_ids, position_ids, attend = pack_ids(model, [[1, 5, 9, 200, 3], [4, 4, 8]])
    for lr in (1e-3, 2e-3, 3e-3):
        optim.begin(optimizer, lr=lr)
        F.cross_entropy(model(input_ids, position_ids, attend), input_ids.roll(-1)).backward()
        norms.append(optim.update(optimizer, lr=lr, clip=0.0, loss=GOOD))
        assert all(p.grad is None for p in model.parameters())
    states = [optimizer.state[p][moment] for p in model.parameters() for moment in manifest.MOMENTS]
    return [*model.parameters(), *states], torch.stack(norms), most


@pytest.mark.parametrize(
    "more",
    [{}, {"tied": True}, {"recompute": "block"}, {"recompute": "elementwise"}, {"host_moments": True}],
    ids=str,
)
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_ordinary_step_bit_for_bit_with_one_gradient_at_a_time(kind, more):
    plain, norms, most = learn(KINDS[kind], **more)
    ours, its_norms, its_most = learn(structs.replace(KINDS[kind], in_backward=True), **more)
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))
    torch.testing.assert_close(its_norms, norms, rtol=1e-6, atol=0)
    assert its_most == 0 and most > 10  # none is left when the next one comes


def weights(folder, step):
    return load_file(folder / "checkpoints" / f"step_{step}" / "weights-00001-of-00001.safetensors")


def curve(lines):
    return [(line["loss"], line["lr"]) for line in lines]


def test_several_processes_are_refused():
    with pytest.raises(ConfigError, match="optim.in_backward = true needs one process, and these are 2"):
        optim.check(OptimConfig(in_backward=True), 2)


def test_a_run_is_that_of_ordinary_updates_and_goes_on_after_a_stop(world, tmp_path):
    """In bf16; in fp32 the ordinary steps are those of torch's AdamW."""
    more = ("--train.dtype=bfloat16", "--optim.master_dtype=bfloat16", "--optim.moment_dtype=bfloat16")
    plain, ours = (tiny.train(world, tmp_path / n, *o, *more) for n, o in (("plain", ONE_BIN), ("ours", IN_BACKWARD)))
    resume = f"--run.resume={tmp_path / 'ours' / 'checkpoints' / 'step_3'}"
    again = tiny.train(world, tmp_path / "again", *IN_BACKWARD, *more, resume)
    assert curve(again) == curve(ours)[3:]
    ends = [weights(tmp_path / name, 6) for name in ("plain", "ours", "again")]
    assert all(torch.equal(ends[1][name], end[name]) for end in ends for name in end)
    for theirs, line in zip(plain, ours, strict=True):
        assert line["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)
    assert curve(ours) == curve(plain)


def test_a_nan_ends_the_run_before_it_is_saved_and_says_what_happened(world, tmp_path, monkeypatch):
    plain = checkpoint.load_base

    def load_base(folder, model):
        plain(folder, model)
        with torch.no_grad():
            model.blocks[0].mlp.down.weight.fill_(torch.nan)

    monkeypatch.setattr(checkpoint, "load_base", load_base)
    with pytest.raises(NonFiniteError, match="some weights were updated before it was seen.*resumes from the base"):
        tiny.train(world, tmp_path / "run", *IN_BACKWARD, "--train.log_every=2")
    assert layout.checkpoint_folders(tmp_path / "run") == []


def test_a_gradient_that_is_not_finite_updates_nothing_of_its_weight():
    layer = torch.nn.Linear(3, 3)
    optimizer = optim.build(layer, OptimConfig(clip=0.0, in_backward=True), REFERENCE.adamw)
    before = [p.detach().clone() for p in layer.parameters()]
    optim.begin(optimizer, lr=0.1)
    (layer.weight.sum() * torch.nan + layer.bias.sum()).backward()
    assert torch.equal(layer.weight, before[0]) and not torch.equal(layer.bias, before[1])
    assert optim.update(optimizer, lr=0.1, clip=0.0, loss=GOOD).isnan()
