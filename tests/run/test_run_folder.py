"""One run at a time on a run folder, and plain words, before the model is loaded, for a folder that cannot be one."""

import errno
import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys

import pytest

from ochat import config as configuration
from ochat.errors import ConfigError, OchatError
from ochat.export import hf_folder
from ochat.run import layout
from ochat.run.lock import folder_lock, is_seen
from ochat.train import build
from ochat.train.trainer import Trainer, train
from tests import tiny
from tests.checkpoint.test_checkpoint_faults import started, wait_for

LONG = ["--data.epochs=200", "--train.eval_every=100000"]


@pytest.fixture
def running(world, tmp_path):
    """(process, run folder) of a run that will not end by itself, after its first checkpoint."""
    run_dir, log = tmp_path / "run", tmp_path / "log"
    command = [sys.executable, "-m", "ochat.train", *tiny.options(world, run_dir, *LONG, "--checkpoint.every=5")]
    with started(log, command) as (process,):
        wait_for(process, lambda: layout.checkpoint_folders(run_dir), log)
        yield process, run_dir


def test_a_second_run_is_refused_by_the_name_of_the_first_and_a_kill_leaves_no_lock(running, world):
    process, run_dir = running
    os.kill(process.pid, signal.SIGSTOP)  # a run that is busy elsewhere, or suspended, still holds its folder
    before = (run_dir / "metrics.jsonl").read_bytes()
    who = rf"another run works there: process {process.pid} on {socket.gethostname()}, since 20\d\d-"
    with pytest.raises(ConfigError, match=who):
        tiny.train(world, run_dir)
    refused = tiny.train_on_ranks(world, run_dir, 2, check=False)
    assert refused.returncode and refused.stderr.count("another run works there") == 1
    assert "trainer.py" not in refused.stderr
    assert (run_dir / "metrics.jsonl").read_bytes() == before
    assert hf_folder.export(run_dir, run_dir.parent / "out") % 5 == 0  # of a run that is training
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    done = layout.step_of(layout.checkpoint_folders(run_dir)[-1])
    lines = tiny.train(world, run_dir, *LONG, f"--data.max_steps={done + 1}")
    assert lines[-1]["step"] == done + 1


@pytest.mark.parametrize("damage", [b"\0" * 512, b'{"st\xff\xfe', b'{"step": {}}'])
def test_no_damaged_line_of_any_file_blocks_a_resume(world, tmp_path, capsys, damage):
    """Before and behind the checkpoint; what is whole of the lines before stays."""
    run, words = tmp_path / "run", [f"--data.eval_path={world.data}", '--samples.prompts=["1+1"]']
    words += ["--train.eval_every=2", "--checkpoint.every=2", "--checkpoint.keep_best=true", "--train.stop_after=9"]
    tiny.train(world, run, *words, "--data.max_steps=4")
    names = [*layout.LINES, layout.EARLIER_NONFINITE]
    for name in names:
        lines = (run / name).read_bytes().splitlines(keepends=True) if (run / name).exists() else []
        (run / name).write_bytes(b"".join([*lines[:1], damage + b"\n", *lines[2:], damage + b"\n"]))
    capsys.readouterr()
    lines = tiny.train(world, run, *words, "--data.max_steps=6")
    said = " ".join(capsys.readouterr().out.split())
    assert [line["step"] for line in lines] == [1, 3, 4, 5, 6] and "no line of step 2;" in said
    assert [line["step"] for line in tiny.metrics(run, layout.EVAL)] == [0, 4, 6]
    assert (run / "metrics.damaged.jsonl").read_bytes() == damage + b"\n" and "line 2 is damaged; kept in" in said


