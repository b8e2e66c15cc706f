"""Answer prompts under chosen classes, as conversations that `ochat prepare` and `ochat eval` read.

    asked = read_prompts(Path("prompts.jsonl"), ["GPT4", "GPT3"], template, tokenizer, context=4096)
    write_answers(Path("answers.jsonl"), asked, model, tokenizer, template.eot, 256)

A record is {"prompt": "...", "system": "..."} or one of any format, whose last answer is dropped and asked for again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ochat.console import bar
from ochat.data.readers import parse_records
from ochat.errors import ConfigError
from ochat.infer.generate import complete
from ochat.model.transformer import Transformer
from ochat.text.conversation import Conversation, Message
from ochat.text.record_formats import RecordReader
from ochat.text.records.objects import Notes
from ochat.text.template import Template
from ochat.text.tokenizer import Tokenizer

PROMPTS_PER_BATCH = 16  # each holds a cache of keys and values as long as the batch's longest


@dataclass(frozen=True)
class Prompt:
    """A conversation without its answer, of the class that is to give it."""

    place: str  # file:line
    conversation: Conversation
    ids: list[int]  # ready for the answer


def read_prompts(
    path: Path, conditions: Sequence[str], template: Template, tokenizer: Tokenizer, context: int
) -> list[Prompt]:
    """Every prompt under every condition. Raises: DataError naming file and line of a record without a prompt;
    ConfigError naming one that fills the model's context."""
    plain = replace(template, default_condition="")  # which would replace an empty class
    found = []
    for record, conversation in parse_records(path, _unanswered):
        for asked in (replace(conversation, condition=condition) for condition in conditions):
            ids = plain.encode_prompt(asked, tokenizer)
            if len(ids) >= context:
                raise ConfigError(
                    f"{record.location}: the prompt has {len(ids)} tokens, but the model's context is {context}; "
                    "shorten it or leave it out"
                )
            found.append(Prompt(record.location, asked, ids))
    return found


def write_answers(
    path: Path, prompts: Sequence[Prompt], model: Transformer, tokenizer: Tokenizer, stop: str, most: int
) -> None:
    """Write the answered conversations as JSON Lines, in order, each as soon as its batch is done. Decoding is greedy,
    up to the token `stop` or `most` tokens.

    A record also has `source`, the prompt's file:line, and `is_cut`: the answer did not reach `stop`. Raises: OSError.
    """
    with path.open("w", encoding="utf-8", newline="") as file, bar("answers", len(prompts)) as advance:
        for first in range(0, len(prompts), PROMPTS_PER_BATCH):
            batch = prompts[first : first + PROMPTS_PER_BATCH]
            found = complete(model, [each.ids for each in batch], tokenizer, stop, most)
            for each, (text, is_cut) in zip(batch, found, strict=True):
                items = (*each.conversation.items, Message("assistant", text))
                record = replace(each.conversation, items=items).to_dict() | {"source": each.place, "is_cut": is_cut}
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
            file.flush()
            advance(len(batch))


def _unanswered(value: dict[str, Any]) -> Conversation:
    """A record's conversation up to its last question, without weights."""
    return RecordReader().read_prompt(value, Notes())
