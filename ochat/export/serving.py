"""What a server needs in addition to the weights: tokenizer, chat template, generation settings, openchat.json.

    write(folder, template, tokenizer, ("GPT3", "GPT4"), eos_ids=eos_ids_of(Path("models/base")))
    adapt(folder, condition="GPT3", boundary=False)

They are written and checked when a run starts, so that a faulty export stops it there and not at its end; every
checkpoint carries a copy, so that it can be exported without the base.

With the chat template (Jinja) a server gets training's ids for a whole chat. Training tokenises each segment alone, a
server the rendered string as a whole. Where a prefix and its content could merge, the template separates them: by a
blank (which is SentencePiece's dummy prefix), or by a boundary that the exported tokenizer drops. A reader that runs
another tokenizer takes the boundary for text, so an export can do without it (keeps_boundary).
"""

from __future__ import annotations

import json
import os.path
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from tokenizers import Tokenizer as ServedTokenizer

from ochat.errors import CheckpointError, ConfigError, DataError
from ochat.files import atomic, bounded_json
from ochat.text import tokenizer as tokenizers
from ochat.text.chat import llama_tools
from ochat.text.chat.dates import parse_date
from ochat.text.chat.sandbox import ChatSource
from ochat.text.chat.variables import chat_variables
from ochat.text.conversation import Conversation, Message
from ochat.text.openchat_json import OPENCHAT, template_as
from ochat.text.template import FOLDER, Template
from ochat.text.tokenizer import Tokenizer
from ochat.text.tokenizer_convert import BOUNDARY

GENERATION = "generation_config.json"
Boundary = Literal["auto", "always", "never"]


def write(
    folder: Path,
    template: Template,
    tokenizer: Tokenizer,
    classes: tuple[str, ...],
    *,
    eos_ids: Sequence[int] = (),
    condition_from: dict[str, Any] | None = None,
) -> None:
    """Writes the files into an empty or missing `folder`, after checking that they give training's ids.

    `eos_ids`: where the base stops; a server stops there too, and at the template's end of turn. `condition_from`: how
    rewards became classes, as the data set's manifest says.
    Raises: ConfigError where the tokenizer lacks one of the template's tokens, CheckpointError where ids would differ.
    """
    rendered = render(template, tokenizer)
    tokenizer.save(folder, chat_template=rendered, eos_token=template.eot)
    verify(folder, template, tokenizer)
    # the end of turn first: what reads one id alone takes the first
    stops = list(dict.fromkeys((tokenizer.special_tokens[template.eot], *eos_ids)))
    settings = {"bos_token_id": tokenizer.bos_id, "eos_token_id": stops if stops[1:] else stops[0], "do_sample": False}
    atomic.write_json(folder / GENERATION, settings)
    # model_type is the name that OpenChat's server looks up; the rest is what `ochat generate` goes by
    described = {"model_type": template.name, "template": template.to_dict(), "classes": list(classes)}
    described |= {"condition_from": condition_from} if condition_from else {}
    atomic.write_json(folder / OPENCHAT, described)


def eos_ids_of(base: Path) -> tuple[int, ...]:
    """The ids at which the base stops: those of its generation_config.json, or else of its config.json.

    Raises: ConfigError for a damaged file.
    """
    for name in (GENERATION, "config.json"):
        path = base / name
        found = bounded_json.read_object(path, ConfigError, "fetch it again") if path.is_file() else {}
        if (ids := found.get("eos_token_id")) is not None:
            ids = ids if isinstance(ids, list) else [ids]
            if not all(isinstance(i, int) and 0 <= i <= bounded_json.MAX_INTEGER for i in ids):
                raise ConfigError(f"{path}: eos_token_id is {bounded_json.shown(ids)}; token ids are expected")
            return tuple(ids)
    return ()


def keeps_boundary(model_type: str, boundary: Boundary) -> bool:
    """Whether an export has the boundary; auto: where transformers, and so vLLM, runs its tokenizer.json.

    For the others it builds the tokenizer anew by the rules of its class for that model type, and of tokenizer.json
    takes vocabulary, merges and added tokens alone.
    """
    return boundary == "always" or (boundary == "auto" and model_type not in ("qwen2",))


def adapt(folder: Path, *, condition: str | None, boundary: bool) -> bool:
    """Makes `condition` the class that the chat template and `ochat generate` take where none is named (None: as it
    is); without `boundary`, takes the boundary out of chat template and tokenizer. Returns whether there was one.

    Raises: ConfigError where no prefix can carry the class, CheckpointError where the ids would differ from training's;
    without a boundary, where the text would.
    """
    if condition is None and boundary:
        return False
    described = bounded_json.read_object(folder / OPENCHAT, CheckpointError, "export the run again")
    tokenizer = tokenizers.load(folder)
    template = template_as(folder, None, condition, tokenizer)
    exact = render(template, tokenizer)
    rendered = exact if boundary else render(template, tokenizer, boundary=False)
    tokenizer.save(folder, chat_template=rendered, eos_token=template.eot)
    verify(folder, template, tokenizer, ids=rendered == exact)
    atomic.write_json(folder / OPENCHAT, described | {"template": template.to_dict()})
    return rendered != exact


