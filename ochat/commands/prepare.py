"""`ochat prepare`: conversations in, a data set of token ids out; or, with --check, compare a data set's checksums.

ochat prepare --input chats.jsonl --base models/base --template openchat_3.5 --output data/train --held-out 0.05
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from ochat.data import manifest, prepare
from ochat.data.prepare_report import print_report
from ochat.errors import ConfigError


@dataclass(frozen=True)
class PrepareOptions(prepare.PrepareOptions):
    """Turns conversations into a data set of token ids that `ochat train` reads.

    Weights by class are no part of it: they are applied in training.
    """

    check: str = ""  # read the data set in this folder and compare its checksums; nothing is prepared
    merge: tuple[str, ...] = ()  # removed: list the data sets where they are used, as data.path = ["a", "b"]


def main(options: PrepareOptions) -> None:
    """Prepares or checks, and prints what was done."""
    if options.merge:
        listed = ", ".join(f'"{folder}"' for folder in options.merge)
        raise ConfigError(
            f"--merge is no longer needed: list the data sets where they are used, data.path = [{listed}]; sets that "
            "were merged before are still read"
        )
    if options.check and options.input:
        raise ConfigError("--input and --check: give one of them, each is a command of its own")
    if options.check:
        checked = manifest.check_files(options.check)
        size = f"{checked.num_files} files, {checked.num_bytes / 1e6:.1f} MB"
        print(f"{checked.folder}: {size}, all as they were written")
    else:
        settings = {key: value for key, value in asdict(options).items() if key not in ("check", "merge")}
        print_report(prepare.run(prepare.PrepareOptions(**settings)))
