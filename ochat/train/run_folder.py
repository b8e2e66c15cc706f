"""A run's folder: it is made, checked and described here, before the model is loaded.

RUN/config.toml  metrics.jsonl  eval.jsonl  samples.jsonl  checkpoints/step_N/  export/
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ochat import config as configuration
from ochat.config import Config
from ochat.data.dataset import TokenDataset
from ochat.data.loader import Loader
from ochat.errors import ConfigError
from ochat.model.config import ModelConfig
from ochat.train import checkpoint
from ochat.train.parallel import Ranks

CONFIG = "config.toml"


def open_folder(config: Config, ranks: Ranks) -> Path:
    """The run folder with the resolved configuration in it; ConfigError if it cannot be written or holds another
    run."""
    folder = Path(config.run.dir)
    if ranks.is_first:
        _refuse_overwriting(folder, config)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _write(folder / CONFIG, configuration.dump(config))
        except OSError as error:
            raise ConfigError(f"run.dir = {config.run.dir!r}: cannot be written: {error}") from None
    return folder


def identity(model: ModelConfig, data: TokenDataset, tokenizer: Any) -> dict[str, Any]:
    """What a checkpoint must share with the run that continues from it; ConfigError if data and tokenizer do not
    belong together."""
    if data.manifest["tokenizer"]["fingerprint"] != tokenizer.fingerprint():
        raise ConfigError(
            f"{data.path}: prepared with another tokenizer than base.path holds; run `ochat prepare` with this base"
        )
    shape = {key: value for key, value in asdict(model).items() if key != "dtype"}
    return {
        "model": hashlib.sha256(json.dumps(shape, sort_keys=True, default=str).encode()).hexdigest()[:16],
        "template": data.template.name,
        "data set": data.fingerprint,
    }


def blame(loader: Loader, step: int) -> str:
    """The bins of this rank in `step` and where their conversations stand in the input files."""
    places = [[loader.dataset.place(i) for i in batch.sequences] for batch in loader.step(step)]
    bins = "; ".join(
        f"bin {loader.rank + loader.world * i}: {', '.join(p[:4])}{' ...' * (len(p) > 4)}" for i, p in enumerate(places)
    )
    return f"rank {loader.rank}'s {bins}"


def append(path: Path, lines: list[dict[str, Any]]) -> None:
    """Adds JSON lines to a file of the run."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def _refuse_overwriting(folder: Path, config: Config) -> None:
    if config.run.resume == "never" and checkpoint.complete(folder):
        raise ConfigError(
            f"run.dir = {config.run.dir!r} holds checkpoints of another run and run.resume is 'never': "
            "choose another --run.dir, or remove that folder"
        )


def _write(path: Path, text: str) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8", newline="")
    os.replace(temporary, path)
