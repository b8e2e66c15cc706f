"""`ochat serve MODEL`: serve an export with vLLM, whose API is OpenAI's. Prints the request that asks as a class.

ochat serve models/mine --port 8001
ochat serve models/mine --python ~/vllm/bin/python --gpus 2
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ochat.errors import ConfigError
from ochat.files import bounded_json
from ochat.overrides import at_least
from ochat.run import layout
from ochat.text import tokenizer as tokenizers
from ochat.text.openchat_json import OPENCHAT, known_classes, load_template, read_description
from ochat.text.template import Template

ENTRY = "vllm.entrypoints.openai.api_server"
HAS_VLLM = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
AGAIN = "export the run again"


@dataclass(frozen=True)
class ServeOptions:
    """Serves an exported model with vLLM, where it is installed."""

    model: Path  # an exported folder
    name: str = ""  # of the model in requests; empty: the folder's
    host: str = "127.0.0.1"  # the address to listen on; 0.0.0.0: all of this machine
    port: int = 8000  # the port to listen on
    gpus: int = 1  # split the model over so many GPUs
    max_model_len: int | None = None  # the longest chat, in tokens; left out: as in training
    python: str = ""  # the Python of an environment that has vLLM; empty: this one


def main(options: ServeOptions) -> None:
    """The command `ochat serve`, which becomes vLLM. Raises: ConfigError for a folder that is no export, and where
    there is no vLLM."""
    at_least(options, port=1, gpus=1, max_model_len=1)
    _check_export(options.model)
    template = load_template(options.model, None, tokenizers.load(options.model))
    command = vllm_command(options, template)
    _find_vllm(options, command)
    print(f"$ {shlex.join(command)}\n\nOnce it is up:\n{_request(options, template)}\n", flush=True)
    os.execv(command[0], command)  # so that Ctrl-C and other signals are vLLM's


def vllm_command(options: ServeOptions, template: Template) -> list[str]:
    """The words that start vLLM: greedy where a request has no temperature, as `ochat generate`; at most as many tokens
    as training had. Raises: ConfigError for a config.json without context or dtype."""
    config = bounded_json.read_object(options.model / "config.json", ConfigError, AGAIN)
    context, dtype = config.get("max_position_embeddings"), config.get("dtype") or config.get("torch_dtype")
    if not isinstance(context, int) or not isinstance(dtype, str):
        raise ConfigError(f"{options.model / 'config.json'}: no max_position_embeddings or no dtype; {AGAIN}")
    settings = {
        "model": options.model,
        "served-model-name": _name(options),
        "host": options.host,
        "port": options.port,
        "dtype": dtype,  # of the exported weights
        "max-model-len": options.max_model_len or min(template.context, context),
        "generation-config": "auto",  # the folder's, for its end tokens
        "override-generation-config": json.dumps({"temperature": 0}),  # else vLLM samples at 1
        **({"tensor-parallel-size": options.gpus} if options.gpus > 1 else {}),
    }
    python = shutil.which(options.python or sys.executable)
    if python is None:
        raise ConfigError(f"--python {options.python}: no such program; name the Python of an environment with vLLM")
    return [python, "-m", ENTRY, *(str(word) for key, value in settings.items() for word in (f"--{key}", value))]


def _check_export(folder: Path) -> None:
    """Raises: ConfigError, with the remedy, for a folder that `ochat export` did not write, or wrote for PEFT."""
    described = read_description(folder)
    if (folder / layout.MANIFEST).is_file() or layout.checkpoint_folders(folder):
        made = folder / layout.EXPORT
        remedy = f"ochat serve {made}" if (made / OPENCHAT).is_file() else f"ochat export {folder} OUT; ochat serve OUT"
        raise ConfigError(f"{folder}: a run or a checkpoint; servers take an export: {remedy}")
    if not described:
        raise ConfigError(
            f"{folder}: no export of a run, as it has no {OPENCHAT}. Write one: ochat export RUN OUT. "
            f"vLLM takes other models' folders without help: vllm serve {folder}"
        )
    if not (folder / "config.json").is_file() and (folder / "adapter_config.json").is_file():
        raise ConfigError(f"{folder}: an adapter without its base; export the run again, without --adapter")


def _find_vllm(options: ServeOptions, command: Sequence[str]) -> None:
    """Raises: ConfigError, which says how to get it and what else there is, if that Python has no vLLM."""
    if subprocess.run([command[0], "-c", HAS_VLLM], capture_output=True).returncode:
        raise ConfigError(
            f"{command[0]}: has no vLLM. Install it, best into an environment of its own, as it needs a certain "
            f"torch:\n  python -m venv vllm && vllm/bin/pip install vllm\n"
            f"  ochat serve {shlex.quote(str(options.model))} --python vllm/bin/python\n"
            f"Or take another server (docs/serving.md), such as: transformers serve {shlex.quote(str(options.model))}"
        )


def _request(options: ServeOptions, template: Template) -> str:
    """A request as the default class, for a shell, and which other classes there are."""
    body = {"model": _name(options), "messages": [{"role": "user", "content": "Why is the sky blue?"}]}
    body |= {"temperature": 0, "max_tokens": 256}
    classes = known_classes(options.model) if template.condition_roles != "none" else []
    if template.condition_roles != "none" and template.default_condition:
        body["chat_template_kwargs"] = {"condition": template.default_condition}
    host = "127.0.0.1" if options.host == "0.0.0.0" else options.host
    words = ["curl", f"http://{host}:{options.port}/v1/chat/completions", "-H", "Content-Type: application/json", "-d"]
    others = [name for name in classes if name != template.default_condition]
    return f"{shlex.join(words)} {shlex.quote(json.dumps(body, ensure_ascii=False))}" + (
        f"\nother classes: {', '.join(json.dumps(name, ensure_ascii=False) for name in others)}" if others else ""
    )


def _name(options: ServeOptions) -> str:
    return options.name or options.model.resolve().name
