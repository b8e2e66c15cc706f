"""Templates: how a conversation becomes token ids, each with a role, so that each can have its weight.

    template = load("openchat_3.5"); input_ids, loss_weights = template.encode(conversation, tokenizer)

A template is a TOML file (built-in ones: templates/*.toml; openchat_v3.2.toml explains the keys). Its turns are plain
text, whose segments (the system text, a prefix, a message) are tokenised alone, as existing checkpoints were trained
(chat/plain.py), or what a chat template in Jinja renders, tokenised as servers do (chat/rendered.py).
"""

from __future__ import annotations

import difflib
import json
import shlex
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import msgspec
from msgspec import Meta

from ochat import overrides
from ochat.errors import ConfigError, DataError
from ochat.files import bounded_json
from ochat.text.attributes import AttributeFormat
from ochat.text.chat import dates, rendered
from ochat.text.chat.plain import CONDITIONED, PlainChat
from ochat.text.chat.rendered import RenderedChat
from ochat.text.conversation import Conversation, Message
from ochat.text.token_weights import Segment, Span, encode
from ochat.text.tokenizer import Tokenizer

FOLDER = Path(__file__).parent / "templates"
ALIASES = {"openchat_3.5": "openchat_v3.2_mistral"}
ConditionsMode = Literal["both", "assistant", "ignore"]
ReasoningMode = Literal["template", "last", "all", "drop"]
_OPTIONAL = {
    "suffix": "", "tokenize": "segments", "chat_template": "", "variables": {}, "date": "", "reasoning": "template",
    "attribute": AttributeFormat.each, "attribute_separator": AttributeFormat.separator,
}  # fmt: skip


