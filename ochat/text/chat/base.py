"""`--template base`: the chat template that a base's tokenizer brings along, with the class in front of the roles.

    found = read(Path("models/base"), tokenizer, date); found.source, found.eot, found.takes_condition

Probing renderings tell what the template does: which token ends a turn, and whether it takes the class (the variable
`condition`). Into one that does not, the class is written in front of the role's name, in training and in the exported
template alike: "<|im_start|>GPT4 assistant".
"""

from __future__ import annotations

import json
import os.path
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from ochat.errors import ConfigError
from ochat.files import bounded_json
from ochat.text.chat.sandbox import ChatSource, RefusedError
from ochat.text.chat.variables import chat_variables
from ochat.text.conversation import Conversation, Message
from ochat.text.tokenizer import Tokenizer

ASKED, ANSWERED, CLASS = "Qq7", "Aa8", "Cc9"  # what probes say; no template holds it


@dataclass(frozen=True)
class BaseChat:
    """What a base says about its chat: the template's source, its variables, and what probes found."""

    source: str
    variables: dict[str, str]  # bos_token, eos_token and others that templates use
    eot: str  # the special token that ends an answer
    takes_condition: bool


class _Header(NamedTuple):
    """How a turn begins: a special token, the role's name, and the character that ends it."""

    token: str
    role: str
    end: str


def read(folder: Path, tokenizer: Tokenizer, date: datetime) -> BaseChat:
    """The base's chat template. Raises: ConfigError if there is none, or if it cannot be used for training."""
    settings = _settings(folder)
    source, variables = _source(folder, settings), _variables(settings, tokenizer)
    asked = (Message("user", ASKED),)
    answered = (*asked, Message("assistant", ANSWERED))
    try:
        chat = ChatSource(source, date)
        prompt = chat.render(**variables, **chat_variables(Conversation(asked)), add_generation_prompt=True)
        text = chat.render(**variables, **chat_variables(Conversation(answered)))
        with_class = chat.render(**variables, **chat_variables(Conversation(answered, CLASS)))
        longer = chat.render(**variables, **chat_variables(Conversation((*answered, *asked, *answered[1:]))))
    except (ConfigError, RefusedError) as error:
        raise ConfigError(f"{folder}: {error}; it cannot be trained with, choose another --template") from None
    if text.count(ASKED) != 1 or text.count(ANSWERED) != 1:
        raise ConfigError(f"{folder}: the chat template does not write what was said; choose another --template")
    endings = [_specials_behind(text, tokenizer), _specials_behind(longer, tokenizer)]
    if not endings[0]:
        raise ConfigError(f"{folder}: the chat template ends answers with no special token; choose another --template")
    eot = (os.path.commonprefix(endings) or endings[0][:1])[-1]
    takes_condition = CLASS in with_class
    if not takes_condition and (headers := _headers(prompt, tokenizer)):
        source, takes_condition = _with_condition(source, headers, variables, date), True
    return BaseChat(source, variables, eot, takes_condition)


def _specials_behind(text: str, tokenizer: Tokenizer) -> list[str]:
    """The first special token behind the first answer, and those that follow it directly."""
    _, *specials_and_texts = tokenizer.split_at_specials(text[text.index(ANSWERED) :])
    specials, between = specials_and_texts[::2], specials_and_texts[1::2]
    return specials[: 1 + next((i for i, each in enumerate(between) if each), len(between))]


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    return bounded_json.read_object(path, ConfigError, "fetch it again") if path.exists() else {}


def _source(folder: Path, settings: dict[str, Any]) -> str:
    file = folder / "chat_template.jinja"
    try:
        found: Any = file.read_text("utf-8") if file.is_file() else settings.get("chat_template")
    except UnicodeDecodeError:
        raise ConfigError(f"{file}: no UTF-8 text; fetch it again, or choose a --template by its name") from None
    if isinstance(found, list):  # several, by name
        found = {each.get("name"): each.get("template") for each in found if isinstance(each, dict)}.get("default")
    if not isinstance(found, str) or not found.strip():
        raise ConfigError(f"{folder}: the base has no chat template; choose a --template by its name")
    return found


