"""`ochat generate MODEL --condition GPT4 --prompt "..." [--prompt "..."]`: answers prompts under a class."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape

from ochat import json_file
from ochat.data import template as templates
from ochat.data import tokenizer as tokenizers
from ochat.data.conversation import Conversation, Message
from ochat.data.template import Template
from ochat.errors import ConfigError
from ochat.model import hub
from ochat.progress import waiting

OPENCHAT = "openchat.json"


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
    device: str = "auto"  # auto: a card if there is one; or cpu, cuda, cuda:1, ...
    base: str = ""  # of a checkpoint of adapters: where their base lies now; empty: where the run had it


def main(options: GenerateOptions) -> None:
    """The command `ochat generate`."""
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
    from ochat.evaluate.open_model import folder_of, open_model  # torch takes seconds to import; a missing prompt
    from ochat.infer.generate import generate  # should not

    device = find_device(options.device)
    folder = folder_of(options.model)
    described = read_description(folder)
    spoken = load_template(folder, options.template)
    if options.condition is not None:
        spoken = dataclasses.replace(spoken, default_condition=options.condition)
    warn_of_unknown_class(spoken.default_condition, described.get("classes"))
    tokenizer = tokenizers.load(folder)
    spoken.check(tokenizer)
    prompts = [
        spoken.encode_prompt(Conversation((Message("user", prompt),), system=options.system), tokenizer)
        for prompt in options.prompt
    ]
    with waiting("answering"):
        new_ids = generate(
            open_model(options.model, dtype=options.dtype, device=device, base=options.base),
            prompts,
            max_new_tokens=options.max_new_tokens,
            stop_ids=[tokenizer.special_tokens[spoken.eot]],
            temperature=options.temperature,
            top_p=options.top_p,
            top_k=options.top_k,
            seed=options.seed,
        )
    return [tokenizer.decode(ids) for ids in new_ids]


def find_device(name: str) -> str:
    """`name` if torch has such a device here; of "auto" the card, or else the CPU. Raises: ConfigError with what there
    is."""
    import torch

    present = ["cpu"]
    if torch.accelerator.is_available() and (kind := torch.accelerator.current_accelerator()) is not None:
        present += [kind.type, *(f"{kind.type}:{index}" for index in range(torch.accelerator.device_count()))]
    if name == "auto":
        return present[1] if len(present) > 1 else "cpu"
    if name not in present:
        raise ConfigError(f"--device {name}: no such device here; there is {', '.join(present)}")
    return name


def load_template(folder: Path, name: str | None) -> Template:
    """The named template, or the one that openchat.json in the folder describes. Raises: ConfigError."""
    if name is not None:
        return templates.load(name)
    path, content = folder / OPENCHAT, read_description(folder)
    if not content:
        raise ConfigError(f"{folder}: has no {OPENCHAT} that names its template; give --template NAME")
    model_type, described = content.get("model_type"), content.get("template")
    if not isinstance(model_type, str) or not isinstance(described, dict | None):
        raise ConfigError(f"{path}: model_type must name a template, and template describe it; give --template NAME")
    if described is not None:
        return Template.from_dict({"name": model_type} | described, f"{path}: template")
    try:
        return templates.load(model_type)
    except ConfigError as error:
        raise ConfigError(f"{path}: model_type: {error}; or give --template NAME") from None


def read_description(folder: Path) -> dict[str, Any]:
    """The content of openchat.json in an exported folder; {} where there is none. Raises: ConfigError."""
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder. {hub.how_to_fetch(folder)}")
    path = folder / OPENCHAT
    return json_file.read_object(path, ConfigError, "export the model again") if path.exists() else {}


def warn_of_unknown_class(condition: str, classes: list[str] | None) -> None:
    """Say on stderr that a model was not trained on a class, if its `classes` are known."""
    if classes and condition and condition not in classes:
        known = ", ".join(repr(name) if name else "none" for name in classes)
        Console(stderr=True, highlight=False).print(
            f"[bold yellow]warning[/]: the model was not trained on the class {escape(repr(condition))}; "
            f"it knows {escape(known)}",
            soft_wrap=True,
        )
