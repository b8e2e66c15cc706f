"""Templates: how a conversation becomes token ids, each with a role, so that each can have its weight.

    template = load("openchat_3.5"); input_ids, loss_weights = template.encode(conversation, tokenizer)

A template is a TOML file (built-in ones: templates/*.toml; openchat_v3.2.toml explains the keys). Every segment - the
system text, a prefix, a message - is tokenised alone and the ids are joined: existing checkpoints were trained on that.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_type_hints

import msgspec
import numpy as np
from msgspec import Meta

from ochat import overrides
from ochat.errors import ConfigError
from ochat.text.conversation import Conversation, Message, default_weight
from ochat.text.tokenizer import Tokenizer

FOLDER = Path(__file__).parent / "templates"
ALIASES = {"openchat_3.5": "openchat_v3.2_mistral"}
ConditionsMode = Literal["both", "assistant", "ignore"]


class Span(NamedTuple):
    """A run of tokens: exclusive end, role (bos, system, prefix, user, assistant), the message's own weight."""

    end: int
    role: str
    weight: float | None  # None: the record gives none

    @property
    def own_weight(self) -> float:
        """The weight that the record gives, else the role's default."""
        return default_weight(self.role) if self.weight is None else self.weight

    @property
    def is_supervised(self) -> bool:
        """Whether its own weight is not 0 as a data set holds it, in float32."""
        return bool(np.float32(self.own_weight))


