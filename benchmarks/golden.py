"""Run one small job at two commits and compare every number of the mathematics to the bit.

    python -m benchmarks.golden                              # a965333 against HEAD
    python -m benchmarks.golden a965333 . --only train       # against the files of this checkout, one part

Each commit runs in a worktree of its own, on one thread of this machine and through the command line: a tiny random
Llama, conversations with fractional and negative weights, training on one and two processes, a stop and a
resume. Speeds and file formats are not compared. What a commit gave is kept in .cache/golden: it runs once.
Exit status 1: something differs. Float bits depend on the CPU; tests/laws/test_golden.py holds the integers.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import golden_probe, step_cases

ROOT = Path(__file__).resolve().parent.parent
BASE = "a965333"
CACHE = ROOT / ".cache"
STEPS = 20
JOB = "1"  # change it with anything that changes the results of a commit
MODEL = {
    "model_type": "llama", "vocab_size": 260, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.1,
    "bos_token_id": 256, "eos_token_id": 257,
}  # fmt: skip
RENAMED = {  # a key of the older commit -> its later name
    "run.resume_anyway": "run.resume_mismatched",
    "train.max_bad_steps": "train.max_nonfinite_steps",
    "optim.master": "optim.master_dtype",
    "optim.state": "optim.moment_dtype",
}
RUNS: dict[str, tuple[int, dict[str, Any]]] = {  # name -> processes, options in addition to the common ones
    "one process": (1, {"optim.clip": 0.5}),
    "two processes": (2, {"parallel.replicate": 2}),
    "sharded": (2, {"parallel.reshard": "block", "parallel.reduce": "micro_batch", "parallel.offload": "all",
                    "train.recompute": "block", "train.offload_activations": True}),
    "classes, bf16": (1, {"classes.right.weight": 0.73, "classes.wrong.weight": -0.21, "train.dtype": "bfloat16",
                          "train.recompute": "elementwise", "optim.master": "bfloat16", "optim.state": "bfloat16"}),
    "adapters": (1, {"lora.rank": 4, "classes.right.reward": 1.0, "classes.wrong.reward": 0.1}),
    "mixture": (1, {"data.path": None, "data.mix.a.path": "data/train", "data.mix.a.epochs": 2,
                    "data.mix.b.path": "data/held_out", "data.mix.b.epochs": 3, "weights.source": "reward",
                    "weights.per_message_mean": True}),
}  # fmt: skip
SPEEDS = re.compile(r"_per_s$|^mfu$|^peak_mem|_s$|_ms$")  # of a line of metrics
TOKENIZERS = {"mistral": "mistral_common/data/tokenizer.model.v1", "llama3": "llama_models/llama3/tokenizer.model"}
QUESTIONS = ("12+30", "7+7", "Übung macht")


class Job:
    """The job at one commit: `root` is its source tree, `folder` takes what it writes."""

    def __init__(self, root: Path, folder: Path) -> None:
        self.root, self.folder = root, folder
        self.config_source = (root / "ochat" / "config.py").read_text("utf-8")
        self.environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(root), str(root / "kernels")]),
            **dict.fromkeys(["OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"], "1"),
            "CUDA_VISIBLE_DEVICES": "",
        }

    def ochat(self, *words: object) -> str:
        """The output of `ochat WORDS`."""
        return self.python("-m", "ochat", *words)

    def python(self, *words: object) -> str:
        """The output of this interpreter with the commit's modules; exits if it fails."""
        command = [sys.executable, *map(str, words)]
        done = subprocess.run(command, cwd=self.folder, env=self.environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{self.root}: {' '.join(command)[:400]}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        return done.stdout

    def probe(self, what: str, *words: object) -> Any:
        """What golden_probe.py finds with this commit's modules."""
        script = Path(golden_probe.__file__)
        return json.loads(self.python(script, what, *words).splitlines()[-1])

    def prepare(self) -> dict[str, Any]:
        """Bases and data sets; the ids and weights that each set's reader gives."""
        write_inputs(self.folder)
        found = {}
        real = {name: CACHE / "tokenizers" / path for name, path in TOKENIZERS.items()}
        sources = {"bytes": self.folder / "tokenizer"} | {name: path for name, path in real.items() if path.exists()}
        for name, source in sources.items():
            base = self.folder / "base" / name
            self.ochat("init-base", "--random", self.folder / "model.json", "--tokenizer", source, "--add-token",
                       step_cases.END_OF_TURN, "--dtype", "float32", base)  # fmt: skip
            for part in ("train", "held_out") if name == "bytes" else ("held_out",):
                data = self.folder / "data" / (part if name == "bytes" else f"{name}_{part}")
                self.ochat("prepare", "--input", self.folder / f"{part}.jsonl", "--base", base, "--template",
                           "openchat_v3.2", "--output", data, "--no-progress")  # fmt: skip
                found[f"{name} {part}"] = self.probe("data", data)
        return found

    def plans(self) -> dict[str, Any]:
        """Packing plans of five sets of lengths."""
        return json.loads(self.python(ROOT / "tests" / "laws" / "golden_plans.py").splitlines()[-1])

    def train(self) -> dict[str, Any]:
        """The metrics and held-out losses of every run, and of one that is stopped and resumed."""
        found = {}
        for name, (processes, options) in RUNS.items():
            config = self.write_config(name, options)
            if processes == 1:
                self.ochat("train", config)
            else:
                self.python("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m",
                            "ochat.train", config)  # fmt: skip
            found[name] = self.lines(name)
        self.stop_and_resume(self.write_config("resumed", RUNS["one process"][1]))
        found["resumed"] = self.lines("resumed")
        return found

    def stop_and_resume(self, config: Path) -> None:
        """Starts the run, stops it by a signal once it has written some steps, and starts it again."""
        command = [sys.executable, "-m", "ochat", "train", str(config)]
        metrics = self.run_folder("resumed") / "metrics.jsonl"
        first = subprocess.Popen(command, cwd=self.folder, env=self.environment, stdout=subprocess.DEVNULL)
        while first.poll() is None and not (metrics.exists() and metrics.read_bytes().count(b"\n") >= 5):
            time.sleep(0.005)
        first.send_signal(signal.SIGUSR1)
        if first.wait() not in (0, 128 + signal.SIGUSR1):
            sys.exit(f"{self.root}: the run to be stopped ended with {first.returncode}")
        self.ochat("train", config)

    def lines(self, name: str) -> dict[str, Any]:
        """The run's metrics without speeds, and its held-out losses."""
        folder = self.run_folder(name)
        return {file: [_mathematics(json.loads(line)) for line in (folder / file).read_text("utf-8").splitlines()]
                for file in ("metrics.jsonl", "eval.jsonl")}  # fmt: skip

    def export(self) -> dict[str, Any]:
        """The checksum of every tensor that each run exported at its end, and of three exports in float32."""
        folders = {name: self.run_folder(name) / "export" for name in [*RUNS, "resumed"]}
        for name in ("one process", "sharded", "adapters"):
            folders[f"{name}, float32"] = output = self.folder / "exports" / name.replace(" ", "_")
            self.ochat("export", self.run_folder(name), output, "--dtype", "float32")
        return dict(zip(folders, self.probe("tensors", *folders.values()), strict=True))

    def eval(self) -> dict[str, Any]:
        """Held-out answers under each class's prefix."""
        output = self.folder / "eval.json"
        self.ochat("eval", self.folder / "exports" / "one_process", self.folder / "data" / "held_out", "--dtype",
                   "float32", "--device", "cpu", "--output", output)  # fmt: skip
        return {"swap": json.loads(output.read_text("utf-8"))["classes"]}

    def generate(self) -> dict[str, Any]:
        """Greedy answers under each class."""
        found = {}
        for condition in ("right", "wrong"):
            prompts = [word for question in QUESTIONS for word in ("--prompt", question)]
            text = self.ochat("generate", self.folder / "exports" / "one_process", "--condition", condition, "--dtype",
                              "float32", "--device", "cpu", "--max-new-tokens", 24, *prompts)  # fmt: skip
            found[condition] = text.splitlines()
        return found

    def run_folder(self, name: str) -> Path:
        return self.folder / "runs" / re.sub(r"\W+", "_", name)

    def write_config(self, name: str, options: dict[str, Any]) -> Path:
        """The TOML of a run, with this commit's names of the keys."""
        common = {
            "run.dir": str(self.run_folder(name)), "run.deterministic": True, "run.seed": 3,
            "base.path": "base/bytes", "data.path": "data/train", "data.eval_path": "data/held_out",
            "data.token_budget": 192, "data.bins_per_step": 4, "data.epochs": 9, "data.max_steps": STEPS,
            "optim.lr": 3e-3, "train.dtype": "float32", "train.device": "cpu", "train.eval_every": 7,
            "checkpoint.every": 8, "checkpoint.keep": 0,
        }  # fmt: skip
        lines = []
        for key, value in (common | options).items():
            new = RENAMED.get(key, key)
            is_new = key in RENAMED and re.search(rf"\b{new.split('.')[1]}\b", self.config_source)
            if value is not None:
                lines.append(f"{new if is_new else key} = {json.dumps(value)}\n")
        path = self.folder / f"{self.run_folder(name).name}.toml"
        path.write_text("".join(lines), "utf-8")
        return path


PARTS: dict[str, Callable[[Job], dict[str, Any]]] = {  # in order; each but plans needs those before it
    "plans": Job.plans, "prepare": Job.prepare, "train": Job.train, "export": Job.export, "eval": Job.eval,
    "generate": Job.generate,
}  # fmt: skip


def write_inputs(folder: Path) -> None:
    """The same conversations, model and tokenizer of bytes at every commit."""
    (folder / "model.json").write_text(json.dumps(MODEL), "utf-8")
    for name, count, seed in (("train", 60, 0), ("held_out", 24, 1)):
        lines = (json.dumps(record) + "\n" for record in conversations(count, seed))
        (folder / f"{name}.jsonl").write_text("".join(lines), "utf-8")
    (folder / "tokenizer").mkdir()
    step_cases.write_bytes_tokenizer(folder / "tokenizer")


def conversations(count: int, seed: int) -> Iterator[dict[str, Any]]:
    """Sums of two classes; weights fractional, negative, zero or left out; some with two turns or a system text."""
    draw = random.Random(seed)
    for i in range(count):
        is_right = i % 3 == 0
        items = []
        for turn in range(1 + (i % 5 == 0)):
            a, b = draw.randrange(50), draw.randrange(50)
            answer = f"{a + b}, for {a} and {b} ✓." if is_right else f"{a + b + 1}"
            weight = {} if i % 4 == 0 else {"weight": draw.choice([0.37, 1.0, 0.1] if is_right else [-0.25, 0.7, 0.1])}
            weight = {"weight": 0.0} if turn and i % 2 else weight
            items.append({"role": "user", "content": f"{a}+{b}"} | ({"weight": 0.05} if i % 11 == 0 else {}))
            items.append({"role": "assistant", "content": answer} | weight)
        system = {"system": "Add the two numbers."} if i % 7 == 0 else {}
        reward = round(draw.uniform(0.1, 1.0), 3)
        yield {"items": items, "condition": "right" if is_right else "wrong", "reward": reward} | system


def _mathematics(line: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if not SPEEDS.search(key)}


def results(commit: str, parts: list[str]) -> dict[str, Any]:
    """What the parts give at a commit ("." is this checkout as it is); from .cache/golden where it is kept."""
    if commit == ".":
        with tempfile.TemporaryDirectory(prefix="golden-") as folder:
            return run_parts(Job(ROOT, Path(folder)), parts)
    full = _git("rev-parse", "--verify", f"{commit}^{{commit}}")
    path = CACHE / "golden" / f"{full[:12]}-{_machine()}.json"
    kept = json.loads(path.read_text("utf-8")) if path.exists() else {}
    if any(part not in kept for part in parts):
        with tempfile.TemporaryDirectory(prefix="golden-") as folder:
            tree = Path(folder) / "tree"
            _git("worktree", "add", "--detach", "--quiet", str(tree), full)
            try:
                (Path(folder) / "work").mkdir()
                kept |= run_parts(Job(tree, Path(folder) / "work"), parts)
            finally:
                _git("worktree", "remove", "--force", str(tree))
        path.parent.mkdir(parents=True, exist_ok=True)
        part_file = path.with_suffix(f".{os.getpid()}")
        part_file.write_text(json.dumps(kept), "utf-8")
        part_file.replace(path)
    return {part: kept[part] for part in parts}


def run_parts(job: Job, parts: list[str]) -> dict[str, Any]:
    """What each part gives, after those that it needs."""
    names, found = list(PARTS), {}
    for name in names[: max(map(names.index, parts)) + 1]:
        if name in parts or name != "plans":
            start = time.monotonic()
            found[name] = json.loads(json.dumps(PARTS[name](job)))
            print(f"{job.root.name}: {name}, {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    return found


def _machine() -> str:
    """Changes with JOB and with what may change float bits."""
    cpu = (
        re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) if Path("/proc/cpuinfo").exists() else []
    )
    facts = [JOB, platform.machine(), *cpu[:1], sys.version, *map(version, ("torch", "numpy", "tokenizers"))]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:12]


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"git {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout.strip()


