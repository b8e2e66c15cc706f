"""A micro-batch: conversations laid end to end, labels and weights already shifted, supervised rows listed.

    batch = pack(examples, indices, class_ids, pad_to=8192)

Letters: T packed tokens, S documents, R supervised rows. How padding works is all in this file: `_pad` adds short
documents of weight 0 up to `pad_to` tokens, because one document of P padding tokens would cost P^2 in attention; the
loader chooses `pad_to` and, for a compiler, with `most_documents` the number of documents; or, for a CPU, a `multiple`
of tokens and of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

IGNORE_INDEX = -100
PAD_ID = 0  # any valid id will do: no document sees padding, and padding has no label
PAD_DOCUMENT_TOKENS = 256  # long enough to keep their number small, short enough to cost nothing in attention
SEQLEN_MULTIPLE = 128  # rows of a kernel's block: a longer max_seqlen launches blocks without work
DOCUMENTS_MULTIPLE = 64  # data sets and epochs that differ a little share a compiled shape


@dataclass(frozen=True, eq=False)
class Example:
    """One conversation as training sees it: unshifted, truncated and trimmed by prepare."""

    input_ids: NDArray[np.int64]  # (len,)
    loss_weights: NDArray[np.float32]  # (len,)
    condition: str


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """Tensors of one bin. The other fields are host values, so that reading them never waits for the device."""

    input_ids: torch.Tensor  # (T,) int64
    labels: torch.Tensor  # (T,) int64, the next id; IGNORE_INDEX at a document's end and in padding
    loss_weights: torch.Tensor  # (T,) float32, the label's weight; 0 where there is none
    position_ids: torch.Tensor  # (T,) int64, from 0 in every document
    cu_seqlens: torch.Tensor  # (S+1,) int32
    supervised_rows: torch.Tensor  # (R,) int64, ascending: weight != 0; with `multiple` a few of weight 0 among them
    supervised_classes: torch.Tensor  # (R,) int64, class of the message that a row's label belongs to
    max_seqlen: int  # the longest document, rounded up
    num_tokens: int  # without padding
    num_supervised: int  # rows of weight != 0: R, or less with `multiple`
    weight_sum: float  # sum of |weight| over the rows, in float64
    lengths: tuple[int, ...]  # (S,) of the documents, padding and empty ones included
    sequences: tuple[int, ...]  # data set indices of the first documents; what follows them is padding

    @cached_property
    def supervised_labels(self) -> torch.Tensor:
        """(R,) int64: the labels that the loss is taken of."""
        return self.labels[self.supervised_rows]

    @cached_property
    def supervised_weights(self) -> torch.Tensor:
        """(R,) float32: the weights of these labels."""
        return self.loss_weights[self.supervised_rows]

    @cached_property
    def sum_len_sq(self) -> int:
        """Sum of squared lengths of the real documents, for FLOPs."""
        return sum(length * length for length in self.lengths[: len(self.sequences)])

    def to(self, device: torch.device | str, non_blocking: bool = True) -> PackedBatch:
        """The same batch on another device. From pinned memory the host does not wait: the copies (2 MB at 40,960
        tokens, 0.05 ms) are queued in the current stream, before the work that uses them."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PackedBatch:
        """The same batch in page-locked host memory, which torch reuses only once copies from it are done."""
        return self._map(torch.Tensor.pin_memory)

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> PackedBatch:
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if torch.is_tensor(getattr(self, f.name))}
        return replace(self, **{name: change(tensor) for name, tensor in tensors.items()})


def pack(examples: Sequence[Example], indices: Sequence[int], class_ids: Sequence[int], **shape: Any) -> PackedBatch:
    """Lay `examples` end to end, as `assemble` does; `indices` and `class_ids` hold one entry for each."""
    assert len(examples) == len(indices) == len(class_ids), "one index and one class per example"
    input_ids = np.concatenate([np.zeros(0, np.int64), *(example.input_ids for example in examples)])
    loss_weights = np.concatenate([np.zeros(0, np.float32), *(example.loss_weights for example in examples)])
    lengths = np.array([len(example.input_ids) for example in examples], np.int64)
    sequences = tuple(int(index) for index in indices)
    of_tokens = np.repeat(np.array(class_ids, np.int64), lengths)
    return assemble(input_ids, loss_weights, lengths, of_tokens, sequences, **shape)


