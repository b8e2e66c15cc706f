"""Answer prompts under chosen classes, as conversations that `ochat prepare` and `ochat eval` read.

    asked = encode(read_conversations(Path("prompts.jsonl")), ["GPT4", "GPT3"], template, tokenizer, context=4096)
    write_answers(Path("answers.jsonl"), answer(asked, model, tokenizer, stop_ids, 256), len(asked))

A file is text with a prompt a line (.txt), or holds records: {"prompt": "...", "system": "..."}, or one of any format,
whose last answer is dropped and asked for again.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ochat.console import bar, stdin_lines
from ochat.data.readers import parse_records
from ochat.errors import ConfigError, DataError
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


def read_conversations(path: Path) -> Iterator[tuple[str, Conversation]]:
    """(file:line, conversation without its answer) of each record, or of each line of text that is not blank: in a
    .txt, and on stdin ("-"). Raises: DataError naming file and line of a record without a prompt."""
    if str(path) == "-" or path.suffix == ".txt":
        name, lines = ("stdin", stdin_lines()) if str(path) == "-" else (str(path), _text_lines(path))
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield f"{name}:{number}", Conversation((Message("user", line.strip()),))
        return
    for record, conversation in parse_records(path, _unanswered):
        yield record.location, conversation


def encode(
    conversations: Iterable[tuple[str, Conversation]],
    conditions: Sequence[str],
    template: Template,
    tokenizer: Tokenizer,
    context: int,
) -> list[Prompt]:
    """Every conversation, with the place that errors name, under every condition, whatever its own class. Raises:
    ConfigError for one that fills the model's context."""
    plain = replace(template, default_condition="")  # which would replace an empty class
    found = []
    for place, conversation in conversations:
        for asked in (replace(conversation, condition=condition) for condition in conditions):
            ids = plain.encode_prompt(asked, tokenizer)
            if len(ids) >= context:
                raise ConfigError(
                    f"{place}: the prompt has {len(ids)} tokens, but the model's context is {context}; shorten it or "
                    "leave it out"
                )
            found.append(Prompt(place, asked, ids))
    return found


def answer(
    prompts: Sequence[Prompt],
    model: Transformer,
    tokenizer: Tokenizer,
    stop_ids: Collection[int],
    most: int,
    *,
    seed: int = 0,
    against: Sequence[Prompt] = (),
    **settings: Any,
) -> Iterator[list[tuple[Prompt, str, bool]]]:
    """Batch by batch each prompt, its answer, and whether it was cut before it reached a stop id. An answer has
    at most `most` tokens. `against`: with guidance, each prompt under the class to keep away from. `settings`: of
    sampling and guidance, as infer.generate.steps; without them the likeliest token is taken."""
    for first in range(0, len(prompts), PROMPTS_PER_BATCH):
        batch, others = (part[first : first + PROMPTS_PER_BATCH] for part in (prompts, against))
        settings |= {"seed": seed + first, "against": [each.ids for each in others]}
        found = complete(model, [each.ids for each in batch], tokenizer, stop_ids, most, **settings)
        yield [(each, text, is_cut) for each, (text, is_cut) in zip(batch, found, strict=True)]


def write_answers(path: Path, batches: Iterable[list[tuple[Prompt, str, bool]]], num_prompts: int) -> int:
    """Write the answered conversations as JSON Lines, in order, each as soon as its batch is done; how many were cut.

    A record also has `source`, the prompt's file:line, and `is_cut`. Raises: OSError.
    """
    num_cut = 0
    with path.open("w", encoding="utf-8", newline="") as file, bar("answers", num_prompts) as advance:
        for batch in batches:
            for each, text, is_cut in batch:
                items = (*each.conversation.items, Message("assistant", text))
                record = replace(each.conversation, items=items).to_dict() | {"source": each.place, "is_cut": is_cut}
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
                num_cut += is_cut
            file.flush()
            advance(len(batch))
    return num_cut


def _text_lines(path: Path) -> list[str]:
    try:
        return path.read_text("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 ({error.reason}, byte {error.start}); convert it, as with iconv") from None


def _unanswered(value: dict[str, Any]) -> Conversation:
    """A record's conversation up to its last question, without weights."""
    return RecordReader().read_prompt(value, Notes())
