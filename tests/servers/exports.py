"""Small exports of every family and template, made as users make them: init-base, prepare, train, export.

    folder = make(Path("work"), "qwen2", "openchat_3.6")
Random models with real tokenizers (those that `make test` fetches), trained for two steps on two classes.
"""

from __future__ import annotations

import json
from pathlib import Path

from ochat.commands import init_base
from ochat.commands.init_base import InitBaseOptions
from ochat.data.prepare import prepare
from ochat.export.hf_folder import export
from ochat.text import template as templates
from ochat.text import tokenizer as tokenizers
from tests import text_kit, tiny

SHAPE = {
    "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 1024, "initializer_range": 0.1,
}  # fmt: skip
TOKENIZERS = {"llama": "smollm2", "mistral": "mistral", "qwen2": "smollm2", "qwen3": "smollm2"}


def tokenizer_path(name: str, folder: Path) -> Path:
    """The file of a real tokenizer; SmolLM2's is written to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    return text_kit.smollm2_tokenizer(folder) if name == "smollm2" else text_kit.real_tokenizer(name)


def make(folder: Path, family: str, template: str, tokenizer: str = "") -> Path:
    """The exported folder, in float32."""
    path = tokenizer_path(tokenizer or TOKENIZERS[family], folder / "tokenizer")
    needed = templates.load(template)
    names = (needed.eot, *needed.special_tokens)
    vocabulary = tokenizers.load(path, names)
    model = SHAPE | {"model_type": family, "vocab_size": vocabulary.vocab_size, "bos_token_id": vocabulary.bos_id}
    (folder / "model.json").write_text(json.dumps(model))
    base = folder / "base"
    init_base.main(InitBaseOptions(base, random=folder / "model.json", tokenizer=path, add_token=names))
    source = tiny.write_lines(folder / "conversations.jsonl", tiny.conversations())
    prepare([source], base, template, folder / "data", progress=False)
    config = folder / "config.toml"
    config.write_text(tiny.TOML.format(base=json.dumps(str(base)), data=json.dumps(str(folder / "data"))))
    world = tiny.World(folder, base, folder / "data", config)
    tiny.train(world, folder / "run", "--data.max_steps=2", "--data.token_budget=256")
    export(folder / "run", folder / "exported", dtype="float32")
    return folder / "exported"
