"""What is read at the start of a run is what was written: data sets and base, file by file against their checksums.

    verify.data(config, ranks, print);  verify.base(Path("bases/llama"), ranks, print)
Each file is read by one of the ranks, and all of them hear of what it finds. Where every machine has a copy of its own,
it reads only its ranks' share of it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ochat.config import Config
from ochat.data import check
from ochat.distributed.processes import Ranks
from ochat.errors import CheckpointError, DataError, OchatError
from ochat.files import atomic, checksums
from ochat.model import hf
from ochat.model.config import ModelConfig
from ochat.run import layout

Say = Callable[[str], None]
PATIENCE_S = 2.0  # of those who wait without a word


def headers(config: Config, model: ModelConfig, run_dir: Path) -> None:
    """Refuses a base that cannot be loaded where a run starts from it, before memory is taken for its model.

    Raises: as hf.check_weights. Costs: reads the files' headers.
    """
    if not layout.folders(run_dir):
        hf.check_weights(config.base.path, model)


def data(config: Config, ranks: Ranks, say: Say) -> None:
    """Compares all files of the data sets that the run trains on and evaluates with. Every rank calls it.

    Raises: DataError naming the file, on all ranks alike. Costs: about 1 s a GB, shared by the ranks;
    data.verify = false leaves it out, and then sizes and layout alone are checked.
    """
    if config.data.verify:
        paths = [*(share.path for share in config.data.mix.values()), config.data.path, config.data.eval_path]
        _compare(
            lambda: {file: sha for path in paths if path for file, sha in check.expected(path).items()},
            check.changed,
            DataError,
            ranks,
            lambda size: say(f"comparing {size} of data with its checksums; --data.verify=false leaves this out"),
        )


def base(folder: Path, ranks: Ranks, say: Say) -> None:
    """Compares the base's files, as far as its folder has checksums. Every rank calls it.

    Raises: CheckpointError naming the file, on all ranks alike. Costs: about 1 s a GB, shared by the ranks.
    """
    found = _compare(
        lambda: checksums.expected(folder),
        checksums.damaged,
        CheckpointError,
        ranks,
        lambda size: say(f"comparing {size} of {folder} with its checksums"),
    )
    if not found:
        say(f"{folder}: no checksums, so only headers and finite values are checked; {checksums.HOW_TO_MAKE}")


def _compare(
    list_files: Callable[[], dict[Path, str]],
    message: Callable[[Path], str],
    kind: type[OchatError],
    ranks: Ranks,
    say: Say,
) -> int:
    """The number of files, of which this rank reads its share; raises `kind` on all ranks where one finds damage."""
    problem, files = "", {}
    try:
        files = list_files()
        mine = sorted(files, key=lambda path: (-path.stat().st_size, path))[ranks.rank :: ranks.world]
        with _told(say, sum(path.stat().st_size for path in files)):
            path = atomic.first_changed({path: files[path] for path in mine})
        problem = message(path) if path else ""
    except (OchatError, OSError) as error:
        problem = str(error)
    ranks.raise_on_all_ranks(problem, kind)
    return len(files)


@contextmanager
def _told(say: Say, num_bytes: int) -> Iterator[None]:
    """Says how much there is to read, where it takes long."""
    timer = threading.Timer(PATIENCE_S, say, [f"{num_bytes / 1e9:,.1f} GB"])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
