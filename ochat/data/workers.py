"""Batches of records through an Encoder, in this process or in a pool, results in the order of the batches.

    for encoded, position in encode_all(batches, encoder, num_workers=2): ...

Memory is a few batches per worker, however many there are.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from ochat.data.encode import Encoded
from ochat.data.records import Record
from ochat.errors import DataError

Batch = tuple[list[Record], int]  # records, and the bytes of all files read by then
Encode = Callable[[list[Record]], Encoded]  # an Encoder: it pickles


def encode_all(batches: Iterable[Batch], encoder: Encode, num_workers: int) -> Iterator[tuple[Encoded, int]]:
    """Encoded batches in the order of their records; 0 workers: in this process.

    Raises DataError where a worker dies, naming its records.
    """
    if num_workers == 0:
        for batch, position in batches:
            yield encoder(batch), position
        return
    # spawn: a fork would copy the locks of this process's threads in whatever state they are
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(num_workers, spawn, _start_worker, (encoder,))
    waiting: deque[tuple[Future[Encoded], Batch]] = deque()
    try:
        for batch in batches:
            waiting.append((pool.submit(_encode, batch[0]), batch))
            if len(waiting) > 3 * num_workers:  # enough to keep everybody busy, few enough to stay small
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
            f"{first.place}: a worker died on this record or one of the {len(batch[0]) - 1} behind it, most often for "
            "want of memory: try --workers 0, which needs the least"
        ) from error


_worker_encoder: Encode


def _start_worker(encoder: Encode) -> None:
    global _worker_encoder  # a worker process has one encoder, and pickling it per batch would cost more than the work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's affair
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a process per core is enough
    _worker_encoder = encoder


def _encode(batch: list[Record]) -> Encoded:
    return _worker_encoder(batch)
