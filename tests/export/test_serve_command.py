"""`ochat serve` becomes vLLM, here a stand-in that prints its words; other folders are refused with what helps.

pytest tests/export/test_serve_command.py
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from dataclasses import replace

import pytest

from ochat.commands import serve
from ochat.commands.serve import ServeOptions
from ochat.errors import ConfigError
from tests import tiny

STAND_IN = "import json, os, sys; print(json.dumps([os.getpid(), sys.argv[1:]])); sys.exit(7)"


@pytest.fixture
def environment(tmp_path):
    """One in which Python finds the stand-in."""
    package = tmp_path / "site" / "vllm" / "entrypoints" / "openai"
    package.mkdir(parents=True)
    for folder in (package, package.parent, package.parent.parent):
        (folder / "__init__.py").touch()
    (package / "api_server.py").write_text(STAND_IN)
    found = tiny.environment()
    return found | {"PYTHONPATH": f"{found['PYTHONPATH']}{os.pathsep}{tmp_path / 'site'}"}


def test_it_becomes_vllm_with_the_exports_own_settings_and_shows_a_request(exported, environment):
    words = [sys.executable, "-m", "ochat", "serve", str(exported), "--name", "it's", "--port", "8123"]
    process = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True)
    shown, _ = process.communicate()
    command, _, _, request, others, *_, last = shown.splitlines()
    pid, given = json.loads(last)
    assert process.returncode == 7 and pid == process.pid  # the same process, so it gets the signals
    settings = dict(zip(given[::2], given[1::2], strict=True))
    assert settings == {
        "--model": str(exported), "--served-model-name": "it's", "--host": "127.0.0.1", "--port": "8123",
        "--dtype": "float32", "--max-model-len": "512", "--generation-config": "auto",
        "--override-generation-config": '{"temperature": 0}',
    }  # fmt: skip
    assert shlex.split(command)[1:] == [sys.executable, "-m", serve.ENTRY, *given]
    *curl, body = shlex.split(request)
    assert curl[:2] == ["curl", "http://127.0.0.1:8123/v1/chat/completions"] and others == 'other classes: "GPT3"'
    asked = json.loads(body)
    assert (asked["model"], asked["temperature"]) == ("it's", 0)
    assert asked["chat_template_kwargs"] == {"condition": "GPT4"}


def test_the_longest_chat_is_trainings_where_the_model_has_more(exported):
    template = serve.load_template(exported, None, serve.tokenizers.load(exported))
    for context, longest, wanted in ((512, None, "100"), (512, 300, "300"), (9999, None, "512")):
        short = replace(template, context=100 if context == 512 else context)
        command = serve.vllm_command(ServeOptions(exported, max_model_len=longest, gpus=2), short)
        settings = dict(zip(command[3::2], command[4::2], strict=True))
        assert settings["--max-model-len"] == wanted and settings["--tensor-parallel-size"] == "2"
        assert settings["--served-model-name"] == exported.name


def test_without_vllm_it_says_how_to_get_it(exported, monkeypatch, tmp_path):
    monkeypatch.setattr(serve, "HAS_VLLM", "raise SystemExit(1)")
    with pytest.raises(ConfigError, match="(?s)has no vLLM.*pip install vllm.*--python.*transformers serve"):
        serve.main(ServeOptions(exported))
    with pytest.raises(ConfigError, match="--python .*/none: no such program"):
        serve.main(ServeOptions(exported, python=str(tmp_path / "none")))


def test_what_is_no_export_is_refused_with_what_helps(world, alone, exported, tmp_path):
    run = world.folder / "alone"
    checkpoint = next((run / "checkpoints").iterdir())
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").touch()
    (adapter / "openchat.json").write_text('{"model_type": "openchat_v3.2"}')
    found = {folder: _refused(folder) for folder in (run, checkpoint, world.base, adapter, tmp_path / "org/name")}
    assert f"ochat serve {run}/export" in found[run] or f"ochat export {run} OUT" in found[run]
    assert f"ochat export {checkpoint} OUT" in found[checkpoint]
    assert "no openchat.json" in found[world.base] and f"vllm serve {world.base}" in found[world.base]
    assert "without --adapter" in found[adapter] and "is not a folder" in found[tmp_path / "org/name"]


def _refused(folder):
    with pytest.raises(ConfigError) as error:
        serve.main(ServeOptions(folder))
    return str(error.value)
