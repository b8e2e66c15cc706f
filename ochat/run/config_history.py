"""Record a run's settings: RUN/config.toml, and those of earlier steps where a later start changed them.

record_config(Path("runs/a"), configuration.dump(config), step=40, num_steps=60)
"""

from __future__ import annotations

import logging
import tomllib
from pathlib import Path
from typing import Any

from ochat import config as configuration
from ochat import overrides
from ochat.errors import ConfigError
from ochat.files import atomic
from ochat.run import layout

OF_A_START = ("run.dir", "run.resume", "run.resume_mismatched")  # they change no step
log = logging.getLogger(__name__)


def record_config(folder: Path, toml: str, *, step: int, num_steps: int) -> None:
    """Write the settings `toml` as config.toml for a run that has done `step` of its `num_steps` steps.

    Different settings of earlier steps are kept as config.until_step_N.toml, and the differences are logged. A finished
    run keeps the settings that it was made with.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / layout.CONFIG
    found = differences(_values(path), _by_name(tomllib.loads(toml))) if step else []
    if found and step == num_steps:
        log.info("%s stays as the run was made; not used: %s", layout.CONFIG, ", ".join(found))
        return
    if found:
        earlier = folder / layout.config_until(step)
        if not earlier.exists():  # else nothing that was trained after it is left
            atomic.write_text(earlier, path.read_text(encoding="utf-8"))
        changes = ", ".join(found)
        log.info("settings differ from step %d on; %s keeps the earlier ones: %s", step + 1, earlier.name, changes)
    atomic.write_text(path, toml)


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """How `new` differs from `old`, both by dotted names, as "optim.lr 2e-05 (was 1e-05)"; empty for an empty `old`."""
    changed = [name for name in {**new, **old} if name not in OF_A_START and old.get(name) != new.get(name)]
    return [f"{name} {_shown(new.get(name))} (was {_shown(old.get(name))})" for name in changed if old]


def _values(path: Path) -> dict[str, Any]:
    """The settings of a file by dotted names; empty where it is missing or no TOML."""
    try:
        return _by_name(configuration.with_new_names(overrides.read_toml(path)))
    except ConfigError:
        return {}


def _by_name(tree: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in configuration.flatten(tree) if value != {}}


def _shown(value: Any) -> str:
    return "not set" if value is None else str(value)
