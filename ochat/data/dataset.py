"""A prepared data set: shards of token ids and spans, mapped into memory, that turn into examples with weights at load.

    dataset = TokenDataset("data/train", classes=config.classes, weights=config.weights)
    dataset[0].input_ids, dataset.lengths, dataset.place(0)

`ochat prepare` writes the folder; manifest.json describes it. Nothing is copied: all processes of a machine share its pages.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ochat.config import ClassConfig, WeightsConfig
from ochat.data.batch import Example as Example


class TokenDataset:
    """Sequence of examples in input order.

    lengths (S,) int64 tokens; supervised (S,) int64 labels of non-zero weight, counted after the shift; class_ids (S,) int64 places in
    class_names; indices (S,) int64 places in the unselected data; template; manifest; fingerprint (of tokens and selection, not of weights).
    """

    path: Path
    lengths: NDArray[np.int64]
    supervised: NDArray[np.int64]
    class_ids: NDArray[np.int64]
    class_names: tuple[str, ...]
    indices: NDArray[np.int64]
    template: Any  # ochat.data.template.Template
    manifest: dict[str, Any]
    fingerprint: str

    def __init__(
        self,
        path: str | Path,
        *,
        classes: Mapping[str, ClassConfig] | None = None,
        weights: WeightsConfig | None = None,
        only_class: str = "",
        subsample: Mapping[str, float] | None = None,
        seed: int = 0,
    ) -> None:
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Example:
        raise NotImplementedError

    def place(self, index: int) -> str:
        """"file:line" of the record that an example came from."""
        raise NotImplementedError

    def verify(self) -> None:
        """Read every shard and compare its sha256. Raises DataError naming the file."""
        raise NotImplementedError
