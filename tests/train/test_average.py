"""The moving average of the weights is that of float64, changes nothing of training, and is saved, resumed on any
number of processes and exported: pytest tests/train/test_average.py"""

import shutil

import ochat_kernels
import pytest
import torch
from safetensors.torch import load_file

from ochat.checkpoint.manifest import Manifest
from ochat.commands.export import ExportOptions, main
from ochat.config import OptimConfig
from ochat.errors import CheckpointError, ConfigError
from ochat.export.hf_folder import export
from ochat.model import hf
from ochat.train import optim
from ochat.train.average import WeightAverage
from tests import tiny
from tests.train.test_optim import GOOD, give_gradients, small_model

REFERENCE = ochat_kernels.load("reference")
FEW = ["--data.max_steps=8", "--optim.ema=0.7", "--checkpoint.every=2", "--checkpoint.keep=0", "--data.epochs=2"]
ROUNDING = 1e-6  # of some steps in fp32, each of half of 1.2e-7


def averages(run_dir, step, shard="00001-of-00001"):
    return load_file(run_dir / "checkpoints" / f"step_{step}" / f"ema-{shard}.safetensors")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_is_that_of_float64_over_the_steps_that_were_applied(dtype):
    model = small_model().to(getattr(torch, dtype))
    optimizer = optim.build(model, OptimConfig(master_dtype=dtype), REFERENCE)
    average = WeightAverage(model, 0.9)
    average.start()
    truth = [parameter.detach().double() for parameter in model.parameters()]
    for step in range(1, 31):
        is_bad = step % 5 == 0
        give_gradients(model, step, torch.inf if is_bad else None)
        before = [value.clone() for value in average.values.values()]
        optim.update(optimizer, lr=0.1, clip=1.0, loss=GOOD, average=average)
        if is_bad:
            assert all(map(torch.equal, before, average.values.values()))
        else:
            truth = [0.9 * a + 0.1 * p.detach().double() for a, p in zip(truth, model.parameters(), strict=True)]
    for value, expected in zip(average.values.values(), truth, strict=True):
        assert value.dtype == torch.float32
        assert (value - expected).abs().max() <= ROUNDING * expected.abs().max()


def moved(dtype, steps=1000):
    """How far an average in `dtype` followed weights that went from 1 to 1.01 at once."""
    weight, value = torch.full((100,), 1.01), torch.linspace(1.0, 1.001, 100).to(dtype)
    start = value.double()
    for _ in range(steps):
        value.lerp_(weight.to(dtype), 1 - 0.999)
    return float(((value.double() - start) / (1.01 - start)).mean())


def test_bf16_would_lose_its_movement():
    assert moved(torch.float32) == pytest.approx(1 - 0.999**1000, abs=1e-3) and moved(torch.bfloat16) < 0.2


@pytest.fixture(scope="module")
def run(world):
    """A run folder with an average, a checkpoint every 2 of 8 steps."""
    tiny.train(world, world.folder / "averaged", *FEW)
    return world.folder / "averaged"


def test_training_is_the_same_to_the_bit_with_and_without(world, run, tmp_path):
    lines = tiny.train(world, tmp_path / "plain", *FEW, "--optim.ema=0")
    assert tiny.curve(lines) == tiny.curve(tiny.metrics(run))
    assert tiny.is_equal(tiny.state(tmp_path / "plain", 8), tiny.state(run, 8))
    assert not list((tmp_path / "plain").rglob("ema-*")) and Manifest.read(run / "checkpoints" / "step_8").ema == 0.7


def test_a_run_averages_the_weights_of_each_step_from_the_base_on(world, tmp_path):
    tiny.train(world, tmp_path / "run", *FEW, "--checkpoint.every=1")
    base = hf.load(world.base, dtype="float32")
    truth = {name: parameter.detach().double() for name, parameter in base.named_parameters()}
    for step in range(1, 9):
        weights = tiny.state(tmp_path / "run", step)
        truth = {name: 0.7 * value + 0.3 * weights[name].double() for name, value in truth.items()}
        found = averages(tmp_path / "run", step)
        assert found.keys() == truth.keys()
        for name, value in found.items():
            assert (value - truth[name]).abs().max() <= ROUNDING * truth[name].abs().max(), name


