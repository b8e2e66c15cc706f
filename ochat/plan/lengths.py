"""Count the sequences of each length, and pack sequences of which only the lengths are known.

    lengths = read("lengths.npy");  counts = LengthCounts.of(lengths);  counts.percentile(50);  counts.text()
    stats, flops = pack(lengths, model, config.data, supervised=0.5, seed=0)

Counting takes memory that does not grow with the number of sequences: a mapped file is read in pieces.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ochat.errors import DataError
from ochat.packing import multipack

if TYPE_CHECKING:  # torch takes seconds to import
    from ochat.config import DataConfig
    from ochat.data.loader import LoaderStats
    from ochat.model.config import ModelConfig

PIECE = 2**22  # sequences looked at together
LONGEST = 2**24  # a count is kept of every length: 128 MiB of them
BARS = " ▏▎▍▌▋▊▉█"
HOW_TO_MAKE = 'np.save("lengths.npy", np.array([len(ids) for ids in ...], dtype=np.int32))'


@dataclass(frozen=True, eq=False)
class LengthCounts:
    """`counts[n]` sequences have n tokens."""

    counts: NDArray[np.int64]  # (longest + 1,)

    @classmethod
    def of(cls, lengths: NDArray) -> LengthCounts:
        """Counts of (S,) integers from 1 up. Raises: DataError naming the first that is no length."""
        counts = np.zeros(1, np.int64)
        for start in range(0, len(lengths), PIECE):
            piece = np.asarray(lengths[start : start + PIECE])
            wrong = np.flatnonzero((piece < 1) | (piece > LONGEST))
            if len(wrong):
                raise DataError(
                    f"sequence {start + wrong[0]} has {piece[wrong[0]]} tokens: expected 1 to {LONGEST:,} tokens each"
                )
            found = np.bincount(piece, minlength=len(counts))
            found[: len(counts)] += counts
            counts = found
        return cls(counts)

    @property
    def num_sequences(self) -> int:
        return int(self.counts.sum())

    @property
    def num_tokens(self) -> int:
        return int(self.counts @ np.arange(len(self.counts)))

    @property
    def longest(self) -> int:
        return len(self.counts) - 1

    def over(self, limit: int) -> int:
        """Sequences of more than `limit` tokens."""
        return int(self.counts[limit + 1 :].sum())

    def cut(self, limit: int) -> LengthCounts:
        """The counts after longer sequences have been cut at `limit` tokens."""
        counts = self.counts[: limit + 1].copy()
        if self.longest > limit:
            counts[limit] += self.over(limit)
        return LengthCounts(counts)

    def percentile(self, percent: float) -> int:
        """The shortest length that at least `percent` % of the sequences do not exceed."""
        reached = np.cumsum(self.counts)
        return int(np.searchsorted(reached, max(percent / 100 * reached[-1], 1)))

    def text(self, width: int = 34, num_ranges: int = 12) -> str:
        """Percentiles, and a bar for each range of lengths; a range is about as wide as the lengths in it are long."""
        edges = _edges(int(np.flatnonzero(self.counts)[0]), self.longest, num_ranges)
        found = np.diff(np.append(0, np.cumsum(self.counts))[np.minimum(edges, len(self.counts))])
        known = ", ".join(f"{name} {self.percentile(p):,}" for name, p in (("p50", 50), ("p90", 90), ("p99", 99)))
        mean = self.num_tokens / self.num_sequences
        lines = [f"tokens a sequence: mean {mean:,.0f}, {known}, max {self.longest:,}"]
        for count, (low, high) in zip(found, pairwise(edges), strict=True):
            share = f"{count:>13,} {count / self.num_sequences:>7.2%}"
            lines.append(f"{low:>9,} - {high - 1:<9,} {share}  {_bar(count / max(found), width)}".rstrip())
        return "\n".join(lines)


def read(path: str | Path) -> NDArray:
    """The (S,) int32 or int64 lengths in a .npy file, mapped. Raises: DataError for anything else."""
    try:
        lengths = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file. Make one with: {HOW_TO_MAKE}") from None
    except Exception as error:  # the library's reader of headers and archives raises what it meets
        raise DataError(f"{path}: not a NumPy .npy file ({error}). Make one with: {HOW_TO_MAKE}") from None
    if not isinstance(lengths, np.ndarray) or lengths.ndim != 1 or lengths.dtype not in (np.int32, np.int64):
        kind = f"{lengths.dtype} of shape {lengths.shape}" if isinstance(lengths, np.ndarray) else "an archive"
        raise DataError(f"{path}: holds {kind}; expected one row of int32 or int64. Make one with: {HOW_TO_MAKE}")
    if not len(lengths):
        raise DataError(f"{path}: holds no lengths")
    return lengths


def pack(
    lengths: NDArray, model: ModelConfig, data: DataConfig, supervised: float, seed: int
) -> tuple[LoaderStats, float]:
    """Statistics and FLOPs of the first epoch, packed as a run would, sequences longer than a bin cut to it.

    Other epochs count the same. `supervised`: the share of tokens that is supervised.
    """
    from ochat.data.loader import LoaderStats

    lengths = np.minimum(lengths, data.token_budget)
    flops = model.flops_per_sequence(lengths, supervised * lengths)
    shape = {"token_budget": data.token_budget, "bins_per_step": data.bins_per_step}
    plan = multipack.plan(lengths, **shape, seed=seed, epoch=0, costs=flops)
    num_supervised = round(supervised * int(lengths.sum(dtype=np.int64)))
    stats = LoaderStats.of(plan, num_supervised, (plan.num_steps,) * data.epochs, data.max_steps)
    return stats, float(flops.sum())


def _edges(shortest: int, longest: int, num_ranges: int) -> NDArray[np.int64]:
    """Round borders from at most `shortest` to above `longest`: 8, 10, 12, 14, 16, 20 ..., or 8, 12, 16, 24 ..., or
    8, 16, 32 ..., the finest that gives at most `num_ranges` ranges."""
    powers = 2 ** np.arange(longest.bit_length() + 1)[:, None]
    for parts in (4, 2, 1):  # ranges between two powers of two
        ladder = np.unique(powers + powers * np.arange(parts) // parts)
        low, high = np.searchsorted(ladder, (shortest, longest), "right")
        if high - low < num_ranges:
            break
    return ladder[low - 1 : high + 1]


def _bar(share: float, width: int) -> str:
    eighths = round(8 * width * share) or (1 if share else 0)
    return "█" * (eighths // 8) + BARS[eighths % 8].strip()