def lacks_boundary(folder: Path, template: Template, tokenizer: Tokenizer) -> bool:
    """Whether the exported folder is without the boundary that its template needs with this tokenizer."""
    source = bounded_json.read_object(folder / "tokenizer_config.json", CheckpointError, "export the run again")
    return BOUNDARY not in source["chat_template"] and BOUNDARY in render(template, tokenizer)


def spells_boundary(text: str) -> bool:
    """Whether a server's tokens spell the boundary, in whole or in part."""
    return BOUNDARY[0] in text or BOUNDARY[1] in text


def without_boundary(text: str) -> str:
    """What an export without a boundary renders instead."""
    return text.replace(BOUNDARY, "")


class Served:
    """What a server makes of a conversation with the chat template and the tokenizer.json of an exported folder."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = ServedTokenizer.from_file(str(folder / "tokenizer.json"))
        config = bounded_json.read_object(folder / "tokenizer_config.json", CheckpointError, "export the run again")
        self.chat = ChatSource(config["chat_template"], parse_date("2001-01-01"))  # no date that training writes

    def text(self, conversation: Conversation, **variables: Any) -> str:
        """The rendered text. Raises: DataError where the chat template refuses."""
        return self.chat.render(**chat_variables(conversation), **variables)

    def ids(self, text: str) -> list[int]:
        """Its ids, in which special tokens are live."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids


def render(template: Template, tokenizer: Tokenizer, *, boundary: bool = True) -> str:
    """The Jinja source of the chat template; without `boundary`, prefix and content may merge.

    Its variables: `messages` (system in front is allowed), `tools`, `add_generation_prompt`, `condition` (undefined:
    the template's default; "": none). Rendering refuses a message that holds a special token: served, it would be live.
    Raises: ConfigError if the tokenizer lacks a special token of the template.
    """
    template.check(tokenizer)
    if template.tokenize == "rendered":
        return template.served_source()
    roles = ("user", "assistant", "system", "tool")
    joints = {f"join_{role}": _joint(template, role, tokenizer, boundary) for role in roles}
    uses_boundary = any(BOUNDARY in joint for joint in joints.values())
    values = joints | {
        "default": _quoted(template.default_condition),
        "marks": json.dumps(_marks(tokenizer, uses_boundary), ensure_ascii=False),
        "bos": _quoted(template.bos_token(tokenizer) or ""),
        "eot": _quoted(template.eot),
        "suffix": _quoted(template.suffix),
        "user": _prefix_expression(template, "user"),
        "assistant": _prefix_expression(template, "assistant"),
        "system": _quoted(template.role_prefix("system")),
        "tool": _quoted(template.role_prefix("tool")),
        "takes_tools": json.dumps("tool" in template.roles),
        "functions": _quoted(llama_tools.FUNCTIONS),
    }
    source = (FOLDER / "chat_template.jinja").read_text("utf-8")
    return re.sub(r"@(\w+)@", lambda match: values[match[1]], source)


def _prefix_expression(template: Template, role: str) -> str:
    before, after = template.prefix.split("{role}")
    name = template.roles[role]
    named = f"(chosen ~ {_quoted(' ' + name)}) | trim" if template.carries_condition(role) else _quoted(name.strip())
    return f"{_quoted(before)} ~ ({named}) ~ {_quoted(after)}"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _marks(tokenizer: Tokenizer, uses_boundary: bool) -> list[str]:
    """Strings that no message may hold. Many tokens that differ in a number (reserved_special_token_7) count as one."""
    stems: dict[str, list[str]] = {}
    for token in tokenizer.special_tokens:
        stems.setdefault(re.split(r"\d", token)[0], []).append(token)
    families = ([stem] if len(tokens) > 8 and len(stem) > 4 else tokens for stem, tokens in stems.items())
    return [*sorted(mark for marks in families for mark in marks), *([BOUNDARY] if uses_boundary else [])]


def _joint(template: Template, role: str, tokenizer: Tokenizer, boundary: bool) -> str:
    """What comes between a prefix and `content` that is not empty, as a Jinja expression."""
    tail = tokenizer.split_at_specials(template.role_prefix(role))[-1]
    if not tail:
        return _quoted("")  # a special token, or nothing, is in front of the content
    if not boundary:
        return _quoted(" " if tokenizer.has_dummy_prefix else "")
    if tokenizer.has_dummy_prefix:
        return _quoted(BOUNDARY + " " if _grows_across_blanks(tokenizer) else " ")
    if tail.endswith("\n") and _splits_after(tail, tokenizer):
        return f"({_quoted(BOUNDARY)} if content[:1] | trim == '' else {_quoted('')})"
    return _quoted(BOUNDARY)