def test_it_goes_on_to_the_bit_after_a_stop(world, run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    for step in (6, 8):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step_{step}")
    tiny.train(world, tmp_path / "run", *FEW)
    assert tiny.is_equal(averages(tmp_path / "run", 8), averages(run, 8))


def test_it_goes_on_on_other_numbers_of_processes(world, run, tmp_path):
    resume = f"--run.resume={run / 'checkpoints' / 'step_4'}"
    tiny.train_on_ranks(world, tmp_path / "two", 2, *FEW, resume)
    parts = [averages(tmp_path / "two", 6, f"0000{shard}-of-00002") for shard in (1, 2)]
    expected = averages(run, 6)
    for name, value in expected.items():
        whole = torch.cat([part[name] for part in parts if name in part])
        assert (whole - value).abs().max() <= 1e-5 * value.abs().max(), name
    back = f"--run.resume={tmp_path / 'two' / 'checkpoints' / 'step_6'}"
    tiny.train(world, tmp_path / "one", *FEW, back)
    for name, value in averages(tmp_path / "one", 8).items():
        assert (value - averages(run, 8)[name]).abs().max() <= 1e-5 * value.abs().max(), name


def test_a_checkpoint_without_it_starts_it_and_one_with_it_is_not_dropped_in_silence(world, run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "off")
    tiny.train(world, tmp_path / "off", "--data.max_steps=10", *FEW[2:], "--run.resume_mismatched=true")
    said = " ".join(capsys.readouterr().out.split())
    assert "the average of weights in" in said and "set it to 0.7 to go on" in said
    assert Manifest.read(tmp_path / "off" / "checkpoints" / "step_10").ema == 0
    tiny.train(world, tmp_path / "off", "--data.max_steps=11", *FEW[1:], "--run.resume_mismatched=true")
    assert "step_10 holds no average of weights: optim.ema starts from its" in " ".join(capsys.readouterr().out.split())
    before, after = (tiny.state(tmp_path / "off", step) for step in (10, 11))
    for name, value in averages(tmp_path / "off", 11).items():
        torch.testing.assert_close(value, before[name].lerp(after[name], 0.3), rtol=1e-6, atol=1e-7)


def test_it_is_exported_instead_of_the_weights_and_only_its_files_are_read(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / "step_8"
    for kind in ("weights", "optimizer"):
        tiny.flip(newest / f"{kind}-00001-of-00001.safetensors")
    main(ExportOptions(newest, tmp_path / "out", ema=True, dtype="float32"))
    exported = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(exported["model.embed_tokens.weight"], averages(run, 8)["embed.weight"])
    assert not torch.equal(exported["model.embed_tokens.weight"], tiny.state(run, 8)["embed.weight"])
    assert not list((tmp_path / "out").glob("ema-*"))
    tiny.flip(newest / "ema-00001-of-00001.safetensors")
    with pytest.raises(CheckpointError, match="ema-00001-of-00001.safetensors: damaged"):
        export(newest, tmp_path / "damaged", ema=True)


def test_an_average_that_is_not_there_is_not_exported(world, alone, tmp_path):
    with pytest.raises(ConfigError, match="has no average of weights; train with optim.ema = 0.999"):
        main(ExportOptions(world.folder / "alone", tmp_path / "out", ema=True))


def test_a_file_of_averages_that_is_missing_is_named(run, tmp_path):
    shutil.copytree(run / "checkpoints" / "step_8", tmp_path / "step_8")
    (tmp_path / "step_8" / "ema-00001-of-00001.safetensors").unlink()
    with pytest.raises(CheckpointError, match="ema-00001-of-00001.safetensors: missing"):
        Manifest.read(tmp_path / "step_8").check_sizes()


def test_adapters_are_averaged_alone_and_exported_merged_or_as_they_are(world, tmp_path):
    tiny.train(world, tmp_path / "run", *FEW, "--lora.rank=4", "--optim.lr=1e-2")
    held, newest = averages(tmp_path / "run", 8), tmp_path / "run" / "checkpoints" / "step_8"
    assert held.keys() == load_file(newest / "weights-00001-of-00001.safetensors").keys()
    main(ExportOptions(newest, tmp_path / "adapter", ema=True, adapter=True))
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    ours = "base_model.model.model.layers.0.mlp.down_proj.lora_B.weight"
    assert torch.equal(saved[ours], held["blocks.0.mlp.down.lora.b"]) and saved[ours].any()
    main(ExportOptions(newest, tmp_path / "merged", ema=True, dtype="float32"))
    a, b = (held[f"blocks.0.mlp.down.lora.{part}"] for part in "ab")
    base = load_file(world.base / "model.safetensors")["model.layers.0.mlp.down_proj.weight"].float()
    merged = load_file(tmp_path / "merged" / "model.safetensors")["model.layers.0.mlp.down_proj.weight"]
    torch.testing.assert_close(merged, base + 32.0 / 4 * b @ a)
