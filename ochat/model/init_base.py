"""Make a base model's folder from a GGUF file, from a Hugging Face folder, or at random; add tokens where asked.

    ochat init-base --hf models/llama --add-token "<|end_of_turn|>" bases/llama
An added token gets the tokenizer's next free id; its embedding (and its row of an untied head) is the mean of the rows
that the tokenizer had before. A token that is there keeps its id and its row.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import ochat_kernels
import torch
from rich.console import Console

from ochat.console import waiting
from ochat.errors import ConfigError
from ochat.files import atomic, bounded_json, checksums
from ochat.files.staging import partial_folder
from ochat.model import hf
from ochat.model.config import ModelConfig
from ochat.model.gguf import GGUFFile
from ochat.model.safetensors_files import TensorFiles, check_finite
from ochat.model.transformer import Transformer
from ochat.text import tokenizer as tokenizers

# what a folder may hold beside weights and config.json that belongs to its tokenizer or to generation
TOKENIZER_FILES = (
    "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "generation_config.json",
)  # fmt: skip
VOCABULARY_PARAMETERS = ("embed.weight", "head.weight")


@dataclass(frozen=True)
class InitBaseOptions:
    """Makes a base model's folder from one of --gguf, --hf and --random."""

    out: Path  # the folder to write; it must not exist, or be empty
    gguf: Path | None = None  # a GGUF file of the llama architecture: dequantised, its tokenizer rebuilt
    hf: Path | None = None  # a Hugging Face folder with config.json, safetensors and a tokenizer
    random: Path | None = None  # a config.json: weights are drawn at random, as for training from nothing
    add_token: tuple[str, ...] = ()  # a special token that the template needs, such as "<|end_of_turn|>"
    tokenizer: Path | None = None  # a tokenizer's folder or file, instead of the source's own
    seed: int = 0  # decides what --random draws
    # of the stored weights; auto: as the source's config says, bfloat16 for GGUF
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"


@dataclass(frozen=True)
class Source:
    """A model to be written: its config and its parameters by our names, one at a time."""

    config: ModelConfig
    parameters: Iterable[tuple[str, torch.Tensor]]


def main(options: InitBaseOptions) -> None:
    """Write `options.out`, whole or not at all, and say what is in it.

    Memory: one tensor at a time, apart from --random. SHA256SUMS of --hf is compared and one of the new folder written:
    each reads the weights once more. Raises ConfigError for options, settings or a tokenizer that
    cannot be honoured, CheckpointError for damaged weights.
    """
    given = [name for name in ("gguf", "hf", "random") if getattr(options, name) is not None]
    if len(given) != 1:
        raise ConfigError(f"give exactly one of --gguf, --hf and --random, not {len(given)}")
    if options.out.exists() and not (options.out.is_dir() and not any(options.out.iterdir())):
        raise ConfigError(f"{options.out}: exists already; remove it or name another folder")
    with waiting("reading, checking and writing"), partial_folder(options.out) as folder:
        gguf = None if options.gguf is None else GGUFFile(options.gguf)
        source = _source(options, gguf)
        tokens = _write_tokenizer(options, gguf, folder)
        source = _with_vocabulary(source, tokens, options)
        hf.save(folder, source.config, source.parameters, source.config.dtype)
        _write_generation_config(folder, source.config)
        checksums.write(folder)
        folder.rename(options.out)
    _report(options, source.config, tokens)


@dataclass(frozen=True)
class Vocabulary:
    """The tokenizer's ids before and after adding: `known` ids were there, `added` maps new tokens to theirs."""

    known: int
    size: int
    added: dict[str, int]


@torch.no_grad()
def grow(weight: torch.Tensor, rows: int, vocabulary: Vocabulary) -> torch.Tensor:
    """weight (V, H) with at least `rows` rows, in its dtype: rows beyond V and those of added tokens hold the fp32 mean
    of the rows that stood for known ids."""
    before, width = weight.shape
    grown = weight.new_empty(max(rows, before), width)
    grown[:before] = weight
    fresh = [*range(before, len(grown)), *vocabulary.added.values()]
    if fresh:
        grown[fresh] = weight[: vocabulary.known].float().mean(dim=0).to(weight.dtype)
    return grown


