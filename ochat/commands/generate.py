"""`ochat generate MODEL --condition GPT4 --prompt "..." [--prompt "..."]`: answers prompts under a class."""

from __future__ import annotations

import dataclasses
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
from ochat.text.openchat_json import load_template, read_description, warn_of_unknown_class


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
    from ochat.infer.generate import generate  # should not

    device = find_device(options.device)
    folder = folder_of(options.model)
    described = read_description(folder)
    template = load_template(folder, options.template)
    if options.condition is not None:
        template = dataclasses.replace(template, default_condition=options.condition)
    warn_of_unknown_class(template.default_condition, described.get("classes"))
    tokenizer = tokenizers.load(folder)
    template.check(tokenizer)
    prompts = [
        template.encode_prompt(Conversation((Message("user", prompt),), system=options.system), tokenizer)
        for prompt in options.prompt
    ]
    with waiting("answering"):
        new_ids = generate(
            open_model(options.model, dtype=options.dtype, device=device, base=options.base),
            prompts,
            max_new_tokens=options.max_new_tokens,
            stop_ids=[tokenizer.special_tokens[template.eot]],
            temperature=options.temperature,
            top_p=options.top_p,
            top_k=options.top_k,
            seed=options.seed,
        )
    return [tokenizer.decode(ids) for ids in new_ids]