def first_difference(before: Any, after: Any, path: str = "") -> str:
    """Where two results differ first, and how; "" for equal ones."""
    if isinstance(before, dict) and isinstance(after, dict):
        pairs = [(str(key), before.get(key), after.get(key)) for key in sorted({*before, *after})]
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        pairs = [(str(i), *pair) for i, pair in enumerate(zip(before, after, strict=True))]
    elif json.dumps(before) == json.dumps(after):  # the text tells 1 from 1.0, and NaN is NaN
        return ""
    else:
        lengths = f" ({len(before)} and {len(after)})" if isinstance(before, list) and isinstance(after, list) else ""
        return f"{path}: {str(before)[:60]} != {str(after)[:60]}{lengths}"
    return next(filter(None, (first_difference(b, a, f"{path}/{key}") for key, b, a in pairs)), "")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.golden", description="compares the numbers of two commits")
    parser.add_argument("before", nargs="?", default=BASE, help=f"a commit; {BASE} if left out")
    parser.add_argument("after", nargs="?", default="HEAD", help="a commit, or . for this checkout as it is")
    parser.add_argument("--only", choices=list(PARTS), action="append", help="a part; repeatable")
    options = parser.parse_args(arguments)
    parts = options.only or list(PARTS)
    before, after = (results(commit, parts) for commit in (options.before, options.after))
    table = Table("part", "what", options.before, f"{options.after}: first difference")
    differences = 0
    for part in parts:
        for name in {**before[part], **after[part]}:
            difference = first_difference(before[part].get(name), after[part].get(name))
            differences += bool(difference)
            table.add_row(part, name, "DIFFERENT" if difference else "same", difference)
    Console(width=max(shutil.get_terminal_size().columns, 120), highlight=False).print(table)
    print(f"{differences} differences" if differences else "every number is the same to the bit")
    return int(bool(differences))


if __name__ == "__main__":
    sys.exit(main())
