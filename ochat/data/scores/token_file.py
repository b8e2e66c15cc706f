"""The file of scores or weights, one for each supervised token: `ochat score` writes it, `--token-weights` reads it.

    scores = safetensors.numpy.load_file("scores/tokens.safetensors")
    scores["weights"] = np.exp(-scores["nll"][0])                               # (N,), whatever you compute
    safetensors.numpy.save_file(scores, "token_weights.safetensors")            # ochat prepare --token-weights ...

Of S conversations with N supervised tokens (labels of non-zero weight; a conversation's first token is none), under C
conditions, it holds:

    record_ids (bytes,) uint8   UTF-8, an id a line (record_ids.py)      offsets   (S+1,) int64  into the N tokens
    lengths    (S,) int64       tokens, prompt included                  checksums (S,) int64    of all those ids
    conditions (bytes,) uint8   UTF-8, one a line                        token_ids (N,) int32
    nll        (C, N) float32   nats                                     entropy   (C, N) float32  nats
    rank       (C, N) int32     logits that are greater than the label's
    weights    (N,) float32 or float64, only where they are read

A token that a condition's longer prefix pushes out of the context has nll and entropy NaN and rank -1. All is in
tensors, nothing in the file's metadata, so the two lines above lose nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import save_file

from ochat.data.scores.record_ids import RecordIndex
from ochat.data.weights import are_unusable
from ochat.errors import DataError
from ochat.files.safetensors_header import open_checked
from ochat.text.token_weights import MAX_WEIGHT

NEEDED = {"offsets": ("I64",), "lengths": ("I64",), "checksums": ("I64",), "record_ids": ("U8",)}
WEIGHT_TYPES = ("F32", "F64")
MADE_BY = "`ochat score` writes such a file; add weights to it"
AGAIN = "score this data with the same base, template, context and classes, or prepare it with those"


def checksum(ids: NDArray[np.integer]) -> int:
    """63 bits of the ids, in order."""
    content = np.asarray(ids, np.uint32).astype("<u4").tobytes()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little") >> 1


def lines(texts: Sequence[str]) -> NDArray[np.uint8]:
    """Texts as the bytes of lines. Raises: DataError for one that is more than a line."""
    if broken := next((text for text in texts if "\n" in text), None):
        raise DataError(f"{broken!r}: a line break in the name of a file or class; rename it")
    return np.frombuffer("".join(f"{text}\n" for text in texts).encode("utf-8", "surrogateescape"), np.uint8)


def write(path: Path, tensors: Mapping[str, NDArray[Any]]) -> None:
    """The tensors as safetensors. Raises: OSError."""
    try:
        save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, path)
    except SafetensorError as error:  # a full disk
        raise OSError(f"{path}: cannot be written: {error}") from None
    path.chmod(path.parent.stat().st_mode & 0o666)  # the library makes files that only their owner may read


@dataclass(frozen=True)
class TokenWeights:
    """The weights of a file. Pickles: a process opens the file at its first look-up.

    `names`: input file -> its name there. Costs: about 300 bytes a record in each process; weights stay in the file.
    """

    path: Path
    names: Mapping[str, str]

    @classmethod
    def open(cls, path: Path, inputs: Sequence[str]) -> TokenWeights:
        """Of the records of these input files. Raises: DataError for a file that holds no weights, that is damaged, or
        that lacks an input file."""
        return cls(path, _Opened(path).index.matches(inputs))

    def of(self, file: str, line: int, input_ids: NDArray[np.integer], count: int) -> NDArray[np.float32]:
        """(count,) the weights of the supervised tokens of a conversation with these ids, read from this line.

        Raises: DataError, without the place, where there are none, or those of other tokens, or one that cannot be
        trained with.
        """
        opened, total = self._opened, len(input_ids)
        rows = opened.index.rows(self.names[file], line)
        if not rows:
            raise DataError(f"no token weights in {self.path}; score it too, or leave it out of the input")
        same = [row for row in rows if opened.checksums[row] == checksum(input_ids)]
        row = next((row for row in same if opened.count(row) == count), None)
        if row is None:
            one = (same or rows)[0]
            theirs = f"{opened.count(one)} of {opened.lengths[one]} tokens"
            raise DataError(
                f"the token weights in {self.path} are of other tokens ({theirs}; here {count} of {total} are "
                f"supervised); {AGAIN}"
            )
        with np.errstate(over="ignore"):
            weights = opened.weights(row).astype(np.float32)
        wrong = np.flatnonzero(are_unusable(weights))
        if len(wrong):
            raise DataError(
                f"token weight {weights[wrong[0]]} in {self.path}, of supervised token {wrong[0]} of {count}; write a "
                f"number for each, at most {MAX_WEIGHT:g}"
            )
        return weights

    @cached_property
    def _opened(self) -> _Opened:
        return _Opened(self.path)

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "names": self.names}


class _Opened:
    """The file's columns: all in memory but the weights, of which a conversation's are read at a time."""

    def __init__(self, path: Path) -> None:
        try:
            file = open_checked(path, "numpy")
            columns = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a dictionary)
            if problem := _find_fault(columns):
                raise DataError(f"{path}: {problem}; {MADE_BY}")
            self._offsets, self.lengths, self.checksums, ids = (columns[name][:] for name in NEEDED)
        except (SafetensorError, OSError, ValueError) as error:
            raise DataError(f"{path}: not readable as safetensors ({error}); {MADE_BY}") from None
        self._weights = columns["weights"]
        texts = bytes(ids).decode("utf-8", "surrogateescape").split("\n")[:-1]
        if not len(texts) == len(self.lengths) == len(self.checksums) == len(self._offsets) - 1:
            raise DataError(f"{path}: {len(texts)} record ids, but columns of other lengths; {MADE_BY}")
        total = self._weights.get_shape()[0]
        if self._offsets[0] != 0 or self._offsets[-1] != total or (np.diff(self._offsets) < 0).any():
            raise DataError(f"{path}: offsets do not run from 0 to {total}, the number of weights; {MADE_BY}")
        self.index = RecordIndex(texts, str(path))

    def count(self, row: int) -> int:
        """Supervised tokens of a conversation."""
        return int(self._offsets[row + 1] - self._offsets[row])

    def weights(self, row: int) -> NDArray[np.floating]:
        """Those of a conversation."""
        return self._weights[int(self._offsets[row]) : int(self._offsets[row + 1])]


def _find_fault(columns: Mapping[str, Any]) -> str:
    """What is wrong with the names, types and shapes of a file's tensors; "" for nothing."""
    for name, kinds in (NEEDED | {"weights": WEIGHT_TYPES}).items():
        if name not in columns:
            return f"no tensor {name!r}"
        shape, kind = columns[name].get_shape(), columns[name].get_dtype()
        if len(shape) != 1 or kind not in kinds:
            return f"{name} is {kind} {tuple(shape)}, not one list of {' or '.join(kinds)}"
    return ""
