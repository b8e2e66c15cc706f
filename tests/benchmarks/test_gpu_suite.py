"""The whole GPU suite on tiny shapes, without a GPU: what it writes and says, what it kills, what it refuses."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import cases, digest, gpu_suite, implementations, ops, smoke, step_profile, train_step
from benchmarks.cases import OPERATORS
from benchmarks.csv_file import CsvFile, read
from benchmarks.step_profile import Ran, Work
from benchmarks.timing import Ceilings

ROOT = Path(__file__).parents[2]
NAMES = ("smoke", "step", "products", "attention", "chosen", "operators", "tests", "peers", "peers' step")


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    """The folder that a dry run leaves, what it printed, its exit status."""
    out = tmp_path_factory.mktemp("suite") / "out"
    command = [sys.executable, "-m", "benchmarks.gpu_suite", "--out", out, "--device", "cpu", "--quick"]
    paths = os.pathsep.join(["kernels", *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    known = os.environ | {"PYTHONPATH": paths}
    done = subprocess.run(command, cwd=ROOT, env=known, capture_output=True, text=True, timeout=580)
    return out, done.stdout + done.stderr, done.returncode


def test_a_dry_run_measures_every_operator_and_says_what_failed(suite):
    """Peers that are not installed are reasons in the rows, and no failure of the suite."""
    out, printed, _ = suite
    rows = read(out / "ops.csv")
    assert list(rows[0]) == ops.COLUMNS, printed
    found = {(row["operator"], row["implementation"]) for row in rows if row["status"] == "ok"}
    assert {(operator, name) for operator in OPERATORS for name in implementations.OURS} <= found, printed
    assert ("attention", "sdpa") in found and {row["window"] for row in rows} == {"", "24"}
    for row in rows:
        assert row["device"] == "cpu-interpreter" and row["torch"] and row["date"] and row["commit"]
        if row["status"] not in ("ok", "unweighted"):
            assert row["note"]
            continue
        p20, median, p80 = (float(row[name]) for name in ("p20_ms", "median_ms", "p80_ms"))
        assert 0 < p20 <= median <= p80
        assert float(row["floor_fraction"]) == pytest.approx(float(row["floor_ms"]) / median, rel=1e-3)
        assert bool(row["tflop_per_s"]) != bool(row["gb_per_s"])
        if row["implementation"] == "triton":
            assert float(row["max_error"]) < 2e-2, row


def test_a_dry_run_leaves_few_files_and_a_digest_that_fits_a_screen(suite):
    out, printed, status = suite
    assert status == 0, printed
    files = {path.name for path in out.iterdir()}
    assert files == {
        *("device.json", "train_step.csv", "kernels.csv", "products.csv"),
        *("ops.csv", "attention.json", "tests.txt", "log.txt"),
    }
    assert len(files) <= 8
    said = (out / "log.txt").read_text().split("\n\n")[-1].splitlines()
    assert said == printed.splitlines()[-len(said) :] and 20 < len(said) < 40
    assert all(f"{name} (" in said[-1] for name in NAMES) and said[-1].startswith("passed: ")
    assert any(line.startswith("tests: ") and " passed" in line for line in said)
    device = json.loads((out / "device.json").read_text())
    assert device["sustained_tflop_per_s"] > 0 and device["kernel_error"] < 1e-4
    assert smoke.read(out, torch.device("cpu")) == Ceilings(device["burst_tflop_per_s"], device["copy_gb_per_s"])
    products = {(row["product"], row["pass"], row["dtype"]) for row in read(out / "products.csv")}
    assert {("qkv", "weight", "bf16"), ("down", "input", "fp8"), ("head", "forward", "bf16")} <= products
    kernels = read(out / "kernels.csv")
    assert kernels[0]["kernel"] == "(all)" and len(kernels) == step_profile.MOST + 1
    longest = [float(row["total_ms"]) for row in kernels[1:]]
    assert longest == sorted(longest, reverse=True) and sum(longest) <= float(kernels[0]["total_ms"]) * 1.001


def test_a_dry_run_trains_the_same_step_with_its_peers(suite):
    """Ours in three phases; transformers padded and packed to the same losses; the reason of who is not installed."""
    out, printed, _ = suite
    rows = read(out / "train_step.csv")
    assert list(rows[0]) == train_step.COLUMNS, printed
    found = [row for row in rows if row["status"] == "ok"]
    assert [row["implementation"] for row in found] == ["ours", "ours", "ours", "padded", "packed"], printed
    for row in found:
        assert row["torch"] and row["date"] and row["cpu"] and int(row["cores"]) > 0
        assert 0 < float(row["supervised_tokens_per_s"]) < float(row["tokens_per_s"]) and float(row["mfu"]) > 0
    for row in found[3:]:
        assert float(row["loss_difference"]) < train_step.LOSS_BOUND["float32"] and row["compared_steps"] == "20"
    assert all(row["note"] for row in rows)


def test_a_phase_that_takes_too_long_is_killed_with_what_it_started(tmp_path):
    program = "import subprocess, time; child = subprocess.Popen(['sleep', '60']); print(child.pid, flush=True); "
    command, log = [sys.executable, "-c", program + "time.sleep(60)"], tmp_path / "log.txt"
    before = time.monotonic()
    assert gpu_suite.watch(command, log, 2.0, dict(os.environ)) is None and time.monotonic() - before < 20
    child = Path(f"/proc/{int(log.read_text())}/stat")
    while child.exists() and child.read_text().split()[2] != "Z":  # on a busy machine it takes a moment to die
        assert time.monotonic() - before < 40
        time.sleep(0.1)
    assert gpu_suite.watch([sys.executable, "-c", "raise SystemExit(3)"], log, 30.0, dict(os.environ)) == 3


def test_the_phases_fit_seven_minutes_and_a_second_run_four(tmp_path, monkeypatch, capsys):
    options = gpu_suite.command_line.parser("x", "x", "x").parse_args([f"--out={tmp_path}"])
    every = gpu_suite.phases(options)
    assert tuple(phase.name for phase in every) == NAMES
    assert sum(phase.seconds for phase in every) <= gpu_suite.SECONDS - gpu_suite.LAST_SECONDS
    monkeypatch.setattr(sys, "argv", ["suite", "--out", str(tmp_path), "--phases", "nonsense"])
    with pytest.raises(SystemExit):
        gpu_suite.main()
    assert "there are smoke, step" in capsys.readouterr().err


def test_a_killed_phase_is_a_line_of_the_digest_and_the_next_ones_run(tmp_path, monkeypatch, capsys):
    ended = {"smoke": None, "step": 1}
    commands, limits = [], []

    def watch(command, log, limit, variables):
        commands.append(command)
        limits.append(limit)
        return ended.get(
            next(name for name, end in (("smoke", "smoke"), ("step", "train_step")) if end in command[2]), 0
        )

    monkeypatch.setattr(gpu_suite, "watch", watch)
    monkeypatch.setattr(sys, "argv", ["suite", "--out", str(tmp_path), "--phases", "step", "smoke"])
    assert gpu_suite.main() == 1
    assert len(commands) == 2 and "--seconds=" in commands[1][-1]
    assert limits == pytest.approx([30, 100], abs=5)  # the second has what the first left
    last = capsys.readouterr().out.splitlines()[-3:]
    assert last[0].startswith("smoke: killed after ") and last[1].startswith("step: failed: exit status 1")
    assert last[2] == "passed: none"


def test_the_fastest_attention_of_the_product_is_kept(tmp_path):
    rows = CsvFile(tmp_path / "ops.csv", ops.COLUMNS)
    shared = {"operator": "attention", "status": "ok", "pass": "forward+backward", "variant": "chats"}
    times = [("Llama-3-8B", "varlen", 5.0), ("Llama-3-8B", "flex", 4.0), ("Llama-3-8B", "another", 1.0),
             ("Llama-3.2-1B", "sdpa", 9.0)]  # fmt: skip
    for model, name, ms in times:
        rows.add(shared | {"model": model, "implementation": name, "median_ms": ms})
    rows.add(shared | {"model": "Llama-3-8B", "implementation": "sdpa", "median_ms": 0.1, "window": 1024})
    digest.write_winners(tmp_path)
    winners = json.loads((tmp_path / "attention.json").read_text())
    assert winners == {"Llama-3-8B": "flex", "Llama-3.2-1B": "sdpa"}
    taken = [train_step.with_attention(case, winners.get(case.model)) for case in train_step.PHASES["chosen"]]
    assert [case.options[-1] for case in taken] == ["--train.attention=flex", "--train.attention=sdpa"]


def test_floors_of_kernels_by_hand():
    """Two products of 2 x 8 x 16 x 4 FLOPs, half the time in fp8; a norm's 4 passes over (T, H); the update's bytes."""
    model = cases.Model("m", H=4, F=8, N=2, K=1, D=2, V=32)
    work = Work(model, num_layers=3, micro_batches=1, token_budget=8, pairs=10, update_bytes=3000)
    ceilings = Ceilings(tflop_per_s=1e-9, gb_per_s=1e-6)  # 1 FLOP and 1 byte a microsecond... of a millisecond
    shapes = ((8, 4), (4, 16))
    ran = [Ran("gemm", "aten::mm", shapes, 4000.0), Ran("gemm", "aten::mm", shapes, 4000.0)]
    ran += [Ran("rms_norm_fwd_kernel", "ochat::add_rms_norm", (), 1000.0), Ran("cast", "aten::copy_", (), 500.0)]
    rows = step_profile.longest(ran, work, ceilings)
    assert [(row["kernel"], row["calls"], row["total_ms"]) for row in rows] == [
        ("(all)", 4, 9.5), ("gemm", 2, 8.0), ("rms_norm_fwd_kernel", 1, 1.0), ("cast", 1, 0.5)
    ]  # fmt: skip
    assert rows[1]["floor_ms"] == 2 * 2 * 8 * 16 * 4 and rows[1]["share"] == pytest.approx(8 / 9.5)
    assert rows[2]["floor_ms"] == 4 * 8 * 4 * 2 and rows[3]["floor_ms"] is None

    def floor(kernel, operator=""):
        return step_profile.floor_of(kernel, operator, shapes, 1, work, ceilings)

    assert floor("qgemm", "aten::_scaled_mm") == 8 * 16 * 4 and floor("adamw_kernel") == 3000
    assert floor("flash_fwd_kernel") == 4 * 2 * 2 * 10 * 3 and floor("cast") is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    ("program", "options", "message"),
    [
        (ops, [], "no CUDA device"),
        (ops, ["--device", "cpu"], "takes --quick"),
        (train_step, [], "no CUDA device"),
        (train_step, ["--device", "cpu"], "takes --quick"),
        (train_step, ["--device", "cpu", "--base", "x"], "come together"),
    ],
)
def test_refuses_what_would_never_end(program, options, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        program.main(["--out", str(tmp_path), *options])
    assert message in capsys.readouterr().err and list(tmp_path.iterdir()) == []
