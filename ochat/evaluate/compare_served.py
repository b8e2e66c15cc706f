"""Compare what a server makes of conversations with what training made of them: prompt ids, greedy answers,
log-probabilities, under every class.

    compared = compare(exported, chats, (None, "GPT4", "GPT3"), ask)       # exported = Exported.open(folder, "cpu")
    compared.rows[0].ids_equal, compared.difference                        # "" where all is equal
"""

from __future__ import annotations

import os.path
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ochat.errors import CheckpointError, DataError
from ochat.evaluate.server_client import Messages, Reply
from ochat.export import serving
from ochat.export.open_model import open_model, stop_ids
from ochat.infer.generate import generate
from ochat.model.config import ModelConfig
from ochat.model.transformer import Transformer, pack_ids
from ochat.text import tokenizer as tokenizers
from ochat.text.chat.variables import chat_variables
from ochat.text.conversation import Conversation, Message
from ochat.text.openchat_json import load_template
from ochat.text.template import Template
from ochat.text.tokenizer import Tokenizer

MOST = 32  # tokens of an answer
# differences of log-probabilities that rounding explains. In float32 they are 1e-5, with a half-precision cache
# (llama.cpp's own default) 3e-3; in bfloat16 some 0.1. Another rotation, class or tokenizer gives more than 1.
TOLERANCES = {"float32": 0.02, "bfloat16": 0.3}
Asked = tuple[Messages, str | None]  # a conversation and its class, None: the default
CHATS = (
    (("", "Why is the sky blue?"),),
    (("", ":) isn't 1234567 a number?"),),
    (("", "\n  def f(x):\n\treturn x  # é 漢字"),),
    (("", "\"Quoted\" (and more) - what's that?"),),
    (("Be brief.", "Name three rivers."), "The Rhine, the Elbe, the Oder.", "And two lakes?"),
    (("", "1+1"), "2.", "2+2"),
    (("You are a poet.", "A line on the sea, please"),),
    (("", "Why?"),),
)  # fmt: skip


@dataclass(frozen=True)
class Exported:
    """An exported model, as this project reads it."""

    folder: Path
    template: Template
    tokenizer: Tokenizer
    model: Transformer
    config: ModelConfig
    served: serving.Served
    stop_ids: frozenset[int]

    @classmethod
    def open(cls, folder: Path, device: str) -> Exported:
        """Raises: ConfigError and CheckpointError for a folder that is no export."""
        if not (folder / serving.GENERATION).is_file():
            raise CheckpointError(f"{folder}: not what `ochat export` writes; give the folder of an export")
        tokenizer, config = tokenizers.load(folder), ModelConfig.load(folder)
        template = load_template(folder, None, tokenizer)
        return cls(
            folder,
            template,
            tokenizer,
            open_model(folder, dtype=config.dtype, device=device),
            config,
            serving.Served(folder),
            frozenset(stop_ids(folder, template, tokenizer)),
        )

    def prompt(self, chat: Conversation, condition: str | None) -> list[int]:
        """Training's ids of the conversation under a class, up to where the assistant answers."""
        template = self.template if condition is None else replace(self.template, default_condition=condition)
        return template.encode_prompt(chat, self.tokenizer)

    def merged(self, chat: Conversation, condition: str | None) -> list[int]:
        """The ids of an export without a boundary, as of every GGUF file: prefix and message may merge."""
        name = self.template.default_condition if condition is None else condition
        text = self.served.text(replace(chat, condition=name), add_generation_prompt=True)
        return self.served.ids(serving.without_boundary(text))


@dataclass(frozen=True)
class Row:
    """One class's prompts. None: the server does not tell."""

    condition: str | None
    count: int
    ids_equal: int | None
    greedy_equal: int
    ties: int  # of those: answers that part where two tokens are equally likely but for rounding
    merged: int  # of ids_equal: those of an export without a boundary, whose prefix and message merged
    logprob_difference: float | None  # the largest


@dataclass(frozen=True)
class Compared:
    """A row for each class, and the first difference that should not be, in words."""

    rows: list[Row]
    difference: str
    classes_differ: bool  # whether the server's prompts or answers depend on the class; False where there is one


