"""transformers serve with an exported model gives the same answers as the model in this process, under each class:
pytest -m slow tests/export/test_served.py"""

from __future__ import annotations

import socket
import subprocess
import sys
import time
import urllib.request

import pytest

from ochat.commands.answer import AnswerOptions, main
from tests import tiny
from tests.evaluate.conftest import read_lines
from tests.tiny import write_lines

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def endpoint(exported):
    """`transformers serve` on 127.0.0.1, on the exported folder."""
    for package in ("fastapi", "uvicorn", "openai", "accelerate"):
        pytest.importorskip(package, reason="transformers[serving] (extra dev) is not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(exported), "--host", "127.0.0.1"]
    program += ["--port", str(port), "--device", "cpu", "--dtype", "float32"]
    with open(exported.parent / "serve.log", "w") as log:
        server = subprocess.Popen(program, env=tiny.environment() | {"HF_HUB_OFFLINE": "1"}, stdout=log, stderr=log)
    try:
        _wait_for(f"http://127.0.0.1:{port}/health", server)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(30)


def _wait_for(url: str, server: subprocess.Popen) -> None:
    for _ in range(240):
        assert server.poll() is None, "the server ended"
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    raise AssertionError("the server did not answer within two minutes")


def test_a_served_models_answers_are_the_models_own(exported, endpoint, tmp_path):
    lines = [{"question_id": i, "category": "math", "turns": [f"{i}+{i}", "1+1"]} for i in range(4)]
    asked, found = {"model": str(exported), "questions": write_lines(tmp_path / "question.jsonl", lines)}, {}
    for condition in (None, "GPT4", "GPT3", ""):
        for where in ({"endpoint": endpoint, "concurrent": 2}, {}):
            output = tmp_path / f"{condition}{len(where)}.jsonl"
            more = {"output": output, "format": "mt_bench", "condition": condition} | where
            main(AnswerOptions(**asked | more, max_new_tokens=12, dtype="float32"))
            found[condition, len(where)] = [record["choices"] for record in read_lines(output)]
        assert found[condition, 2] == found[condition, 0], condition
    assert found[None, 2] == found["GPT4", 2] != found["GPT3", 2]
