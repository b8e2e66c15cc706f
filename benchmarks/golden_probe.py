"""Print what a commit's modules give, as JSON: data sets, packing plans, exported tensors. Run by golden.py.

python benchmarks/golden_probe.py data FOLDER | plans | tensors FOLDER...

It runs with the modules of either commit on the path, so it imports by their names, the newer first.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import random
import sys
from pathlib import Path
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


def write_bytes_tokenizer(folder: Path, *special: str) -> None:
    """A tokenizer of 256 bytes, BOS, EOS and the `special` tokens."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>", *special])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}', "utf-8")


def digest(array: Any, dtype: str) -> str:
    return hashlib.sha256(np.ascontiguousarray(array, dtype).tobytes()).hexdigest()[:16]


if __name__ == "__main__":
    made = {"data": data, "plans": plans, "tensors": tensors}[sys.argv[1]](*sys.argv[2:])
    print(json.dumps(made))
