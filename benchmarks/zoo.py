"""Compare every `config.json` of a folder with transformers: is it accepted, and are the logits of a small model equal?

    python -m benchmarks.zoo FOLDER [--out zoo.csv]

Of an accepted configuration a tiny variant is made: sizes, windows and trained lengths shrink, every other setting
stays as it is spelled. transformers draws and saves the weights; both compute documents alone and packed. The error in
fp32 is the largest difference over the largest logit; in bfloat16 the root mean square of either's from transformers'
fp32.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from rich.table import Table

from benchmarks.csv_file import CsvFile
from ochat.console import stdout
from ochat.errors import ConfigError
from ochat.model import families, hf
from ochat.model.config import ModelConfig

LENGTHS = (40, 1, 11, 23)  # on both sides of the windows and of the trained length
WINDOW, CONTEXT, LAYERS, VOCABULARY = 6, 16, 7, 131
FP32, SLACK = 2e-5, 1.5  # what is allowed: of the scale; times transformers' own error in bfloat16
COLUMNS = (
    "date",
    "torch",
    "transformers",
    "config",
    "model_type",
    "accepted",
    "parameters",
    "fp32",
    "bf16",
    "bf16_transformers",
    "says",
)


class PeerError(Exception):
    """transformers refuses a configuration."""


class Errors(NamedTuple):
    """Largest differences from transformers in fp32, over the largest logit."""

    fp32: float
    bf16: float
    bf16_transformers: float

    @property
    def is_equal(self) -> bool:
        return self.fp32 <= FP32 and self.bf16 <= SLACK * self.bf16_transformers


def tiny_record(given: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    """A config.json of the text model, as it is spelled, but for its sizes; `config`: what we read of it."""
    heads = min(config.num_heads, 4)
    group = config.num_heads // config.num_kv_heads
    layers = min(config.num_layers, LAYERS)
    record: dict[str, Any] = copy.deepcopy(dict(families.text_record(given))) | {
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": max(heads // group, 1),
        "hidden_size": heads * config.head_dim,  # some families have no other head dim
        "head_dim": config.head_dim,
        "intermediate_size": 56,
        "vocab_size": VOCABULARY,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    for key in ("layer_types", "no_rope_layers"):
        if record.get(key):
            record[key] = record[key][:layers]
    if any(config.windows):
        record["sliding_window"] = WINDOW
    if "max_window_layers" in record:
        record["max_window_layers"] = min(record["max_window_layers"], 2)
    tables = [record, record.get("rope_scaling"), parameters := record.get("rope_parameters") or {}]
    for table in [*tables, *parameters.values()]:
        if isinstance(table, dict) and "original_max_position_embeddings" in table:
            table["original_max_position_embeddings"] = CONTEXT
    return record


def compare(record: dict[str, Any], folder: Path) -> Errors:
    """Both libraries' logits of a random model with this config.json, written into `folder`."""
    (folder / "config.json").write_text(json.dumps(record))
    try:
        theirs = transformers.AutoConfig.from_pretrained(folder)
    except (KeyError, ValueError) as error:
        raise PeerError(f"transformers cannot read it: {error}") from error
    torch.manual_seed(0)
    peer = transformers.AutoModelForCausalLM.from_config(theirs, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in peer.parameters():
            scale = 1.0 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5
            parameter.copy_(torch.randn(parameter.shape) * scale * 0.5 + (parameter.dim() == 1))
    peer.save_pretrained(folder)
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in LENGTHS]

    def peer_logits() -> torch.Tensor:
        with torch.no_grad():
            return torch.cat([peer(torch.tensor([each])).logits[0].float() for each in ids])

    def our_logits(dtype: str) -> list[torch.Tensor]:
        model = hf.load(folder, dtype=dtype)
        return [torch.cat(model.logits(ids)), torch.cat([model.logits([each])[0] for each in ids])]

    truth = peer_logits()
    scale = truth.abs().max()
    peer.bfloat16()
    halves = [*our_logits("bfloat16"), peer_logits()]
    exact = max(float((ours - truth).abs().max() / scale) for ours in our_logits("float32"))
    rounded = [float((half - truth).square().mean().sqrt() / scale) for half in halves]
    return Errors(exact, max(rounded[:2]), rounded[2])


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table; exits with 1 where an accepted model differs."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.zoo", description="configurations of a folder against transformers"
    )
    parser.add_argument("folder", type=Path, help="with one JSON file a model")
    parser.add_argument("--out", type=Path, help="a CSV for the same rows")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # for models so small more only wait for each other
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    rows = None if options.out is None else CsvFile(options.out, COLUMNS)
    table = Table(title=f"{options.folder} against transformers {transformers.__version__}", title_justify="left")
    for name in ("config", "model_type", "fp32", "bf16", "bf16 of transformers", "says"):
        table.add_column(name, justify="right" if "16" in name or "32" in name else "left")
    differ = accepted = 0
    for path in sorted(options.folder.glob("*.json")):
        found, says, errors = json.loads(path.read_text()), "", None
        try:
            config = ModelConfig.from_hf(found, path.name)
        except ConfigError as refusal:
            config, says = None, str(refusal)
        if config is not None:
            with tempfile.TemporaryDirectory() as folder:
                try:
                    errors = compare(tiny_record(found, config), Path(folder))
                except PeerError as refusal:
                    says = str(refusal)
        accepted += errors is not None
        differ += errors is not None and not errors.is_equal
        numbers = ("", "", "") if errors is None else tuple(f"{each:.1e}" for each in errors)
        says = says or ("equal" if errors is not None and errors.is_equal else "DIFFERENT")
        table.add_row(path.stem, str(found.get("model_type")), *numbers, says)
        if rows is not None:
            count = "" if config is None else config.num_parameters()
            versions = (datetime.now(UTC).date(), torch.__version__, transformers.__version__)
            values = (*versions, path.stem, found.get("model_type"), errors is not None, count, *numbers, says)
            rows.add(dict(zip(COLUMNS, values, strict=True)))
    stdout.print(table)
    stdout.print(
        f"{accepted} accepted, {accepted - differ} of them equal; all others are refused, by us or by transformers"
    )
    raise SystemExit(differ > 0)


if __name__ == "__main__":
    main()
