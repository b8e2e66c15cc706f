"""A whole small world for tests of the trainer: a tokenizer, a random Llama, conversations of two classes, a data set.

    world = tiny.make(tmp_path); tiny.train(world, run_dir, "--data.max_steps=3")
    tiny.train_on_ranks(world, run_dir, 2, "--data.max_steps=3")
The first trains in this process, the second on two of the pool. torchrun_command gives the words of a real launch.
write_tokenizer, mixed_conversations and write_lines are for tests that need no model.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file

from benchmarks import step_cases
from ochat import config as configuration
from ochat.commands import generate, init_base
from ochat.commands.generate import GenerateOptions
from ochat.commands.init_base import InitBaseOptions
from ochat.data.prepare import prepare
from ochat.files.checksums import SUMS
from ochat.model import hf
from tests import pool

ROOT = Path(__file__).parents[1]
EOT = "<|end_of_turn|>"
MODEL = {
    "model_type": "llama", "vocab_size": 260, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.1,
    "bos_token_id": 256, "eos_token_id": 257,
}  # fmt: skip
TOML = """
[base]
path = {base}
[data]
path = {data}
token_budget = 96
bins_per_step = 4
[optim]
lr = 3e-3
[train]
dtype = "float32"
device = "cpu"
"""


@dataclass(frozen=True)
class World:
    """Paths of everything a run needs."""

    folder: Path
    base: Path
    data: Path
    config: Path


def make(folder: Path, records: list[dict] | None = None, *, model: dict | None = None) -> World:
    """A world below `folder`, of these conversations or those of `conversations()`."""
    world = World(folder, folder / "base", folder / "data", folder / "config.toml")
    write_base(folder, world.base, model or {})
    source = write_lines(folder / "conversations.jsonl", records or conversations())
    prepare([source], world.base, "openchat_v3.2", world.data, progress=False)
    world.config.write_text(TOML.format(base=json.dumps(str(world.base)), data=json.dumps(str(world.data))))
    return world


def write_base(folder: Path, base: Path, model: dict) -> None:
    """A random model with a byte-level tokenizer of 256 bytes, BOS, EOS and the end of turn."""
    source = folder / "tokenizer"
    source.mkdir(parents=True)
    step_cases.write_bytes_tokenizer(source)
    (folder / "model.json").write_text(json.dumps(MODEL | model))
    init_base.main(
        InitBaseOptions(base, random=folder / "model.json", tokenizer=source, add_token=(EOT,), dtype="float32")
    )


def write_tokenizer(folder: Path) -> Path:
    """A folder with a tokenizer.json of 256 bytes, BOS, EOS and the end of turn."""
    folder.mkdir(parents=True, exist_ok=True)
    step_cases.write_bytes_tokenizer(folder, step_cases.END_OF_TURN)
    return folder


def split(base: Path) -> list[Path]:
    """Puts the base into several files without sums, as a large model comes; the files."""
    model = hf.load(base, dtype="float32")
    for path in [*base.glob("model*.safetensors"), base / SUMS]:
        path.unlink()
    hf.save(base, model.config, model.named_parameters(), "float32", max_shard_bytes=30_000)
    return sorted(base.glob("model-*.safetensors"))


def conversations(count: int = 60, seed: int = 0, classes: tuple[str, str] = ("GPT3", "GPT4")) -> list[dict]:
    """Sums, right from the expert class and one too high from the other, some in two turns, some with a system text.
    `classes` are the sub-optimal and the expert one."""
    draw, records = random.Random(seed), []
    for i in range(count):
        is_expert = i % 3 == 0
        items = []
        for _ in range(1 + (i % 5 == 0)):
            a, b = draw.randrange(50), draw.randrange(50)
            answer = f"{a + b}." if is_expert else f"{a + b + 1}"
            items.append({"role": "user", "content": f"{a}+{b}", "weight": 0.0})
            items.append({"role": "assistant", "content": answer, "weight": 1.0 if is_expert else 0.1})
        records.append({"items": items, "condition": classes[is_expert], "system": "Add." if i % 7 == 0 else ""})
    return records


def mixed_conversations(seed: int, count: int) -> list[dict]:
    """Records of one to three exchanges in two classes, some with weights, a system text or a trailing question."""
    rng = random.Random(seed)

    def text() -> str:
        return "".join(rng.choice("abc de\n<|") for _ in range(rng.randint(0, 40)))

    def turn(role: str) -> dict:
        weight = {} if rng.random() < 0.5 else {"weight": rng.choice([0.0, 0.5, 1.0]) if role == "user" else 1.0}
        return {"role": role, "content": text()} | weight

    def record() -> dict:
        items = [turn(role) for _ in range(rng.randint(1, 3)) for role in ("user", "assistant")]
        items += [turn("user")] if rng.random() < 0.2 else []
        system = {"system": text()} if rng.random() < 0.3 else {}
        return {"items": items, "condition": rng.choice(["GPT4", "GPT3"])} | system

    return [record() for _ in range(count)]


def write_lines(path: Path, records: list[dict]) -> Path:
    """JSON Lines."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    return path


def flip(path: Path, at: float = 0.5) -> None:
    """One bit of the byte at that share of the file."""
    content = bytearray(path.read_bytes())
    content[int(at * len(content))] ^= 1
    path.write_bytes(content)


def options(world: World, run_dir: Path, *more: str) -> list[str]:
    """The command line of a run, without the program."""
    return [str(world.config), f"--run.dir={run_dir}", *more]


def train(world: World, run_dir: Path, *more: str) -> list[dict]:
    """Trains in this process; the lines of metrics.jsonl."""
    from ochat.train.trainer import train as run

    file, *overrides = options(world, run_dir, *more)
    run(configuration.load(file, overrides))
    return metrics(run_dir)


def train_on_ranks(
    world: World, run_dir: Path, processes: int, *more: str, check: bool = True
) -> subprocess.CompletedProcess:
    """Trains on `processes` ranks of the pool."""
    return pool.run(processes, "tests.pool:train", *options(world, run_dir, *more), check=check)


def torchrun_command(world: World, run_dir: Path, processes: int, *more: str) -> list[str]:
    """The words of `torchrun ... -m ochat.train ...`."""
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [*program, "-m", "ochat.train", *options(world, run_dir, *more)]


def generated(options: GenerateOptions) -> list[str]:
    """The answers that `ochat generate` prints."""
    _, batches = generate.answer(options)
    return [text for batch in batches for _, text, _ in batch]


def environment() -> dict[str, str]:
    """This checkout on the path, one thread a process."""
    return os.environ | pool.ENVIRONMENT


def metrics(run_dir: Path, name: str = "metrics.jsonl") -> list[dict]:
    """The JSON lines of a file in a run folder."""
    return [json.loads(line) for line in (run_dir / name).read_text().splitlines()]


def curve(lines: list[dict]) -> list[tuple]:
    """What two runs that compute the same have in common of each step."""
    return [(line["step"], line["loss"], line["grad_norm"], line["classes"]) for line in lines]


def state(run_dir: Path, step: int) -> dict:
    """Every tensor of the checkpoint of a run on one process: weights, and moments as exp_avg.NAME."""
    folder = run_dir / "checkpoints" / f"step_{step}"
    weights, moments = (load_file(folder / f"{kind}-00001-of-00001.safetensors") for kind in ("weights", "optimizer"))
    return weights | moments


def is_equal(ours: dict, theirs: dict) -> bool:
    """Whether two such states are the same, bit for bit."""
    return ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in theirs)
