"""What compressed files hold, in bounded memory: gzip, bzip2, xz and zstd, of one stream or of many.

for chunk in decompress(open("a.jsonl.zst", "rb"), "zstd"): ...
"""

from __future__ import annotations

import bz2
import lzma
import shlex
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

from ochat.data.containers import kinds

CHUNK_BYTES = 1 << 20
COMPRESSED_BYTES = 1 << 10  # at most 32 MiB come of them: zstd makes a block of 128 KiB of 4 bytes
XZ_MEMORY_BYTES = 1 << 28  # four times what `xz -9` needs; a file can ask for 4 GiB


class DamagedError(Exception):
    """The rest of a file cannot be read; `is_whole`: what came before it is all that was meant to."""

    def __init__(self, why: str, *, is_whole: bool = False) -> None:
        super().__init__(why)
        self.is_whole = is_whole


def decompress(raw: BinaryIO, kind: str, chunk_bytes: int = CHUNK_BYTES) -> Iterator[bytes]:
    """What the streams hold, one after another, in chunks of at least so many bytes; zeros may pad them. Reads little
    at a time, because a small file can expand to gigabytes.

    Raises: DamagedError where it is damaged or ends too early, or something else follows its end.
    """
    stream, waiting, damage = _decompressor(kind), bytearray(), ""
    start, is_whole = b"", False  # the first bytes of a stream after the first
    try:
        while data := raw.read(COMPRESSED_BYTES):
            while data := data.lstrip(b"\0") if stream.eof else data:
                if stream.eof:
                    stream, start = _decompressor(kind), data[:16]
                for piece in _expand(stream, data):
                    waiting += piece
                    piece = b""  # a large one is not held twice
                    if len(waiting) >= chunk_bytes:
                        yield bytes(waiting)
                        waiting.clear()
                data = stream.unused_data
        damage = "" if stream.eof else "damaged or cut compressed file (the file ends inside it)"
    except Exception as error:  # every library has its own
        damage = f"damaged or cut compressed file ({str(error) or repr(error)})"
        if "memory" in damage.lower():
            command = f"{kinds.TOOLS[kind]} -dc {shlex.quote(str(raw.name))}"
            damage = f"{kind} that takes too much memory to read here: unpack it with {command} > NEW.jsonl"
        elif start and kinds.packing(start) != kind:
            is_whole = True
            damage = f"bytes that are no {kind} follow the end of the data ({start!r}); all before them was read"
    if waiting:
        yield bytes(waiting)
    if damage:
        raise DamagedError(damage, is_whole=is_whole)


def _expand(stream: Any, data: bytes) -> Iterator[bytes]:
    """What the stream makes of `data`, in pieces where the library can: 40 bytes of bzip2 can hold 46 MB."""
    if not hasattr(stream, "needs_input"):
        yield stream.decompress(data)
        return
    yield stream.decompress(data, CHUNK_BYTES)
    while not (stream.needs_input or stream.eof):
        yield stream.decompress(b"", CHUNK_BYTES)


def _decompressor(kind: str) -> Any:
    if kind == "gzip":
        return zlib.decompressobj(zlib.MAX_WBITS | 16)
    if kind == "bzip2":
        return bz2.BZ2Decompressor()
    if kind == "xz":
        return lzma.LZMADecompressor(lzma.FORMAT_XZ, XZ_MEMORY_BYTES)
    import zstandard

    return zstandard.ZstdDecompressor().decompressobj()  # refuses windows of more than 128 MiB
