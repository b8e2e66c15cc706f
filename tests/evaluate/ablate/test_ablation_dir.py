"""A killed ablation resumes and gives what undisturbed runs give; what would spoil a comparison is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from ochat import cli
from ochat import config as configuration
from ochat.commands import init_base
from ochat.commands.eval import EvalOptions, evaluate
from ochat.commands.init_base import InitBaseOptions
from ochat.data.dataset import TokenDataset
from ochat.errors import ConfigError
from ochat.evaluate.ablate import variants
from ochat.evaluate.ablate.ablation_dir import AblationDir, held_out, last_step
from ochat.train.trainer import train
from tests import tiny
from tests.checkpoint.test_checkpoint_faults import descendants, wait_for
from tests.evaluate.ablate.conftest import STEPS
from tests.evaluate.conftest import read_lines

pytest.importorskip("scipy", reason="the extra `report` is not installed")


def arguments(file, folder, *more):
    """The command's arguments, for two short runs."""
    some = '--ablate.variants=["c-rlft", "sft"]'
    return [str(file), f"--ablate.dir={folder}", some, "--ablate.seeds=[3]", "--checkpoint.every=4", *more]


def opened(file, folder, *more):
    ablation = AblationDir(*variants.read_config(file, [f"--ablate.dir={folder}", *more]))
    ablation.open()
    return ablation


@pytest.fixture(scope="module")
def killed(file):
    """An ablation killed in its second run and started again: its folder, who was alive after the kill, when the first
    run was measured, and what the second start printed."""
    folder, log = file.parent / "killed", file.parent / "log"
    command = [sys.executable, "-m", "ochat", "ablate", *arguments(file, folder)]
    with log.open("w") as output:
        process = subprocess.Popen(command, cwd=tiny.ROOT, env=tiny.environment(), stdout=output, stderr=output)
    second = folder / "runs" / "sft-seed3"
    wait_for(process, lambda: any((second / "checkpoints").glob("step_*")), log)
    family = descendants(process.pid)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 10
    while (alive := [pid for pid in family if os.path.exists(f"/proc/{pid}")]) and time.monotonic() < deadline:
        time.sleep(0.05)
    stamp = (folder / "runs" / "c-rlft-seed3" / "measured.json").stat().st_mtime_ns
    assert not (second / "measured.json").exists(), "it was to be killed before it was done"
    done = subprocess.run(command, cwd=tiny.ROOT, env=tiny.environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, alive, stamp, done.stdout


def test_a_killed_ablation_leaves_no_process_repeats_nothing_and_gives_what_undisturbed_runs_give(killed, tmp_path):
    folder, alive, stamp, printed = killed
    assert not alive and (folder / "runs" / "c-rlft-seed3" / "measured.json").stat().st_mtime_ns == stamp
    assert "1 to do" in printed and "resuming from" in (folder / "logs" / "sft-seed3.log").read_text()
    results = {record["run"]: record for record in read_lines(folder / "results.jsonl")}
    for name, data, conditions in (("c-rlft-seed3", "condition", ("GPT4", "GPT3")), ("sft-seed3", "plain", ())):
        train(configuration.load(folder / "configs" / f"{name}.toml", [f"--run.dir={tmp_path / name}"]))
        held_out = folder / "data" / f"{data}-held-out"
        alone = evaluate(EvalOptions(tmp_path / name, (held_out,), conditions, dtype="float32"))
        assert results[name]["classes"] == json.loads(json.dumps(alone["classes"]))
        lines = [[line["loss"] for line in tiny.metrics(at / name)] for at in (folder / "runs", tmp_path)]
        assert lines[0] == lines[1] and len(lines[0]) == STEPS == results[name]["steps"]


def test_a_finished_ablation_prints_its_table_again_and_trains_nothing(killed, file, capsys, monkeypatch):
    folder, *_, printed = killed
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a process was started"))
    written = (folder / "table.json").read_text()
    for more in (["--table"], []):
        cli.call("ablate", arguments(file, folder, *more))
        assert capsys.readouterr().out.split("exact match")[1] == printed.split("exact match")[1]
        assert (folder / "table.json").read_text() == written
    assert not (folder / "runs" / "sft-seed3" / "checkpoints").exists()
    assert (folder / "runs" / "sft-seed3" / "export" / "openchat.json").is_file()
    assert "| only SFT | 1 |" in (folder / "table.md").read_text()


CHANGED = [
    (["--optim.lr=2e-2"], "optim.lr is 0.02, and was 0.01"),
    (["--classes.GPT3.weight=0.2"], "classes.GPT3 is .*0.2"),
    (["--ablate.held_out=0.5"], "ablate.held_out is 0.5"),
    (["--ablate.limit=3"], "ablate.limit is 3"),
    (["--table", "--ablate.expert=GPT5"], "ablate.expert is 'GPT5', and was 'GPT4'"),
]


@pytest.mark.parametrize("name", ["ablation.json", "laboratory.json"])  # the second was its name in earlier versions
def test_a_changed_setting_is_named(killed, file, name):
    os.replace(killed[0] / "ablation.json", killed[0] / name)
    for more, needle in CHANGED:
        with pytest.raises(ConfigError, match=needle):
            cli.call("ablate", arguments(file, killed[0], *more))
    os.replace(killed[0] / name, killed[0] / "ablation.json")


def test_changed_data_and_another_base_are_named_but_not_a_moved_one(file, world, chats, tmp_path):
    copy, data = tmp_path / "chats.jsonl", f'--ablate.input=["{tmp_path / "chats.jsonl"}"]'
    shutil.copy(chats, copy)
    opened(file, tmp_path, data)
    (tmp_path / "runs" / "c-rlft-seed3").mkdir(parents=True)
    (tmp_path / "runs" / "c-rlft-seed3" / "metrics.jsonl").write_text('{"step": 1}\n')  # as if it had made a step
    opened(file, tmp_path, data, "--ablate.seeds=[8]", "--ablate.jobs=3", "--run.deterministic=true")
    shutil.copytree(world.base, tmp_path / "moved")
    opened(file, tmp_path, data, f"--base.path={tmp_path / 'moved'}")
    random = {"random": world.folder / "model.json", "tokenizer": world.base}
    init_base.main(InitBaseOptions(tmp_path / "other", **random, seed=1, dtype="float32"))
    with pytest.raises(ConfigError, match="checksum of the base"):
        opened(file, tmp_path, data, f"--base.path={tmp_path / 'other'}")
    copy.write_text("".join(copy.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(ConfigError, match="content of .*chats.jsonl"):
        opened(file, tmp_path, data)


def test_before_the_first_step_a_mistake_can_be_corrected(file, tmp_path):
    with pytest.raises(ConfigError, match="nothing"):
        cli.call("ablate", arguments(file, tmp_path / "nothing", "--table"))
    assert not (tmp_path / "nothing").exists()
    with pytest.raises(ConfigError, match="ablate.expert = 'GPT5'"):
        opened(file, tmp_path, "--ablate.expert=GPT5")
    folders = (opened(file, tmp_path, f"--ablate.held_out={share}") for share in (0.3, 0.8))
    few, many = (len(TokenDataset(held_out(ablation.runs[0]))) for ablation in folders)
    assert many > 1.5 * few


def test_the_last_whole_line_of_a_growing_file(tmp_path):
    assert last_step(tmp_path) == {}
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert last_step(tmp_path) == {"step": 2} == last_step(tmp_path, tail_bytes=20)
    assert last_step(tmp_path, tail_bytes=8) == {}
