"""A micro-batch: conversations laid end to end, labels and weights already shifted, supervised rows listed.

    batch = pack(examples, indices, class_ids, pad_to=8192)

Letters: T packed tokens, S documents, R supervised rows. Padding comes as short documents of weight 0, because one
document of P padding tokens would cost P^2 in attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

IGNORE_INDEX = -100
PAD_ID = 0  # any valid id will do: no document sees padding, and padding has no label
PAD_DOCUMENT_TOKENS = 256  # long enough to keep their number small, short enough to cost nothing in attention
DOCUMENTS_MULTIPLE = 64  # data sets and epochs that differ a little share a compiled shape


@dataclass(frozen=True, eq=False)
class Example:
    """One conversation as training sees it: unshifted, truncated and trimmed by prepare."""

    input_ids: NDArray[np.int64]  # (len,)
    loss_weights: NDArray[np.float32]  # (len,)
    condition: str


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """Tensors of one bin. The rest are host values, so that nobody has to ask the device for them."""

    input_ids: torch.Tensor  # (T,) int64
    labels: torch.Tensor  # (T,) int64, the next id; IGNORE_INDEX at a document's end and in padding
    loss_weights: torch.Tensor  # (T,) float32, the label's weight; 0 where there is none
    position_ids: torch.Tensor  # (T,) int64, from 0 in every document
    cu_seqlens: torch.Tensor  # (S+1,) int32
    supervised_rows: torch.Tensor  # (R,) int64, ascending: label != IGNORE_INDEX and weight != 0
    supervised_classes: torch.Tensor  # (R,) int64, class of the conversation that a row belongs to
    max_seqlen: int  # at least the longest document
    num_tokens: int  # without padding
    num_supervised: int  # R
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
        """The same batch on another device. From pinned memory nobody waits: the host goes on at once, and the copies
        (2 MB at 40,960 tokens, 0.05 ms) take their turn in the current stream, so what follows them there finds them
        done."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if torch.is_tensor(getattr(self, f.name))}
        return replace(self, **{name: x.to(device, non_blocking=non_blocking) for name, x in tensors.items()})


def pack(
    examples: Sequence[Example],
    indices: Sequence[int],
    class_ids: Sequence[int],
    *,
    pad_to: int | None = None,
    num_documents: int | None = None,
) -> PackedBatch:
    """Lay `examples` end to end: the definition of what `TokenDataset.batch` does in compiled code.

    `indices` (S,) are their places in the data set, `class_ids` (S,) their classes. `pad_to`: fill up to exactly so
    many tokens. `num_documents`: exactly so many documents, empty ones at the end, and a `max_seqlen` that is a power
    of two from PAD_DOCUMENT_TOKENS on, or `pad_to`, so that a compiler meets few shapes. Without examples the batch is
    padding alone: `pad_to` tokens, or one.
    """
    assert len(examples) == len(indices) == len(class_ids), "one index and one class per example"
    lengths, max_seqlen = documents([len(example.input_ids) for example in examples], pad_to, num_documents)
    cu_seqlens = np.concatenate([[0], np.cumsum(lengths)])
    input_ids = np.full(cu_seqlens[-1], PAD_ID, np.int64)
    labels = np.full(len(input_ids), IGNORE_INDEX, np.int64)
    weights = np.zeros(len(input_ids), np.float32)
    row_class = np.zeros(len(input_ids), np.int64)
    for example, class_id, begin in zip(examples, class_ids, cu_seqlens, strict=False):
        end = begin + len(example.input_ids)
        input_ids[begin:end] = example.input_ids
        labels[begin : end - 1] = example.input_ids[1:]
        weights[begin : end - 1] = example.loss_weights[1:]
        row_class[begin:end] = class_id
    rows = np.flatnonzero(weights)
    return PackedBatch(
        input_ids=torch.from_numpy(input_ids),
        labels=torch.from_numpy(labels),
        loss_weights=torch.from_numpy(weights),
        position_ids=torch.from_numpy(np.arange(len(input_ids)) - np.repeat(cu_seqlens[:-1], lengths)),
        cu_seqlens=torch.from_numpy(cu_seqlens.astype(np.int32)),
        supervised_rows=torch.from_numpy(rows),
        supervised_classes=torch.from_numpy(row_class[rows]),
        max_seqlen=max_seqlen,
        num_tokens=int(cu_seqlens[len(examples)]),
        num_supervised=len(rows),
        weight_sum=float(np.abs(weights[rows], dtype=np.float64).sum()),
        lengths=tuple(lengths),
        sequences=tuple(int(index) for index in indices),
    )


def allocate(num_tokens: int, num_documents: int, pin: bool) -> dict[str, torch.Tensor]:
    """Unfilled tensors of a PackedBatch; `supervised_rows` and `supervised_classes` have room for all tokens.

    `pin`: in page-locked memory, which torch hands out again only when copies from it are done.
    """
    int64 = ("input_ids", "labels", "position_ids", "supervised_rows", "supervised_classes")
    tensors = {name: torch.empty(num_tokens, dtype=torch.int64, pin_memory=pin) for name in int64}
    tensors["loss_weights"] = torch.empty(num_tokens, dtype=torch.float32, pin_memory=pin)
    tensors["cu_seqlens"] = torch.empty(num_documents + 1, dtype=torch.int32, pin_memory=pin)
    return tensors


def documents(real: list[int], pad_to: int | None, num_documents: int | None) -> tuple[list[int], int]:
    """Lengths of a batch's documents, padding and empty ones included, and its max_seqlen (see `pack`)."""
    num_tokens = sum(real)
    lengths = real + _padding(max(pad_to or 0, 0 if real else 1) - num_tokens)
    total, longest = sum(lengths), max(lengths)
    assert pad_to is None or total == pad_to, f"{num_tokens} tokens do not fit into {pad_to}"
    if num_documents is None:
        return lengths, longest
    assert len(lengths) <= num_documents, f"{len(lengths)} documents do not fit into {num_documents}"
    bucket = max(1 << (longest - 1).bit_length(), PAD_DOCUMENT_TOKENS)
    return lengths + [0] * (num_documents - len(lengths)), min(bucket, total)


def most_documents(num_real: NDArray[np.int64], num_tokens: NDArray[np.int64], pad_to: int) -> int:
    """Most documents, padding included, of bins with so many sequences and tokens (B,), rounded up to a multiple."""
    padding = -(-(pad_to - num_tokens) // PAD_DOCUMENT_TOKENS)
    most = int((num_real + padding).max(initial=1))
    return -(-most // DOCUMENTS_MULTIPLE) * DOCUMENTS_MULTIPLE


def _padding(num_tokens: int) -> list[int]:
    """Lengths of the padding documents."""
    whole, rest = divmod(max(num_tokens, 0), PAD_DOCUMENT_TOKENS)
    return [PAD_DOCUMENT_TOKENS] * whole + [rest] * (rest > 0)
