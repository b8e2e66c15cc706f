"""A base folder has the source's weights bit for bit and a row for every id; added rows are the mean."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import ochat_kernels
import pytest
import torch

from ochat.cli import run as cli
from ochat.commands import init_base
from ochat.commands.init_base import InitBaseOptions
from ochat.errors import ConfigError
from ochat.model import hf
from ochat.model.config import ModelConfig
from ochat.model.gguf import byte_level_bpe
from ochat.model.transformer import Transformer
from ochat.text import tokenizer as tokenizers
from tests import text_kit

EOT = "<|end_of_turn|>"
TOKENS = ["<s>", "</s>", *(chr(ord("a") + i) for i in range(26)), *"0123456789", "Ġ", "th", "the", "<|spare|>"]
TYPES = [3, 3, *[1] * (len(TOKENS) - 3), 3]
CONFIG = ModelConfig("llama", len(TOKENS), 32, 48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8)


def write_json_tokenizer(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(byte_level_bpe(TOKENS, TYPES, [["t", "h"], ["th", "e"]])))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))


def write_model(folder: Path, config: ModelConfig, dtype: str = "float32") -> Path:
    model = Transformer(config, ochat_kernels.load("reference"))
    model.initialize(0)
    hf.save(folder, config, model.named_parameters(), dtype)
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(hf.read_model(folder)[1])


KNOWN = len(TOKENS)
TWO = (EOT, "<|second|>"), [KNOWN, KNOWN + 1]


@pytest.mark.parametrize(
    ("changes", "dtype", "tokens", "ids"),
    [
        *(({"tie_embeddings": tied}, dtype, *TWO) for tied in (True, False) for dtype in ("float32", "bfloat16")),
        ({"vocab_size": KNOWN + 5}, "float32", (EOT,), [KNOWN]),
        ({}, "float32", ("<|spare|>",), [KNOWN - 1]),
    ],
)
def test_added_tokens_get_the_next_ids_and_the_mean_row(tmp_path, changes, dtype, tokens, ids):
    """Padded rows stand for no id: they are no part of the mean, and added ids take the first of them before there are
    new rows. A token that is there keeps id and row."""
    config = replace(CONFIG, **changes)
    write_json_tokenizer(write_model(tmp_path / "source", config, dtype))
    init_base.main(InitBaseOptions(tmp_path / "out", hf=tmp_path / "source", add_token=tokens))

    before, after = weights(tmp_path / "source"), weights(tmp_path / "out")
    tokenizer, size = tokenizers.load(tmp_path / "out"), max(config.vocab_size, ids[-1] + 1)
    assert [tokenizer.special_tokens[token] for token in tokens] == ids
    assert tokenizer.vocab_size == max(KNOWN, ids[-1] + 1) and ModelConfig.load(tmp_path / "out").vocab_size == size
    for name, weight in before.items():
        end = KNOWN if name in ("embed.weight", "head.weight") else len(weight)
        added = [row for row in ids if row >= end]
        assert torch.equal(after[name][:end], weight[:end]), name
        assert torch.equal(after[name][end + len(added) : len(weight)], weight[end + len(added) :]), name
        if end == KNOWN:
            assert after[name].shape == (size, 32) and after[name].dtype == getattr(torch, dtype)
            # one rounding of an fp32 mean against one of an fp64 mean
            rtol = 0.008 if dtype == "bfloat16" else 1e-5
            mean = weight[:KNOWN].double().mean(0).to(weight.dtype)
            torch.testing.assert_close(after[name][added], mean.expand(len(added), -1), rtol=rtol, atol=1e-6)
    sequences = [[0, 5, 9, 30], [7]]
    old, new = (hf.load(tmp_path / name, dtype="float32").logits(sequences) for name in ("source", "out"))
    for a, b in zip(old, new, strict=True):
        torch.testing.assert_close(b[:, :KNOWN], a[:, :KNOWN], rtol=1e-5, atol=1e-6)


def test_sentencepiece_folder(tmp_path):
    text_kit.small_folder("llama", tmp_path / "source")
    pieces = tokenizers.load(tmp_path / "source").vocab_size
    write_model(tmp_path / "source", replace(CONFIG, vocab_size=pieces))
    init_base.main(InitBaseOptions(tmp_path / "out", hf=tmp_path / "source", add_token=(EOT,)))
    tokenizer = tokenizers.load(tmp_path / "out")
    assert tokenizer.kind == "sentencepiece" and tokenizer.special_tokens[EOT] == pieces
    assert ModelConfig.load(tmp_path / "out").vocab_size == pieces + 1


def test_random_is_a_function_of_its_seed(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG.to_hf()))
    write_json_tokenizer(tmp_path / "tokenizer")
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        cli("init-base", ["--random", str(tmp_path / "config.json"), "--tokenizer", str(tmp_path / "tokenizer"),
                          "--add-token", EOT, "--seed", str(seed), str(tmp_path / name)])  # fmt: skip
    a, b, c = (weights(tmp_path / name) for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["embed.weight"], c["embed.weight"])
    assert tokenizers.load(tmp_path / "a").special_tokens[EOT] == len(TOKENS)


def test_random_without_a_tokenizer(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG.to_hf()))
    init_base.main(InitBaseOptions(tmp_path / "out", random=tmp_path / "config.json", dtype="bfloat16"))
    assert hf.load(tmp_path / "out").config == CONFIG
    assert weights(tmp_path / "out")["embed.weight"].dtype == torch.bfloat16
    assert "no tokenizer" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="--tokenizer"):
        init_base.main(InitBaseOptions(tmp_path / "other", random=tmp_path / "config.json", add_token=(EOT,)))


def test_gguf_folder(tmp_path):
    pytest.importorskip("gguf", reason="PyPI `gguf` (extra `data`) is not installed")
    from tests.model import test_gguf

    state = test_gguf.random_state(test_gguf.CONFIG)
    file = test_gguf.write(tmp_path / "m.gguf", state=state)
    init_base.main(InitBaseOptions(tmp_path / "out", gguf=file, add_token=(EOT,), dtype="float32"))
    config = ModelConfig.load(tmp_path / "out")
    stored, size = hf.open_tensors(tmp_path / "out", config), test_gguf.CONFIG.vocab_size
    assert config.vocab_size == size + 1
    for name, weight in state.items():
        assert torch.equal(stored[name].read()[: len(weight)], torch.from_numpy(weight)), name
    tokenizer = tokenizers.load(tmp_path / "out")
    assert (tokenizer.special_tokens[EOT], tokenizer.bos_id, tokenizer.eos_id) == (size, 1, 2)
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert settings["chat_template"] == "{{ messages[0].content }}"


def test_the_folder_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    """An empty one is filled."""
    write_json_tokenizer(write_model(tmp_path / "source", CONFIG))

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    options = InitBaseOptions(tmp_path / "out", hf=tmp_path / "source", add_token=(EOT,))
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("ochat.files.checksums.write", stop)
        init_base.main(options)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    options.out.mkdir()
    init_base.main(options)
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_wrong_options_are_explained(tmp_path):
    out, source = tmp_path / "out", write_model(tmp_path / "source", CONFIG)
    for options, named in (
        (InitBaseOptions(out), "exactly one of --gguf, --hf and --random, not 0"),
        (InitBaseOptions(out, hf=source, random=tmp_path / "x.json"), "not 2"),
        (InitBaseOptions(source, hf=source), "exists already"),
        (InitBaseOptions(out, random=tmp_path / "x.json"), "x.json: no such file"),
        (InitBaseOptions(out, hf=Path("someone/llama"), add_token=(EOT,)), "config.json does not exist.*hf download"),
        (InitBaseOptions(out, hf=source, add_token=(EOT,)), "source.*no tokenizer.model"),
    ):
        with pytest.raises(ConfigError, match=named):
            init_base.main(options)
    assert not out.exists()