@dataclass(frozen=True)
class Template:
    """How turns are written. `{role}` in `prefix` becomes "CONDITION ROLE" without surrounding blanks."""

    name: str
    context: Annotated[int, Meta(ge=1)]  # tokens a conversation may have
    eot: Annotated[str, Meta(min_length=1)]  # the special token after content
    # user, assistant: the text in `{role}`; system too, "" or absent: its text has no prefix; tool: chat/llama_tools.py
    roles: dict[str, str] = field(
        default_factory=lambda: {role: role for role in ("user", "assistant", "system")}, hash=False
    )
    prefix: str = ""
    suffix: str = ""  # text after the end of turn; weight 0
    special_tokens: tuple[str, ...] = ()  # those in `prefix`
    bos: str = "auto"  # auto: the tokenizer's, if it has one (see with_bos_of); "": none; else the token
    default_condition: str = ""  # at inference, where none is given
    condition_roles: Literal["both", "assistant", "none"] = "both"  # which prefixes carry the condition
    # segments: prefix and content are tokenised alone; rendered: the text that chat_template writes, as servers do
    tokenize: Literal["segments", "rendered"] = "segments"
    chat_template: str = ""  # Jinja source
    variables: dict[str, str] = field(default_factory=dict, hash=False)  # of chat_template
    date: str = ""  # that chat_template writes as today's
    # reasoning of the assistant: as chat_template writes it, of the last answer alone, of all, or left out
    reasoning: ReasoningMode = "template"
    # how a condition of several attributes is written: each with {name} and {value}, and what stands between two
    attribute: str = AttributeFormat.each
    attribute_separator: str = AttributeFormat.separator

    @classmethod
    def from_dict(cls, data: dict[str, Any], place: str = "template") -> Template:
        """A template from its TOML data (or from `to_dict`). Raises: ConfigError naming the key."""
        hints = get_type_hints(cls, include_extras=True)
        if unknown := [key for key in data if key not in hints]:
            raise ConfigError(f"{place}: unknown key {unknown[0]!r}; {_known(unknown[0], hints)}")
        needed = ["chat_template"] if data.get("tokenize") == "rendered" else ["prefix", "roles"]
        if missing := [key for key in ("name", "context", *needed, "eot") if key not in data]:
            raise ConfigError(f"{place}: {missing[0]} is missing")
        template = cls(**{key: overrides.build(hints[key], value, f"{place}: {key}") for key, value in data.items()})
        _check(template, place)
        return template

    def to_dict(self) -> dict[str, Any]:
        """Plain data that `from_dict` reads back as an equal template."""
        optional = _OPTIONAL | ({"prefix": "", "roles": self.roles} if self.tokenize == "rendered" else {})
        return {k: v for k, v in msgspec.to_builtins(self).items() if k not in optional or v != optional[k]}

    def carries_condition(self, role: str) -> bool:
        """Whether the prefix of this role holds the condition."""
        return role in {"both": ("user", "assistant"), "assistant": ("assistant",), "none": ()}[self.condition_roles]

    def role_prefix(self, role: str, condition: str = "") -> str:
        """The text before a message of this role, for example "GPT4 User:"; "" where `roles` has none for it."""
        name = self.roles.get(role)
        if not name:
            return ""
        return self.prefix.replace("{role}", f"{condition if self.carries_condition(role) else ''} {name}".strip())

    def prefix_texts(self, condition: str) -> list[str]:
        """The prefixes that can carry the condition, under this one, as Span.prefix counts them from 1: of each role of
        CONDITIONED, and the same behind another turn. [] where chat_template writes them."""
        if self.tokenize == "rendered":
            return []
        return [before + self.role_prefix(role, condition) for before in ("", self.suffix) for role in CONDITIONED]

    @property
    def attributes(self) -> AttributeFormat:
        """How a condition of several attributes is written."""
        return AttributeFormat(self.attribute, self.attribute_separator)

    def bos_token(self, tokenizer: Tokenizer) -> str | None:
        """The token that opens every conversation, if any."""
        return tokenizer.bos if self.bos == "auto" else self.bos or None

    def check(self, tokenizer: Tokenizer) -> None:
        """Raises: ConfigError naming the template's special tokens that the tokenizer lacks."""
        bos = () if self.bos in ("auto", "") else (self.bos,)
        before, *special_and_after = tokenizer.split_at_specials(self.eot)
        if not before and special_and_after[1:] and special_and_after[1:] != [""]:
            _refuse_text_in_eot(f"template {self.name}", *special_and_after[:2])
        tokens = dict.fromkeys((self.eot, *self.special_tokens, *bos))
        if missing := [token for token in tokens if token not in tokenizer.special_tokens]:
            names = f"special token{'s' * (len(missing) > 1)} {', '.join(map(repr, missing))}"
            raise ConfigError(
                f"template {self.name}: the tokenizer has no {names}; make a base that has "
                f"{'them' if missing[1:] else 'it'}: ochat init-base --hf BASE OUT --add-token {shlex.join(missing)}"
            )

    def encode(self, conversation: Conversation, tokenizer: Tokenizer) -> tuple[list[int], list[float]]:
        """Ids and as many loss weights, unshifted, neither truncated nor trimmed.

        BOS, prefixes and system text weigh 0; a message's content and its end of turn weigh what the message does.
        Raises: ConfigError if the tokenizer lacks a special token of the template.
        """
        input_ids, spans = self.encode_spans(conversation, tokenizer)
        weights: list[float] = []
        for span in spans:
            weights += [span.own_weight] * (span.end - len(weights))
        return input_ids, weights

    def encode_spans(self, conversation: Conversation, tokenizer: Tokenizer) -> tuple[list[int], list[Span]]:
        """Ids and the spans that cover them in order. A message's content and its end of turn are one span."""
        return encode([self.segments(conversation, tokenizer)], tokenizer)[0]

    def segments(self, conversation: Conversation, tokenizer: Tokenizer) -> list[Segment]:
        """The conversation as segments in order, of which only the texts are left to tokenise.

        Raises: DataError for a conversation that the template cannot write.
        """
        self.check(tokenizer)
        conversation = self.prepared(conversation)
        if self.tokenize == "rendered":
            return self._rendered.segments(conversation, tokenizer, needs_reasoning=self.reasoning == "all")
        return self._plain(tokenizer).segments(conversation, tokenizer)

    def encode_prompt(self, conversation: Conversation, tokenizer: Tokenizer) -> list[int]:
        """Ids for inference: a final assistant message stays open (no end of turn), else an empty one is opened.

        The default condition is taken where the conversation has none; `replace(template, default_condition="")` asks
        for none. Raises: DataError for a conversation that the template cannot write.
        """
        self.check(tokenizer)
        conversation = replace(conversation, condition=conversation.condition or self.default_condition)
        if self.tokenize == "rendered":
            _refuse_other_classes(conversation, self.name)
        items = conversation.items
        if not items or items[-1].role != "assistant":
            items = (*items, Message("assistant", ""))
        *asked, begun = items
        if begun.reasoning or begun.tool_calls:
            raise DataError(
                f"items[{len(asked)}]: an answer that is to go on is text, without reasoning and tool calls"
            )
        conversation = self.prepared(replace(conversation, items=tuple(asked)))
        chat = self._rendered if self.tokenize == "rendered" else self._plain(tokenizer)
        return encode([chat.prompt_segments(conversation, begun, tokenizer)], tokenizer)[0][0]

    def render(self, conversation: Conversation) -> str:
        """The text that chat_template writes. Raises: DataError where it refuses."""
        return self._rendered.render(self.prepared(conversation))

    def served_source(self) -> str:
        """The chat template that an export of a rendered one has: it writes what training saw, whatever day it is."""
        return self._rendered.served_source(self.default_condition)

    def facts(self, tokenizer: Tokenizer) -> list[str]:
        """What chat_template writes of itself, in words. Raises: DataError where it refuses a plain question."""
        if self.tokenize != "rendered":
            return []
        found, system = [], self._rendered.default_system(tokenizer)
        if system:
            text = json.dumps(system, ensure_ascii=False)
            found.append(f"without a system text, the template {self.name} writes: {text}")
        if "strftime_now" in self.chat_template:
            found.append(f"it writes {dates.parse_date(self.date):%Y-%m-%d} as today's date (--date)")
        return found

    @property
    def _rendered(self) -> RenderedChat:
        variables = self.variables | ({"keep_reasoning": "all"} if self.reasoning == "all" else {})
        return rendered.compiled(self.chat_template, self.eot, self.date, tuple(variables.items()))

    def _plain(self, tokenizer: Tokenizer) -> PlainChat:
        return PlainChat(
            self.name, self.bos_token(tokenizer), self.eot, self.suffix, self.role_prefix, "tool" in self.roles,
            self.carries_condition,
        )  # fmt: skip

    def prepared(self, conversation: Conversation) -> Conversation:
        """The conversation with the class and the reasoning that are to be written. Raises: DataError for a turn of
        another class where chat_template writes one for all."""
        if self.tokenize == "rendered":
            _refuse_other_classes(conversation, self.name)
        condition = "" if self.condition_roles == "none" else conversation.condition
        items = self.with_thoughts_apart(conversation).items
        if self.reasoning in ("last", "drop"):
            kept = len(items) - 1 if self.reasoning == "last" else len(items)
            items = tuple(replace(m, reasoning="") if i < kept and m.reasoning else m for i, m in enumerate(items))
        is_same = items is conversation.items and condition == conversation.condition
        return conversation if is_same else replace(conversation, condition=condition, items=items)

    def with_thoughts_apart(self, conversation: Conversation) -> Conversation:
        """The conversation with `<think>` blocks in front of answers as reasoning, where chat_template does so."""
        is_rendered = self.tokenize == "rendered"
        return self._rendered.with_thoughts_apart(conversation) if is_rendered else conversation

    def without_lost_reasoning(self, conversation: Conversation) -> Conversation:
        """The conversation without the reasoning that is not written. Raises: DataError where chat_template breaks."""
        items = self.prepared(conversation).items
        if self.tokenize == "rendered":
            lost = self._rendered.lost_reasoning(replace(conversation, items=items))
            items = tuple(replace(m, reasoning="") if i in lost else m for i, m in enumerate(items))
        return replace(conversation, items=items)