def _grows_across_blanks(tokenizer: Tokenizer) -> bool:
    """Whether some vocabulary entry holds "▁" after another character, so that it could span prefix and content."""
    return any(re.search("[^▁]▁", piece) for piece in tokenizer.pieces)


# one of each kind of character that pre-tokenizers tell apart
_LETTERS = ("a", "Z", "é", "ß", "漢", "ん", "ب", "א", "\u0301", "\u093f", "0", "٣", "²", "½")
_SIGNS = ("'s", "'", '"', "-", "--", ":", ")", "#", "/", "`", "_", "€", "+", "😀")
_INVISIBLE = ("\u200d", "\u200b", "\ufeff", "\ufffd", "\ue000", "\x00", "\x1b", "\x7f")


def _splits_after(tail: str, tokenizer: Tokenizer) -> bool:
    """Whether content that starts with no blank keeps its ids directly after `tail`, which ends in a newline."""
    if any(re.search(r"\n[^\s▁]", piece) for piece in tokenizer.pieces):
        return False
    head = tokenizer.encode(tail)
    contents = [start + rest for start in (*_LETTERS, *_SIGNS, *_INVISIBLE) for rest in ("", "b", " b", "7", "\n")]
    return all(tokenizer.encode(tail + content) == head + tokenizer.encode(content) for content in contents)


def verify(folder: Path, template: Template, tokenizer: Tokenizer, *, ids: bool = True) -> None:
    """Render awkward conversations with the exported chat template, tokenise with the exported tokenizer, compare ids;
    without `ids`, the text that they spell.

    Raises: CheckpointError at the first difference.
    """
    served = Served(folder)
    served.tokenizer.encode_special_tokens = True
    for text in (*_AWKWARD, *list(tokenizer.special_tokens)[:8]):
        _compare(served, text, tokenizer.encode(text), folder)
    served.tokenizer.encode_special_tokens = False
    compared = 0
    for conversation in map(template.prepared, _probes()):
        try:
            whole, _ = template.encode(conversation, tokenizer)
        except DataError:  # a chat template may refuse roles that do not alternate, or system text
            continue
        asked = replace(conversation, items=conversation.items[:-1])
        opened = replace(template, default_condition="").encode_prompt(asked, tokenizer)
        _compare(served, served.text(conversation), whole, folder, ids=ids)
        _compare(served, served.text(asked, add_generation_prompt=True), opened, folder, ids=ids)
        compared += 1
    if not compared:
        raise CheckpointError(f"{folder}: the chat template writes none of the conversations that it is checked with")


def _compare(served: Served, text: str, trained: list[int], folder: Path, *, ids: bool = True) -> None:
    found = served.ids(text)
    spelt = (served.tokenizer.decode(each, skip_special_tokens=False) for each in (found, trained))
    if found != trained and (ids or len(set(spelt)) > 1):
        at = len(os.path.commonprefix([found, trained]))
        raise CheckpointError(
            f"{folder}: the exported tokenizer and chat template give other ids than training from token {at} on "
            f"({found[at : at + 4]} instead of {trained[at : at + 4]}) for {text!r}"
        )


_BLANKS = (
    "", " ", "  two blanks", "\n", "\n\nlines", " \n x", "\t", "\u00a0x", "\u2028x", "\x1cx", "\r\nx", "trailing \n\n",
)  # fmt: skip
_TEXTS = ("Hello", "User: hi", "12345", "a\x00b", "😀 漢字", "\u0301accent", "\u200dz", "▁", "▁ x")
_AWKWARD = (*_BLANKS, *_TEXTS, ":)", ")", "'s", "-- -", "<", "|>", "//")


def _probes() -> list[Conversation]:
    """Conversations whose contents start and end in awkward ways, over several turns, systems and conditions."""
    conditions = ("", "GPT4", "Math Correct", " blanks ", "é:")
    count, conversations = len(_AWKWARD), []
    for i in range(count):
        items = tuple(Message(("user", "assistant")[k % 2], _AWKWARD[(i * 5 + k) % count]) for k in range(4))
        system = "" if i % 3 == 0 else _AWKWARD[(i * 7 + 4) % count]
        conversations.append(Conversation(items, conditions[i % len(conditions)], system))
    call = {"name": "rain", "arguments": {"in": "Ulm", "é": [1, None]}}
    tool = {"type": "function", "function": {"name": "rain", "description": "<b> é", "parameters": {}}}
    asked, said = Message("user", "Rain?"), Message("assistant", "No.")
    called = (Message("assistant", "", tool_calls=(call,)), Message("tool", '"no"\n é', name="rain"), said)
    thought = (asked, replace(said, reasoning="Dry."), asked, replace(said, reasoning="Dry\nstill."))
    special = [  # refused by many templates
        Conversation((asked, *called), tools=(tool,)),
        Conversation((Message("user", "\n\n x"), *called, asked, *called), "GPT4", "Be brief.", tools=(tool, tool)),
        Conversation(thought, "GPT4"),
    ]
    return [*conversations, replace(conversations[1], items=conversations[1].items[:1]), *special]
