"""`ochat check CONFIG.toml --section.key=value ...`: all that `ochat train` would refuse, in seconds and without a GPU.

It opens what the run reads with the functions that training starts with, compares files with their checksums, and tries
the run folder. It asks nothing of a GPU: whether the run fits is `ochat plan`'s to say.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ochat import config as configuration
from ochat.config import Config, RunConfig
from ochat.console import next_command, stdout
from ochat.overrides import at_least

SCHEMA = Config


@dataclass(frozen=True)
class CheckOptions:
    """Says what `ochat train` would refuse with the same arguments, or that it would start.

    Needs no GPU, and no memory for the model. Files are compared with their checksums, about 1 s a GB.
    """

    config: Path
    """a configuration in TOML; configs/ has files to start from"""
    gpus: int = 1
    """of a machine, as `ochat train` will get them"""
    nodes: int = 1
    """machines"""


def main(options: CheckOptions, overrides: Sequence[str] = ()) -> None:
    """Checks and prints what was found. Raises: OchatError, OSError as training would."""
    at_least(options, gpus=1, nodes=1)
    config = configuration.load(options.config, overrides)
    from ochat.train import build  # torch takes seconds to import; a wrong option should not

    try_folder(config.run)
    inputs = build.check(config, options.gpus * options.nodes)
    loader = inputs.loader
    stdout.print(
        f"{options.config}: `ochat train` would start: {loader.num_steps:,} steps of "
        f"{loader.bins_per_step} x {loader.token_budget:,} tokens",
        soft_wrap=True, markup=False,
    )  # fmt: skip
    gpus = ["--gpus", str(options.gpus)] if options.gpus > 1 else []
    next_command("ochat train", options.config, *gpus, *overrides)


def try_folder(run: RunConfig) -> None:
    """Takes the run folder as training does, and leaves nothing there that was not. Raises: ConfigError."""
    from ochat.distributed.processes import alone
    from ochat.run import layout
    from ochat.run.lock import acquire_run_dir

    made = [each for each in (Path(run.dir), *Path(run.dir).parents) if not each.exists()]
    with acquire_run_dir(run, alone()):
        pass
    for folder in made:
        with contextlib.suppress(OSError):  # another run may be there by now
            (folder / layout.LOCK).unlink(missing_ok=True)
            folder.rmdir()
