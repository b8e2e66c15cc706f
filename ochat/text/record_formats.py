"""Read records as conversations, in whatever format they come: messages under several names, or a question and answer.

    convert({"instruction": "Say hello", "output": "Hello!"})          # one conversation
    RecordReader(default_condition="GPT4").read(record, Notes())       # several where a map names several answers

The law: a key of a record is read, mapped, ignored by name, or refused by name (records/keys.py); all others are
metadata, which `Notes` counts.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any, Literal

from ochat.errors import ConfigError, DataError
from ochat.text.attributes import AttributeFormat
from ochat.text.conversation import Conversation, Message, default_weight
from ochat.text.fields import check_object, nearest, shorten
from ochat.text.records.answers import answered
from ochat.text.records.calls import read_tools
from ochat.text.records.keys import RECORD
from ochat.text.records.map import ClassRule, RecordMap
from ochat.text.records.messages import MessageReader, Turn
from ochat.text.records.objects import Fields, Notes, read_fields
from ochat.text.records.system import split_system
from ochat.text.records.turns import QUESTION, TurnReader
from ochat.text.records.weights import weighted
from ochat.text.reward_text import RewardText

FROM_REWARD = "--condition-from reward"
EmptyAnswers = Literal["refuse", "keep"]
NO_TEMPLATE = AttributeFormat()  # as templates have it that say nothing
FORMATS = {"openchat": "items", "messages": "messages", "sharegpt": "conversations", "alpaca": "instruction"}


def convert(
    record: Any, format: str = "auto", default_condition: str = "", attributes: AttributeFormat = NO_TEMPLATE
) -> Conversation:
    """The conversation in a record, as RecordReader reads it; empty answers are kept."""
    return _reader(format, default_condition, attributes).read(record, Notes())[0]


@lru_cache(maxsize=64)
def _reader(format: str, default_condition: str, attributes: AttributeFormat) -> RecordReader:
    return RecordReader(format, default_condition, empty_answers="keep", attributes=attributes)


@dataclass(frozen=True)
class RecordReader:
    """How records are read. Pickles.

    `format`: auto, or one of FORMATS: its key is read where several are there. `default_condition` is for records that
    have no condition, or an empty one. `ignore`: keys to leave out, as Level.ignores reads them. `attributes`: how a
    condition of several is written. `reward_text`: how each record's reward becomes its class, in place of all that
    says one.
    """

    format: str = "auto"
    default_condition: str = ""
    map: RecordMap = field(default_factory=RecordMap)
    ignore: frozenset[str] = frozenset()
    empty_answers: EmptyAnswers = "refuse"
    attributes: AttributeFormat = NO_TEMPLATE
    reward_text: RewardText | None = None

    def __post_init__(self) -> None:
        if self.format not in ("auto", *FORMATS):
            raise ConfigError(f"format {self.format!r}: unknown; known: auto, {', '.join(FORMATS)}")

    def read(self, record: Any, notes: Notes, default_condition: str = "") -> list[Conversation]:
        """The conversations of a record: one, or one for each answer that the map names.

        `default_condition`: of the record's file. Raises: DataError naming the field.
        """
        try:
            reader = self._turn_reader(record, notes)
            fields, condition = reader.fields, self._class(reader, default_condition)
            if not self.map.answers:
                return [self._conversation(reader.turns(), fields, condition)]
            answered_by = answered(reader, self.map.answers)
            names = {column: name or condition for column, name in self.map.answers.items()}
            if default_condition and (others := set(names.values()) - {default_condition}):
                raise DataError(_two_classes(min(others), default_condition))
            if fields.condition(self.attributes) and names != dict.fromkeys(names, condition):
                raise fields.refusal("condition", "the map gives each answer its class")
            return [self._conversation(turns, fields, names[column]) for column, turns in answered_by.items()]
        except RecursionError:
            raise DataError("record: objects and lists are nested too deep") from None

    def read_prompt(self, record: Any, notes: Notes) -> Conversation:
        """The conversation up to its last question, without weights; an answer is left out. Raises: DataError."""
        try:
            reader = self._turn_reader(record, notes)
            turns = [turn._replace(message=replace(turn.message, weight=None, spans=())) for turn in reader.prompt()]
            system, items = split_system(turns, reader.fields)
            return Conversation(items, self._class(reader, ""), system, tools=_tools(reader.fields))
        except RecursionError:
            raise DataError("record: objects and lists are nested too deep") from None

    @cached_property
    def _ignored(self) -> frozenset[str]:
        """Keys to leave out, those that a fixed format does not read among them."""
        others = {"auto": (), "alpaca": ("messages",)}.get(self.format, ("messages", *QUESTION, "answer"))
        names = {name for meaning in others for name in RECORD.names(meaning)} - {FORMATS.get(self.format)}
        return frozenset({*self.ignore, *self.map.ignore, *names})

    @cached_property
    def _rule(self) -> ClassRule | None:
        return self.map.class_rule

    @cached_property
    def _columns(self) -> dict[str, str]:
        return self.map.columns()

    @cached_property
    def _messages(self) -> MessageReader:
        return MessageReader(self.map.message_columns(), self.map.roles, self.attributes)

    @cached_property
    def _taken(self) -> frozenset[str]:
        """Columns of classes and answers, unless they are read as something else too, as a reward is."""
        read = {name for name, meaning in RECORD.meanings.items() if meaning not in ("condition", "label")}
        classes = {self._rule.column} if self._rule else set()
        return frozenset({*self.map.answers} | (classes - read - self._columns.keys()))

    def _turn_reader(self, record: Any, notes: Notes) -> TurnReader:
        """The record, and its fields but for classes and answers that the map reads."""
        is_list = isinstance(record, list) and record and isinstance(record[0], dict)
        record = {"messages": record} if is_list else check_object(record, "record")
        body = None if "input" in self._ignored else record.get("input")
        if isinstance(body, dict) and not body.keys().isdisjoint(RECORD.names("messages")):  # OpenAI's preferences
            if twice := body.keys() & record.keys():
                raise DataError(f"input.{shorten(min(twice))}: the record has this key as well; take one of them out")
            record = {key: value for key, value in record.items() if key != "input"} | body
        rest = {key: value for key, value in record.items() if key not in self._taken} if self._taken else record
        notes.ignore = self._ignored
        fields = read_fields(rest, RECORD, notes, self._columns)
        needed = FORMATS.get(self.format, "")
        if needed and not self._columns and needed not in fields.names.values():
            raise DataError(f"{needed}: missing or null; --format {self.format} reads it")
        fields.check_label()
        return TurnReader(record, fields, self._messages)

    def _class(self, reader: TurnReader, file_class: str) -> str:
        """What the map or the record says, else the class of the file, else the default; or the reward's."""
        if self.reward_text:
            return _class_of_reward(reader.fields, self.reward_text, file_class)
        record, condition, rule = reader.record, reader.fields.condition(self.attributes) or "", self._rule
        if rule:
            if condition:
                raise reader.fields.refusal("condition", f"the map reads the class from {rule.column!r}")
            value = record.get(rule.column)
            if value is not None:
                condition = rule.of(value)
            elif not (file_class or self.default_condition):
                close = nearest(rule.column, record)
                raise DataError(
                    f"{rule.column}: missing{close}; the map reads the class from it; or --default-condition"
                )
        if file_class and condition not in ("", file_class):
            raise DataError(_two_classes(condition, file_class))
        return condition or file_class or self.default_condition

    def _conversation(self, turns: list[Turn], fields: Fields, condition: str) -> Conversation:
        turns = weighted(turns, fields)
        system, items = split_system(turns, fields)
        if self.reward_text and (own := [i for i, message in enumerate(items) if message.condition is not None]):
            raise DataError(f"items[{own[0]}].condition: {FROM_REWARD} gives all turns the class of the reward")
        if self.empty_answers == "refuse":
            for turn in turns:
                if is_empty_answer(turn.message):
                    raise DataError(f"{turn.place}: an empty answer, which teaches nothing; or --empty-answers keep")
        return Conversation(items, condition, system, fields.number("reward"), _tools(fields))


