"""`ochat chat` with piped lines, and typed into a terminal: pytest tests/infer/test_chat_command.py"""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time

import pytest

from ochat.commands import chat as command
from ochat.commands.chat import ChatOptions, open_chat
from ochat.console import stdout
from ochat.errors import ConfigError, DataError
from tests import tiny


def piped(monkeypatch, capsys, folder, said, **options):
    """What the command prints on stdout and stderr when these bytes are piped into it."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(said)))
    command.main(ChatOptions(folder, **{"max_new_tokens": 6, "dtype": "float32"} | options))
    return capsys.readouterr()


def answers(folder, *questions, condition=None):
    chat = open_chat(ChatOptions(folder, condition, max_new_tokens=6, dtype="float32"))
    return ["".join(chat.ask(question)) for question in questions]


def test_piped_lines_are_answered_on_stdout_without_marks(monkeypatch, capsys, exported):
    first, second = answers(exported, "1+1", "/2")
    shown = piped(monkeypatch, capsys, exported, b"1+1\n\n /2\n/quit\nnever asked\n")
    assert shown.out == f"{first}\n{second}\n"
    cut = piped(monkeypatch, capsys, exported, b"1+1", max_new_tokens=1)
    assert cut.out == f"{first[0]}\n" and "cut at --max-new-tokens 1" in cut.err


def test_commands_switch_forget_and_compare(monkeypatch, capsys, exported):
    monkeypatch.setattr(stdout, "_width", 80)
    expert, other = (answers(exported, "9+9", condition=name)[0] for name in ("GPT4", "GPT3"))
    shown = piped(
        monkeypatch, capsys, exported, b'1+1\n/new\n9+9\n/both\n/new\n/class GPT3\n9+9\n/class\n/class ""\n/help'
    )
    lines = shown.out.splitlines()
    assert lines[1] == expert and other in lines
    box = next(line for line in lines if line.startswith("╭"))
    assert re.fullmatch(r"╭─ GPT\d ─+╮ ╭─ GPT\d ─+╮", box.strip()) and len(box) <= 80
    both = lines[lines.index("9+9") + 2]
    assert expert.strip() in both and other.strip() in both
    assert "GPT3 answers; classes: GPT4, GPT3" in shown.err
    assert all(name.split()[0] in shown.out for name in command.HELP) and max(map(len, lines)) <= 80


@pytest.mark.parametrize(
    ("said", "error", "needle"),
    [
        (b"/class GPT5\n", ConfigError, "/class: the model has no class 'GPT5'; did you mean 'GPT[34]'"),
        (b"/clas GPT3\n", ConfigError, "no command /clas; did you mean /class"),
        (b"/both\n", ConfigError, "no question yet"),
        (b"\xff\n", DataError, "stdin, line 1: not UTF-8"),
        (b"9" * 600, ConfigError, "context is 512"),
    ],
)
def test_an_error_in_a_piped_line_ends_the_command(monkeypatch, capsys, exported, said, error, needle):
    with pytest.raises(error, match=needle):
        piped(monkeypatch, capsys, exported, said)


def test_options_out_of_range_are_named_before_the_model_is_loaded(exported):
    for options, needle in (({"max_new_tokens": 0}, "--max-new-tokens 0"), ({"top_p": 2.0}, "top_p = 2")):
        with pytest.raises(ConfigError, match=needle):
            open_chat(ChatOptions(exported, **options))


class Terminal:
    """The command in a terminal of its own."""

    def __init__(self, *words):
        self.master, slave = pty.openpty()
        environment = tiny.environment() | {"TERM": "dumb", "COLUMNS": "80"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "ochat", "chat", *map(str, words)],
            stdin=slave, stdout=slave, stderr=slave, env=environment, start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # so that Ctrl-C reaches it
        )  # fmt: skip
        os.close(slave)

    def until(self, pattern, seconds=240, again=""):
        """What is shown up to the pattern; `again` is typed where nothing comes for a second."""
        shown, end = b"", time.monotonic() + seconds
        while not re.search(pattern, shown.decode("utf-8", "replace")):
            assert time.monotonic() < end, f"{pattern!r} was not shown: {shown!r}"
            if select.select([self.master], [], [], 1)[0]:
                shown += os.read(self.master, 1)
            else:
                self.type(again)
        return shown.decode("utf-8", "replace")

    def type(self, text):
        os.write(self.master, text.encode())


def test_in_a_terminal_answers_are_stopped_kept_and_errors_only_told(exported):
    terminal = Terminal(exported, "--max-new-tokens", "400", "--temperature", "3", "--dtype", "float32")
    try:
        assert "/help lists commands" in terminal.until(r"GPT4> ")
        terminal.type("/clas\n")
        assert "did you mean /class?" in terminal.until(r"\r\nGPT4> ")
        terminal.type("/class GPT3\n")
        terminal.until(r"GPT3> ")
        terminal.type("1+1\n")
        terminal.until(r"1\+1\r\n.{3}")
        terminal.type("\x03")  # Ctrl-C
        shown = terminal.until(r"GPT3> ")
        assert "stopped" in shown and "forgotten" not in shown
        terminal.type("\x03")  # while readline starts, a signal is seen with the next key only
        terminal.until(r"Ctrl-D or /quit ends\r\n[\s\S]*GPT3> ", again="\x03")
        terminal.type("/both\n")
        terminal.until(r"GPT4 ─[\s\S]*GPT3> ")  # of the question whose answer was stopped
        terminal.type("\x04")  # Ctrl-D
        assert terminal.process.wait(60) == 0
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(terminal.process.pid, signal.SIGKILL)
        os.close(terminal.master)