def own_chats() -> list[Conversation]:
    """A few conversations for exports whose data is not at hand."""
    chats = []
    for (system, first), *more in CHATS:
        items = tuple(Message(("user", "assistant")[i % 2], text) for i, text in enumerate((first, *more)))
        chats.append(Conversation(items, system=system))
    return chats


def questions(exported: Exported, chats: Sequence[Conversation], count: int) -> list[Conversation]:
    """Up to `count` of the conversations, up to their last question, that the template can write and that fit into the
    model's context. Raises: DataError where there is none."""
    most, found = exported.config.max_position_embeddings - MOST, []
    for chat in chats:
        last = max((i for i, message in enumerate(chat.items) if message.role == "user"), default=-1)
        asked = replace(chat, items=chat.items[: last + 1], condition="", tools=())
        if last < 0 or any(m.role == "tool" or m.tool_calls for m in asked.items):
            continue
        try:
            if len(exported.prompt(asked, None)) <= most:
                found.append(asked)
        except DataError:
            continue
        if len(found) == count:
            return found
    if not found:
        raise DataError("no conversation there has a question of plain text that fits into the model's context")
    return found


def compare(
    exported: Exported,
    chats: Sequence[Conversation],
    conditions: Sequence[str | None],
    ask: Callable[[Sequence[Asked]], Sequence[Reply]],
) -> Compared:
    """Asks for every conversation under every class, and compares. Raises: as `ask`."""
    replies = ask([(chat_variables(chat)["messages"], name) for name in conditions for chat in chats])
    rows, problems, seen = [], [], []
    for i, name in enumerate(conditions):
        own = replies[i * len(chats) : (i + 1) * len(chats)]
        row, found = _compare_class(exported, chats, name, own)
        rows.append(row)
        problems += found
        seen.append([(reply.prompt_ids, reply.text) for reply in own])
    differ = len({repr(each) for each in seen}) > 1
    return Compared(rows, problems[0] if problems else "", differ)


def _compare_class(
    exported: Exported, chats: Sequence[Conversation], condition: str | None, replies: Sequence[Reply]
) -> tuple[Row, list[str]]:
    problems: list[str] = []
    prompts, merged, ids_equal = [], 0, 0
    for chat, reply in zip(chats, replies, strict=True):
        ids = exported.prompt(chat, condition)
        if reply.prompt_ids not in (None, ids) and reply.prompt_ids == (own := exported.merged(chat, condition)):
            ids, merged = own, merged + 1
        prompts.append(ids)
        problem = _ids_problem(exported, chat, condition, ids, reply)
        ids_equal += not problem
        problems += [problem] if problem else []
    tolerance = TOLERANCES.get(exported.config.dtype, TOLERANCES["bfloat16"])
    answers = generate(exported.model, prompts, max_new_tokens=MOST, stop_ids=exported.stop_ids)
    greedy_equal, ties, largest = 0, 0, None
    for chat, prompt, ours, told in zip(chats, prompts, answers, replies, strict=True):
        reply, difference = _with_withheld(exported.tokenizer, ours, told), None
        if reply.answer_ids and reply.logprobs:
            difference = _logprob_difference(exported.model, prompt, reply.answer_ids, reply.logprobs)
            largest = difference if largest is None else max(largest, difference)
        place = f"{_named(condition)}, {chat.items[-1].content[:60]!r}"
        problem, is_tie = _answer_problem(exported, prompt, ours, reply, tolerance)
        ties += is_tie
        greedy_equal += not problem
        problems += [f"{place}: {problem}"] if problem else []
        if difference is not None and difference > tolerance:
            problems.append(f"{place}: log-probabilities differ by {difference:.2g}, more than {tolerance:g}")
    tells_ids = all(reply.num_prompt_tokens is not None or reply.prompt_ids for reply in replies)
    row = Row(condition, len(chats), ids_equal if tells_ids else None, greedy_equal, ties, merged, largest)
    return row, problems


