"""Errors that a user can cause and fix. Each message says what was wrong, where, and what to do.

A command prints the message alone and exits with `exit_code`; it treats an OSError, which names its path, the same way.
Every other exception is a bug and keeps its traceback.
"""

from __future__ import annotations


class OchatError(Exception):
    """Base of every error that a user can cause and fix."""

    exit_code = 1  # of the command


class UsageError(OchatError):
    """A command line that cannot be parsed."""

    exit_code = 2


class ConfigError(OchatError):
    """A setting, an option or a model configuration that cannot be used."""


class DataError(OchatError):
    """A record, a data file or a prepared data set that is wrong; names the file, the line and the field where it
    can."""


class CheckpointError(OchatError):
    """Weights or optimizer state that are missing, damaged or belong to something else; names the file and the
    tensor."""


class NonFiniteError(OchatError):
    """A loss or gradient that is NaN or infinite; names the step and its bins."""


class RanksError(OchatError):
    """Another process of the run is gone or hangs, or all wait for each other; names it and the step. The same command
    resumes from the newest checkpoint."""

    exit_code = 3


class Interrupted(OchatError):
    """A signal stopped the run, and its state is saved; `exit_code` is 128 + the signal's number."""

    def __init__(self, steps_done: int, number: int):
        what = f"saved at step {steps_done}" if steps_done else "stopped before the first step"
        super().__init__(f"{what}; start the same command again to continue")
        self.exit_code = 128 + number


class ServerError(OchatError):
    """A server that answers questions refuses a request, or keeps failing; gives its words. The same command resumes
    from the answers kept."""


def message(error: OchatError | OSError) -> str:
    """The text of an error; for an OSError its paths and the reason."""
    if isinstance(error, OchatError):
        return str(error)
    where = " -> ".join(str(path) for path in (error.filename, error.filename2) if path is not None)
    reason = error.strerror or str(error)
    return f"{where}: {reason}" if where else reason


def how_to_fetch(base: object) -> str:
    """One sentence for a message where `base` is not a local model folder: how to get one."""
    name = str(base)
    name = name if name.count("/") == 1 and not name.startswith((".", "/")) else "ORG/NAME"
    return (
        "A base model is a local folder with config.json, safetensors and a tokenizer; fetch a hub model first, with "
        f"`hf download {name} --local-dir DIR`, and name DIR"
    )