class Segment(NamedTuple):
    """A span before its text is tokenised: the ids of `text`, encoded alone, then `ids`."""

    role: str
    weight: float | None
    text: str
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Template:
    """How turns are written. `{role}` in `prefix` becomes "CONDITION ROLE" without surrounding blanks."""

    name: str
    context: Annotated[int, Meta(ge=1)]  # tokens a conversation may have
    roles: dict[str, str]  # user, assistant: the text in `{role}`; system too, "" or absent: its text has no prefix
    prefix: str
    eot: Annotated[str, Meta(min_length=1)]  # the special token after content
    special_tokens: tuple[str, ...] = ()  # those in `prefix`
    bos: str = "auto"  # auto: the tokenizer's, if it has one; "": none; else the token
    default_condition: str = ""  # at inference, where none is given
    condition_roles: Literal["both", "assistant", "none"] = "both"  # which prefixes carry the condition

    @classmethod
    def from_dict(cls, data: dict[str, Any], place: str = "template") -> Template:
        """A template from its TOML data (or from `to_dict`). Raises: ConfigError naming the key."""
        hints = get_type_hints(cls, include_extras=True)
        if unknown := [key for key in data if key not in hints]:
            raise ConfigError(f"{place}: unknown key {unknown[0]!r}; {_known(unknown[0], hints)}")
        if missing := [key for key in ("name", "context", "roles", "prefix", "eot") if key not in data]:
            raise ConfigError(f"{place}: {missing[0]} is missing")
        template = cls(**{key: overrides.build(hints[key], value, f"{place}: {key}") for key, value in data.items()})
        _check(template, place)
        return template

    def to_dict(self) -> dict[str, Any]:
        """Plain data that `from_dict` reads back as an equal template."""
        return msgspec.to_builtins(self)

    def carries_condition(self, role: str) -> bool:
        """Whether the prefix of this role holds the condition."""
        return role in {"both": ("user", "assistant"), "assistant": ("assistant",), "none": ()}[self.condition_roles]

    def role_prefix(self, role: str, condition: str) -> str:
        """The text before a message of this role, for example "GPT4 User:"."""
        named = f"{condition} {self.roles[role]}" if self.carries_condition(role) else self.roles[role]
        return self.prefix.replace("{role}", named.strip())

    def system_prefix(self) -> str:
        """The text before the system text; "" where it is bare."""
        return self.role_prefix("system", "") if self.roles.get("system") else ""

    def bos_token(self, tokenizer: Tokenizer) -> str | None:
        """The token that opens every conversation, if any."""
        return tokenizer.bos if self.bos == "auto" else self.bos or None

    def check(self, tokenizer: Tokenizer) -> None:
        """Raises: ConfigError if the tokenizer lacks one of the template's special tokens."""
        bos = () if self.bos in ("auto", "") else (self.bos,)
        for token in (self.eot, *self.special_tokens, *bos):
            if token not in tokenizer.special_tokens:
                raise ConfigError(
                    f"template {self.name}: the tokenizer has no special token {token!r}; "
                    f"make a base that has it: ochat init-base --hf BASE OUT --add-token {token!r}"
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
        segments = self.segments(conversation, tokenizer)
        return join(segments, {segment.text: tokenizer.encode(segment.text) for segment in segments})

    def segments(self, conversation: Conversation, tokenizer: Tokenizer) -> list[Segment]:
        """The conversation as segments in order, of which only the texts are left to tokenise."""
        self.check(tokenizer)
        bos, eot = self.bos_token(tokenizer), (tokenizer.special_tokens[self.eot],)
        segments = [] if bos is None else [Segment("bos", None, "", (tokenizer.special_tokens[bos],))]
        if conversation.system:
            segments.append(Segment("prefix", None, "", tokenizer.prefix_ids(self.system_prefix())))
            segments.append(Segment("system", None, conversation.system, eot))
        for message in conversation.items:
            prefix = self.role_prefix(message.role, conversation.condition)
            segments.append(Segment("prefix", None, "", tokenizer.prefix_ids(prefix)))
            segments.append(Segment(message.role, message.weight, message.content, eot))
        return segments

    def encode_prompt(self, conversation: Conversation, tokenizer: Tokenizer) -> list[int]:
        """Ids for inference: a final assistant message stays open (no end of turn), else an empty one is opened.

        The default condition is taken where the conversation has none; `replace(template, default_condition="")` asks
        for none.
        """
        self.check(tokenizer)
        conversation = replace(conversation, condition=conversation.condition or self.default_condition)
        items = conversation.items
        if not items or items[-1].role != "assistant":
            items = (*items, Message("assistant", ""))
        ids, _ = self.encode_spans(replace(conversation, items=items[:-1]), tokenizer)
        ids += tokenizer.encode_with_specials(self.role_prefix("assistant", conversation.condition))
        return ids + tokenizer.encode(items[-1].content)


def join(segments: Sequence[Segment], encoded: Mapping[str, Sequence[int]]) -> tuple[list[int], list[Span]]:
    """Ids and spans of `segments`; `encoded`: the ids of each text. A segment without tokens leaves no span."""
    ids: list[int] = []
    spans: list[Span] = []
    for role, weight, text, tail in segments:
        own = [*(encoded[text] if text else ()), *tail]
        if own:
            ids += own
            spans.append(Span(len(ids), role, weight))
    return ids, spans


def load(name_or_path: str | Path) -> Template:
    """A built-in template by name, or a user's by the path of its .toml. Raises: ConfigError with the known names."""
    text = str(name_or_path)
    name = ALIASES.get(text, text)
    path = FOLDER / f"{name}.toml" if name in names() else Path(text)
    if not path.is_file():
        hint = _known(text, sorted([*names(), *ALIASES]))
        raise ConfigError(f"template {text!r}: no such name or .toml file; {hint}")
    return Template.from_dict({"name": path.stem} | overrides.read_toml(path), str(path))


def names() -> list[str]:
    """The built-in templates."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def with_conditions(template: Template, mode: ConditionsMode) -> Template:
    """The template with the condition in both prefixes, the assistant's alone, or ignored (no default either)."""
    if mode == "ignore":
        return replace(template, condition_roles="none", default_condition="")
    return template if template.condition_roles == "none" else replace(template, condition_roles=mode)


def with_default_condition(template: Template, condition: str, tokenizer: Tokenizer) -> Template:
    """The template with this condition where none is given; "": none. Raises: ConfigError where no prefix carries
    it."""
    if condition and template.condition_roles == "none":
        raise ConfigError(f"--condition: the template {template.name} has none in its prefixes; leave it out")
    check_condition(condition, tokenizer, "--condition: ")
    return replace(template, default_condition=condition)


def check_condition(condition: str, tokenizer: Tokenizer, option: str = "") -> None:
    """Raise ConfigError, which starts with `option`, if the class spells a special token."""
    if len(tokenizer.split_at_specials(condition)) > 1:
        raise ConfigError(f"{option}the class {condition!r} spells a special token; no prefix can carry it")


def _known(word: str, known: Collection[str]) -> str:
    """What a wrong word may have meant."""
    close = difflib.get_close_matches(word, known, n=1)
    return (f"did you mean {close[0]!r}? " if close else "") + f"known: {', '.join(known)}"


def _check(template: Template, place: str) -> None:
    """Raises: ConfigError for values that each have their type but make no template."""
    roles = template.roles
    if not {"user", "assistant"} <= set(roles) <= {"user", "assistant", "system"}:
        raise ConfigError(f"{place}: roles needs user and assistant, and may have system; it has {sorted(roles)}")
    if not (roles["user"].strip() and roles["assistant"].strip()):
        raise ConfigError(f"{place}: roles.user and roles.assistant must not be blank")
    if template.prefix.count("{role}") != 1:
        raise ConfigError(f"{place}: prefix must hold {{role}} exactly once; it is {template.prefix!r}")
    for token in template.special_tokens:
        if token not in template.prefix:
            raise ConfigError(f"{place}: special token {token!r} is not in prefix {template.prefix!r}")
