"""The batches of an Arrow file, as `datasets.save_to_disk` and Feather write them, in bounded memory.

    for batch, share in batches(Path("data-00000-of-00001.arrow")): ...

A file is a stream of messages (https://arrow.apache.org/docs/format/Columnar.html), with 8 bytes in front and an index
behind it in what Arrow calls the file format. It is mapped into memory, so only what is compressed takes any.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ochat.errors import DataError

FILE_START = b"ARROW1\0\0"
MAX_BATCH_BYTES = 1 << 31  # of a compressed batch, once it is unpacked; pages of Parquet cannot be larger either


def batches(path: Path) -> Iterator[tuple[Any, float]]:
    """The batches, each with the share of the file up to its end.

    Raises: DataError for one that takes too much memory; errors of pyarrow where the file is damaged.
    """
    import pyarrow
    import pyarrow.ipc

    with pyarrow.memory_map(str(path)) as source:
        start = len(FILE_START) if source.read(len(FILE_START)) == FILE_START else 0
        source.seek(start)
        for message in pyarrow.ipc.MessageReader.open_stream(source):
            if message.type in _RECORDS and _unpacked_bytes(message) > MAX_BATCH_BYTES:
                raise DataError(f"a batch of more than {MAX_BATCH_BYTES >> 30} GiB; write smaller batches, or Parquet")
        source.seek(start)
        with pyarrow.ipc.open_stream(source) as reader:
            for batch in reader:
                batch.validate(full=True)  # a file can say that a text lies outside of it
                yield batch, source.tell() / source.size()


_RECORDS = ("record batch", "dictionary")  # types of messages that hold values


def _unpacked_bytes(message: Any) -> int:
    """What the buffers of a message take once they are decompressed; 0 if they are not compressed.

    The message's head is a flatbuffer (https://flatbuffers.dev/internals): tables of fields by number. Each compressed
    buffer begins with its size, -1 for one that is as it is.
    """
    head, body = message.metadata.to_pybytes(), memoryview(message.body)
    batch = _field(head, _target(head, 0), 2)
    batch = _field(head, batch, 1) if message.type == "dictionary" else batch
    if not _field(head, batch, 3):
        return 0
    buffers = _field(head, batch, 2)
    (count,) = struct.unpack_from("<I", head, buffers)
    total = 0
    for i in range(count):
        offset, length = struct.unpack_from("<qq", head, buffers + 4 + 16 * i)
        total += max(struct.unpack_from("<q", body, offset)[0], length) if length else 0
    return total


def _target(head: bytes, at: int) -> int:
    return at + struct.unpack_from("<I", head, at)[0]


def _field(head: bytes, table: int, number: int) -> int:
    """Where what a field of a table names begins, 0 without the field."""
    layout = table - struct.unpack_from("<i", head, table)[0]
    (size,) = struct.unpack_from("<H", head, layout)
    place = 4 + 2 * number
    offset = struct.unpack_from("<H", head, layout + place)[0] if place < size else 0
    return _target(head, table + offset) if offset else 0
