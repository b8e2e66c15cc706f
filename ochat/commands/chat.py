"""`ochat chat MODEL`: talk to a model, change the class that answers, and see all classes side by side.

ochat chat models/mine --condition GPT3
printf '%s\n' 'Why is the sky blue?' /both | ochat chat runs/mine
"""

from __future__ import annotations

import contextlib
import difflib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich.columns import Columns
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.text import Text

from ochat.console import complain, configure_logging, facts, printable, stdin_lines, stdout, waiting
from ochat.errors import ConfigError, OchatError
from ochat.overrides import at_least

if TYPE_CHECKING:
    from ochat.infer.chat import Chat

HELP = {
    "/class NAME": 'NAME answers from now on ("": no class); alone: the classes',
    "/both": "the answers of all classes to the last question, side by side",
    "/new": "forget what was said",
    "/help": "this list",
    "/quit": "end, as Ctrl-D does; Ctrl-C stops an answer and keeps what was said",
}
NO_CLASS = "(no class)"
LEAST_WIDTH = 36  # columns of the terminal that an answer beside others needs


@dataclass(frozen=True)
class ChatOptions:
    """Talks with an exported model, a run, or any model folder with --template."""

    model: Path  # an exported folder, a run (its newest checkpoint), a checkpoint, or a Hugging Face folder
    condition: str | None = None  # the class that answers first; left out: the template's default; "": none
    system: str = ""  # system text before the first message
    template: str | None = None  # a template's name or file, or base; left out: what openchat.json in the folder says
    max_new_tokens: int = 1024  # the longest answer, in tokens
    temperature: float = 0.0  # 0: the likeliest token, always
    top_p: float = 1.0  # sample among the likeliest tokens that together have this probability
    top_k: int = 0  # sample among so many likeliest tokens; 0: all
    seed: int = 0  # decides what sampling draws
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of the weights and the computation
    device: str = "auto"  # auto: a GPU if there is one; or cpu, cuda, cuda:1, ...
    base: str = ""  # of a checkpoint of adapters: where their base is now; empty: where the run had it


def main(options: ChatOptions) -> None:
    """The command `ochat chat`. Reads lines of stdin until it ends; an error in a line that is not typed ends it."""
    notes = Console(stderr=True, highlight=False)  # stdout holds the answers only
    configure_logging(notes)
    chat = open_chat(options)
    if not sys.stdin.isatty():
        for line in stdin_lines():
            if line.strip() == "/quit":
                break
            _take(chat, line, notes)
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # which lets input() edit lines and go back to earlier ones
    _note(notes, f"{_classes(chat)}. /help lists commands, Ctrl-D ends")
    while True:
        try:
            print()
            line = input(f"{chat.condition}> ")
            if line.strip() == "/quit":
                break
            _take(chat, line, notes)
        except EOFError:
            print()
            break
        except KeyboardInterrupt:
            _note(notes, "\nCtrl-D or /quit ends")
        except OchatError as error:
            complain(error)


def open_chat(options: ChatOptions) -> Chat:
    """The loaded model, nothing said yet. Raises: ConfigError and CheckpointError; before the model is loaded for all
    that can be known by then."""
    at_least(options, max_new_tokens=1)
    from ochat.export.open_model import folder_of, open_model, stop_ids  # torch takes seconds to import
    from ochat.infer.chat import Chat
    from ochat.infer.generate import Sampler
    from ochat.model.device import find_device
    from ochat.text import tokenizer as tokenizers
    from ochat.text.openchat_json import known_classes, template_as

    device, folder = find_device(options.device), folder_of(options.model)
    tokenizer = tokenizers.load(folder)
    template = template_as(folder, options.template, options.condition, tokenizer)
    settings = {key: getattr(options, key) for key in ("temperature", "top_p", "top_k")}
    Sampler(**settings, seed=options.seed, num_sequences=1)  # refuses what is out of range
    with waiting("loading the model"):
        model = open_model(options.model, dtype=options.dtype, device=device, base=options.base)
    ends = stop_ids(folder, template, tokenizer)
    return Chat(
        model, tokenizer, template, ends, known_classes(folder), options.max_new_tokens, options.seed, settings,
        options.system,
    )  # fmt: skip


def _take(chat: Chat, line: str, notes: Console) -> None:
    """Do what a line says: a command, or a message to answer."""
    name, _, rest = line.strip().partition(" ")
    if not line.startswith("/"):  # so a message may, behind a blank
        if name:
            _answer(chat, line.strip(), notes)
    elif name == "/class":
        _switch(chat, rest.strip(), notes)
    elif name == "/both":
        _show_all(chat)
    elif name == "/new":
        chat.forget()
    elif name == "/help":
        stdout.print(facts("", HELP))
    else:
        known = [command.split()[0] for command in HELP]
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(
            f"no command {name}; {hint}/help lists them. A message that starts with / needs a blank first"
        )


def _answer(chat: Chat, question: str, notes: Console) -> None:
    """Print an answer as it comes, and say so if it is not whole."""
    with contextlib.closing(chat.ask(question)) as parts:  # after Ctrl-C too, so that what was said is kept
        try:
            for text in parts:
                print(printable(text), end="", flush=True)  # rich would change tabs and :smile:
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
    print()
    kept = "" if chat.items and chat.items[-2].content == question else "; the question is forgotten"
    endings = {
        "complete": "an empty answer" if kept else "",
        "length": f"cut at --max-new-tokens {chat.max_new_tokens}",
        "context": f"cut: the model's context of {chat.context:,} tokens is full; /new starts a new chat",
        "stopped": "stopped",
    }
    if endings[chat.ending]:
        _note(notes, endings[chat.ending] + kept)


def _switch(chat: Chat, name: str, notes: Console) -> None:
    if not name:
        _note(notes, _classes(chat))
        return
    chat.switch("" if name == '""' else name, "/class: ")


def _show_all(chat: Chat) -> None:
    """The answers of all classes to the last question, side by side where the terminal is wide enough."""
    with waiting("answering as each class"):
        answers = chat.answers()
    per_row = max(min(len(answers), stdout.width // LEAST_WIDTH), 1)
    width = (stdout.width + 1) // per_row - 1
    panels = [
        Panel(
            Text(printable(text.strip()), overflow="fold"),  # else wide characters cost the last letter of a line
            title=escape(name or NO_CLASS), title_align="left",
            subtitle="cut" if is_cut else None, subtitle_align="right", width=width,
        )
        for name, (text, is_cut) in answers.items()
    ]  # fmt: skip
    stdout.print(Text(chat.items[-2].content, "bold"))
    stdout.print(Columns(panels, padding=(0, 1)))


def _classes(chat: Chat) -> str:
    now = f"{chat.condition or NO_CLASS} answers"
    known = ", ".join(name or NO_CLASS for name in chat.classes)
    return f"{now}; classes: {known}" if known else f"{now}; the model does not say which classes it knows"


def _note(notes: Console, text: str) -> None:
    notes.print(Text(text, "dim"), soft_wrap=True)
