"""Make a base model's folder from a GGUF file, from a Hugging Face folder, or at random, and add tokens to it.

    make_base(Path("bases/llama"), hf_folder=Path("models/llama"), add_tokens=["<|end_of_turn|>"])
An added token gets the tokenizer's next free id; its embedding (and its row of an untied head) is the mean of the rows
of the ids that existed before. A token that exists keeps its id and its row.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ochat_kernels
import torch

from ochat.errors import ConfigError
from ochat.files import atomic, bounded_json, checksums
from ochat.model import hf
from ochat.model.config import ModelConfig
from ochat.model.gguf import GGUFFile
from ochat.model.transformer import Transformer
from ochat.text import tokenizer as tokenizers

# what a folder may hold in addition to weights and config.json that belongs to its tokenizer or to generation
TOKENIZER_FILES = (
    "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "generation_config.json",
)  # fmt: skip
VOCABULARY_PARAMETERS = ("embed.weight", "head.weight")
Parameters = Iterator[tuple[str, torch.Tensor]]  # (our name, whole tensor), one at a time


@dataclass(frozen=True)
class Vocabulary:
    """The tokenizer's ids before and after adding: `known` ids were there, `added` maps new tokens to theirs."""

    known: int
    size: int
    added: dict[str, int]


def make_base(
    out: Path,
    *,
    gguf: Path | None = None,
    hf_folder: Path | None = None,
    random: Path | None = None,
    tokenizer: Path | None = None,
    add_tokens: Sequence[str] = (),
    seed: int = 0,
    dtype: str = "auto",
) -> tuple[ModelConfig, Vocabulary | None]:
    """Writes a base from one of `gguf`, `hf_folder` and `random`, whole or not at all; returns its configuration and
    vocabulary, None where a random model has no tokenizer.

    Memory: one tensor at a time, except for `random`. SHA256SUMS of `hf_folder` is compared and one of the new folder
    is written: each reads the weights once more. Raises: ConfigError for settings or a tokenizer that cannot be used,
    CheckpointError for damaged weights.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError(f"{out}: exists already; remove it or name another folder")
    with atomic.staging_dir(out) as folder:
        file = None if gguf is None else GGUFFile(gguf)
        config, parameters = _source(file, hf_folder, random, seed)
        vocabulary = _write_tokenizer(folder, tokenizer or hf_folder, file, add_tokens)
        config = config if dtype == "auto" else replace(config, dtype=dtype)
        if vocabulary is not None:
            config = replace(config, vocab_size=max(config.vocab_size, vocabulary.size))
            parameters = _with_rows(parameters, config.vocab_size, vocabulary)
        hf.save(folder, config, parameters, config.dtype)
        if not (folder / "generation_config.json").exists():  # the source's own
            ids = {key: config.to_hf()[key] for key in ("bos_token_id", "eos_token_id")}
            known = {key: value for key, value in ids.items() if value is not None}
            atomic.write_json(folder / "generation_config.json", known)
        checksums.write(folder)
        folder.rename(out)
    return config, vocabulary


@torch.no_grad()
def _with_rows(parameters: Parameters, rows: int, vocabulary: Vocabulary) -> Parameters:
    """The parameters, embedding and head grown to `rows` rows: rows that are new and those of added tokens hold the
    fp32 mean of the rows that stood for known ids."""
    for name, weight in parameters:
        if name in VOCABULARY_PARAMETERS:
            grown = weight.new_empty(rows, weight.shape[1])
            grown[: len(weight)] = weight
            if fresh := [*range(len(weight), rows), *vocabulary.added.values()]:
                grown[fresh] = weight[: vocabulary.known].float().mean(dim=0).to(weight.dtype)
            weight = grown
        yield name, weight


def _source(
    gguf: GGUFFile | None, folder: Path | None, random: Path | None, seed: int
) -> tuple[ModelConfig, Parameters]:
    """The source's config, and its parameters by our names, one at a time."""
    if gguf is not None:
        return gguf.config, hf.read_parameters(gguf.tensors, gguf.config)
    if folder is not None:
        return hf.read_model(folder)
    assert random is not None
    config = ModelConfig.from_hf(_read_json(random), str(random))
    has_gb, wants_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 4 * config.num_parameters() / 1e9
    if wants_gb > has_gb:
        raise ConfigError(f"{random}: its model takes {wants_gb:,.0f} GB in float32, this machine has {has_gb:,.0f}")
    model = Transformer(config, ochat_kernels.load("reference"))
    model.initialize(seed)
    return config, iter(model.named_parameters())


def _write_tokenizer(
    folder: Path, origin: Path | None, gguf: GGUFFile | None, add_tokens: Sequence[str]
) -> Vocabulary | None:
    """Puts the tokenizer's files into `folder` and adds the tokens; None where a random model has no tokenizer."""
    if origin is not None:
        before = tokenizers.load(origin)
        _copy_tokenizer(origin, folder)
    elif gguf is not None:
        special = {f"{role}_token": gguf.special_token(role) for role in ("bos", "eos")}
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **special}
        if isinstance(template := gguf.metadata.get("tokenizer.chat_template"), str):
            settings["chat_template"] = template
        atomic.write_json(folder / "tokenizer.json", gguf.tokenizer_json())
        atomic.write_json(folder / "tokenizer_config.json", settings)
        before = tokenizers.load(folder)
    elif add_tokens:
        raise ConfigError("--add-token needs a tokenizer to add to: give one with --tokenizer PATH")
    else:
        return None
    after = tokenizers.load(folder, add_tokens)
    ids = {token: after.special_tokens[token] for token in add_tokens}
    _declare(folder, ids)
    assert tokenizers.load(folder).fingerprint() == after.fingerprint(), "the folder must give the ids that were added"
    new = {token: index for token, index in ids.items() if before.model.token_to_id(token) is None}
    return Vocabulary(before.vocab_size, after.vocab_size, new)


def _copy_tokenizer(source: Path, folder: Path) -> None:
    """A folder's tokenizer files, or one file under the name that its content asks for."""
    if source.is_file():
        is_json = source.read_bytes().lstrip().startswith(b"{")
        shutil.copyfile(source, folder / ("tokenizer.json" if is_json else "tokenizer.model"))
        return
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def _declare(folder: Path, ids: dict[str, int]) -> None:
    """Write the tokens where ochat and transformers look: tokenizer_config.json, and tokenizer.json if there is one."""
    if not ids:
        return
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    settings = _read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").exists() else {}
    entries = {str(index): {"content": token, **flags} for token, index in ids.items()}
    settings["added_tokens_decoder"] = settings.get("added_tokens_decoder", {}) | entries
    atomic.write_json(folder / "tokenizer_config.json", settings)
    if (folder / "tokenizer.json").exists():
        record = _read_json(folder / "tokenizer.json")
        kept = [entry for entry in record.get("added_tokens") or [] if entry["content"] not in ids]
        added = [{"id": index, "content": token, **flags} for token, index in ids.items()]
        record["added_tokens"] = sorted(kept + added, key=lambda entry: entry["id"])
        atomic.write_json(folder / "tokenizer.json", record)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return bounded_json.read_object(path, ConfigError, "fetch it again")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
