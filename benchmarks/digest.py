"""What a run of the GPU suite found, in some thirty lines: from the files in its folder, as far as they were written.

print(*lines(Path("DIR"), {"step": "passed (50 s)"}, Path("DIR/tests.txt")), sep="\n")
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import get_args, get_type_hints

from benchmarks import csv_file, report, smoke, step_cases
from benchmarks.csv_file import Row
from benchmarks.step_cases import Case
from ochat.config import TrainConfig
from ochat.plan import gpus

WINNERS = "attention.json"
BACKENDS = get_args(get_type_hints(TrainConfig)["attention"])  # that a run can be told to take
KERNELS = 8  # of a profile
FAILED_TESTS = 3


def lines(out: Path, outcomes: dict[str, str], tests: Path) -> list[str]:
    """Device, steps, kernels, products, attention, operators, tests, and how each phase ended."""
    found = [*_device(out), *_steps(_rows(out, "train_step")), *_kernels(_rows(out, "kernels"))]
    found += [*_products(_rows(out, "products")), *_attention(_rows(out, "ops")), *_operators(_rows(out, "ops"))]
    found += _tests(tests)
    found += [f"{name}: {outcome}" for name, outcome in outcomes.items() if not outcome.startswith("passed")]
    passed = [f"{name} {outcome.removeprefix('passed ')}" for name, outcome in outcomes.items() if "passed" in outcome]
    return [*found, f"passed: {', '.join(passed) or 'none'}"]


def write_winners(out: Path) -> None:
    """The backend of attention for each model that was measured on chats: those of the product that were fastest."""
    fastest: dict[str, tuple[float, str]] = {}
    for row in _rows(out, "ops"):
        is_chosen_from = row["operator"] == "attention" and row["pass"] == "forward+backward" and row["status"] == "ok"
        if is_chosen_from and row["variant"] == "chats" and not row["window"] and row["implementation"] in BACKENDS:
            found = float(row["median_ms"]), row["implementation"]
            fastest[row["model"]] = min(found, fastest.get(row["model"], found))
    (out / WINNERS).write_text(json.dumps({model: name for model, (_, name) in fastest.items()}), encoding="utf-8")


def _rows(out: Path, name: str) -> list[Row]:
    path = out / f"{name}.csv"
    return csv_file.read(path) if path.is_file() else []


def _device(out: Path) -> Iterator[str]:
    if not (out / smoke.FILE).is_file():
        return
    found = json.loads((out / smoke.FILE).read_text("utf-8"))
    yield f"{found['device']}, torch {found['torch']}, triton {found['triton']}, driver {found['driver'] or '-'}"
    burst, sustained = found["burst_tflop_per_s"], found["sustained_tflop_per_s"]
    yield f"products: {burst:.4g} TFLOP/s in a burst, {sustained:.4g} for 3 s ({found['after_it']}); copy " + (
        f"{found['copy_gb_per_s']:.4g} GB/s"
    )


def _steps(rows: list[Row]) -> Iterator[str]:
    """Ours beside the plan's prediction for this card; peers; why others have no number."""
    for row in rows:
        title = f"{row['model']}, {row['bins_per_step']} x {row['token_budget']} {row['options']}".strip()
        if not row["tokens_per_s"]:
            yield f"step of {row['implementation']}, {row['model']}: {row['status']}: {row['note'][:80]}"
            continue
        rate, low, high = (float(row[f"tokens_per_s{part}"]) for part in ("", "_p20", "_p80"))
        text = f"{row['implementation']}: {rate:,.0f} tokens/s ({low:,.0f}-{high:,.0f}), MFU {float(row['mfu']):.1%}"
        yield f"{text}, {float(row['peak_gib']):.1f} GiB{_predicted(row)}; {title}"


def _predicted(row: Row) -> str:
    gpu = gpus.lookup(row["device"])
    if row["implementation"] != "ours" or gpu is None:
        return ""
    case = Case(
        row["model"], int(row["token_budget"]), int(row["bins_per_step"]), options=tuple(row["options"].split())
    )
    return f", predicted {step_cases.predict(case, gpu).speed.tokens_per_s:,.0f}"


def _kernels(rows: list[Row]) -> Iterator[str]:
    for row in rows[: KERNELS + 1]:
        floor = f", {float(row['floor_fraction']):.0%} of its floor's speed" if row["floor_fraction"] else ""
        name = f"{row['kernel'][:50]} {row['operator'][:20]} {row['shapes'][:40]}".rstrip()
        yield f"{float(row['total_ms']):8.2f} ms {float(row['share']):5.1%} in {row['calls']} x {name}{floor}"


def _products(rows: list[Row]) -> Iterator[str]:
    """TFLOP/s of forward, input's and weight's gradient."""
    found: dict[tuple[str, str], dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        rate = f"{float(row['tflop_per_s']):.3g}" if row["tflop_per_s"] else "-"
        found[row["model"], row["dtype"]][row["product"]].append(rate)
    for (model, dtype), products in found.items():
        rates = ", ".join(f"{name} {'/'.join(each)}" for name, each in products.items())
        yield f"{model} {dtype} TFLOP/s: {rates}"


def _attention(rows: list[Row]) -> Iterator[str]:
    for each in report.compare([row for row in rows if row["operator"] == "attention"])[:6]:
        ahead = f", {each.margin:.0%} ahead of {each.runner_up}" if each.runner_up else ""
        yield f"attention, {each.case}: {each.fastest}, {each.times_baseline:.2f} x the baseline{ahead}"


def _operators(rows: list[Row]) -> Iterator[str]:
    """A line a model: the share of the floor's speed that our kernels reach."""
    found: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        if row["implementation"] == "triton" and row["median_ms"] and row["pass"] != "forward":
            share = "" if row["supervised"] in ("1", "1.0") else f" {float(row['supervised']):.0%}"
            name = f"{row['operator']}{share} {row['variant']}".rstrip()
            found[row["model"]].append(f"{name} {float(row['floor_fraction']):.1%}")
    for model, shares in found.items():
        yield f"{model}, of the floor's speed: {', '.join(shares)}"


def _tests(path: Path) -> Iterator[str]:
    if not path.is_file():
        return
    text = path.read_text("utf-8", errors="replace")
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", text, re.MULTILINE) or re.findall(r"(\S+::\S.*?) FAILED", text)
    counts = {word: len(re.findall(rf"\b{word}\b", text)) for word in ("PASSED", "FAILED", "SKIPPED")}
    last = next((line for line in reversed(text.splitlines()) if re.search(r"\d+ (passed|failed)", line)), None)
    yield f"tests: {last.strip('= ')}" if last else f"tests, not all of them: {counts}"
    yield from (f"  failed: {name}" for name in list(dict.fromkeys(failed))[:FAILED_TESTS])
