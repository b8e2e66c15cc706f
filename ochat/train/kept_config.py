"""The settings of a run in its folder: RUN/config.toml, and those of earlier steps where a later start changed them.

kept_config.keep(Path("runs/a"), config, step=40, num_steps=60, say=print)
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ochat import config as configuration
from ochat import disk
from ochat.config import Config

CONFIG = "config.toml"
OF_A_START = ("run.dir", "run.resume", "run.resume_anyway")  # they change no step


def keep(folder: Path, config: Config, *, step: int, num_steps: int, say: Callable[[str], None]) -> None:
    """Writes config.toml for a run that has done `step` of its `num_steps` steps.

    Settings that earlier steps were made with stay beside it as config.until_step_N.toml, and the differences are told.
    A run that is over keeps the settings that it was made with.
    """
    folder.mkdir(parents=True, exist_ok=True)
    new, old = configuration.dump(config), _read(folder / CONFIG)
    found = differences(old, new) if old and step else []
    if found and step == num_steps:
        say(f"{CONFIG} stays as the run was made; not used: {', '.join(found)}")
        return
    if found:
        earlier = folder / f"config.until_step_{step}.toml"
        if not earlier.exists():  # else nothing that was trained after it is left
            disk.write_text(earlier, old)
        say(f"from step {step + 1} on with other settings than before, which {earlier.name} keeps: {', '.join(found)}")
    disk.write_text(folder / CONFIG, new)


def differences(old: str, new: str) -> list[str]:
    """What `new` sets otherwise than `old`, as "optim.lr 2e-05 (was 1e-05)"; nothing where `old` is no TOML."""
    try:
        before = _flat(tomllib.loads(old))
    except tomllib.TOMLDecodeError:
        return []
    after = _flat(tomllib.loads(new))
    names = [name for name in {**after, **before} if name not in OF_A_START and before.get(name) != after.get(name)]
    return [f"{name} {_shown(after.get(name))} (was {_shown(before.get(name))})" for name in names]


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _shown(value: Any) -> str:
    return "not set" if value is None else str(value)