def with_bos_of(template: Template, tokenizer: Tokenizer) -> Template:
    """The template as new data is prepared with it: without BOS where the tokenizer names one, but puts none in front
    by its own rules. Data that was prepared before keeps the BOS that it has."""
    is_named_only = tokenizer.bos is not None and not tokenizer.adds_bos
    return replace(template, bos="") if is_named_only and template.bos == "auto" and template.prefix else template


def load(name_or_path: str | Path) -> Template:
    """A built-in template by name, or a user's by the path of its .toml. Raises: ConfigError with the known names.

    A TOML's `chat_template` names a file of Jinja next to it.
    """
    text = str(name_or_path)
    name = ALIASES.get(text, text)
    path = FOLDER / f"{name}.toml" if name in names() else Path(text)
    if not path.is_file():
        hint = _known(text, sorted([*names(), *ALIASES, "base"]))
        raise ConfigError(f"template {text!r}: no such name or .toml file; {hint}")
    return _from_toml({"name": path.stem} | overrides.read_toml(path), path.parent, str(path))


def of_base(base: str | Path, tokenizer: Tokenizer, date: str, context: int | None) -> Template:
    """The chat template that the base brings along. `date`: what it writes as today's, as 2026-01-31.

    Raises: ConfigError.
    """
    folder = Path(base)
    if not folder.is_dir():
        raise ConfigError(
            f"--template base: {folder} is a tokenizer's file; give the base's folder, or another template"
        )
    from ochat.text.chat import base as base_chat  # which imports jinja2

    found = base_chat.read(folder, tokenizer, dates.parse_date(date))
    if context is None:
        path = folder / "config.json"
        config = bounded_json.read_object(path, ConfigError, "fetch it again") if path.exists() else {}
        text = config.get("text_config")  # of a multimodal model
        context = (text if isinstance(text, dict) else config).get("max_position_embeddings")
        if not isinstance(context, int):
            raise ConfigError(f"{folder}/config.json: no max_position_embeddings; give --context")
    template = Template(
        "base", context, found.eot, tokenize="rendered", chat_template=found.source, variables=found.variables,
        date=date, condition_roles="both" if found.takes_condition else "none",
    )  # fmt: skip
    _check(template, str(folder))
    return template


