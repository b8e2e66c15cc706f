"""The folder of an ablation: data that is prepared once, one folder per run, and what each run measured.

DIR/ablation.json  data/{condition,plain}[-held-out]/  configs/RUN.toml  logs/RUN.log  runs/RUN/  results.jsonl
DIR/table.{json,md}

ablation.json holds the settings and checksums that the folder was begun with. A run is done once runs/RUN/measured.json
exists: it is written last, in one atomic write.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import msgspec

from ochat import config as configuration
from ochat.config import ABLATE, Config
from ochat.data import prepare
from ochat.data.dataset import TokenDataset
from ochat.data.inputs import find_inputs
from ochat.data.manifest import MANIFEST
from ochat.errors import ConfigError
from ochat.evaluate.ablate import variants
from ochat.evaluate.ablate.job_runner import Job, cuda_devices, run_jobs, slots
from ochat.evaluate.ablate.variants import AblateConfig, Run
from ochat.files import atomic, bounded_json, checksums, jsonl
from ochat.overrides import expect
from ochat.run import layout
from ochat.run.lock import folder_lock
from ochat.text import template as templates

log = logging.getLogger(__name__)
IDENTITY, OLD_IDENTITY = "ablation.json", "laboratory.json"
MEASURED = "measured.json"
FREE_SECTIONS = ("run", "checkpoint", "log", "samples")  # which change no number
FREE_KEYS = [f"{ABLATE}.{key}" for key in ("dir", "seeds", "variants", "subsample", "jobs", "keep_checkpoints")]


class AblationDir:
    """The folder of one [ablate] section. Nothing is written before `open`."""

    def __init__(self, base: Config, options: AblateConfig) -> None:
        self.base, self.options, self.folder = base, options, Path(options.dir)
        self.runs = variants.runs(base, options)

    def open(self) -> None:
        """Make the folder, or check that it was begun with the same settings and files; prepare the data that is
        missing.

        Raises: ConfigError naming a setting or a file that has changed since the folder was begun, and a class that the
        data lacks; DataError for a bad record. Costs: reads the input once each time, for its checksums.
        """
        name, why = self.options.template, "one whose prefixes name a class, which can be left out"
        expect(templates.load(name).condition_roles != "none", f"{ABLATE}.template", name, why)
        self._check_identity()
        for run in self.runs:
            self._prepare(run)
            for path, keys in ((run.data, ("expert", "suboptimal")), (held_out(run), ("expert",))):
                known = TokenDataset(path).class_names
                for key in keys:
                    name, why = getattr(self.options, key), f"a class of {path}: {', '.join(map(repr, known))}"
                    expect(name in known, f"{ABLATE}.{key}", name, why)

    def check(self) -> None:
        """Raises: ConfigError where nothing was begun, and naming a setting that has changed since."""
        if not (was := self._begun()):
            raise ConfigError(f"{self.folder}: no ablation was begun there")
        self._refuse_change(was, self._settings())

    def run(self) -> list[Job]:
        """Train and measure every run that is not done; the jobs that failed. Raises: as `open`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with folder_lock(self.folder, f"--{ABLATE}.dir"):
            self.open()
            todo = [run for run in self.runs if not (run.folder / MEASURED).is_file()]
            counts = len(self.runs), self.base.data.max_steps, len(todo), self.options.jobs
            log.info("%s: %d runs of %d steps, %d to do, %d at a time", self.folder, *counts)
            devices = [] if self.base.train.device == "cpu" else cuda_devices()
            jobs = [self._job(run, "cuda" if devices else "cpu") for run in todo]
            return run_jobs(jobs, slots(self.options.jobs, devices))

    def results(self) -> list[dict[str, Any]]:
        """A record of each measured run, in order; results.jsonl holds the same, a line each."""
        found = []
        for run in self.runs:
            if (path := run.folder / MEASURED).is_file():
                measured = bounded_json.read_object(path, ConfigError, "remove it, and the run is made again")
                last = last_step(run.folder)
                record = {"run": run.name, "variant": run.variant.name, "title": run.variant.title, "seed": run.seed}
                record |= {"steps": last.get("step"), "loss": last.get("loss")}
                found.append(record | {key: measured[key] for key in ("conditions", "interval", "classes")})
        lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in found)
        atomic.write_text(self.folder / "results.jsonl", "".join(lines))
        return found

    def _job(self, run: Run, device: str) -> Job:
        """The run's two programs: the trainer, and `ochat eval` of the result."""
        options = self.options
        config, output = self.folder / "configs" / f"{run.name}.toml", self.folder / "logs" / f"{run.name}.log"
        for path in (config, output):
            path.parent.mkdir(exist_ok=True)
        atomic.write_text(config, configuration.dump(run.config))
        conditions = [options.expert, options.suboptimal] if run.variant.has_condition else []
        measure = [
            *("-m", "ochat", "eval", str(run.folder), str(held_out(run))),
            *(f"--conditions={name}" for name in conditions),
            *(() if options.limit is None else (f"--limit={options.limit}",)),
            *(f"--dtype={run.config.train.dtype}", f"--device={device}"),
            f"--output={run.folder / MEASURED}",
        ]

        def finish() -> None:
            if not options.keep_checkpoints:
                shutil.rmtree(run.folder / layout.CHECKPOINTS, ignore_errors=True)
                (run.folder / layout.LATEST).unlink(missing_ok=True)

        programs, steps = [("-m", "ochat.train", str(config)), measure], run.config.data.max_steps
        return Job(run.name, programs, output, steps, lambda: last_step(run.folder).get("step", 0), finish)

    def _prepare(self, run: Run) -> None:
        """The run's training and held-out sets, from files or by holding out a share."""
        if all((folder / MANIFEST).is_file() for folder in (run.data, held_out(run))):
            return
        run.data.parent.mkdir(parents=True, exist_ok=True)
        files, share = variants.held_out(self.options)
        for inputs, folder, part in ((self.options.input, run.data, share), (files, held_out(run), 0.0)):
            if inputs:
                prepare.prepare(
                    [variants.of_seed(name, run.seed) for name in inputs],
                    run.config.base.path,
                    self.options.template,
                    folder,
                    context=self.options.context,
                    conditions="both" if run.variant.has_condition else "ignore",
                    held_out=part,
                    overwrite=True,
                )

    def _begun(self) -> dict[str, Any]:
        """What the folder was begun with; {} for a new one."""
        found = next((self.folder / name for name in (IDENTITY, OLD_IDENTITY) if (self.folder / name).is_file()), None)
        return {} if found is None else bounded_json.read_object(found, ConfigError, "choose another folder")

    def _check_identity(self) -> None:
        """Record settings and checksums. Raises: ConfigError naming the first that has changed. Before the first step
        of the first run any change is allowed, and the data is prepared again."""
        now = self._identity()
        self.folder.mkdir(parents=True, exist_ok=True)
        was = self._begun()
        try:
            self._refuse_change(was, now)
        except ConfigError:
            if any(self.folder.glob(f"runs/*/{layout.METRICS}")):
                raise
            shutil.rmtree(self.folder / "data", ignore_errors=True)
            was = {}
        if now != was:
            atomic.write_json(self.folder / IDENTITY, was | now)

    def _refuse_change(self, was: dict[str, Any], now: dict[str, Any]) -> None:
        for name, value in was.items():
            if now.get(name, value) != value:
                raise ConfigError(
                    f"{name} is {now[name]!r}, and was {value!r} when {self.folder} was begun: its runs would not "
                    f"compare. Put it back, or choose another {ABLATE}.dir"
                )

    def _identity(self) -> dict[str, Any]:
        """Everything that a number of a run depends on, as name -> value."""
        found, base = self._settings(), self.base.base.path
        for seed in self.options.seeds:
            texts = (*self.options.input, *variants.held_out(self.options)[0])
            for path in (variants.of_seed(text, seed) for text in texts):
                if (name := f"the content of {path}") not in found:
                    found[name] = _content(path)
            whose = f" of seed {seed}" if variants.SEED in base else ""
            found[f"the checksum of the base{whose}"] = _weights(Path(variants.of_seed(base, seed)))
        return found

    def _settings(self) -> dict[str, Any]:
        base = msgspec.structs.replace(self.base, base=configuration.BaseConfig(""))
        sections = msgspec.to_builtins(base) | {ABLATE: msgspec.structs.asdict(self.options)}
        found = {
            name: value
            for section, values in sections.items()
            for key, value in values.items()
            if section not in FREE_SECTIONS and (name := f"{section}.{key}") not in FREE_KEYS
        }
        return json.loads(json.dumps(found))  # as it is read back


def held_out(run: Run) -> Path:
    """The prepared set that a run is measured on."""
    return run.data.with_name(run.data.name + prepare.HELD_OUT)


def last_step(folder: Path, tail_bytes: int = 1 << 16) -> dict[str, Any]:
    """The newest whole line of a run's metrics; {} where there is none yet. Reads the file's last `tail_bytes`."""
    path = folder / layout.METRICS
    if not path.is_file():
        return {}
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - tail_bytes))
        lines = file.read().split(b"\n")[:-1]
    return next((line for text in reversed(lines) if (line := jsonl.parse_line(text)) is not None), {})


def _content(path: str) -> str:
    """A checksum of the files that an input names. Costs: reads them, about 1 s a GB."""
    return _digest({str(file): checksums.sha256(file) for file in find_inputs([path]).paths})


def _weights(folder: Path) -> str:
    """A checksum of the checksums in a base's folder; without any, of its files' sizes."""
    known = checksums.expected(folder) or {path: path.stat().st_size for path in folder.glob("*.safetensors")}
    return _digest({path.name: value for path, value in known.items()})


def _digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]
