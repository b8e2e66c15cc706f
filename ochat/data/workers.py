"""Cut the input into batches of records and encode them, in this process or in a pool; results keep the order.

    for encoded, position in encode_all(batches(files, InputShare(1, 1)), encoder, num_workers=2): ...

Memory is a few batches per worker, however many there are.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

from ochat.data.encode import Encoded
from ochat.data.readers import Record, RecordFile
from ochat.errors import ConfigError, DataError

BATCH_RECORDS, BATCH_BYTES = 512, 1 << 20  # enough to be worth a message to another process
Batch = tuple[list[Record], int]  # records, and the bytes of all files read by then
Encode = Callable[[list[Record]], Encoded]  # an Encoder: it pickles


@dataclass(frozen=True)
class InputShare:
    """Of every `of` records the `number`-th, from 1: what `--shard i/n` takes of the input."""

    number: int
    of: int

    @classmethod
    def parse(cls, text: str) -> InputShare:
        """Raises ConfigError unless `text` is "i/n"."""
        number, slash, of = text.partition("/")
        if not (slash and number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of)):
            raise ConfigError(f"--shard {text}: i/n is needed, with i from 1 to n, such as 3/8")
        return cls(int(number), int(of))


def batches(files: Sequence[RecordFile], share: InputShare) -> Iterator[Batch]:
    """The share's records of all files, in order."""
    batch: list[Record] = []
    num_bytes = done = 0
    number = itertools.cycle(range(1, share.of + 1))
    for file in files:
        for record in file:
            if next(number) != share.number:
                continue
            batch.append(record)
            num_bytes += len(record.data)
            if len(batch) == BATCH_RECORDS or num_bytes >= BATCH_BYTES:
                yield batch, done + file.position
                batch, num_bytes = [], 0
        done += file.size
    if batch:
        yield batch, done


def encode_all(batches: Iterable[Batch], encoder: Encode, num_workers: int) -> Iterator[tuple[Encoded, int]]:
    """Encoded batches in the order of their records; 0 workers: in this process.

    Raises DataError if a worker dies, naming its records.
    """
    if num_workers == 0:
        for batch, position in batches:
            yield encoder(batch), position
        return
    # spawn: a fork would copy the locks of this process's threads in an unknown state
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(num_workers, spawn, _start_worker, (encoder,))
    waiting: deque[tuple[Future[Encoded], Batch]] = deque()
    try:
        for batch in batches:
            waiting.append((pool.submit(_encode, batch[0]), batch))
            if len(waiting) > 3 * num_workers:  # enough to keep all workers busy, few enough to stay small
                yield _result(*waiting.popleft())
        while waiting:
            yield _result(*waiting.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


def _result(future: Future[Encoded], batch: Batch) -> tuple[Encoded, int]:
    try:
        return future.result(), batch[1]
    except BrokenProcessPool as error:
        first = batch[0][0]
        raise DataError(
            f"{first.location}: a worker died on this record or one of the {len(batch[0]) - 1} after it, mostly for "
            "lack of memory: try --workers 0, which needs the least"
        ) from error


_worker_encoder: Encode


def _start_worker(encoder: Encode) -> None:
    global _worker_encoder  # a worker process has one encoder, and pickling it per batch would cost more than the work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process handles Ctrl-C
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a process per core is enough
    _worker_encoder = encoder


def _encode(batch: list[Record]) -> Encoded:
    return _worker_encoder(batch)
