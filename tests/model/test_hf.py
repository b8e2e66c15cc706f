"""Weights in and out: what is saved is what transformers loads, one file or many; what does not fit is named."""

import json

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ochat.errors import CheckpointError, ConfigError
from ochat.files.safetensors_file import StoredTensor
from ochat.model import hf
from ochat.model.config import ModelConfig
from tests.model_families import FAMILIES, make, peer_logits, random_ids

FREQUENCIES = "model.layers.0.self_attn.rotary_emb.inv_freq"
EMBED, Q_PROJ = "model.embed_tokens.weight", "model.layers.1.self_attn.q_proj.weight"


def reload(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_is_the_same_model_to_transformers(family, tmp_path):
    """Saving wants the names, order and shapes of the table, which are thus the model's."""
    peer, (ids,) = make(family, tmp_path / "base"), random_ids(30)
    ours = hf.load(tmp_path / "base", dtype="float32")
    hf.save(tmp_path / "out", ours.config, ours.named_parameters(), "float32")
    assert torch.equal(peer_logits(reload(tmp_path / "out"), ids), peer_logits(peer, ids))
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(load_file(tmp_path / "base" / "model.safetensors"))


@pytest.mark.parametrize("max_shard_bytes", [1, 9000, 40000])
def test_shards_hold_what_one_file_holds(max_shard_bytes, tmp_path):
    make("llama-biases", tmp_path / "base")
    ours, (ids,) = hf.load(tmp_path / "base", dtype="float32"), random_ids(9)
    hf.save(tmp_path / "out", ours.config, ours.named_parameters(), "float32", max_shard_bytes)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 1 and all(name.endswith(f"-of-{len(shards):05d}.safetensors") for name in shards)
    assert index["metadata"]["total_size"] == 4 * ours.config.num_parameters()
    wanted = ours.logits([ids])[0]
    assert torch.equal(hf.load(tmp_path / "out", dtype="float32").logits([ids])[0], wanted)
    torch.testing.assert_close(peer_logits(reload(tmp_path / "out"), ids), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("parts", [1, 3, 7])
def test_rows_of_fused_parameters_come_from_their_parts_alone(parts, tmp_path, monkeypatch):
    """However many ranks share the rows: together they are the whole, and no byte is read twice."""
    make("qwen3-mixed", tmp_path)
    model_config, plain, count = ModelConfig.load(tmp_path), StoredTensor.rows, []
    stored, whole = hf.open_tensors(tmp_path, model_config), hf.load(tmp_path, dtype="float32")

    def counted(*args):
        count.append(plain(*args))
        return count[-1]

    monkeypatch.setattr(StoredTensor, "rows", counted)
    for name, parameter in whole.named_parameters():
        read = torch.full_like(parameter, torch.nan)
        chunk = -(-len(read) // parts)
        for start in range(0, len(read), chunk):
            for offset, piece in hf.read_rows(stored, model_config, name, start, min(start + chunk, len(read))):
                read[start + offset : start + offset + len(piece)] = piece
        assert torch.equal(read, parameter), name
    assert sum(piece.numel() for piece in count) == whole.config.num_parameters()


def test_dtype_is_rounded_once_and_recorded(tmp_path):
    make("llama2", tmp_path / "base")
    wide, narrow = hf.load(tmp_path / "base", dtype="float32"), hf.load(tmp_path / "base")
    pairs = zip(wide.parameters(), narrow.parameters(), strict=True)
    assert all(b.dtype == torch.bfloat16 and torch.equal(a.bfloat16(), b) for a, b in pairs)
    hf.save(tmp_path / "out", wide.config, wide.named_parameters(), "bfloat16")
    assert ModelConfig.load(tmp_path / "out").dtype == "bfloat16"
    assert {t.dtype for t in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}
    with pytest.raises(ConfigError, match="dtype = 'int8'"):
        hf.load(tmp_path / "base", dtype="int8")


def change(folder, edit):
    """Rewrite the folder's weights after `edit(tensors)`."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def renamed(new_name):
    """An edit that stores all tensors under other names."""

    def edit(tensors):
        old = dict(tensors)
        tensors.clear()
        tensors.update({new_name(name): tensor for name, tensor in old.items()})

    return edit


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (lambda t: t.pop(Q_PROJ), f"lacks {Q_PROJ}, which"),
        (lambda t: [t.pop(name) for name in list(t) if "mlp" in name], "layers.1.mlp.gate_proj.weight and 4 more"),
        (lambda t: t.update(extra=torch.zeros(2)), "holds extra, which"),
        (lambda t: t.update({Q_PROJ: torch.zeros(32, 16)}), rf"{Q_PROJ} has shape \(32, 16\).*\(32, 32\)"),
        (lambda t: t.update({Q_PROJ: torch.zeros(32, 32, dtype=torch.int8)}), f"{Q_PROJ} is I8"),
        (lambda t: t.pop("lm_head.weight"), "lacks lm_head.weight; if .* set tie_word_embeddings to true"),
        (lambda t: t.update({Q_PROJ: torch.zeros(32, 32, dtype=torch.float8_e4m3fn)}), "is F8_E4M3.*take the model"),
        (renamed(lambda name: f"policy.{name}"), f"holds policy.{EMBED} where {EMBED} is expected; take that prefix"),
        (lambda t: t.update({f"language_model.{EMBED}": t[EMBED] + 0}), f"{EMBED} .* both read as {EMBED}: two models"),
        (lambda t: t.update({"vision_tower.norm.weight": torch.zeros(2)}), "holds vision_tower.norm.weight, which"),
        (lambda t: t.update({"lm_head.bias": torch.zeros(97)}), "holds lm_head.bias, which"),
    ],
)
def test_weights_that_do_not_fit_are_named_by_the_files_headers_alone(edit, named, tmp_path, monkeypatch):
    monkeypatch.setattr(StoredTensor, "read", lambda *_: pytest.fail("a tensor was read"))
    make("llama2", tmp_path)
    change(tmp_path, edit)
    with pytest.raises(CheckpointError, match=named) as caught:
        hf.load(tmp_path)
    assert str(tmp_path) in str(caught.value)


QUANTISED = {  # the tensors that take a weight's place
    "GPTQ": {"qweight": torch.int32, "qzeros": torch.int32, "scales": torch.float16, "g_idx": torch.int32},
    "AWQ": {"qweight": torch.int32, "qzeros": torch.int32, "scales": torch.float16},
    "FP8": {"weight": torch.float8_e4m3fn, "weight_scale_inv": torch.float32},
    "FP8, one scale": {"weight": torch.float8_e4m3fn, "weight_scale": torch.float32, "input_scale": torch.float32},
    "bitsandbytes 4": {
        "weight": torch.uint8, "weight.absmax": torch.uint8, "weight.quant_map": torch.float32,
        "weight.quant_state.bitsandbytes__nf4": torch.uint8,
    },
    "bitsandbytes 8": {"weight": torch.int8, "SCB": torch.float32, "weight_format": torch.uint8},
    "compressed-tensors": {"weight_packed": torch.int32, "weight_scale": torch.bfloat16, "weight_shape": torch.int64},
    "MLX": {"weight": torch.uint32, "scales": torch.bfloat16, "biases": torch.bfloat16},
}  # fmt: skip


@pytest.mark.parametrize("tensors", QUANTISED.values(), ids=QUANTISED)
def test_quantised_weights_say_to_take_what_they_were_made_from(tensors, tmp_path):
    """Also where config.json is silent, as old quantisers left it."""
    make("llama2", tmp_path)
    place = Q_PROJ.removesuffix("weight")
    new = {f"{place}{name}": torch.zeros(4, 4).to(dtype) for name, dtype in tensors.items()}
    change(tmp_path, lambda t: (t.pop(Q_PROJ), t.update(new)))
    with pytest.raises(CheckpointError, match=f"holds {place}.*quantised weights are not read; take the model that"):
        hf.load(tmp_path)


@pytest.mark.parametrize("family", ["llama2", "llama-tied-odd-head", "qwen3-mixed"])
@pytest.mark.parametrize(
    "new_name",
    [
        lambda name: name.removeprefix("model."),  # of a model class without a head
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: name.replace("layers.1.", "layers.1._orig_mod."),  # blocks compiled one by one
        lambda name: f"language_model.{name}",
        lambda name: name.replace("model.", "model.language_model."),
    ],
    ids=["bare", "compiled", "ddp", "both", "blocks", "old wrapper", "new wrapper"],
)
def test_names_are_read_whatever_was_around_the_model(new_name, family, tmp_path):
    make(family, tmp_path)
    wanted = dict(hf.load(tmp_path, dtype="float32").named_parameters())
    change(tmp_path, renamed(new_name))
    found = dict(hf.load(tmp_path, dtype="float32").named_parameters())
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_the_names_that_a_compiled_model_and_one_without_a_head_have(tmp_path):
    """By PyTorch and transformers themselves."""
    peer, (ids,) = make("llama-tied-odd-head", tmp_path), random_ids(9)
    wanted = hf.load(tmp_path, dtype="float32").logits([ids])[0]
    compiled = torch.compile(peer).state_dict()
    assert all(name.startswith("_orig_mod.") for name in compiled)
    for state in (compiled, peer.model.state_dict()):
        save_file({name: tensor.clone() for name, tensor in state.items()}, tmp_path / "model.safetensors")
        assert torch.equal(hf.load(tmp_path, dtype="float32").logits([ids])[0], wanted)


def test_dtypes_may_be_mixed_within_a_fused_parameter(tmp_path):
    make("llama2", tmp_path)
    half = {"q_proj": torch.float16, "k_proj": torch.bfloat16}
    change(tmp_path, lambda t: t.update({n: x.to(half.get(n.split(".")[-2], x.dtype)) for n, x in t.items()}))
    stored, model = load_file(tmp_path / "model.safetensors"), hf.load(tmp_path, dtype="float32")
    parts = [stored[Q_PROJ.replace("q_proj", name)].float() for name in ("q_proj", "k_proj", "v_proj")]
    assert torch.equal(dict(model.named_parameters())["blocks.1.attn.qkv.weight"], torch.cat(parts))


def test_a_tied_head_may_be_stored_but_not_differ_and_frequencies_are_no_weights(tmp_path):
    make("llama-tied-odd-head", tmp_path)
    change(tmp_path, lambda t: t.update({"lm_head.weight": t[EMBED].clone(), FREQUENCIES: torch.zeros(4)}))
    hf.load(tmp_path)
    change(tmp_path, lambda t: t.update({"lm_head.weight": t[EMBED] + 1}))
    with pytest.raises(CheckpointError, match="lm_head.weight differs from"):
        hf.load(tmp_path)
    model_config = ModelConfig.load(tmp_path)
    with pytest.raises(CheckpointError, match="lm_head.weight differs from"):  # nor in the rows of one rank
        list(hf.read_rows(hf.open_tensors(tmp_path, model_config), model_config, "embed.weight", 3, 5))


def test_nothing_incomplete_or_unknown_is_saved(tmp_path):
    make("llama2", tmp_path / "base")
    model = hf.load(tmp_path / "base")
    pairs = list(model.named_parameters())
    for number, (wrong, named) in enumerate([
        (pairs[:-1], r"nothing \(0,\) was given for head.weight"),
        ([*pairs, pairs[0]], "embed.weight given twice"),
        ([("blocks.9.norm1.weight", pairs[1][1]), *pairs], r"blocks.9.norm1.weight \(32,\) was given for embed.weight"),
        ([("embed.weight", pairs[0][1][:5]), *pairs[1:]], r"embed.weight \(5, 32\) was given for .* \(97, 32\)"),
    ]):  # fmt: skip
        with pytest.raises(CheckpointError, match=named):
            hf.save(tmp_path / str(number), model.config, wrong, "float32")
        assert not (tmp_path / str(number) / "config.json").exists()
    with pytest.raises(CheckpointError, match="holds model.safetensors already"):
        hf.save(tmp_path / "base", model.config, pairs, "float32")