def assemble(
    input_ids: NDArray[np.integer],
    loss_weights: NDArray[np.float32],
    lengths: NDArray[np.integer],
    class_ids: NDArray[np.integer],
    sequences: tuple[int, ...],
    *,
    pad_to: int | None = None,
    num_documents: int | None = None,
    multiple: int = 1,
) -> PackedBatch:
    """A batch of documents whose ids, loss weights and classes, unshifted, are given end to end.

    `lengths` (S,) and `sequences` (places in the data set) describe the documents. `pad_to`: fill up to
    exactly so many tokens. `max_seqlen` is that of the longest document, rounded up to SEQLEN_MULTIPLE, or all tokens.
    `num_documents`: exactly so many documents, empty ones at the end, and a `max_seqlen` that is a power of two from
    PAD_DOCUMENT_TOKENS on, or `pad_to`, so that a compiler meets few shapes; a kernel then launches blocks for all of
    them, most without work. `multiple`: fill up tokens, where `pad_to` is not given, and supervised rows to a multiple
    of it, so that a CPU meets few shapes of products, each of which it keeps half a megabyte for. Without documents the
    batch is padding alone: `pad_to` tokens, or `multiple`.
    """
    num_tokens = len(input_ids)
    pad_to = _round_up(max(num_tokens, 1), multiple) if pad_to is None else pad_to
    padded, max_seqlen = _pad(lengths.tolist(), pad_to, num_documents)
    cu_seqlens = np.concatenate([[0], np.cumsum(padded)])
    ids = np.full(cu_seqlens[-1], PAD_ID, np.int64)
    labels = np.full(len(ids), IGNORE_INDEX, np.int64)
    weights = np.zeros(len(ids), np.float32)
    ids[:num_tokens] = input_ids
    labels[: max(num_tokens - 1, 0)] = input_ids[1:]
    weights[: max(num_tokens - 1, 0)] = loss_weights[1:]
    last = cu_seqlens[1 : len(lengths) + 1] - 1  # the last token of a document has no label
    labels[last], weights[last] = IGNORE_INDEX, 0
    rows = np.flatnonzero(weights)
    num_supervised = len(rows)
    total = np.cumsum(np.abs(weights[rows], dtype=np.float64))  # one after another: rounds alike on every CPU
    if missing := -num_supervised % multiple:
        rows = np.sort(np.append(rows, np.flatnonzero(weights == 0)[:missing]))
    classes = np.zeros(len(ids), np.int64)  # of the label, as weights are
    classes[: max(num_tokens - 1, 0)] = class_ids[1:]
    classes[last] = class_ids[last]
    return PackedBatch(
        input_ids=torch.from_numpy(ids),
        labels=torch.from_numpy(labels),
        loss_weights=torch.from_numpy(weights),
        position_ids=torch.from_numpy(np.arange(len(ids)) - np.repeat(cu_seqlens[:-1], padded)),
        cu_seqlens=torch.from_numpy(cu_seqlens.astype(np.int32)),
        supervised_rows=torch.from_numpy(rows),
        supervised_classes=torch.from_numpy(classes[rows]),
        max_seqlen=max_seqlen,
        num_tokens=num_tokens,
        num_supervised=num_supervised,
        weight_sum=float(total[-1]) if num_supervised else 0.0,
        lengths=tuple(padded),
        sequences=sequences,
    )


def _pad(real: list[int], pad_to: int, num_documents: int | None) -> tuple[list[int], int]:
    """Lengths of a batch's documents, padding and empty ones included, and its max_seqlen (see `assemble`)."""
    num_tokens = sum(real)
    missing = max(pad_to - num_tokens, 0)
    whole, rest = divmod(missing, PAD_DOCUMENT_TOKENS)
    lengths = real + [PAD_DOCUMENT_TOKENS] * whole + [rest] * (rest > 0)
    total, longest = sum(lengths), max(lengths)
    assert total == pad_to, f"{num_tokens} tokens do not fit into {pad_to}"
    if num_documents is None:
        return lengths, min(_round_up(longest, SEQLEN_MULTIPLE), total)
    assert len(lengths) <= num_documents, f"{len(lengths)} documents do not fit into {num_documents}"
    bucket = max(1 << (longest - 1).bit_length(), PAD_DOCUMENT_TOKENS)
    return lengths + [0] * (num_documents - len(lengths)), min(bucket, total)


def most_documents(num_real: NDArray[np.int64], num_tokens: NDArray[np.int64], pad_to: int) -> int:
    """The most documents, padding included, of bins with so many sequences and tokens (B,), rounded up to a
    multiple."""
    padding = -(-(pad_to - num_tokens) // PAD_DOCUMENT_TOKENS)
    most = int((num_real + padding).max(initial=1))
    return _round_up(most, DOCUMENTS_MULTIPLE)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
