"""Answers to a prompt set under chosen classes, as conversations that `ochat prepare` and `ochat eval` read.

    asked = read(Path("prompts.jsonl"), ["GPT4", "GPT3"]);  list(answers(model, template, tokenizer, asked, 256))

A record is {"prompt": "...", "system": "..."} or a conversation, whose last answer is left out and asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ochat.errors import ConfigError, DataError
from ochat.evaluate.held_out import read_records
from ochat.infer.generate import generate
from ochat.model.transformer import Transformer
from ochat.text import record_formats
from ochat.text.conversation import (
    Conversation,
    Message,
    refuse_misspelt,
    text_field,
)
from ochat.text.template import Template
from ochat.text.tokenizer import Tokenizer

PROMPTS_PER_BATCH = 16  # each holds a cache of keys and values as long as the batch's longest


@dataclass(frozen=True)
class Asked:
    """A conversation that waits for its answer, under the class that is to give it."""

    place: str  # file:line
    conversation: Conversation


def read(path: Path, conditions: Sequence[str]) -> list[Asked]:
    """Every prompt under every condition. Raises: DataError naming file and line of a record without a prompt."""
    asked = []
    for record in read_records(path):
        value = record.value()
        try:
            conversation = _unanswered(value)
        except DataError as error:
            raise DataError(f"{record.place}: {error}") from None
        asked += [Asked(record.place, replace(conversation, condition=condition)) for condition in conditions]
    return asked


def encode(asked: Sequence[Asked], template: Template, tokenizer: Tokenizer, context: int) -> list[list[int]]:
    """The ids of each prompt, ready for its answer. Raises: ConfigError naming one that fills the model's context."""
    plain = replace(template, default_condition="")  # it would stand in for an empty one, which was asked for
    encoded = []
    for each in asked:
        encoded.append(plain.encode_prompt(each.conversation, tokenizer))
        if len(encoded[-1]) >= context:
            raise ConfigError(
                f"{each.place}: the prompt has {len(encoded[-1])} tokens, but the model's context is {context}; "
                "shorten it or leave it out"
            )
    return encoded


def answers(
    model: Transformer, asked: Sequence[Asked], prompts: Sequence[list[int]], stop: str, tokenizer: Tokenizer, most: int
) -> Iterator[dict[str, Any]]:
    """The records of the answered conversations, in order, each as soon as its batch is done: the likeliest token
    always, up to the token `stop` or `most` tokens.

    Beside the conversation a record has `source`, the prompt's file:line, and `is_cut`: it did not reach `stop`.
    """
    for first in range(0, len(asked), PROMPTS_PER_BATCH):
        batch = slice(first, first + PROMPTS_PER_BATCH)
        found = generate(model, prompts[batch], max_new_tokens=most, stop_ids=[tokenizer.special_tokens[stop]])
        for each, prompt, ids in zip(asked[batch], prompts[batch], found, strict=True):
            answer = Message("assistant", tokenizer.decode(ids))
            answered = replace(each.conversation, items=(*each.conversation.items, answer))
            is_cut = len(ids) == min(most, model.config.max_position_embeddings - len(prompt))
            yield answered.to_dict() | {"source": each.place, "is_cut": is_cut}


def _unanswered(value: dict[str, Any]) -> Conversation:
    """A record's conversation up to its last question, without weights."""
    if "prompt" in value:
        refuse_misspelt(value, ("prompt", "system"), "record")
        text, system = text_field(value, "prompt", "prompt"), text_field(value, "system", "system")
        return Conversation((Message("user", text),), system=system)
    conversation = record_formats.convert(value)
    items = tuple(replace(item, weight=None) for item in conversation.items)
    items = items[:-1] if items[-1].role == "assistant" else items
    if not items:
        raise DataError("items: an answer without a question; a prompt needs a user message")
    return replace(conversation, items=items, reward=None)
