"""Reads records of other formats as conversations: OpenAI `messages`, ShareGPT `conversations`, Alpaca instructions.

    convert({"instruction": "Say hello", "output": "Hello!"}, default_condition="GPT4")

A record's own `condition`, `reward` and per-message `weight` are kept; what a conversation cannot express is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ochat.errors import ConfigError, DataError
from ochat.text.conversation import (
    Conversation,
    describe,
    number_field,
    refuse_misspelt,
    require_list,
    require_object,
    text_field,
)

_ASSISTANTS = ("gpt", "assistant", "chatgpt", "bing", "bard", "bot", "model")
_SYNONYMS = {"human": "user", "user": "user", "prompter": "user"} | dict.fromkeys(_ASSISTANTS, "assistant")
_SYNONYMS["system"] = "system"


def convert(record: Any, format: str = "auto", default_condition: str = "") -> Conversation:
    """The conversation in a record of `format`: openchat, messages, sharegpt, alpaca, or auto (known by its keys).

    `default_condition` is for records that have no condition, or an empty one.
    Raises: DataError naming the field; ConfigError for an unknown format.
    """
    require_object(record, "record")
    if format not in ("auto", *FORMATS):
        raise ConfigError(f"format {format!r}: unknown; known: auto, {', '.join(FORMATS)}")
    refuse_misspelt(record, ("condition", "reward", "system"), "record")
    kept = {key: record[key] for key in ("condition", "reward") if key in record}
    plain = kept | FORMATS[_detect(record) if format == "auto" else format](record)
    if plain.get("condition", "") == "":
        plain["condition"] = default_condition
    return Conversation.from_dict(plain)


def _detect(record: dict[str, Any]) -> str:
    keys = {"items": "openchat", "messages": "messages", "conversations": "sharegpt", "instruction": "alpaca"}
    found = [key for key in keys if key in record]
    if len(found) == 1:
        return keys[found[0]]
    if not found:
        raise DataError(f"record: none of the keys {', '.join(keys)} that tell the format; it has {_keys(record)}")
    raise DataError(f"record: the keys {', '.join(found)} belong to different formats; say which with --format")


def _keys(record: dict[str, Any]) -> str:
    shown = ", ".join(repr(key[:40]) for key in list(record)[:8])
    return shown + (", ..." if len(record) > 8 else "") if record else "no keys"


def _from_turns(record: dict[str, Any], key: str, role_key: str, text_key: str) -> dict[str, Any]:
    turns = require_list(record, key)
    system, items = text_field(record, "system", "system"), []
    for i, turn in enumerate(turns):
        place = f"{key}[{i}]"
        require_object(turn, place)
        refuse_misspelt(turn, ("weight",), place)
        item = {"role": _role(turn, role_key, place), "content": _content(turn, text_key, place)}
        if item["role"] == "system":
            if i:
                raise DataError(f"{place}.{role_key}: a system message after the first message cannot be expressed")
            if system:
                raise DataError(f"{place}.{role_key}: the record has a `system` field as well; keep one of the two")
            system = item["content"]
        else:
            items.append(item | {"weight": number_field(turn, "weight", f"{place}.weight")})
    if not items:
        raise DataError(f"{key}: only a system message; a conversation needs a user or assistant message")
    return {"items": items, "system": system}


def _role(turn: dict[str, Any], key: str, place: str) -> str:
    name = text_field(turn, key, f"{place}.{key}", required=True)
    role = _SYNONYMS.get(name.lower())
    if role is None:
        raise DataError(f"{place}.{key}: role {name[:40]!r} cannot be expressed; known: {', '.join(_SYNONYMS)}")
    for extra in ("tool_calls", "function_call"):
        if turn.get(extra):
            raise DataError(
                f"{place}.{extra}: tool calls cannot be expressed; write them as text or leave the record out"
            )
    return role


def _content(turn: dict[str, Any], key: str, place: str) -> str:
    """Text, or a list of text parts joined."""
    if not isinstance(turn.get(key), list):
        return text_field(turn, key, f"{place}.{key}", required=True)
    texts = []
    for i, part in enumerate(turn[key]):
        part_place = f"{place}.{key}[{i}]"
        require_object(part, part_place)
        if part.get("type", "text") != "text":
            raise DataError(f"{part_place}.type: only text parts can be expressed, got {describe(part['type'])}")
        texts.append(text_field(part, "text", f"{part_place}.text", required=True))
    return "".join(texts)


def _from_alpaca(record: dict[str, Any]) -> dict[str, Any]:
    instruction = text_field(record, "instruction", "instruction", required=True)
    extra = text_field(record, "input", "input")
    question = {"role": "user", "content": f"{instruction}\n\n{extra}" if extra else instruction}
    answer = {"role": "assistant", "content": text_field(record, "output", "output", required=True)}
    items = [question, answer | {"weight": number_field(record, "weight", "weight")}]
    return {"items": items, "system": text_field(record, "system", "system")}


FORMATS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "openchat": lambda record: record,
    "messages": lambda record: _from_turns(record, "messages", "role", "content"),
    "sharegpt": lambda record: _from_turns(record, "conversations", "from", "value"),
    "alpaca": _from_alpaca,
}
