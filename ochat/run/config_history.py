"""The settings of a run in its folder: RUN/config.toml, and those of earlier steps where a later start changed them.

kept_config.keep(Path("runs/a"), config, step=40, num_steps=60, say=print)
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ochat import config as configuration
from ochat import overrides
from ochat.config import Config
from ochat.errors import ConfigError
from ochat.files import atomic

CONFIG = "config.toml"
OF_A_START = ("run.dir", "run.resume", "run.resume_mismatched")  # they change no step


def keep(folder: Path, config: Config, *, step: int, num_steps: int, say: Callable[[str], None]) -> None:
    """Writes config.toml for a run that has done `step` of its `num_steps` steps.

    Settings that earlier steps were made with stay beside it as config.until_step_N.toml, and the differences are told.
    A run that is over keeps the settings that it was made with.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, new = folder / CONFIG, configuration.dump(config)
    found = differences(_values(path), _by_name(tomllib.loads(new))) if step else []
    if found and step == num_steps:
        say(f"{CONFIG} stays as the run was made; not used: {', '.join(found)}")
        return
    if found:
        earlier = folder / f"config.until_step_{step}.toml"
        if not earlier.exists():  # else nothing that was trained after it is left
            atomic.write_text(earlier, path.read_text(encoding="utf-8"))
        say(f"from step {step + 1} on with other settings than before, which {earlier.name} keeps: {', '.join(found)}")
    atomic.write_text(path, new)


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What `new` sets otherwise than `old`, both by dotted names, as "optim.lr 2e-05 (was 1e-05)"; nothing for an
    empty `old`."""
    changed = [name for name in {**new, **old} if name not in OF_A_START and old.get(name) != new.get(name)]
    return [f"{name} {_shown(new.get(name))} (was {_shown(old.get(name))})" for name in changed if old]


def _values(path: Path) -> dict[str, Any]:
    """The settings of a file by dotted names; nothing where there is none, or what it holds is no TOML."""
    try:
        return _by_name(configuration.with_new_names(overrides.read_toml(path)))
    except ConfigError:
        return {}


def _by_name(tree: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in configuration.flatten(tree) if value != {}}


def _shown(value: Any) -> str:
    return "not set" if value is None else str(value)
