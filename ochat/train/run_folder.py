"""A run's folder: it is made, checked and described here, before the model is loaded.

RUN/config.toml  config.until_step_N.toml  plan.json  metrics.jsonl  eval.jsonl  samples.jsonl  bad_steps.jsonl
    checkpoints/step_N/  latest  export/  .lock
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ochat import disk
from ochat.config import Config
from ochat.data.dataset import TokenDataset
from ochat.data.loader import Loader
from ochat.data.template import Template
from ochat.data.tokenizer import Tokenizer
from ochat.errors import ConfigError
from ochat.model.config import ModelConfig
from ochat.train import checkpoint, folder_lock, serving
from ochat.train.bad_steps import Bins
from ochat.train.folder_lock import FolderLock
from ochat.train.parallel import Ranks

PLAN = "plan.json"
PLAN_POINTS = 1000  # of the balance of an epoch's steps
BAD_STEPS = "bad_steps.jsonl"
PROBE_BYTES = 1 << 16
LINES = ("metrics.jsonl", "eval.jsonl", "samples.jsonl", BAD_STEPS)


@contextmanager
def claim(config: Config, ranks: Ranks, warn: Callable[[str], None]) -> Iterator[Config]:
    """The configuration with run.dir as the first rank's working directory resolves it; the folder is made where it is
    missing, and locked.

    Raises: ConfigError where it cannot be written, another process works in it, it holds another run, or a rank sees
    another folder there; on the other ranks a silent SystemExit, so that one voice says so.
    """
    with ExitStack() as held:
        mine = _take(config, warn, held) if ranks.is_first else {}
        first = ranks.exchange(mine)[0]
        _agree(ranks, first.get("problem", ""))
        folder = Path(first["folder"])
        seen = folder_lock.is_seen(folder, first["token"]) if not ranks.is_first else True
        there = ranks.exchange({"seen": seen, "host": socket.gethostname()})
        _agree(ranks, next((_unseen(folder, r["host"], there[0]["host"]) for r in there if not r["seen"]), ""))
        yield replace(config, run=replace(config.run, dir=str(folder)))


def describe(folder: Path, template: Template, tokenizer: Tokenizer, classes: tuple[str, ...]) -> None:
    """Writes the serving files; called once the run is known to go on."""
    shutil.rmtree(folder / serving.FOLDER, ignore_errors=True)
    serving.write(folder / serving.FOLDER, template, tokenizer, classes)


def write_plan(folder: Path, loader: Loader, facts: dict[str, str]) -> None:
    """Writes what the run is going to do: its steps, how they are packed, and the facts that it announces.

    `imbalance`: max over mean work among the bins of a step, of the first epoch's steps but the last, the worst of each
    `steps_each` of them.
    """
    stats, imbalance = loader.stats(), loader.plan(0).cost_imbalance()
    each = max(math.ceil(len(imbalance) / PLAN_POINTS), 1)
    worst = [float(imbalance[first : first + each].max()) for first in range(0, len(imbalance), each)]
    record = {
        "num_steps": stats.num_steps,
        "steps_per_epoch": list(stats.steps_per_epoch),
        "fill": stats.fill,
        "imbalance_mean": stats.imbalance_mean,
        "imbalance_worst": stats.imbalance_worst,
        "imbalance": {"steps_each": each, "worst": worst},
        "facts": facts,
    }
    disk.write_json(folder / PLAN, record)


def identity(config: Config, model: ModelConfig, loader: Loader) -> dict[str, Any]:
    """What a checkpoint must share with the run that continues from it, as name -> short value."""
    shape = {key: value for key, value in asdict(model).items() if key != "dtype"}
    plan = loader.plan(0)
    return {
        "model": _digest(json.dumps(shape, sort_keys=True, default=str).encode()),
        "template": loader.dataset.template.name,
        "data set": loader.dataset.fingerprint[:16],
        "run.seed": config.run.seed,
        "data.token_budget": config.data.token_budget,
        "data.bins_per_step": config.data.bins_per_step,
        "order of the data": _digest(plan.indices.tobytes() + plan.bin_offsets.tobytes()),
    }


def check_data(
    data: TokenDataset, held_out: Loader | None, tokenizer: Tokenizer, model: ModelConfig, config: Config
) -> None:
    """Raises ConfigError unless data, held-out data, tokenizer and model belong together."""
    base = config.base.path
    for each in (data, *([held_out.dataset] if held_out else [])):
        if each.manifest["tokenizer"]["fingerprint"] != tokenizer.fingerprint():
            raise ConfigError(
                f"{each.path}: prepared with another tokenizer than {base} holds; prepare it with this base"
            )
        if replace(each.template, context=0) != replace(data.template, context=0):
            raise ConfigError(f"{each.path}: prepared with another template or --conditions than {data.path}")
    if tokenizer.vocab_size > model.vocab_size:
        raise ConfigError(
            f"{base}: its tokenizer has ids up to {tokenizer.vocab_size - 1}, its embedding {model.vocab_size} rows; "
            f"make a base with as many: ochat init-base --hf {base} OUT --add-token TOKEN"
        )


def bins_of(loader: Loader, step: int) -> Bins:
    """Where the conversations of each bin of a step (counted from 0) stand in the input."""
    epoch, step_in_epoch = loader.position(step)
    plan, first = loader.plan(epoch), step_in_epoch * loader.bins_per_step
    return [[loader.dataset.place(int(i)) for i in plan.bin(first + b)] for b in range(loader.bins_per_step)]


def _take(config: Config, warn: Callable[[str], None], held: ExitStack) -> dict[str, str]:
    """Makes, locks and tries the folder; what to tell the other ranks."""
    try:
        folder = Path(config.run.dir).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        lock = held.enter_context(FolderLock(folder, warn))
        _try_to_write(folder / ".probe")
        _refuse_overwriting(folder, config)
    except ConfigError as error:
        return {"problem": f"run.dir = {config.run.dir!r}: {error}"}
    except FileExistsError:
        return {"problem": f"run.dir = {config.run.dir!r} is a file; name a folder"}
    except (OSError, ValueError) as error:  # ValueError: no path has a zero byte
        why = error.strerror if isinstance(error, OSError) else error
        return {"problem": f"run.dir = {config.run.dir!r} cannot be written ({why}); name a folder that can"}
    return {"folder": str(folder), "token": lock.token}


def _try_to_write(probe: Path) -> None:
    try:
        probe.write_bytes(bytes(PROBE_BYTES))
        disk.sync(probe)  # a quota may speak only now
    finally:
        probe.unlink(missing_ok=True)


def _agree(ranks: Ranks, problem: str) -> None:
    """Ends all ranks for what the first one says."""
    if problem and ranks.is_first:
        raise ConfigError(problem)
    if problem:
        time.sleep(1)  # it speaks before a launcher sees this process end, and ends them all
        raise SystemExit(ConfigError.exit_code)


def _unseen(folder: Path, host: str, first_host: str) -> str:
    return (
        f"run.dir = {str(folder)!r} on {host} is not the folder that it is on {first_host}: all processes need one "
        "folder, on a disk that their machines share"
    )


def _refuse_overwriting(folder: Path, config: Config) -> None:
    if config.run.resume == "never" and checkpoint.folders(folder):
        raise ConfigError(
            "holds checkpoints of another run and run.resume is 'never'; "
            "choose another --run.dir, or remove that folder"
        )


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