def _source(options: InitBaseOptions, gguf: GGUFFile | None) -> Source:
    if options.random is not None:
        config = ModelConfig.from_hf(_read_json(options.random), str(options.random))
        _check_memory(config, options.random)
        model = Transformer(config, ochat_kernels.load("reference"))
        model.initialize(options.seed)
        return Source(config, model.named_parameters())
    if gguf is not None:
        files = gguf
        config = ModelConfig.from_hf(gguf.config() | {"dtype": "bfloat16"}, str(options.gguf))
    else:
        assert options.hf is not None
        config = ModelConfig.load(options.hf)
        files = hf.read_tensors(options.hf, config)
        checksums.compare(checksums.expected(options.hf))
    return Source(config, _parameters(files, config))


def _check_memory(config: ModelConfig, path: Path) -> None:
    has_gb, wants_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 4 * config.num_parameters() / 1e9
    if wants_gb > has_gb:
        raise ConfigError(f"{path}: its model takes {wants_gb:,.0f} GB in float32, this machine has {has_gb:,.0f}")


def _parameters(files: GGUFFile | TensorFiles, config: ModelConfig) -> Iterator[tuple[str, torch.Tensor]]:
    for name, parts in hf.parameter_parts(config).items():
        read = [check_finite(files.read(part.name), files.location(part.name)) for part in parts]
        yield name, torch.cat(read)


def _with_vocabulary(source: Source, vocabulary: Vocabulary | None, options: InitBaseOptions) -> Source:
    """The source with rows for every id of the tokenizer, in the dtype asked for."""
    config = source.config if options.dtype == "auto" else replace(source.config, dtype=options.dtype)
    if vocabulary is None:
        return replace(source, config=config)
    rows = max(config.vocab_size, vocabulary.size)
    parameters = ((name, grow(tensor, rows, vocabulary) if name in VOCABULARY_PARAMETERS else tensor)
                  for name, tensor in source.parameters)  # fmt: skip
    return Source(replace(config, vocab_size=rows), parameters)


def _write_tokenizer(options: InitBaseOptions, gguf: GGUFFile | None, folder: Path) -> Vocabulary | None:
    """Put the tokenizer's files into `folder`, add the tokens; None where a random model has no tokenizer."""
    origin = options.tokenizer or options.hf
    if origin is None and gguf is None:
        if options.add_token:
            raise ConfigError("--add-token needs a tokenizer to add to: give one with --tokenizer PATH")
        return None
    if origin is not None:
        before = tokenizers.load(origin)
        _copy_tokenizer(origin, folder)
    else:
        assert gguf is not None
        _rebuild_tokenizer(gguf, folder)
        before = tokenizers.load(folder)
    after = tokenizers.load(folder, options.add_token)
    ids = {token: after.special_tokens[token] for token in options.add_token}
    _declare(folder, ids)
    assert tokenizers.load(folder).fingerprint() == after.fingerprint(), "the folder must give the ids that were added"
    new = {token: index for token, index in ids.items() if before.token_id(token) is None}
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


def _rebuild_tokenizer(file: GGUFFile, folder: Path) -> None:
    special = {f"{role}_token": file.special_token(role) for role in ("bos", "eos")}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **special}
    atomic.write_json(folder / "tokenizer.json", file.tokenizer_json())
    atomic.write_json(folder / "tokenizer_config.json", settings)


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


def _write_generation_config(folder: Path, config: ModelConfig) -> None:
    """The source's own, else the ids that start and stop."""
    path, record = folder / "generation_config.json", config.to_hf()
    if not path.exists():
        atomic.write_json(
            path, {key: record[key] for key in ("bos_token_id", "eos_token_id") if record[key] is not None}
        )


def _report(options: InitBaseOptions, config: ModelConfig, vocabulary: Vocabulary | None) -> None:
    console = Console(soft_wrap=True)
    console.print(f"{options.out}: {config.model_type}, {config.num_parameters():,} parameters in {config.dtype}, "
                  f"{config.vocab_size:,} embedding rows", markup=False, highlight=False)  # fmt: skip
    if vocabulary is None:
        console.print("no tokenizer was given (--tokenizer PATH): the folder cannot prepare data", highlight=False)
        return
    for token in options.add_token:
        what = f"added as id {vocabulary.added[token]}" if token in vocabulary.added else "was there, kept as it is"
        console.print(f"{token} {what}", markup=False, highlight=False)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return bounded_json.read_object(path, ConfigError, "fetch it again")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
