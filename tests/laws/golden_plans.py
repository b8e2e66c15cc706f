"""Print the packing plans of five sets of lengths as JSON: number of steps, and digests of their arrays.

python tests/laws/golden_plans.py

benchmarks/golden.py runs it with the modules of an older commit too, so it imports by either name, the newer first.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import random
from typing import Any

import numpy as np

PLANS = {  # name -> seed, number of sequences, longest, options of plan()
    "chats": (1, 3000, 2048, {"token_budget": 8192, "bins_per_step": 8}),
    "one bin a step": (2, 500, 700, {"token_budget": 2048, "bins_per_step": 1}),
    "tight": (3, 800, 1024, {"token_budget": 1024, "bins_per_step": 4}),
    "few": (4, 5, 300, {"token_budget": 512, "bins_per_step": 16}),
    "short": (5, 6000, 40, {"token_budget": 1024, "bins_per_step": 2, "max_sequences": 60}),
}


def first_module(*names: str) -> Any:
    """The first of these modules that exists."""
    for name in names:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if not name.startswith(str(error.name)):
                raise
    raise ModuleNotFoundError(f"none of {', '.join(names)}")


def plans() -> dict[str, Any]:
    """Every plan's arrays, of two epochs, with and without costs: sums and digests."""
    multipack = first_module("ochat.packing.multipack", "ochat.data.multipack")
    found = {}
    for name, (seed, count, longest, options) in PLANS.items():
        draw = random.Random(seed)
        lengths = [1 + min(draw.randrange(longest), draw.randrange(longest)) for _ in range(count)]
        for costs in (None, [length * (512 + length) for length in lengths]):
            for epoch in (0, 1):
                made = multipack.plan(np.array(lengths), seed=seed, epoch=epoch, costs=costs, **options)
                arrays = (made.indices, made.bin_offsets)
                where = f"{name}, epoch {epoch}{', costs' if costs else ''}"
                found[where] = [int(made.num_steps), *(digest(array, "<i8") for array in arrays)]
    return found


def digest(array: Any, dtype: str) -> str:
    return hashlib.sha256(np.ascontiguousarray(array, dtype).tobytes()).hexdigest()[:16]


if __name__ == "__main__":
    print(json.dumps(plans()))
