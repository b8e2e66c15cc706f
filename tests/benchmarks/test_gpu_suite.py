"""The whole GPU suite on tiny shapes, without a GPU; and what the programs refuse."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import implementations, ops, train_step
from benchmarks.cases import OPERATORS
from benchmarks.csv_file import read

ROOT = Path(__file__).parents[2]


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
    """Peers that are not installed are reasons in the report, and no failure of the suite."""
    out, printed, status = suite
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
    text = (out / "report.txt").read_text()
    assert "ModuleNotFoundError" in text and '"auto" at tiny 4/2 heads of 16 chats window 24: sdpa' in text
    assert status == 0 and (out / "tests.txt").stat().st_size > 0 and len(list(out.iterdir())) <= 7
    for name in ("tests on the GPU", "attention", "laws of the kernels", "times: ours", "times: peers", "step: ours"):
        assert f"{name}: passed" in printed


def test_a_dry_run_trains_the_same_step_with_its_peers(suite):
    """Ours in both phases; transformers padded and packed to the same losses; the reason of who is not installed."""
    out, printed, _ = suite
    rows = read(out / "train_step.csv")
    assert list(rows[0]) == train_step.COLUMNS, printed
    found = [row for row in rows if row["status"] == "ok"]
    assert [row["implementation"] for row in found] == ["ours", "ours", "padded", "packed"], printed
    for row in found:
        assert row["torch"] and row["date"] and row["cpu"] and int(row["cores"]) > 0
        assert 0 < float(row["supervised_tokens_per_s"]) < float(row["tokens_per_s"]) and float(row["mfu"]) > 0
    for row in found[2:]:
        assert float(row["loss_difference"]) < train_step.LOSS_BOUND["float32"] and row["compared_steps"] == "20"
    assert all(row["note"] for row in rows) and "ours is x" in (out / "steps.txt").read_text()


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