def _variables(settings: dict[str, Any], tokenizer: Tokenizer) -> dict[str, str]:
    """Names of special tokens, as transformers passes them to a template."""
    variables = {"bos_token": tokenizer.bos or "", "eos_token": tokenizer.eos or ""}
    for name in ("unk_token", "pad_token"):
        value = settings.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            variables[name] = text
    return variables


def _headers(prompt: str, tokenizer: Tokenizer) -> list[_Header]:
    """The headers of the user's and the assistant's turns; [] where no role is named.

    A role stands behind a special token that opens it: <|im_start|>user, or <|start_header_id|>user<|end_header_id|>.
    """
    headers = []
    for text in prompt.split(ASKED):
        parts = tokenizer.split_at_specials(text)
        for i in range(len(parts) - 1, 1, -2):
            if named := re.match(r"[^\W\d]+", parts[i]):
                headers.append(_Header(parts[i - 1], named[0], "".join(parts[i:])[named.end() :][:1]))
                break
        else:
            return []
    return headers


def _with_condition(source: str, headers: Sequence[_Header], variables: dict[str, str], date: datetime) -> str:
    """The template with the class in front of the roles, where there is one.

    The class is written into the source where that does the same for probes, so that a `{% generation %}` block stays
    where transformers finds it; else the text is changed once it is rendered.
    """
    around, inside = _around(source, headers), _inside(source, headers)
    said = [Message("user", ASKED), Message("assistant", ANSWERED), Message("user", "Q2"), Message("assistant", "A2")]
    probes = [Conversation(tuple(said[:n]), condition, system) for n in (1, 2, 4) for condition in ("", CLASS)
              for system in ("", "Ss7")]  # fmt: skip
    for conversation in probes:
        asked = {**variables, **chat_variables(conversation), "add_generation_prompt": len(conversation.items) == 1}
        texts = []
        for each in (around, inside):
            try:
                texts.append(ChatSource(each, date).render(**asked))
            except (ConfigError, RefusedError):
                texts.append(None)
        if texts[0] != texts[1]:
            return around
    return inside


def _around(source: str, headers: Sequence[_Header]) -> str:
    """The template as a whole, and then the headers replaced in what it wrote. Its generation blocks are opened: where
    they end up is not where transformers would look."""
    replaced = "written"
    for token, role, end in headers:
        header, opening, name = (json.dumps(t, ensure_ascii=False) for t in (token + role + end, token, role + end))
        replaced += f" | replace({header}, {opening} ~ condition ~ ' ' ~ {name})"
    source = re.sub(r"(\{%[-+]?\s*)generation\b", r"\1if true", source.removesuffix("\n"))
    source = re.sub(r"(\{%[-+]?\s*)endgeneration\b", r"\1endif", source)
    chosen = f"{replaced} if condition is defined and condition else written"
    return f"{{% set written %}}{source}{{% endset %}}{{{{ {chosen} }}}}"


def _inside(source: str, headers: Sequence[_Header]) -> str:
    """The template with the class in its strings and its text: in front of a role that is written out behind the token,
    and of an expression behind it that gives the role."""
    roles = json.dumps([header.role for header in headers], ensure_ascii=False)
    for token in dict.fromkeys(header.token for header in headers):
        names = "|".join(dict.fromkeys(re.escape(header.role) for header in headers if header.token == token))
        opening, expression = re.escape(token), r"(\w+(?:\.\w+|\[[\"']\w+[\"']\])?)"
        chosen = rf"(class_in_front if \4 in {roles} else '')"
        source = re.sub(rf"({opening}([\"']))\s*([+~])\s*{expression}", rf"\1 \3 {chosen} \3 \4", source)
        source = re.sub(rf"({opening})(\{{\{{)(-?\s*){expression}", rf"\1{{{{ {chosen} }}}}\2 \4", source)
        source = re.sub(rf"([\"'])([^\"'\n]*?{opening})(?=(?:{names})\b)", r"\1\2\1 ~ class_in_front ~ \1", source)
        source = re.sub(rf"({opening})(?=(?:{names})\b)", r"\1{{ class_in_front }}", source)
    return "{%- set class_in_front = condition ~ ' ' if condition is defined and condition else '' %}\n" + source
