"""From a base to a trained model by the commands that each command ends with: pytest tests/test_whole_way.py"""

from __future__ import annotations

import shlex

import pytest

from ochat import cli
from tests import tiny


def test_each_command_ends_with_the_next_one_and_that_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def run(line: str) -> str:
        """Runs a command; the one that it ends with."""
        program, name, *arguments = shlex.split(line)
        assert program == "ochat"
        cli.call(name, arguments)
        *_, last = capsys.readouterr().out.splitlines()
        assert last.startswith("next: "), last
        return last.removeprefix("next: ")

    chats = tiny.write_lines(tmp_path / "chats of mine.jsonl", tiny.conversations(200))
    tiny.write_base(tmp_path, tmp_path / "base", {})
    *_, made = capsys.readouterr().out.splitlines()
    following = made.removeprefix("next: ").replace("CHATS.jsonl", f"'{chats}'").replace("NAME", "openchat_v3.2")
    assert following.startswith("ochat prepare ") and "--held-out 0.02" in following
    following = run(f"{following} --no-progress")
    assert run("ochat show data/train --n 1") == "ochat new --base BASE --data data/train"
    following = run(f"{following} --gpus 0 --output run.toml")
    assert following == "ochat check run.toml" == run("ochat plan run.toml --gpus 1")
    following = run(f"{following} --data.max_steps=2 --train.dtype float32")
    assert following == "ochat train run.toml --data.max_steps=2 --train.dtype=float32"
    following = run(following)
    assert following == f"ochat report {tmp_path / 'runs' / 'train'}"
    assert run("ochat export runs/train 'models/of mine'") == "ochat chat 'models/of mine'"
    assert run("ochat eval 'models/of mine' data/train-held-out --limit 2") == "ochat chat 'models/of mine'"
    pytest.importorskip("plotly")
    assert run(following) == f"ochat chat {tmp_path / 'runs' / 'train'}"
