"""Reads a SentencePiece model file without protobuf: pieces, scores, types and the switches that decide tokenisation.

    model = parse(Path("tokenizer.model").read_bytes())
    model.pieces[0], model.add_dummy_prefix

Only the fields below are interpreted (sentencepiece_model.proto).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

SIZES = {1: 8, 5: 4}  # bytes of a number of these wire types; 0 is a varint, 2 begins with its length
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
BPE = 2


@dataclass(frozen=True)
class Piece:
    """One vocabulary entry; its id is its place in the list."""

    text: str
    score: float
    type: int


@dataclass(frozen=True)
class SentencePieceModel:
    """What decides tokenisation. The defaults are those of the proto, for fields that a file leaves out."""

    pieces: tuple[Piece, ...]
    model_type: int = 1
    byte_fallback: bool = False
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True
    escape_whitespaces: bool = True
    whitespace_as_suffix: bool = False
    normalizes: bool = False  # a character map (such as NFKC) is applied to the text
    bos: str = "<s>"
    eos: str = "</s>"


def parse(content: bytes) -> SentencePieceModel:
    """Interpret a model file. Raises: ValueError or KeyError if it is none."""
    messages = [(field, value) for field, value in _fields(content) if isinstance(value, bytes)]
    pieces = [_piece(value) for field, value in messages if field == 1]
    trainer, normalizer = (dict(_fields(dict(messages).get(field, b""))) for field in (2, 3))
    if not pieces or not (normalizer or trainer):
        raise ValueError("no SentencePiece vocabulary")
    return SentencePieceModel(
        pieces=tuple(pieces),
        model_type=int(trainer.get(3, 1)),
        byte_fallback=bool(trainer.get(35, False)),
        whitespace_as_suffix=bool(trainer.get(24, False)),
        normalizes=bool(normalizer.get(2, b"")),
        add_dummy_prefix=bool(normalizer.get(3, True)),
        remove_extra_whitespaces=bool(normalizer.get(4, True)),
        escape_whitespaces=bool(normalizer.get(5, True)),
        bos=_text(trainer.get(46), "<s>"),
        eos=_text(trainer.get(47), "</s>"),
    )


def _piece(body: bytes) -> Piece:
    fields = dict(_fields(body))
    text, score, kind = fields[1], fields.get(2, b"\0\0\0\0"), fields.get(3, NORMAL)
    if not isinstance(text, bytes) or not isinstance(score, bytes) or not isinstance(kind, int):
        raise ValueError("a piece of the wrong shape")
    return Piece(text.decode("utf-8"), struct.unpack("<f", score)[0], kind)


def _text(value: int | bytes | None, default: str) -> str:
    return value.decode("utf-8") if isinstance(value, bytes) and value else default


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of each field of a protobuf message; fixed-size numbers stay bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        value, at = _varint(data, at) if key & 7 in (0, 2) else (SIZES[key & 7], at)
        if key & 7:
            value, at = data[at : at + value], at + value
        if at > len(data):
            raise ValueError("cut off")
        yield key >> 3, value


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """The number that starts at `at`, and where it ends."""
    value = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise ValueError("cut off")
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
