"""A real server, transformers serve, with an exported model: its answers are the model's here, the class goes with each
request, and it judges: pytest -m slow tests/export/test_served.py"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

from ochat.evaluate.judges.agieval import AgievalOptions, evaluate
from ochat.evaluate.judges.answer import AnswerOptions, answer
from ochat.evaluate.judges.judge import JudgeOptions, judge
from ochat.export.hf_folder import export
from tests import tiny

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(world, alone, tmp_path_factory):
    folder = tmp_path_factory.mktemp("served") / "mine"
    export(world.folder / "alone", folder, dtype="float32")
    return folder


@pytest.fixture(scope="module")
def endpoint(model):
    """`transformers serve` on 127.0.0.1, on the exported folder."""
    for package in ("fastapi", "uvicorn", "openai", "accelerate"):
        pytest.importorskip(package, reason="transformers[serving] (extra dev) is not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(model), "--host", "127.0.0.1"]
    program += ["--port", str(port), "--device", "cpu", "--dtype", "float32"]
    with open(model.parent / "serve.log", "w") as log:
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


def test_a_served_models_answers_are_the_models_own(model, endpoint, tmp_path):
    lines = [{"question_id": i, "category": "math", "turns": [f"{i}+{i}", "1+1"]} for i in range(4)]
    (tmp_path / "question.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = {}
    for condition in (None, "GPT4", "GPT3", ""):
        for where in ({"endpoint": endpoint, "concurrent": 2}, {}):
            asked = AnswerOptions(
                model=str(model),
                questions=tmp_path / "question.jsonl",
                output=tmp_path / f"{condition}{len(where)}.jsonl",
                format="mt_bench",
                condition=condition,
                max_new_tokens=12,
                dtype="float32",
                **where,
            )
            found[condition, len(where)] = [(each.turns, each.is_cut) for _, each in answer(asked)]
        assert found[condition, 2] == found[condition, 0], condition
    assert found[None, 2] == found["GPT4", 2] != found["GPT3", 2]


def test_a_served_model_judges_and_is_examined(model, endpoint, tmp_path):
    for name in ("a", "b"):
        outputs = [{"instruction": f"{i}+1", "output": name, "generator": name} for i in range(2)]
        (tmp_path / f"{name}.json").write_text(json.dumps(outputs))
    record = judge(
        JudgeOptions(
            a=tmp_path / "a.json",
            b=tmp_path / "b.json",
            output=tmp_path / "verdicts.jsonl",
            endpoint=endpoint,
            judge=str(model),
            max_new_tokens=8,
        )
    )
    assert record["verdicts"]["all"] == 4 and record["unread"] == 2  # a model of 30,000 weights has no verdict
    record = {"passage": "", "question": "Who?", "options": ["(A)I", "(B)You"], "label": "A"}
    (tmp_path / "sat-en.jsonl").write_text(json.dumps(record))
    numbers = [
        evaluate(
            AgievalOptions(model=str(model), data=tmp_path / "sat-en.jsonl", max_new_tokens=9, dtype="float32", **at)
        )
        for at in ({"endpoint": endpoint}, {})
    ]
    assert numbers[0]["tasks"] == numbers[1]["tasks"]
