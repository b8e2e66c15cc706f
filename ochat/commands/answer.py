"""`ochat answer MODEL QUESTIONS OUTPUT --format F`: answers that AlpacaEval's and FastChat's judges read.

ochat answer models/mine alpaca_eval.json results/mine/model_outputs.json --format alpaca_eval --condition GPT4
ochat answer mine question.jsonl model_answer/mine.jsonl --format mt_bench --endpoint http://127.0.0.1:8000/v1
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.markup import escape

from ochat.console import next_command
from ochat.errors import ConfigError
from ochat.evaluate import answer_files
from ochat.evaluate.answer_files import Format
from ochat.evaluate.endpoint import check_address
from ochat.files import checksums
from ochat.overrides import at_least

MAX_NEW_TOKENS = {"alpaca_eval": 2048, "mt_bench": 1024, "vicuna_bench": 1024}
LEAST = {
    "limit": 1, "max_new_tokens": 1, "temperature": 0,
    "concurrent": 1, "requests_per_minute": 0, "retries": 0, "timeout_s": 1,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class AnswerOptions:
    """Answers a benchmark's questions, for its own judge to read."""

    model: str  # an exported folder, a run or a checkpoint; with --endpoint: the model's name on the server
    questions: Path  # alpaca_eval.json, or FastChat's question.jsonl, as published
    output: Path  # the file to write: model_outputs.json, or model_answer/NAME.jsonl
    format: Format = "alpaca_eval"  # of the questions and answers
    name: str = ""  # of the model in the answers; empty: OUTPUT's, in alpaca_eval the model's
    condition: str | None = None  # the class whose answers are wanted; left out: the model's default; "": none
    max_new_tokens: int | None = None  # the longest answer to a turn; left out: 2048 in alpaca_eval, else 1024
    temperature: float | None = None  # left out: 0 in alpaca_eval, else FastChat's for the question's category
    limit: int | None = None  # answer only the first so many questions; left out: all
    seed: int = 0  # of sampling
    template: str | None = None  # of a local model without openchat.json: a template's name or file
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of a local model's weights and computation
    device: str = "auto"  # of a local model; auto: a GPU if there is one; or cpu, cuda, cuda:1, ...
    base: str = ""  # of a checkpoint of adapters: where their base is now; empty: where the run had it
    endpoint: str = ""  # an OpenAI-compatible server, http://host:port/v1; its key: environment variable OPENAI_API_KEY
    concurrent: int = 8  # requests to the server at a time
    requests_per_minute: float = 0.0  # most requests that are sent in a minute; 0: no limit
    retries: int = 10  # of a request that failed for a reason that may pass
    timeout_s: float = 600.0  # the longest wait for one whole reply, of each try


def main(options: AnswerOptions) -> None:
    """The command `ochat answer`."""
    # torch takes seconds to import; --help does without
    from ochat.evaluate.model_client import EndpointAnswerer, LocalAnswerer
    from ochat.model.device import find_device

    answer_files.check_output(options.output)
    at_least(options, **LEAST)
    limits = {"limit": options.limit, "temperature": options.temperature}
    questions = answer_files.read_questions(options.questions, options.format, **limits)
    most = options.max_new_tokens or MAX_NEW_TOKENS[options.format]
    shared = {"max_new_tokens": most, "condition": options.condition, "seed": options.seed}
    if options.endpoint:
        _check_endpoint(options.endpoint)
        own = {key: getattr(options, key) for key in ("concurrent", "requests_per_minute", "retries", "timeout_s")}
        answerer = EndpointAnswerer(options.endpoint, options.model, **shared, **own)
    else:
        own = {key: getattr(options, key) for key in ("template", "dtype", "base")}
        answerer = LocalAnswerer(Path(options.model), device=find_device(options.device), **shared, **own)
    about = {"questions": checksums.sha256(options.questions), "format": options.format, "seed": options.seed}
    about |= {"max_new_tokens": most, "temperature": options.temperature} | answerer.about
    name = options.name or answer_files.generator_name(options.format, options.model, options.output)
    answers = answer_files.answer(questions, options.output, options.format, answerer.answers, about=about, name=name)
    num_cut = sum(each.is_cut for each in answers)
    cut = f"{num_cut:,} of them cut short by --max-new-tokens or the context" if num_cut else "none of them cut short"
    Console(highlight=False).print(f"{len(answers):,} answers in {escape(str(options.output))}, {cut}", soft_wrap=True)
    if options.format == "alpaca_eval":
        next_command("alpaca_eval --model_outputs", options.output, "--reference_outputs", "REFERENCE.json")
    else:
        next_command("python -m fastchat.llm_judge.gen_judgment --model-list", name)


def _check_endpoint(endpoint: str) -> None:
    if importlib.util.find_spec("openai") is None:
        raise ConfigError("--endpoint needs the package openai: pip install 'ochat-crlft[judge]'")
    check_address(endpoint, "--endpoint", "http://127.0.0.1:8000/v1")