def _from_toml(data: dict[str, Any], folder: Any, place: str) -> Template:
    if isinstance(file := data.get("chat_template"), str) and "{" not in file:
        try:
            data = data | {"chat_template": folder.joinpath(file).read_text("utf-8")}
        except OSError as error:
            raise ConfigError(f"{place}: chat_template {file!r} cannot be read: {error.strerror}") from None
    return Template.from_dict(data, place)


def names() -> list[str]:
    """The built-in templates."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def with_conditions(template: Template, mode: ConditionsMode) -> Template:
    """The template with the condition in both prefixes, the assistant's alone, or ignored (no default either)."""
    if mode == "ignore":
        return replace(template, condition_roles="none", default_condition="")
    if mode == "assistant" and template.tokenize == "rendered" and template.condition_roles != "none":
        raise ConfigError(
            f"--conditions assistant: the template {template.name} writes the class for both roles, or none"
        )
    return template if template.condition_roles == "none" else replace(template, condition_roles=mode)


def with_reasoning(template: Template, mode: ReasoningMode) -> Template:
    """The template with the reasoning of assistant messages as it writes it, of the last alone, of all, or none."""
    return replace(template, reasoning=mode)


def with_default_condition(template: Template, condition: str, tokenizer: Tokenizer, option: str) -> Template:
    """The template with this condition where none is given; "": none. Raises: ConfigError, which starts with `option`,
    where no prefix carries it."""
    if condition and template.condition_roles == "none":
        raise ConfigError(f"{option}the template {template.name} has no class in its prefixes; leave it out")
    check_condition(condition, tokenizer, option)
    return replace(template, default_condition=condition)


def check_condition(condition: str, tokenizer: Tokenizer, option: str = "") -> None:
    """Raise ConfigError, which starts with `option`, if the class spells a special token."""
    if tokenizer.spells_special(condition):
        raise ConfigError(f"{option}the class {condition!r} spells a special token; no prefix can carry it")


def _refuse_other_classes(conversation: Conversation, name: str) -> None:
    for place, condition in conversation.conditions.items():
        if condition != conversation.condition:
            raise DataError(
                f"{place}: {condition!r}, and the template {name} writes one class for all turns, which is "
                f"{conversation.condition!r}; choose a template whose turns are plain text, such as openchat_3.6"
            )


def _known(word: str, known: Collection[str]) -> str:
    """What a wrong word may have meant."""
    close = difflib.get_close_matches(word, known, n=1)
    return (f"did you mean {close[0]!r}? " if close else "") + f"known: {', '.join(known)}"


def _refuse_text_in_eot(place: str, token: str, text: str) -> None:
    suffix = json.dumps(text, ensure_ascii=False)
    raise ConfigError(
        f"{place}: eot is one special token; the text behind it is the key suffix: eot = {json.dumps(token)}, "
        f"suffix = {suffix}"
    )


def _check(template: Template, place: str) -> None:
    """Raises: ConfigError for values that each have their type but make no template."""
    roles, token = template.roles, template.eot.rstrip()
    for name in ("{name}", "{value}"):
        if template.attribute.count(name) != 1:
            raise ConfigError(f"{place}: attribute must hold {name} exactly once; it is {template.attribute!r}")
    if token and token != template.eot:
        _refuse_text_in_eot(place, token, template.eot[len(token) :])
    if template.tokenize == "rendered":
        for key in ("prefix", "suffix"):
            if getattr(template, key):
                raise ConfigError(f"{place}: {key} does nothing, as chat_template writes {key}es; leave it out")
        try:
            rendered.compiled(template.chat_template, template.eot, template.date, tuple(template.variables.items()))
            dates.fixed(template.chat_template, template.date)
        except ConfigError as error:
            raise ConfigError(f"{place}: {error}") from None
        return
    if template.chat_template:
        raise ConfigError(f'{place}: chat_template needs tokenize = "rendered"')
    if not {"user", "assistant"} <= set(roles) <= {"user", "assistant", "system", "tool"}:
        raise ConfigError(
            f"{place}: roles needs user and assistant, and may have system and tool; it has {sorted(roles)}"
        )
    if blank := [role for role in roles if role != "system" and not roles[role].strip()]:
        raise ConfigError(f"{place}: roles.{blank[0]} must not be blank")
    if template.prefix.count("{role}") != 1:
        raise ConfigError(f"{place}: prefix must hold {{role}} exactly once; it is {template.prefix!r}")
    for token in template.special_tokens:
        if token not in template.prefix:
            raise ConfigError(f"{place}: special token {token!r} is not in prefix {template.prefix!r}")