def _ids_problem(exported: Exported, chat: Conversation, condition: str | None, ids: list[int], reply: Reply) -> str:
    """What is wrong with the prompt's ids, in words with a remedy; "" where they are training's or are not told."""
    is_default = condition is None or condition == exported.template.default_condition
    place, found = f"{_named(condition)}, {chat.items[-1].content[:60]!r}", reply.prompt_ids
    if found is None:
        if reply.num_prompt_tokens in (None, len(ids)):
            return ""
        return f"{place}: the server counts {reply.num_prompt_tokens} prompt tokens, training {len(ids)}"
    if found == ids:
        return ""
    if not is_default and found == exported.prompt(chat, None):
        return (
            f"{place}: the server wrote the default class: it does not pass chat_template_kwargs on to the chat "
            f"template. Update it, or export with the class fixed: ochat export RUN OUT --condition {condition!r}"
        )
    at = len(os.path.commonprefix([found, ids]))
    own, theirs = (
        exported.tokenizer.model.decode(each[at : at + 6], skip_special_tokens=False) for each in (ids, found)
    )
    extra = f"the server's prompt has {len(found)} ids, training's {len(ids)}; "
    remedy = ""
    if serving.spells_boundary(theirs):
        remedy = ". It takes the boundary for text: export with --boundary never"
    return f"{place}: {extra}from token {at} on {theirs!r} for {own!r}{remedy}"


def _answer_problem(
    exported: Exported, prompt: list[int], ours: list[int], reply: Reply, tolerance: float
) -> tuple[str, bool]:
    """(what is wrong with the greedy answer, "" for nothing; whether it parts from ours at a tie)."""
    if reply.answer_ids is None:
        text = exported.tokenizer.decode(ours)
        same = reply.text.strip() == text.strip()
        return ("" if same else f"the answer is {reply.text[:60]!r} for {text[:60]!r}"), False
    theirs = reply.answer_ids
    while theirs and theirs[-1] in exported.stop_ids:
        theirs = theirs[:-1]
    if theirs == ours:
        return "", False
    at = len(os.path.commonprefix([theirs, ours]))
    if at < min(len(theirs), len(ours)):
        values = _logprobs(exported.model, prompt, [*ours[:at], theirs[at]])[at]
        if abs(float(values[ours[at]] - values[theirs[at]])) <= tolerance:
            return "", True
    own, other = (
        exported.tokenizer.model.decode(each[at : at + 6], skip_special_tokens=False) for each in (ours, theirs)
    )
    return f"the answer goes on with {other!r} for {own!r} after {at} tokens", False


def _with_withheld(tokenizer: Tokenizer, ours: list[int], reply: Reply) -> Reply:
    """The reply with those of our tokens put in that are part of a character, where it tells fewer than it counts."""
    if not reply.withheld or reply.answer_ids is None or reply.logprobs is None:
        return reply
    told = list(zip(reply.answer_ids, reply.logprobs, strict=True))
    found, left = [], reply.withheld
    for token in ours:
        if told and told[0][0] == token:
            found.append(told.pop(0))
        elif left and "\ufffd" in tokenizer.decode([token]):
            found.append((token, {}))
            left -= 1
        else:
            break
    found += told
    return replace(reply, answer_ids=[token for token, _ in found], logprobs=[each for _, each in found])


@torch.no_grad()
def _logprobs(model: Transformer, prompt: Sequence[int], answer: Sequence[int]) -> torch.Tensor:
    """(len(answer), V) of the answer's tokens."""
    input_ids, position_ids, attend = pack_ids(model, [[*prompt, *answer]], None)
    logits = model(input_ids, position_ids, attend)
    return logits[len(prompt) - 1 : -1].float().log_softmax(-1)


def _logprob_difference(
    model: Transformer, prompt: Sequence[int], answer: Sequence[int], theirs: Sequence[dict[int, float]]
) -> float:
    """The largest difference over the tokens of their answer and the alternatives that they name."""
    ours = _logprobs(model, prompt, answer)
    pairs = [(float(own[i]), value) for own, each in zip(ours, theirs, strict=False) for i, value in each.items()]
    return max((abs(own - value) for own, value in pairs), default=0.0)


def _named(condition: str | None) -> str:
    return "default class" if condition is None else f"class {condition!r}"
