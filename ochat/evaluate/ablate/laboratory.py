"""An ablation's folder: data prepared once, a folder a run, what each run measured, and what the folder was begun with.

DIR/laboratory.json  data/{condition,plain}[-held-out]/  configs/RUN.toml  logs/RUN.log  runs/RUN/  results.jsonl
DIR/table.{json,md}

A run is done when runs/RUN/measured.json stands: it is written last, and whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from ochat import config as configuration
from ochat.config import ABLATE, Config
from ochat.data import input_files, prepare, shards
from ochat.data.dataset import TokenDataset
from ochat.errors import ConfigError
from ochat.evaluate.ablate import variants
from ochat.evaluate.ablate.variants import AblateConfig, Run
from ochat.files import atomic, bounded_json, checksums
from ochat.text import template as templates
from ochat.text.template import ConditionsMode

IDENTITY = "laboratory.json"
MEASURED = "measured.json"
MODES: dict[str, ConditionsMode] = {
    "condition": "both",
    "plain": "ignore",
}  # `ochat prepare --conditions` of each preparation
FREE = ("dir", "seeds", "variants", "subsample", "jobs", "keep_checkpoints")  # of [ablate]: they decide no number
FREE_SECTIONS = ("run", "checkpoint", "log", "samples")


class Laboratory:
    """The folder of one [ablate] section. Nothing is written before `open`."""

    def __init__(self, base: Config, options: AblateConfig) -> None:
        self.base, self.options, self.folder = base, options, Path(options.dir)
        self.runs = variants.runs(base, options)

    def open(self) -> None:
        """Makes the folder, or checks that it was begun alike; prepares what data is missing.

        Raises: ConfigError naming a setting or a file that is another than when the folder was begun, and a class that
        the data lacks; DataError for a bad record. Costs: reads the input once each time, for its checksums.
        """
        spoken = templates.load(self.options.template)
        if spoken.condition_roles == "none":
            raise ConfigError(
                f"{ABLATE}.template = {spoken.name!r}: its prefixes name no class, so none can be left out"
            )
        self._check_identity()
        for run in self.runs:
            self._prepare(run)
            self._check_classes(run)

    def check(self) -> None:
        """Raises: ConfigError where nothing was begun, and naming a setting that is another than when it was."""
        path = self.folder / IDENTITY
        if not path.is_file():
            raise ConfigError(f"{self.folder}: no laboratory was begun there")
        self._refuse_change(bounded_json.read_object(path, ConfigError, "choose another folder"), self._settings())

    def config_file(self, run: Run) -> Path:
        """The run's configuration, written anew: what `ochat train` gets."""
        path = self.folder / "configs" / f"{run.name}.toml"
        path.parent.mkdir(exist_ok=True)
        atomic.write_text(path, configuration.dump(run.config))
        return path

    def log_file(self, run: Run) -> Path:
        """What the run's processes print."""
        path = self.folder / "logs" / f"{run.name}.log"
        path.parent.mkdir(exist_ok=True)
        return path

    def data(self, run: Run, *, is_held_out: bool = False) -> Path:
        """The prepared set that a run reads, or is measured on."""
        path = variants.data_folder(self.options, self.base, run.seed, run.variant.data)
        return path.with_name(path.name + prepare.HELD_OUT) if is_held_out else path

    def measured(self, run: Run) -> Path:
        """The file with a finished run's numbers, as `ochat eval --output` writes it."""
        return Path(run.config.run.dir) / MEASURED

    def todo(self) -> list[Run]:
        """The runs that have not been measured."""
        return [run for run in self.runs if not self.measured(run).is_file()]

    def close(self, run: Run) -> None:
        """Removes a measured run's checkpoints, unless they are to stay."""
        if not self.options.keep_checkpoints:
            shutil.rmtree(Path(run.config.run.dir) / "checkpoints", ignore_errors=True)
            (Path(run.config.run.dir) / "latest").unlink(missing_ok=True)

    def results(self) -> list[dict[str, Any]]:
        """A record of each measured run, in order; results.jsonl holds the same, a line each."""
        found = [self._result(run) for run in self.runs if self.measured(run).is_file()]
        lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in found)
        atomic.write_text(self.folder / "results.jsonl", "".join(lines))
        return found

    def _result(self, run: Run) -> dict[str, Any]:
        measured = bounded_json.read_object(self.measured(run), ConfigError, "remove it, and the run is made again")
        last = last_step(Path(run.config.run.dir))
        return {
            "run": run.name,
            "variant": run.variant.name,
            "title": run.variant.title,
            "seed": run.seed,
            "steps": last.get("step"),
            "loss": last.get("loss"),
            "conditions": measured["conditions"],
            "interval": measured["interval"],
            "classes": measured["classes"],
        }

    def _prepare(self, run: Run) -> None:
        """The run's training and held-out sets, from files or by holding out a share."""
        output, held_out = self.data(run), self.data(run, is_held_out=True)
        if all((folder / shards.MANIFEST).is_file() for folder in (output, held_out)):
            return
        output.parent.mkdir(parents=True, exist_ok=True)
        files, share = variants.held_out(self.options)
        self._prepare_one(run, self.options.input, output, share)
        if files:
            self._prepare_one(run, files, held_out)

    def _prepare_one(self, run: Run, inputs: Sequence[str], output: Path, share: float = 0.0) -> None:
        prepare.run(
            prepare.PrepareOptions(
                tuple(variants.of_seed(name, run.seed) for name in inputs),
                run.config.base.path,
                self.options.template,
                str(output),
                context=self.options.context,
                conditions=MODES[run.variant.data],
                held_out=share,
                overwrite=True,
            )
        )

    def _check_classes(self, run: Run) -> None:
        for is_held_out in (False, True):
            path = self.data(run, is_held_out=is_held_out)
            names = TokenDataset(path).class_names
            for key in ("expert", "suboptimal"):
                name = getattr(self.options, key)
                if name not in names and not (is_held_out and key == "suboptimal"):
                    known = ", ".join(map(repr, names))
                    raise ConfigError(f"{ABLATE}.{key} = {name!r}: {path} has no such class; it has {known}")

    def _check_identity(self) -> None:
        """Raises: ConfigError naming the first thing that is not as it was; what is new is added. While no run has made
        a step, nothing is lost by another setting: the data is prepared anew."""
        path, now = self.folder / IDENTITY, self._identity()
        self.folder.mkdir(parents=True, exist_ok=True)
        was = bounded_json.read_object(path, ConfigError, "choose another folder") if path.is_file() else {}
        try:
            self._refuse_change(was, now)
        except ConfigError:
            if any(self.folder.glob("runs/*/metrics.jsonl")):
                raise
            shutil.rmtree(self.folder / "data", ignore_errors=True)
            was = {}
        if now != was:
            atomic.write_json(path, was | now)

    def _refuse_change(self, was: dict[str, Any], now: dict[str, Any]) -> None:
        for name, value in was.items():
            if name in now and now[name] != value:
                raise ConfigError(
                    f"{name} is {now[name]!r}, and was {value!r} when {self.folder} was begun: its runs would not "
                    f"compare. Put it back, or choose another {ABLATE}.dir"
                )

    def _identity(self) -> dict[str, Any]:
        """Everything that a number of a run depends on, as name -> value."""
        found = self._settings()
        for seed in self.options.seeds:
            texts = (*self.options.input, *variants.held_out(self.options)[0])
            for path in (variants.of_seed(text, seed) for text in texts):
                found.setdefault(f"the content of {path}", _content(path))
            base = self.base.base.path
            whose = f" of seed {seed}" if variants.SEED in base else ""
            found.setdefault(f"the checksum of the base{whose}", _weights(Path(variants.of_seed(base, seed))))
        return found

    def _settings(self) -> dict[str, Any]:
        base = msgspec.structs.replace(self.base, base=configuration.BaseConfig(""))
        found: dict[str, Any] = {}
        for section, values in msgspec.to_builtins(base).items():
            if section not in FREE_SECTIONS:
                found |= {f"{section}.{key}": value for key, value in values.items()}
        found |= {
            f"{ABLATE}.{key}": value for key, value in msgspec.structs.asdict(self.options).items() if key not in FREE
        }
        return json.loads(json.dumps(found))  # as it is read back


def _content(path: str) -> str:
    """A checksum of the files that an input names. Costs: reads them, about 1 s a GB."""
    return _digest({str(file): atomic.sha256(file) for file in input_files.find([path]).paths})


def _weights(folder: Path) -> str:
    """A checksum of the checksums in a base's folder; without any, of its files' sizes."""
    known = checksums.expected(folder) or {path: path.stat().st_size for path in folder.glob("*.safetensors")}
    return _digest({path.name: value for path, value in known.items()})


def _digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def last_step(folder: Path, tail_bytes: int = 1 << 16) -> dict[str, Any]:
    """The newest whole line of a run's metrics; {} where there is none yet."""
    try:
        with (folder / "metrics.jsonl").open("rb") as file:
            begin = max(0, file.seek(0, os.SEEK_END) - tail_bytes)
            file.seek(begin)
            lines = file.read().splitlines(keepends=True)[begin > 0 :]  # the first may have begun before
    except FileNotFoundError:
        return {}
    whole = [line for line in lines if line.endswith(b"\n")]
    return json.loads(whole[-1]) if whole else {}
