"""`ochat init-base --hf models/llama bases/llama --add-token "<|end_of_turn|>"`: make a base model's folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ochat.console import next_command, stdout, waiting
from ochat.errors import ConfigError


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


def main(options: InitBaseOptions) -> None:
    """Writes the folder and prints what is in it. Raises: ConfigError, CheckpointError, OSError."""
    given = [name for name in ("gguf", "hf", "random") if getattr(options, name) is not None]
    if len(given) != 1:
        raise ConfigError(f"give exactly one of --gguf, --hf and --random, not {len(given)}")
    from ochat.model.init_base import make_base

    with waiting("reading, checking and writing"):
        config, vocabulary = make_base(
            options.out,
            gguf=options.gguf,
            hf_folder=options.hf,
            random=options.random,
            add_tokens=options.add_token,
            tokenizer=options.tokenizer,
            seed=options.seed,
            dtype=options.dtype,
        )
    lines = [
        f"{options.out}: {config.model_type}, {config.num_parameters():,} parameters in {config.dtype}, "
        f"{config.vocab_size:,} embedding rows"
    ]
    if vocabulary is None:
        lines.append("no tokenizer was given (--tokenizer PATH): the folder cannot prepare data")
    else:
        for token in options.add_token:
            is_new = token in vocabulary.added
            lines.append(f"{token} {f'added as id {vocabulary.added[token]}' if is_new else 'was there already, kept'}")
    for line in lines:
        stdout.print(line, markup=False, soft_wrap=True)
    if vocabulary is not None:
        held_out = ("--output", "data/train", "--held-out", "0.02")
        next_command("ochat prepare --input CHATS.jsonl --template NAME", "--base", options.out, *held_out)