def test_a_process_that_was_forked_off_does_not_hold_the_folder(tmp_path):
    program = (
        "import os, sys, time\n"
        "from pathlib import Path\n"
        "from ochat.run.lock import folder_lock\n"
        "with folder_lock(Path(sys.argv[1])):\n"
        "    child = os.fork()\n"
        "    print(child, flush=True) if child else time.sleep(60)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(command, env=tiny.environment(), stdout=subprocess.PIPE, text=True) as parent:
        child = int(parent.stdout.readline())
        parent.wait()
        try:
            os.kill(child, 0)
            with folder_lock(tmp_path):
                assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
        finally:
            os.kill(child, signal.SIGKILL)


def test_a_file_system_without_locks_is_warned_of_and_used(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with folder_lock(tmp_path) as token:
        assert is_seen(tmp_path, token, seconds=0)
    assert caplog.text.count("cannot be locked (No locks available): a second run could start there") == 1


@pytest.fixture
def disks(tmp_path):
    """Two that are mounted for the test: one with no room left, and one that is only read."""
    disks = {tmp_path / "full": "size=16k", tmp_path / "readonly": "ro"}
    for folder, options in disks.items():
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("mounting a disk takes root")
    yield tuple(disks)
    subprocess.run(["umount", "--lazy", *disks], check=True)


def test_a_folder_that_cannot_be_one_is_refused_before_anything_is_built(world, tmp_path, monkeypatch, disks):
    monkeypatch.setattr(Trainer, "__init__", lambda *_: pytest.fail("the run went on"))
    (tmp_path / "file").write_text("")
    full, readonly = disks
    reasons = {
        "file/below": "Not a directory", readonly: "Read-only file system", readonly / "new": "Read-only file system",
        full: "No space left on device", "a\\u0000b": "embedded null byte",
    }  # fmt: skip
    told = {tmp_path / name: rf"cannot be written \({reason}\)" for name, reason in reasons.items()}
    for folder, reason in (told | {tmp_path / "file": "is a file; name a folder"}).items():
        with pytest.raises(ConfigError, match=f"^run.dir = .* {reason}"):
            tiny.train(world, json.dumps(str(folder)).replace("\\\\", "\\"))
    assert not list(full.glob(".probe"))


def test_a_relative_folder_is_resolved_once(world, tmp_path, monkeypatch):
    """A process that changes its working directory on the way still writes to the one folder; missing parents are
    made."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    plain = Trainer.step

    def step(self, *arguments):
        os.chdir(tmp_path / "elsewhere")
        plain(self, *arguments)

    monkeypatch.setattr(Trainer, "step", step)
    train(configuration.load(world.config, ["--run.dir=runs/a/b", "--data.max_steps=2"]))
    run_dir = tmp_path / "runs" / "a" / "b"
    assert len(tiny.metrics(run_dir)) == 2 and (run_dir / "export" / "config.json").exists()
    assert configuration.load(run_dir / "config.toml").run.dir == str(run_dir)
    assert not list((tmp_path / "elsewhere").iterdir())


def torchrun_shell(world, script, *options):
    """Two processes, each the shell command `script`, in which "$@" is a process of the training."""
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python"]
    command = [*program, "sh", "-c", script, "sh", sys.executable, "-m", "ochat.train", str(world.config), *options]
    return subprocess.run(command, env=tiny.environment(), cwd=world.folder, capture_output=True, text=True)


def test_processes_in_other_working_directories_share_the_first_ones_folder(world, tmp_path):
    for rank in "01":
        (tmp_path / rank).mkdir()
    script = f'cd {tmp_path}/$RANK; exec "$@"'
    done = torchrun_shell(world, script, "--run.dir=runs/a", "--data.max_steps=2")
    assert done.returncode == 0, done.stderr
    assert len(tiny.metrics(tmp_path / "0" / "runs" / "a")) == 2 and not list((tmp_path / "1").iterdir())


def test_processes_that_see_other_folders_are_refused(world, tmp_path):
    """The second process has another disk mounted at the place of the run folder, as another machine would."""
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        pytest.skip("a private mount needs root")
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    other = f'exec unshare --mount sh -c \'mount -t tmpfs tmpfs {run_dir}; exec "$@"\' sh "$@"'
    done = torchrun_shell(world, f'[ $RANK = 0 ] || {other}; exec "$@"', f"--run.dir={run_dir}")
    assert done.returncode and done.stderr.count("is not the folder that it is on") == 1, done.stderr
    assert "trainer.py" not in done.stderr and not (run_dir / "metrics.jsonl").exists()


@pytest.mark.parametrize("name", ["base.path", "data.path", "data.eval_path"])
def test_a_folder_to_read_that_is_none_is_named_whole(world, tmp_path, monkeypatch, name):
    (tmp_path / "file").write_text("{}")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(build, "build_model", lambda *_: pytest.fail("the model was built"))
    reason = "does not exist. A base model is a local" if name == "base.path" else r"not a prepared data set \("
    for given in ("missing", "file", "empty"):
        with pytest.raises(OchatError, match=f"{re.escape(str(tmp_path / given))}.*{reason}"):
            tiny.train(world, tmp_path / "run", f"--{name}={given}")
