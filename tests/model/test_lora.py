"""Adapters train what PEFT would, on any number of processes, and leave as PEFT's files or merged into their base:
pytest tests/model/test_lora.py"""

import dataclasses
import json
import shutil

import ochat_kernels
import pytest
import torch
from ochat_kernels import Dynamic
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from ochat.commands.export import ExportOptions, main
from ochat.config import LINEARS, LoraConfig
from ochat.data.batch import Example, PackedBatch, pack
from ochat.distributed import local_shards
from ochat.errors import CheckpointError, ConfigError
from ochat.export.hf_folder import export
from ochat.model import hf, lora
from ochat.model.attention.packed import PackedAttention
from ochat.model.config import ModelConfig
from ochat.model.transformer import Transformer
from ochat.train.loss import head_loss
from tests import tiny

MODEL = ModelConfig("llama", 64, 24, 40, 2, 4, 2, 6)
REFERENCE = ochat_kernels.load("reference")
IDS = (5, 61)
OPTIONS = ["--lora.rank=4", "--optim.lr=1e-2", "--checkpoint.every=5", "--checkpoint.keep=0"]


def adapted(config: ModelConfig, settings: LoraConfig, ids=IDS) -> Transformer:
    """A model of random weights, every B included, so that all gradients are there."""
    with torch.device("meta"):
        model = Transformer(config, REFERENCE)
    lora.attach(model, settings, ids)
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def batch(tokens: int, vocab: int) -> PackedBatch:
    """One document with every row of IDS, as input and as label; a third of the tokens is not supervised, but among the
    rows."""
    draw = torch.Generator().manual_seed(1)
    ids, weights = torch.randint(0, vocab, (tokens,), generator=draw), torch.rand(tokens, generator=draw) - 0.3
    ids[4], ids[7] = IDS
    weights[::3] = 0
    return pack([Example(ids.numpy(), weights.numpy(), "")], [0], [0], multiple=tokens)


def packed(given: PackedBatch):
    return given.input_ids, given.position_ids, PackedAttention(given.cu_seqlens, given.max_seqlen)


def plain_loss(
    model: Transformer, settings: LoraConfig, leaves: dict[str, torch.Tensor], given: PackedBatch, kind: str = ""
):
    """The same by a model whose weights are W + (alpha / r) B A and whose rows are replaced, in float64; with weights
    that change as `kind` says."""
    whole = {name: p.detach().double() for name, p in model.named_parameters() if not p.requires_grad}
    for name, parts in lora.adapted_parts(model.config, settings.targets).items():
        a, b = iter(leaves[f"{name}.lora.a"].split(settings.rank)), leaves[f"{name}.lora.b"]
        b = iter(b.split([part.rows for part in parts if part.is_adapted]))
        pieces = whole[f"{name}.weight"].split([part.rows for part in parts])
        whole[f"{name}.weight"] = torch.cat([
            w + settings.alpha / settings.rank * next(b) @ next(a) if part.is_adapted else w
            for w, part in zip(pieces, parts, strict=True)
        ])  # fmt: skip
    for name in ("embed", "head"):
        if f"{name}.tokens.weight" in leaves:
            rows = leaves[f"{name}.tokens.weight"]
            whole[f"{name}.weight"] = whole[f"{name}.weight"].index_copy(0, torch.tensor(IDS), rows)
    if model.config.tie_embeddings:
        whole["head.weight"] = whole["embed.weight"]
    plain = Transformer(model.config, REFERENCE).double()
    logits = torch.func.functional_call(plain, whole, packed(given), tie_weights=False)
    nll = F.cross_entropy(logits.double(), given.labels, reduction="none", ignore_index=-100)
    factors = {"": torch.ones_like(nll), "dft": (-nll).exp().detach()}
    factors["eaft"] = (torch.distributions.Categorical(logits=logits.detach().double()).entropy() / 5) ** 1.5
    assert not kind or factors[kind].min() < 0.9
    return (nll * factors[kind].clamp_max(1) * given.loss_weights.double()).sum()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("softcap", [0.0, 1.5])
