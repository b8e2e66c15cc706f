"""Read a file's plain content in chunks, compressed or not; its first bytes tell the format, not its name.

with open("chats.jsonl.xz", "rb") as raw:
    for chunk in chunks(raw, "chats.jsonl.xz"): ...

Memory is bounded even for a small file that expands to gigabytes: every reader asks for a limited amount.
"""

from __future__ import annotations

import gzip
import lzma
import zlib
from collections.abc import Iterator
from typing import BinaryIO

from ochat.errors import ConfigError

CHUNK_BYTES = 1 << 20
ZSTD_INPUT_BYTES = 1 << 10  # at most 32 MiB come of it, a block of 128 KiB for 4 bytes
XZ_MEMORY_BYTES = 1 << 28  # four times what `xz -9` needs; a file can ask for 4 GiB
DAMAGED = (EOFError, OSError, zlib.error, lzma.LZMAError)  # what reading a cut or damaged file raises


def chunks(raw: BinaryIO, name: str) -> Iterator[bytes]:
    """Chunks of the file's plain content, of CHUNK_BYTES at most."""
    magic = raw.read(6)
    raw.seek(0)
    if magic.startswith(b"\x28\xb5\x2f\xfd"):
        return _even(_zstd(raw, name))
    if magic == b"\xfd7zXZ\x00":
        return _xz(raw)
    stream = gzip.GzipFile(fileobj=raw) if magic.startswith(b"\x1f\x8b") else raw
    return iter(lambda: stream.read(CHUNK_BYTES), b"")


def _even(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """The same bytes in chunks of CHUNK_BYTES; of a damaged file, what came before the damage too."""
    waiting = bytearray()
    try:
        for piece in pieces:
            waiting += piece
            while len(waiting) >= CHUNK_BYTES:
                yield bytes(waiting[:CHUNK_BYTES])
                del waiting[:CHUNK_BYTES]
    except DAMAGED:
        yield bytes(waiting)
        raise
    if waiting:
        yield bytes(waiting)


def _xz(raw: BinaryIO) -> Iterator[bytes]:
    """Streams one after another, as `xz` reads them; zeros may pad them."""
    data = raw.read(CHUNK_BYTES)
    while data:
        stream = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=XZ_MEMORY_BYTES)
        while not stream.eof:
            if stream.needs_input and not data and not (data := raw.read(CHUNK_BYTES)):
                raise EOFError("the file ends inside an xz stream")
            if chunk := stream.decompress(data, CHUNK_BYTES):
                yield chunk
            data = b""
        data = stream.unused_data.lstrip(b"\0")
        while not data and (more := raw.read(CHUNK_BYTES)):
            data = more.lstrip(b"\0")


def _zstd(raw: BinaryIO, name: str) -> Iterator[bytes]:
    try:
        import zstandard
    except ImportError as error:
        raise ConfigError(f"{name}: reading zstd needs zstandard: pip install 'ochat-crlft[data]'") from error
    frame = zstandard.ZstdDecompressor().decompressobj()  # refuses windows of more than 128 MiB
    try:
        while data := raw.read(ZSTD_INPUT_BYTES):
            while data:
                if frame.eof:
                    frame = zstandard.ZstdDecompressor().decompressobj()
                if chunk := frame.decompress(data):
                    yield chunk
                data = frame.unused_data if frame.eof else b""
    except zstandard.ZstdError as error:
        raise OSError(str(error)) from error
    if not frame.eof:
        raise EOFError("the file ends inside a zstd frame")
