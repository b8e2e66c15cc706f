"""Find the edges of bins that hold equally many rewards of the input.

quantile_edges([[record, ...], ...], RecordReader(), 4)      # 3 edges
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from ochat.data.records import Record
from ochat.data.scores.rewards import Rewards
from ochat.errors import DataError
from ochat.text.record_formats import RecordReader
from ochat.text.records.objects import Notes


def quantile_edges(
    batches: Iterable[list[Record]], reader: RecordReader, count: int, given: Rewards | None = None
) -> tuple[float, ...]:
    """`count` - 1 rising edges. Records that cannot be read are left to the pass that refuses them. `given`: rewards in
    place of the records' own.

    Raises: DataError where rewards are too few or too often the same. Costs: reads all records; 8 bytes a record.
    """
    found = []
    for record in (record for batch in batches for record in batch):
        try:
            value = record.value() if given is None else given.put(record)
            found += [each.reward for each in reader.read(value, Notes()) if each.reward is not None]
        except DataError:
            continue
    if not found:
        raise DataError(f"--quantiles {count}: no record has a reward")
    edges = np.quantile(np.array(found), np.arange(1, count) / count).tolist()
    if len(set(edges)) < len(edges) or edges[0] == min(found):
        raise DataError(
            f"--quantiles {count}: rewards are too often the same, so that the edges {', '.join(map(str, edges))} make "
            "bins without records; take fewer, or --bins"
        )
    return tuple(edges)
