"""Print what a commit's modules give, as JSON: data sets and exported tensors. Run by golden.py.

python benchmarks/golden_probe.py data FOLDER | tensors FOLDER...
"""

from __future__ import annotations

import hashlib
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np


def data(folder: str) -> list[Any]:
    """Every example's ids, weights and class."""
    dataset = importlib.import_module("ochat.data.dataset").TokenDataset(folder)
    examples = [dataset[i] for i in range(len(dataset))]
    return [[e.condition, e.input_ids.tolist(), np.asarray(e.loss_weights, np.float64).tolist()] for e in examples]


def tensors(*folders: str) -> list[dict[str, str]]:
    """The checksum of each tensor in each folder of safetensors."""
    import torch
    from safetensors import safe_open

    found = []
    for folder in folders:
        of_folder = {}
        for path in sorted(Path(folder).glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118 (it is no mapping)
                    tensor = file.get_tensor(name)
                    content = hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy()).hexdigest()[:16]
                    of_folder[name] = f"{tensor.dtype} {tuple(tensor.shape)} {content}"
        found.append(of_folder)
    return found


if __name__ == "__main__":
    made = {"data": data, "tensors": tensors}[sys.argv[1]](*sys.argv[2:])
    print(json.dumps(made))
