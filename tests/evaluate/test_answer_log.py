"""Kept answers survive a torn end, and files of something else stay untouched."""

from __future__ import annotations

import pytest

from ochat.errors import ConfigError, DataError
from ochat.evaluate.answer import AnswerLog

ABOUT = {"model": "mine", "condition": None, "sizes": (1, 2)}


def filled(path):
    with AnswerLog(path, ABOUT) as log:
        log.append("1", {"text": "é\n"})
        log.append("2", {"text": "b"})
        log.append("1", {"text": "again"})
    return path


def test_the_last_line_of_a_key_counts(tmp_path):
    with AnswerLog(filled(tmp_path / "a"), ABOUT) as log:
        assert log.found == {"1": {"text": "again"}, "2": {"text": "b"}}


def test_whole_lines_survive_a_cut_anywhere(tmp_path):
    content = filled(tmp_path / "whole").read_bytes()
    path = tmp_path / "torn"
    for cut in range(len(content) + 1):
        path.write_bytes(content[:cut])
        with AnswerLog(path, ABOUT) as log:
            log.append("3", {"text": "c"})
        lines = content[:cut].count(b"\n")
        with AnswerLog(path, ABOUT) as log:
            assert len(log.found) == 1 + min(max(lines - 1, 0), 2) and log.found["3"] == {"text": "c"}


@pytest.mark.parametrize(
    "content", [b"my thesis", b"\x89PNG", b'{"key": "1"}\n{"key": "2"}\n', b"[1]\n", b"thesis\nin lines\n"]
)
def test_a_file_of_something_else_is_refused_and_left_alone(tmp_path, content):
    (tmp_path / "a").write_bytes(content)
    with pytest.raises((ConfigError, DataError)), AnswerLog(tmp_path / "a", ABOUT):
        pass
    assert (tmp_path / "a").read_bytes() == content


def test_another_setting_another_process_and_a_damaged_line_are_named(tmp_path):
    path = filled(tmp_path / "a")
    for more, named in (({"condition": "GPT3"}, 'condition null, now it is "GPT3"'), ({"seed": 3}, "seed null")):
        with pytest.raises(ConfigError, match=f"begun with {named}"):
            AnswerLog(path, ABOUT | more).__enter__()
    with AnswerLog(path, ABOUT), pytest.raises(ConfigError, match="another process"):
        AnswerLog(path, ABOUT).__enter__()
    path.write_text(path.read_text().replace('"b"', '"b'))
    with pytest.raises(DataError, match=f"{path}:3: not JSON"):
        AnswerLog(path, ABOUT).__enter__()
