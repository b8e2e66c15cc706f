"""`ochat generate MODEL_DIR --condition GPT4 --prompt "..." [--prompt "..."]`: answers prompts under a class."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.markup import escape

from ochat.data import template as templates
from ochat.data import tokenizer as tokenizers
from ochat.data.conversation import Conversation, Message
from ochat.data.template import Template
from ochat.errors import ConfigError


@dataclass(frozen=True)
class GenerateOptions:
    """Answers prompts with a model that `ochat export` wrote (or any Llama folder, with --template)."""

    model: Path  # a Hugging Face folder
    prompt: tuple[str, ...] = ()  # one or more user messages, each answered on its own
    condition: str | None = None  # the class whose answer is wanted; left out: the template's default; "": none
    system: str = ""  # system text before the prompt
    template: str | None = None  # a template's name or file; left out: what openchat.json in the folder says
    max_new_tokens: int = 512  # the longest answer, in tokens
    temperature: float = 0.0  # 0: the likeliest token, always
    top_p: float = 1.0  # sample among the likeliest tokens that together have this probability
    top_k: int = 0  # sample among so many likeliest tokens; 0: all
    seed: int = 0  # decides what sampling draws
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of weights and computation
    device: str = "cpu"  # or cuda


def main(options: GenerateOptions) -> None:
    """The command `ochat generate`."""
    console = Console(highlight=False)
    answers = answer(options)
    for prompt, text in zip(options.prompt, answers, strict=True):
        if len(answers) > 1:
            console.print(f"[bold]{escape(prompt)}[/]", soft_wrap=True)
        console.print(escape(text), soft_wrap=True)


def answer(options: GenerateOptions) -> list[str]:
    """One answer per prompt; ConfigError where there is no prompt or no template."""
    if not options.prompt:
        raise ConfigError('nothing to answer; give --prompt "..."')
    from ochat.infer.generate import generate  # torch takes seconds to import; a missing prompt should not
    from ochat.model import hf

    spoken = load_template(options.model, options.template)
    if options.condition is not None:
        spoken = dataclasses.replace(spoken, default_condition=options.condition)
    tokenizer = tokenizers.load(options.model)
    spoken.check(tokenizer)
    prompts = [
        spoken.encode_prompt(Conversation((Message("user", prompt),), system=options.system), tokenizer)
        for prompt in options.prompt
    ]
    model = hf.load(options.model, dtype=options.dtype, device=options.device)
    new_ids = generate(
        model,
        prompts,
        max_new_tokens=options.max_new_tokens,
        stop_ids=[tokenizer.special_tokens[spoken.eot]],
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        seed=options.seed,
    )
    return [tokenizer.decode(ids) for ids in new_ids]


def load_template(folder: Path, name: str | None) -> Template:
    """The named template, or the one that openchat.json in the folder describes."""
    if name is not None:
        return templates.load(name)
    try:
        content = json.loads((folder / "openchat.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{folder}: has no openchat.json that names its template; give --template NAME") from None
    except ValueError as error:
        raise ConfigError(f"{folder / 'openchat.json'}: not JSON: {error}") from None
    return Template.from_dict(content["template"]) if "template" in content else templates.load(content["model_type"])
