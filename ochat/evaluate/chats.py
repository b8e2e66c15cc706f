"""The conversations of a data set as text, and how many of their messages an export without a boundary changes.

chats = read_chats(Path("data/train"), template, tokenizer, 1000)
count_changed(Path("exported/a"), template, tokenizer, chats)        # (28, 1000)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from ochat.data.dataset import Paths, TokenDataset, folder_list, shown_paths
from ochat.data.readers import parse_records
from ochat.errors import DataError
from ochat.evaluate.held_out import is_prepared
from ochat.export.serving import Served
from ochat.text import record_formats
from ochat.text.conversation import Conversation, Message
from ochat.text.template import Template
from ochat.text.tokenizer import Tokenizer


def read_chats(data: Paths, template: Template, tokenizer: Tokenizer, most: int) -> list[Conversation]:
    """Up to `most` conversations: of a prepared set spread over all of it, of files the first.

    Of a prepared set, those whose text gives their ids again: not those that were cut, nor those with tools where the
    template writes them. Those in which a message spells a special token are left out, too: a server refuses it, or
    takes it for the token. Raises: DataError where none is left, and naming file and line of a record that is none.
    """
    found = []
    for chat in _of_set(data, template, tokenizer, most) if is_prepared(data) else _of_files(data):
        texts = (chat.system, *(message.content for message in chat.items))
        is_of_one_class = set(chat.conditions.values()) == {chat.condition}  # else no server can write it
        if is_of_one_class and not any(map(tokenizer.spells_special, texts)):
            found.append(chat)
        if len(found) == most:
            break
    if not found:
        raise DataError(f"{shown_paths(data)}: no conversation there can be sent to a server; give other data")
    return found


def _of_files(data: Paths) -> Iterator[Conversation]:
    for path in folder_list(data):
        yield from (chat for _, chat in parse_records(path, record_formats.convert))


def _of_set(data: Paths, template: Template, tokenizer: Tokenizer, most: int) -> Iterator[Conversation]:
    dataset = TokenDataset(data)
    for index in np.unique(np.linspace(0, len(dataset) - 1, min(most, len(dataset))).astype(int)).tolist():
        example, begin, system, items = dataset[index], 0, "", []
        for span in dataset.spans(index):
            text = tokenizer.decode(example.input_ids[begin : span.end].tolist())
            begin = span.end
            if span.role == "system":
                system = text
            elif span.role in ("user", "assistant"):
                items.append(Message(span.role, text))
        chat = Conversation(tuple(items), example.condition, system)
        try:
            if template.encode(chat, tokenizer)[0] == example.input_ids.tolist():
                yield chat
        except DataError:  # a chat template refuses what is left of a conversation with tools
            continue


def count_changed(
    folder: Path, template: Template, tokenizer: Tokenizer, chats: Iterable[Conversation]
) -> tuple[int, int]:
    """Of the messages, how many get other ids from the exported folder than in training, and how many there are."""
    served, changed, count = Served(folder), 0, 0
    for chat in chats:
        for one in _each_alone(chat):
            try:
                trained, text = template.encode(one, tokenizer)[0], served.text(one)
            except DataError:  # a chat template refuses an answer without a question
                continue
            changed += served.ids(text) != trained
            count += 1
    return changed, count


def _each_alone(chat: Conversation) -> Sequence[Conversation]:
    """The system text and each message as a conversation of its own."""
    alone = [replace(chat, items=(message,), system="", tools=()) for message in chat.items]
    return [*([replace(chat, items=(), tools=())] if chat.system else []), *alone]