@pytest.mark.parametrize(
    ("targets", "kind"), [(LINEARS, ""), (("q_proj", "v_proj", "up_proj"), ""), (LINEARS, "dft"), (LINEARS, "eaft")]
)
def test_gradients_are_those_of_a_plain_model_with_merged_weights(targets, kind, softcap, tied):
    config = dataclasses.replace(MODEL, tie_embeddings=tied, qkv_bias=True, logit_softcap=softcap)
    settings = LoraConfig(rank=3, alpha=6.0, targets=targets)
    model, given = adapted(config, settings), batch(20, config.vocab_size)
    dynamic = Dynamic(kind, 1.5, 5.0) if kind else None  # type: ignore[arg-type]
    head = head_loss(REFERENCE, model, given, torch.ones((), dtype=torch.float64), dynamic)
    loss = model(*packed(given), head=head, rows=given.supervised_rows).loss_sum
    loss.backward()
    trained = local_shards.trainable_parameters(model)
    leaves = {name: p.detach().double().requires_grad_() for name, p in trained.items()}
    expected = plain_loss(model, settings, leaves, given, kind)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert {name.split(".")[-1] for name in trained} == {"a", "b", "weight"}
    for name, parameter in trained.items():
        truth, found = leaves[name].grad, parameter.grad
        assert truth is not None and found is not None and truth.abs().max() > 0, name
        assert (found - truth).abs().max() <= 1e-4 * truth.abs().max(), name
    assert all(p.grad is None for name, p in model.named_parameters() if name not in trained)


@pytest.fixture(scope="module")
def lora_run(world):
    """Run folder and metrics of one process over the tiny world."""
    folder = world.folder / "lora"
    return folder, tiny.train(world, folder, *OPTIONS)


def weights(checkpoint):
    return load_file(checkpoint / "weights-00001-of-00001.safetensors")


def test_the_loss_falls_and_a_checkpoint_holds_adapters_alone(world, lora_run):
    folder, lines = lora_run
    assert lines[-1]["loss"] < 0.8 * lines[0]["loss"]
    held = weights(folder / "checkpoints" / "step_5")
    assert all(".lora." in name or ".tokens." in name for name in held) and len(held) == 2 * 2 * 4 + 2
    assert all(tensor.dtype == torch.float32 for tensor in held.values())
    assert held["blocks.1.attn.qkv.lora.a"].shape == (3 * 4, 32) and held["blocks.1.attn.qkv.lora.b"].shape == (64, 4)
    assert json.loads((folder / "checkpoints" / "step_5" / "adapter_config.json").read_text())["r"] == 4


def test_adapters_start_as_pefts_do_and_alike_everywhere():
    a = lora.first_value("blocks.0.attn.qkv.lora.a", (48, 100), 0)
    assert a.abs().max() <= 0.1 and a.std() == pytest.approx(0.1 / 3**0.5, rel=0.05)
    assert torch.equal(a, lora.first_value("blocks.0.attn.qkv.lora.a", (48, 100), 0))
    assert not torch.equal(a, lora.first_value("blocks.1.attn.qkv.lora.a", (48, 100), 0))
    assert not torch.equal(a, lora.first_value("blocks.0.attn.qkv.lora.a", (48, 100), 1))
    assert not lora.first_value("blocks.0.attn.qkv.lora.b", (48, 4), 0).any()


