"""Kept answers: a torn end is asked again: pytest tests/evaluate/test_answer_log.py"""

from __future__ import annotations

import json

import pytest

from ochat.errors import ConfigError, DataError
from ochat.evaluate.judges.answer_log import AnswerLog

ABOUT = {"model": "mine", "condition": None, "sizes": (1, 2)}


def filled(path):
    with AnswerLog(path, ABOUT) as log:
        log.append("1", {"text": "é\n"})
        log.append("2", {"text": "b"})
        log.append("1", {"text": "again"})
    return path


def test_lines_come_back_the_last_of_a_key(tmp_path):
    with AnswerLog(filled(tmp_path / "a"), ABOUT) as log:
        assert log.found == {"1": {"text": "again"}, "2": {"text": "b"}}


def test_wherever_it_is_torn_whole_lines_are_kept(tmp_path):
    content = filled(tmp_path / "whole").read_bytes()
    for cut in range(len(content) + 1):
        path = tmp_path / "torn"
        path.write_bytes(content[:cut])
        with AnswerLog(path, ABOUT) as log:
            log.append("3", {"text": "c"})
        lines = content[:cut].count(b"\n")
        with AnswerLog(path, ABOUT) as log:
            assert len(log.found) == 1 + min(max(lines - 1, 0), 2) and log.found["3"] == {"text": "c"}
        assert len(path.read_text().splitlines()) == 1 + max(lines, 1)


@pytest.mark.parametrize(
    "content", [b"my thesis", b"\x89PNG", b'{"key": "1"}\n{"key": "2"}\n', b"[1]\n", b"thesis\nin lines\n"]
)
def test_a_file_of_something_else_is_left_alone(tmp_path, content):
    (tmp_path / "a").write_bytes(content)
    with pytest.raises((ConfigError, DataError)), AnswerLog(tmp_path / "a", ABOUT):
        pass
    assert (tmp_path / "a").read_bytes() == content


def test_what_was_begun_otherwise_is_refused_by_name(tmp_path):
    filled(tmp_path / "a")
    with pytest.raises(ConfigError, match='begun with condition null, now it is "GPT3"'):
        AnswerLog(tmp_path / "a", ABOUT | {"condition": "GPT3"}).__enter__()
    with pytest.raises(ConfigError, match="begun with seed null, now it is 3"):
        AnswerLog(tmp_path / "a", ABOUT | {"seed": 3}).__enter__()


def test_two_processes_do_not_write_one_file(tmp_path):
    with AnswerLog(tmp_path / "a", ABOUT), pytest.raises(ConfigError, match="another process"):
        AnswerLog(tmp_path / "a", ABOUT).__enter__()


def test_a_damaged_line_is_named(tmp_path):
    path = filled(tmp_path / "a")
    path.write_text(path.read_text().replace('"b"', '"b'))
    with pytest.raises(DataError, match=f"{path}:3: not JSON"):
        AnswerLog(path, ABOUT).__enter__()


def test_without_a_path_it_keeps_them_in_memory():
    with AnswerLog(None, ABOUT) as log:
        log.append("1", {"a": 1})
        assert json.dumps(log.found) == '{"1": {"a": 1}}'
