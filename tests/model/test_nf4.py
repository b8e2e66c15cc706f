"""A base in NF4 computes and trains as its dequantised weights do, on any number of processes and after a resume:
pytest tests/model/test_nf4.py"""

import dataclasses
import importlib.util
import shutil
import sys

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from ochat.checkpoint import load
from ochat.config import LINEARS, LoraConfig
from ochat.distributed import local_shards
from ochat.errors import CheckpointError, ConfigError
from ochat.export.hf_folder import export
from ochat.model import hf, lora, nf4
from ochat.model.config import ModelConfig
from ochat.model.nf4 import Packing
from ochat.model.transformer import Transformer
from ochat.train.loss import head_loss
from tests import tiny
from tests.model.test_lora import MODEL, REFERENCE, batch, packed

if importlib.util.find_spec("bitsandbytes") is None:
    pytest.skip("needs bitsandbytes", allow_module_level=True)
CPU = torch.device("cpu")
OPTIONS = ["--lora.rank=4", "--optim.lr=1e-2", "--checkpoint.every=5", "--checkpoint.keep=0"]
NF4 = "--base.quantize=nf4"
LEVELS = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip
# (rows of the parts, columns): whole blocks; one short block; parts that end within a block; an odd number of numbers;
# more than one group of scales, the last one short
SHAPES = [((64,), 256), ((3,), 5), ((24, 12, 12), 20), ((5, 2), 13), ((300, 70), 64)]


def parts_of(rows, columns) -> list[torch.Tensor]:
    """Numbers whose blocks differ in scale, as those of trained weights do."""
    draw = torch.Generator().manual_seed(sum(rows) + columns)
    return [torch.randn(n, columns, generator=draw) * torch.rand(n, 1, generator=draw) for n in rows]


def stored(packing: Packing, parts, dtype=torch.float32) -> torch.Tensor:
    return torch.cat([section for _, section in packing.quantize(parts, dtype, CPU)])


