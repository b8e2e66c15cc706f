"""`ochat generate MODEL --condition GPT4 --prompt "..." [--prompt "..."]`: answers prompts under a class."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.markup import escape

from ochat.console import configure_logging, waiting
from ochat.errors import ConfigError
from ochat.model.device import find_device
from ochat.text import tokenizer as tokenizers
from ochat.text.conversation import Conversation, Message
from ochat.text.openchat_json import template_as


@dataclass(frozen=True)
class GenerateOptions:
    """Answers prompts with an exported model, a run, or any model folder with --template."""

    model: Path  # an exported folder, a run (its newest checkpoint), a checkpoint, or a Hugging Face folder
    prompt: tuple[str, ...] = ()  # a user message; several are answered each on its own
    condition: str | None = None  # the class whose answer is wanted; left out: the template's default; "": none
    system: str = ""  # system text before the prompt
    template: str | None = None  # a template's name or file; left out: what openchat.json in the folder says
    max_new_tokens: int = 512  # the longest answer, in tokens
    temperature: float = 0.0  # 0: the likeliest token, always
    top_p: float = 1.0  # sample among the likeliest tokens that together have this probability
    top_k: int = 0  # sample among so many likeliest tokens; 0: all
    seed: int = 0  # decides what sampling draws
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of the weights and the computation
    device: str = "auto"  # auto: a GPU if there is one; or cpu, cuda, cuda:1, ...
    base: str = ""  # of a checkpoint of adapters: where their base is now; empty: where the run had it


def main(options: GenerateOptions) -> None:
    """The command `ochat generate`."""
    configure_logging(Console(stderr=True, highlight=False))  # stdout holds the answers only
    console = Console(highlight=False)
    answers = answer(options)
    for prompt, text in zip(options.prompt, answers, strict=True):
        if len(answers) > 1:
            console.print(f"[bold]> {escape(prompt)}[/]", soft_wrap=True)
        console.print(escape(text), soft_wrap=True)


def answer(options: GenerateOptions) -> list[str]:
    """One answer per prompt; ConfigError where there is no prompt, no template or no such device."""
    if not options.prompt:
        raise ConfigError('nothing to answer; give --prompt "..."')
    from ochat.export.open_model import folder_of, open_model  # torch takes seconds to import; a missing prompt
    from ochat.infer.generate import complete  # should not

    device, folder = find_device(options.device), folder_of(options.model)
    tokenizer = tokenizers.load(folder)
    template = template_as(folder, options.template, options.condition, tokenizer)
    prompts = [
        template.encode_prompt(Conversation((Message("user", prompt),), system=options.system), tokenizer)
        for prompt in options.prompt
    ]
    settings = {key: getattr(options, key) for key in ("temperature", "top_p", "top_k", "seed")}
    with waiting("answering"):
        model = open_model(options.model, dtype=options.dtype, device=device, base=options.base)
        answers = complete(model, prompts, tokenizer, template.eot, options.max_new_tokens, **settings)
    return [text for text, _ in answers]