def test_two_processes_train_the_same(world, lora_run, tmp_path):
    tiny.train_on_ranks(world, tmp_path / "run", 2, *OPTIONS, "--train.recompute=block")
    for ours, theirs in zip(tiny.metrics(tmp_path / "run"), lora_run[1], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
    whole, shards = (load_file(run / "export" / "model.safetensors") for run in (lora_run[0], tmp_path / "run"))
    for name, tensor in whole.items():
        assert (tensor - shards[name]).float().abs().max() <= 1e-2 * tensor.float().abs().max(), name  # bfloat16


def test_a_resumed_run_is_bitwise_the_run_that_never_stopped(world, lora_run, tmp_path):
    folder, lines = lora_run
    shutil.copytree(folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step_{len(lines)}")
    assert tiny.curve(tiny.train(world, tmp_path / "run", *OPTIONS)) == tiny.curve(lines)
    assert tiny.is_equal(*(tiny.state(run, len(lines)) for run in (folder, tmp_path / "run")))


@pytest.mark.parametrize("option", ["--lora.alpha=16", "--lora.tokens=none", "--lora.rank=0"])
def test_going_on_with_other_adapters_is_refused(world, lora_run, option):
    with pytest.raises(CheckpointError, match="lora"):
        tiny.train(world, lora_run[0], *OPTIONS, option)


def test_the_merged_export_computes_what_the_run_did_and_keeps_what_it_did_not_train(world, tmp_path):
    targets = '--lora.targets=["q_proj", "v_proj", "down_proj"]'
    tiny.train(world, tmp_path / "run", *OPTIONS, targets, "--data.max_steps=5")
    export(tmp_path / "run", tmp_path / "merged", dtype="float32")
    base, merged = hf.load(world.base, dtype="float32"), hf.load(tmp_path / "merged", dtype="float32")
    model = adapted(base.config, LoraConfig(rank=4, targets=("q_proj", "v_proj", "down_proj")), (258,))
    model.load_state_dict(dict(base.named_parameters()) | weights(tmp_path / "run" / "checkpoints" / "step_5"))
    ids = [[256, 5, 258, 7], list(range(60))]
    for ours, theirs in zip(model.logits(ids), merged.logits(ids), strict=True):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    before, after = (load_file(folder / "model.safetensors") for folder in (world.base, tmp_path / "merged"))
    changed = {name.split(".")[-2] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"q_proj", "v_proj", "down_proj", "embed_tokens", "lm_head"}
    rows = (before["lm_head.weight"] != after["lm_head.weight"]).any(1).nonzero().flatten().tolist()
    assert rows == [258]
    assert not (tmp_path / "merged" / "adapter_config.json").exists()


def test_an_adapter_that_vllm_refuses_is_said_where_it_is_written(world, lora_run, tmp_path, capsys):
    """One with rows of tokens; not the merged model, nor an adapter without such rows."""
    tiny.train(world, tmp_path / "run", "--lora.rank=2", '--lora.tokens="none"', "--data.max_steps=1")
    for source, adapter, says in (
        (lora_run[0], True, True),
        (lora_run[0], False, False),
        (tmp_path / "run", True, False),
    ):
        main(ExportOptions(source, tmp_path / "out", adapter=adapter, overwrite=True))
        said = capsys.readouterr().out
        assert ("vLLM refuses it" in said) == ('lora.tokens = "none"' in said) == says
        if adapter:
            names = load_file(tmp_path / "out" / "adapter_model.safetensors")
            assert any("trainable_tokens_delta" in name for name in names) == says


def test_peft_loads_the_adapter(world, lora_run, tmp_path):
    """Of all linear layers, and the row of the one token, and computes with it what the merged model does."""
    from peft import PeftModel

    main(ExportOptions(lora_run[0], tmp_path / "adapter", adapter=True))
    export(lora_run[0], tmp_path / "merged", dtype="float32")
    assert len(load_file(tmp_path / "adapter" / "adapter_model.safetensors")) == 2 * (2 * 7) + 2
    record = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert record["target_modules"] == list(LINEARS) and record["base_model_name_or_path"] == str(world.base)
    plain = AutoModelForCausalLM.from_pretrained(world.base, dtype="float32")
    theirs = PeftModel.from_pretrained(plain, tmp_path / "adapter")
    ids = [256, 5, 258, 7, 40]
    (ours,) = hf.load(tmp_path / "merged", dtype="float32").logits([ids])
    with torch.no_grad():
        assert (ours - theirs(torch.tensor([ids])).logits[0]).abs().max() <= 1e-5 * ours.abs().max()


def test_an_adapter_goes_back_to_its_own_base_only(world, alone, lora_run, tmp_path):
    moved, other = tmp_path / "moved", tmp_path / "other"
    shutil.copytree(world.base, moved)
    export(lora_run[0], tmp_path / "out", base=str(moved))
    shutil.copytree(world.base, other)
    state = load_file(other / "model.safetensors")
    state["model.layers.0.mlp.up_proj.weight"][-1, 3] += 1
    save_file(state, other / "model.safetensors")
    with pytest.raises(CheckpointError, match="not the base of .*--base"):
        export(lora_run[0], tmp_path / "wrong", base=str(other))
    with pytest.raises(ConfigError, match="not there; say with --base"):
        export(lora_run[0], tmp_path / "gone", base=str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="has no adapter"):
        main(ExportOptions(world.folder / "alone", tmp_path / "full", adapter=True))
    assert not (tmp_path / "wrong").exists() and not (tmp_path / "full").exists()
