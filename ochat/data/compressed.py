"""A file's plain content in chunks, whatever it was compressed with; told by its first bytes, not by its name.

with open("chats.jsonl.xz", "rb") as raw:
    for chunk in chunks(raw, "chats.jsonl.xz"): ...
"""

from __future__ import annotations

import gzip
import lzma
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

from ochat.errors import ConfigError

CHUNK_BYTES = 1 << 20
DAMAGED = (EOFError, OSError, zlib.error, lzma.LZMAError)  # what reading a cut or damaged file raises


def chunks(raw: BinaryIO, name: str) -> Iterator[bytes]:
    """Chunks of the file's plain content."""
    magic = raw.read(6)
    raw.seek(0)
    if magic.startswith(b"\x28\xb5\x2f\xfd"):
        yield from _zstd(raw, name)
        return
    stream: Any = raw
    if magic.startswith(b"\x1f\x8b"):
        stream = gzip.GzipFile(fileobj=raw)
    elif magic == b"\xfd7zXZ\x00":
        stream = lzma.LZMAFile(raw)  # noqa: SIM115
    while chunk := stream.read(CHUNK_BYTES):
        yield chunk


def _zstd(raw: BinaryIO, name: str) -> Iterator[bytes]:
    try:
        import zstandard
    except ImportError as error:
        raise ConfigError(f"{name}: reading zstd needs the package zstandard: pip install 'ochat[data]'") from error
    frame = zstandard.ZstdDecompressor().decompressobj()
    try:
        while data := raw.read(CHUNK_BYTES):
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