def plain(held: torch.Tensor, packing: Packing) -> torch.Tensor:
    """What the bytes stand for, in float64, by the definition; the values of an 8-bit scale are the library's."""
    code, levels = nf4.library().create_dynamic_map().double(), torch.tensor(LEVELS, dtype=torch.float64)
    left, whole = held.view(torch.uint8), []

    def take(count: int) -> torch.Tensor:
        nonlocal left
        taken, left = left[:count], left[-(-count // nf4.ALIGN) * nf4.ALIGN :]
        return taken

    for rows in packing.rows:
        numbers = rows * packing.columns
        blocks = -(-numbers // 64)
        groups = -(-blocks // 256)
        pairs, scales = take(32 * blocks), code[take(blocks).long()]
        *shared, mean = take(4 * (groups + 1)).view(torch.float32).double()
        scales = scales * torch.stack(shared).repeat_interleave(256)[:blocks] + mean
        fours = torch.stack([pairs >> 4, pairs & 15], 1).view(blocks, 64)
        whole.append((levels[fours.long()] * scales[:, None]).flatten()[:numbers].view(rows, packing.columns))
    assert not len(left)
    return torch.cat(whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_a_weight_comes_back_as_the_definition_says(rows, columns, dtype):
    packing, parts = Packing(rows, columns), [part.to(dtype) for part in parts_of(rows, columns)]
    held = stored(packing, parts, dtype)
    found, expected, whole = packing.dequantize(held, torch.float32), plain(held, packing), torch.cat(parts).double()
    assert found.shape == (sum(rows), columns)
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()
    assert torch.equal(packing.dequantize(held, torch.bfloat16), found.bfloat16())
    largest = (
        torch.cat([part.abs().amax(1, keepdim=True) for part in parts]) if columns % 64 == 0 else whole.abs().max()
    )
    # half the widest gap of levels is 0.152; 8 bits of a scale are off by 1/64 of the largest in its group
    assert ((expected - whole).abs() <= 0.153 * largest + 0.02 * whole.abs().max()).all()


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_parts_are_what_bitsandbytes_makes_of_the_linears_of_a_folder(rows, columns):
    packing, parts, theirs = Packing(rows, columns), parts_of(rows, columns), []
    nf4.library()
    for part in parts:
        held = sys.modules["bitsandbytes"].nn.Params4bit(part.clone(), quant_type="nf4").to("cpu")
        theirs.append(nf4.library().dequantize_4bit(held.data, held.quant_state))
    assert torch.equal(packing.dequantize(stored(packing, parts), torch.float32), torch.cat(theirs))


def test_a_weight_takes_4_127_bits_a_number():
    sizes = {"hidden_size": 4096, "head_dim": 128, "num_heads": 32, "num_kv_heads": 8, "intermediate_size": 14336}
    packing = lora.packings(dataclasses.replace(MODEL, **sizes))["blocks.0.mlp.gate_up"]
    assert packing == Packing((14336, 14336), 4096)
    assert 8 * packing.nbytes / packing.numel == pytest.approx(4.127, abs=1e-3)
    for rows, columns in SHAPES:
        packing = Packing(rows, columns)
        assert stored(packing, parts_of(rows, columns), torch.bfloat16).nbytes == packing.nbytes


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_a_linear_is_that_of_the_dequantised_weight(rows, columns, has_bias):
    packing, draw = Packing(rows, columns), torch.Generator().manual_seed(0)
    held = stored(packing, parts_of(rows, columns))
    bias = torch.randn(sum(rows), generator=draw) if has_bias else None
    x, dy = torch.randn(7, columns, generator=draw, requires_grad=True), torch.randn(7, sum(rows), generator=draw)
    y = nf4.linear(x, held, bias, packing)
    y.backward(dy)
    again = x.detach().clone().requires_grad_()
    expected = F.linear(again, packing.dequantize(held, torch.float32), bias)
    expected.backward(dy)
    assert torch.equal(y, expected) and torch.equal(x.grad, again.grad)


def quantised(config: ModelConfig, settings: LoraConfig, ids, folder) -> Transformer:
    """A model of a folder's weights in NF4 under adapters of random numbers."""
    with torch.device("meta"):
        model = Transformer(config, REFERENCE)
    lora.attach(model, settings, ids)
    lora.quantize(model)
    model.to_empty(device="cpu")
    load.load_base(folder, model)
    return fill(model)


def fill(model: Transformer) -> Transformer:
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in local_shards.trainable_parameters(model).values():
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.3)
    return model


def loss_and_gradients(model: Transformer, given) -> tuple[float, dict[str, torch.Tensor]]:
    head = head_loss(REFERENCE, model, given, torch.ones((), dtype=torch.float64))
    loss = model(*packed(given), head=head, rows=given.supervised_rows).loss_sum
    loss.backward()
    return loss.item(), {name: p.grad for name, p in local_shards.trainable_parameters(model).items()}


@pytest.mark.parametrize("recompute", ["none", "elementwise", "block"])
@pytest.mark.parametrize("targets", [LINEARS, ("q_proj", "v_proj", "up_proj")])
@pytest.mark.parametrize(("tied", "ids"), [(False, (5, 61)), (True, ())])
def test_loss_and_gradients_are_those_of_the_dequantised_base(tmp_path, tied, ids, targets, recompute):
    """Of a model whose rows are no whole blocks of 64 numbers."""
    sizes = {"hidden_size": 25, "intermediate_size": 39}
    config = dataclasses.replace(MODEL, model_type="qwen2", qkv_bias=True, tie_embeddings=tied, **sizes)
    draw, settings = torch.Generator().manual_seed(2), LoraConfig(rank=3, alpha=6.0, targets=targets)
    parts = hf.parameter_parts(config).items()
    whole = {n: torch.randn(sum(p.shape[0] for p in ps), *ps[0].shape[1:], generator=draw) * 0.3 for n, ps in parts}
    hf.save(tmp_path / "base", config, whole.items(), "float32")
    model = quantised(config, settings, ids, tmp_path / "base")
    with torch.device("meta"):
        dequantised = Transformer(config, REFERENCE)
    lora.attach(dequantised, settings, ids)
    dequantised.to_empty(device="cpu")
    load.load_base(tmp_path / "base", dequantised)
    changed = 0
    with torch.no_grad():
        for name, packing in lora.packings(config).items():
            ours, theirs = model.get_submodule(name).weight, dequantised.get_submodule(name).weight
            values = packing.dequantize(ours, torch.float32)
            changed += not torch.equal(values, theirs)
            theirs.copy_(values)
    assert changed == 4 * config.num_layers
    given = batch(20, config.vocab_size)
    model.recompute = recompute
    (loss, gradients), (expected, truths) = (loss_and_gradients(each, given) for each in (model, fill(dequantised)))
    assert loss == pytest.approx(expected, rel=1e-5)
    assert gradients.keys() == truths.keys()
    for name, truth in truths.items():
        assert truth.abs().max() > 0, name
        assert (gradients[name] - truth).abs().max() <= 1e-5 * truth.abs().max(), name


def test_backward_keeps_no_dequantised_weight():
    packing = Packing((64,), 256)
    held, kept = stored(packing, parts_of((64,), 256)), []
    x = torch.randn(3, 256, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        nf4.linear(x, held, None, packing)
    assert [t.data_ptr() for t in kept] == [held.data_ptr()]


@pytest.fixture(scope="module")
def nf4_run(world):
    """Run folder and metrics of one process over the tiny world."""
    folder = world.folder / "nf4"
    return folder, tiny.train(world, folder, *OPTIONS, NF4)


def test_the_loss_falls_and_the_export_merges_into_the_base_as_it_is(world, nf4_run, tmp_path):
    folder, lines = nf4_run
    assert lines[-1]["loss"] < 0.8 * lines[0]["loss"]
    plain_run = tiny.train(world, tmp_path / "plain", *OPTIONS, "--data.max_steps=1")
    assert lines[0]["loss"] != plain_run[0]["loss"] == pytest.approx(lines[0]["loss"], rel=0.05)
    held = load_file(folder / "checkpoints" / "step_5" / "weights-00001-of-00001.safetensors")
    assert all(".lora." in name or ".tokens." in name for name in held)
    export(folder, tmp_path / "merged", dtype="float32")
    base, merged = (load_file(each / "model.safetensors") for each in (world.base, tmp_path / "merged"))
    adapter = load_file(folder / "checkpoints" / f"step_{len(lines)}" / "weights-00001-of-00001.safetensors")
    name, ours = "model.layers.1.self_attn.o_proj.weight", "blocks.1.attn.out.lora"
    expected = base[name] + 32 / 4 * adapter[f"{ours}.b"] @ adapter[f"{ours}.a"]
    assert (merged[name] - expected).abs().max() <= 1e-6 * expected.abs().max()


@pytest.mark.parametrize(
    "more",
    [
        (),
        ("--train.recompute=block", "--parallel.reshard=block"),
        ("--parallel.reshard=step", "--parallel.offload=all"),
    ],
)
def test_two_processes_train_the_same(world, nf4_run, tmp_path, more):
    tiny.train_on_ranks(world, tmp_path / "run", 2, *OPTIONS, NF4, *more)
    for ours, theirs in zip(tiny.metrics(tmp_path / "run"), nf4_run[1], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)


def test_bytes_that_are_no_numbers_of_bf16_survive_gathering(world, tmp_path):
    """The first loss, before updates differ: each process computes its bins as one process would."""
    narrow = (*OPTIONS, NF4, "--train.dtype=bfloat16", "--data.max_steps=1")
    (alone,) = tiny.train(world, tmp_path / "one", *narrow)
    tiny.train_on_ranks(world, tmp_path / "two", 2, *narrow)
    assert tiny.metrics(tmp_path / "two")[0]["loss"] == pytest.approx(alone["loss"], rel=1e-6)


def test_a_resumed_run_is_bitwise_the_run_that_never_stopped(world, nf4_run, tmp_path):
    folder, lines = nf4_run
    shutil.copytree(folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step_{len(lines)}")
    assert tiny.curve(tiny.train(world, tmp_path / "run", *OPTIONS, NF4)) == tiny.curve(lines)
    assert tiny.is_equal(*(tiny.state(run, len(lines)) for run in (folder, tmp_path / "run")))


def test_going_on_without_it_is_refused(world, nf4_run):
    with pytest.raises(CheckpointError, match="base.quantize"):
        tiny.train(world, nf4_run[0], *OPTIONS)


@pytest.mark.parametrize("option", ["--lora.rank=0", "--train.linear=fp8", "--train.compile=true"])
def test_it_is_refused_where_it_cannot_be(world, tmp_path, option):
    with pytest.raises(ConfigError, match='base.quantize = .nf4.: expected "none" with'):
        tiny.train(world, tmp_path / "run", *OPTIONS, NF4, "--train.dtype=bfloat16", option)


def test_a_missing_or_broken_library_is_said(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "bitsandbytes", None)
        nf4.library.cache_clear()
        with pytest.raises(ConfigError, match=r"needs bitsandbytes .*pip install 'ochat-crlft\[quantized\]'"):
            nf4.check(CPU)

    def fails(*_, **__):
        raise RuntimeError("no kernel image for this card\nand a long trace")

    monkeypatch.setattr(nf4.library(), "quantize_4bit", fails)
    with pytest.raises(ConfigError, match=r"does not work on cpu \(no kernel image for this card\); .*python -m"):
        nf4.check(CPU)


def test_a_base_with_a_nan_is_refused(world, tmp_path):
    shutil.copytree(world.base, tmp_path / "base")
    tensors = load_file(world.base / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    (tmp_path / "base" / "SHA256SUMS").unlink(missing_ok=True)
    save_file(tensors, tmp_path / "base" / "model.safetensors")
    with pytest.raises(CheckpointError, match="up_proj.*NaN"):
        tiny.train(world, tmp_path / "run", *OPTIONS, NF4, f"--base.path={tmp_path / 'base'}")
