"""`ochat show DATA`: conversations of a data set as they are trained.

ochat show data/train --n 3 --class GPT4
ochat show data/train --index 17 --ids
ochat show data/train --line chats.jsonl:12
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from rich.console import Console
from rich.text import Text

from ochat.console import next_command
from ochat.errors import ConfigError
from ochat.text import tokenizer
from ochat.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from ochat.data.shown import Shown
    from ochat.text.token_weights import Span

LEGEND = "dim: in the prompt; bright: trained, with its weight where that is not 1; reversed: special tokens"
PLAIN_LEGEND = "«»: trained, with its weight where that is not 1; all else is in the prompt"


@dataclass(frozen=True)
class ShowOptions:
    """Shows conversations of a data set as they are trained, with weights and sources."""

    data: Annotated[Path, tyro.conf.Positional]  # folder that `ochat prepare` wrote
    n: int = 3  # how many to show
    class_: Annotated[str | None, tyro.conf.arg(name="class")] = None  # only of this class; "": without one
    index: int | None = None  # only this one, by its place in the data set from 0
    # only what was read from this line of the input
    line: Annotated[str, tyro.conf.arg(metavar="[FILE:]NUMBER")] = ""
    ids: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False  # show each token's id
    base: str = ""  # folder of the tokenizer, for data sets of earlier versions, which have none of their own


def main(options: ShowOptions) -> None:
    """Print them. Raises: ConfigError, DataError."""
    from ochat.data import shown

    if options.n < 1:
        raise ConfigError(f"--n {options.n}: at least 1 is needed")
    total, by_class = shown.count(options.data)
    if options.index is not None:
        chosen = [options.index]
    elif options.line:
        chosen = shown.of_line(options.data, options.line)
    elif options.class_ is None:
        chosen = list(range(min(options.n, total)))
    elif options.class_ in by_class:
        chosen = by_class[options.class_][: options.n]
    else:
        known = ", ".join(repr(name) for name in by_class)
        raise ConfigError(f"--class {options.class_!r}: the data set has no such class; it has {known}")
    tokens = read_tokenizer(options.data, options.base)
    console = Console(highlight=False)
    console.print(Text(shown.about(options.data), "dim"))
    for each in shown.conversations(options.data, chosen):
        show(each, tokens, console, with_ids=options.ids)
    legend = LEGEND if console.color_system else PLAIN_LEGEND
    console.print(f"{len(chosen)} of {total:,} conversations. {legend}", style="dim")
    next_command("ochat new --base", options.base or "BASE", "--data", options.data)


def read_tokenizer(data: Path, base: str = "") -> Tokenizer:
    """The data set's own tokenizer, or the base's. Raises: ConfigError."""
    path = data / "tokenizer.json"
    if not base and not path.is_file():
        raise ConfigError(
            f"{data}: no tokenizer.json, as an earlier version wrote it; say which one with --base FOLDER"
        )
    return tokenizer.load(base or path)


def show(
    each: Shown, tokens: Tokenizer, console: Console, *, with_ids: bool = False, most_lines: int | None = None
) -> None:
    """Print one conversation; of one with more than `most_lines`, its beginning and its end."""
    trained = sum(span.end - begin for begin, span in _with_begins(each) if span.is_supervised)
    facts = [f"index {each.index}", each.condition or "no class", each.place, f"{len(each.input_ids):,} tokens"]
    facts += [f"{trained:,} trained", *([] if each.reward is None else [f"reward {each.reward:g}"])]
    console.print(" · ".join(facts), style="bold cyan")
    text, ended, weight = Text(), False, 0.0  # of the text before; 0: it is not trained
    opening, closing = ("", "") if console.color_system else ("«", "»")
    for begin, span in _with_begins(each):
        own = span.own_weight if span.is_supervised else 0.0
        style = "dim" if not own else "bold green" if own > 0 else "bold red"
        pieces = _pieces(each.input_ids[begin : span.end], tokens, with_ids=with_ids)
        if weight and not own:
            text.append(closing)
        if span.role == "prefix" and ended and not pieces[0][0].startswith("\n"):
            text.append("\n")  # the next turn, where the template has no newline of its own
        if own and not weight:
            text.append(opening)
        if own not in (0, weight or 1):
            text.append(f"[{own:g}]", style="bold magenta")
        weight, ended = own, pieces[-1][1] and span.role != "prefix"
        for piece, is_special in pieces:
            text.append(piece, style=f"{style} reverse" if is_special else style)
    text.append(closing if weight else "")
    lines = list(text.wrap(console, console.width - 2))
    if most_lines and len(lines) > most_lines:  # those at the end have an answer
        hidden = Text(f"... {len(lines) - most_lines:,} more lines", style="dim")
        lines = [*lines[: most_lines // 2], hidden, *lines[most_lines // 2 - most_lines :]]
    for line in lines:
        console.print(Text("  ") + line)
    console.print()


def _with_begins(each: Shown) -> list[tuple[int, Span]]:
    begins = [0, *(span.end for span in each.spans)]
    return list(zip(begins, each.spans, strict=False))


def _pieces(ids: list[int], tokens: Tokenizer, *, with_ids: bool) -> list[tuple[str, bool]]:
    """Texts of the ids, and which are special tokens; with ids each token alone."""
    specials = {i: name for name, i in tokens.special_tokens.items()}
    if with_ids:
        return [(f"{specials.get(i) or tokens.token_text(i)}({i}) ", i in specials) for i in ids]
    pieces: list[tuple[str, bool]] = []
    ordinary: list[int] = []
    for i in [*ids, None]:
        if i is None or i in specials:
            pieces += [(tokens.decode(ordinary), False)] if ordinary else []
            ordinary = []
            pieces += [] if i is None else [(specials[i], True)]
        else:
            ordinary.append(i)
    return pieces