def _class_of_reward(fields: Fields, text: RewardText, file_class: str) -> str:
    """Raises: DataError for a record without a reward, and for one that has a class as well."""
    if file_class or fields.values.get("condition"):
        raise DataError(f"condition: {FROM_REWARD} gives the record the class of its reward; take one of the two out")
    reward = fields.number("reward")
    if reward is None:
        raise DataError(f"reward: missing or null, and {FROM_REWARD} needs one in every record")
    return text.of(reward)


def is_empty_answer(message: Message) -> bool:
    """Whether an assistant message that is trained says nothing."""
    trained = default_weight(message.role) if message.weight is None else message.weight
    is_answer = message.role == "assistant" and trained and not message.tool_calls
    return bool(is_answer and _is_blank(message.content) and _is_blank(message.reasoning))


def _is_blank(text: str) -> bool:
    """Whether nothing of it can be seen: blanks, and characters that only format, such as U+200B."""
    return not text[:1].isalnum() and all(char.isspace() or unicodedata.category(char) in ("Cc", "Cf") for char in text)


def _tools(fields: Fields) -> tuple[dict[str, Any], ...]:
    return read_tools(fields.values["tools"], fields.names["tools"]) if "tools" in fields else ()


def _two_classes(one: str, of_file: str) -> str:
    return f"condition: {one!r}, but the input says that the file is {of_file!r}"
