"""`ochat generate MODEL --condition GPT4 --prompt "..." [--prompt "..."]`: answers prompts under a class.

git diff | ochat generate models/mine --system "Review this change." --prompt -
ochat generate models/mine --prompts prompts.txt --output answers.jsonl
ochat generate models/mine --condition GPT4 --guidance 1.5 --against GPT3 --prompt "..."
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console
from rich.text import Text

from ochat.console import configure_logging, printable, stdin_lines, waiting
from ochat.errors import ConfigError
from ochat.files import atomic
from ochat.overrides import at_least
from ochat.text.conversation import Conversation, Message

if TYPE_CHECKING:
    from ochat.evaluate.prompts import Prompt

log = logging.getLogger(__name__)
Answers = Iterator[list[tuple["Prompt", str, bool]]]


@dataclass(frozen=True)
class GenerateOptions:
    """Answers prompts with an exported model, a run, or any model folder with --template."""

    model: Path  # an exported folder, a run (its newest checkpoint), a checkpoint, or a Hugging Face folder
    prompt: tuple[str, ...] = ()  # a user message, "-": all of stdin; several are answered each on its own
    prompts: Path | None = None  # a file of prompts: .txt, one a line; or records of {"prompt"} or messages; -: stdin
    output: Path | None = None  # write the answered conversations to this JSON Lines file instead
    condition: str | None = None  # the class whose answer is wanted; left out: the template's default; "": none
    system: str = ""  # system text before the prompts
    template: str | None = None  # a template's name or file, or base; left out: what openchat.json in the folder says
    guidance: float = 1.0  # how far to go from the class --against to --condition; 1: just there, 1.5: beyond it
    against: str | None = None  # the class that guidance leads away from; none: no class; left out: the only other one
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
    asked, batches = answer(options)
    if options.output:
        from ochat.evaluate.prompts import write_answers

        num_cut = write_answers(options.output, batches, len(asked))
        cut = (
            f"{num_cut:,} of them cut short by --max-new-tokens or the context" if num_cut else "none of them cut short"
        )
        log.info("%s answers in %s, %s", f"{len(asked):,}", options.output, cut)
        return
    while True:
        with waiting("answering"):
            batch = next(batches, ())
        for prompt, text, is_cut in batch:
            if len(asked) > 1:
                console.print(Text(f"> {prompt.conversation.items[-1].content}", "bold"), soft_wrap=True)
            print(printable(text), flush=True)  # rich would change tabs and :smile:
            if is_cut:
                place = f"{prompt.place}: " if len(asked) > 1 else ""
                most = options.max_new_tokens
                log.warning("%sthe answer is cut short by --max-new-tokens %d or the context", place, most)
        if not batch:
            break


def answer(options: GenerateOptions) -> tuple[list[Prompt], Answers]:
    """The prompts, and their answers batch by batch as prompts.answer gives them.

    Raises: ConfigError where there is no prompt, no template, no such class or device, or no place for the output.
    """
    if not options.prompt and options.prompts is None:
        raise ConfigError('nothing to answer; give --prompt "...", --prompt - (stdin) or --prompts FILE')
    at_least(options, max_new_tokens=1)
    atomic.check_writable(options.output)
    from ochat.evaluate import prompts  # torch takes seconds to import; a missing prompt should not
    from ochat.export.open_model import folder_of, open_model, stop_ids
    from ochat.model.config import ModelConfig
    from ochat.model.device import find_device
    from ochat.text import tokenizer as tokenizers
    from ochat.text.openchat_json import against, known_classes, template_as

    device, folder = find_device(options.device), folder_of(options.model)
    tokenizer = tokenizers.load(folder)
    template = template_as(folder, options.template, options.condition, tokenizer)
    context = ModelConfig.load(folder).max_position_embeddings
    chats = list(_conversations(options))
    asked = prompts.encode(chats, [template.default_condition], template, tokenizer, context)
    settings: dict[str, Any] = {key: getattr(options, key) for key in ("temperature", "top_p", "top_k", "seed")}
    if options.guidance != 1 or options.against is not None:
        other = against(template, options.against, known_classes(folder), tokenizer)
        others = prompts.encode(chats, [other], template, tokenizer, context)
        settings |= {"guidance": options.guidance, "against": others}
    with waiting("loading the model"):
        model = open_model(options.model, dtype=options.dtype, device=device, base=options.base)
    ends = stop_ids(folder, template, tokenizer)
    return asked, prompts.answer(asked, model, tokenizer, ends, options.max_new_tokens, **settings)


def _conversations(options: GenerateOptions) -> Iterator[tuple[str, Conversation]]:
    """What is asked, and where it stands."""
    from ochat.evaluate.prompts import read_conversations

    for number, text in enumerate(options.prompt, 1):
        said = "".join(stdin_lines()) if text == "-" else text
        place = "stdin" if text == "-" else f"prompt {number}"
        yield place, Conversation((Message("user", said),), system=options.system)
    for place, conversation in read_conversations(options.prompts) if options.prompts else ():
        yield place, replace(conversation, system=options.system or conversation.system)
