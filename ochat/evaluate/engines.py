"""Start an engine on this machine for a while, in the environment that has it.

with vllm(Path("models/mine"), python, on_cpu=True) as url: Server(url, "mine")
replies = ask_transformers(Path("models/mine"), python, requests)
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ochat.errors import ServerError
from ochat.evaluate.server_client import Reply
from ochat.model.config import ModelConfig

STARTS_S = 900.0  # the longest that a server takes; vLLM compiles
CONTEXT = 4096  # tokens of a conversation in a server that is started here
# half-precision caches would change log-probabilities in the third digit
_LLAMA_CPP = """
import os, sys, time, xllamacpp
params = xllamacpp.CommonParams()
path, port, context = sys.argv[1:]
params.model.path, params.hostnames, params.port, params.n_ctx = path, ["127.0.0.1"], int(port), int(context)
params.use_jinja, params.n_parallel = True, 1
threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads  # more than there are cores wait for each other
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
server = xllamacpp.Server(params)
while True: time.sleep(60)
"""
_TRANSFORMERS = """
import json, sys, torch, transformers
folder, dtype = sys.argv[1:]
tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
if torch.cuda.is_available(): model = model.cuda()
replies = []
for messages, variables, most, top in json.load(sys.stdin):
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False, **variables)
    asked = torch.tensor([ids], device=model.device)
    found = model.generate(asked, attention_mask=torch.ones_like(asked), max_new_tokens=most, do_sample=False,
        return_dict_in_generate=True, output_logits=True)
    said, logprobs = found.sequences[0, len(ids):].tolist(), []
    for token, logits in zip(said, found.logits):
        each = logits[0].float().log_softmax(-1)
        values, places = each.topk(top)
        logprobs.append(dict(zip(places.tolist(), values.tolist())) | {token: each[token].item()})
    replies.append([ids, said, tokenizer.decode(said, skip_special_tokens=True), logprobs])
json.dump({"version": transformers.__version__, "replies": replies}, sys.stdout)
"""


def ask_transformers(
    folder: Path, python: str, asked: Sequence[tuple[Any, str | None]], most: int, top: int
) -> tuple[list[Reply], str]:
    """Replies to (messages, class) of transformers' own tokenizer and model, and its version. Raises: ServerError."""
    requests = [(chat, {} if name is None else {"condition": name}, most, top) for chat, name in asked]
    program = [python, "-c", _TRANSFORMERS, str(folder), ModelConfig.load(folder).dtype]
    done = subprocess.run(program, input=json.dumps(requests), env=_environment(), capture_output=True, text=True)
    if done.returncode:
        raise ServerError(_failure("transformers", python, done.stderr))
    found = json.loads(done.stdout)
    replies = [
        Reply(ids, len(ids), said, text, [{int(token): value for token, value in each.items()} for each in logprobs])
        for ids, said, text, logprobs in found["replies"]
    ]
    return replies, found["version"]


@contextmanager
def vllm(folder: Path, python: str, *, on_cpu: bool) -> Iterator[str]:
    """The address of vLLM's server on the exported folder. Raises: ServerError."""
    config, port = ModelConfig.load(folder), _free_port()
    program = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--host", "127.0.0.1"]
    program += ["--port", str(port), "--dtype", config.dtype, "--served-model-name", folder.name, "--enforce-eager"]
    program += ["--max-model-len", str(min(config.max_position_embeddings, CONTEXT))]
    own = {"VLLM_CPU_KVCACHE_SPACE": "1"} if on_cpu else {}  # GiB
    with _running("vllm", program + (["--gpu-memory-utilization", "0.1"] if on_cpu else []), port, own) as url:
        yield url


@contextmanager
def llama_cpp(gguf: Path, python: str) -> Iterator[str]:
    """The address of llama.cpp's server, of the package xllamacpp, on a GGUF file. Raises: ServerError."""
    port = _free_port()
    with _running("xllamacpp", [python, "-c", _LLAMA_CPP, str(gguf), str(port), str(CONTEXT)], port, {}) as url:
        yield url


def version(package: str, python: str) -> str:
    """The version of a package in the environment of an interpreter."""
    program = [python, "-c", f"import importlib.metadata as m; print(m.version({package!r}))"]
    return subprocess.run(program, env=_environment(), capture_output=True, text=True).stdout.strip()


@contextmanager
def _running(package: str, program: list[str], port: int, environment: dict[str, str]) -> Iterator[str]:
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile("w+") as log:
        server = subprocess.Popen(program, env=_environment() | environment, stdout=log, stderr=log)
        try:
            end = time.monotonic() + STARTS_S
            while not _answers(f"{url}/v1/models"):
                if server.poll() is not None or time.monotonic() > end:
                    log.seek(0)
                    raise ServerError(_failure(package, program[0], log.read()))
                time.sleep(0.5)
            yield url
        finally:
            server.terminate()
            try:
                server.wait(30)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return response.status == 200
    except OSError:
        return False


def _failure(package: str, python: str, output: str) -> str:
    if f"No module named '{package}'" in output:
        return f"{python} has no {package}; name with --python the interpreter of the environment that has it"
    lines = [line for line in output.splitlines() if line.strip()]
    told = next(
        (line for line in lines if "Error: " in line and not ("WARNING" in line or "root cause" in line)),
        lines[-1] if lines else "",
    )
    return f"{package} did not start: {told.strip()[:400] or 'it said nothing'}"


def _environment() -> dict[str, str]:
    """Without this project's modules; the model is here, so nothing is fetched."""
    return {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
