"""Exact match: the share of prompts whose greedy answer is the right one.

    task = ExactTask.read(("held_out.jsonl",), ["GPT4"], 64, template, tokenizer, context=4096)
    lines = task.answer(model, tokenizer, stop_ids, device);  score(lines)["exact"]

A file holds conversations in any format that `ochat prepare` reads; the last message of each is the right answer. Each
is asked under every condition, whatever its own class. An answer is right if it ends by itself, within max_new_tokens,
and its text is the expected one without the blanks around both.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ochat.data.readers import parse_records
from ochat.errors import DataError
from ochat.infer.generate import complete
from ochat.model.transformer import Transformer
from ochat.text import record_formats
from ochat.text.conversation import Conversation
from ochat.text.template import Template
from ochat.text.tokenizer import Tokenizer

PROMPTS_PER_BATCH = 16  # each holds a cache of keys and values as long as the batch's longest


@dataclass(frozen=True)
class Question:
    """A prompt under one condition."""

    place: str  # file:line
    prompt: str  # the last message before the answer
    condition: str
    ids: list[int]  # ready for the answer
    expected: str


@dataclass(frozen=True)
class ExactTask:
    """The questions of one [eval.NAME], and the longest answer in tokens, its end included."""

    questions: list[Question]
    max_new_tokens: int

    @classmethod
    def read(
        cls,
        paths: Sequence[str],
        conditions: Sequence[str],
        max_new_tokens: int,
        template: Template,
        tokenizer: Tokenizer,
        context: int,
    ) -> ExactTask:
        """The questions of all records under all conditions. `context`: the model's, in tokens.

        Raises: DataError naming file and line of a record that ends with no answer, of a prompt that leaves no room in
        the context, and of an answer longer than max_new_tokens; and for files without a record.
        """
        plain = replace(template, default_condition="")  # which would replace an empty class

        def parse(value: dict[str, Any]) -> list[tuple[str, str, list[int], str]]:
            asked, expected = _answered(record_formats.convert(value, attributes=template.attributes))
            most = len(tokenizer.encode(expected.strip())) + 1
            if most > max_new_tokens:
                raise DataError(
                    f"the answer and its end have {most} tokens: of max_new_tokens = {max_new_tokens} none can be "
                    "right; raise it, or leave the record out"
                )
            found = []
            for condition in conditions:
                ids = plain.encode_prompt(replace(asked, condition=condition), tokenizer)
                if (length := len(ids) + most) > context:
                    raise DataError(
                        f"prompt and answer have {length} tokens, but the model's context is {context}; shorten them, "
                        "or leave the record out"
                    )
                found.append((asked.items[-1].content, condition, ids, expected))
            return found

        read = (each for path in paths for each in parse_records(Path(path), parse))
        questions = [Question(record.location, *one) for record, found in read for one in found]
        if not questions:
            raise DataError(f"{', '.join(paths)}: no record there, so nothing to ask")
        return cls(questions, max_new_tokens)

    def answer(
        self, model: Transformer, tokenizer: Tokenizer, stop_ids: Collection[int], device: torch.device
    ) -> list[dict[str, Any]]:
        """A line of answers.jsonl for each question, without step and set. All ranks of a sharded model call it, and
        each answers all of them. Costs: as infer.generate, in batches of PROMPTS_PER_BATCH."""
        lines = []
        for first in range(0, len(self.questions), PROMPTS_PER_BATCH):
            batch = self.questions[first : first + PROMPTS_PER_BATCH]
            prompts = [each.ids for each in batch]
            answers = complete(model, prompts, tokenizer, stop_ids, self.max_new_tokens, device=device)
            lines += [_line(each, text, is_cut) for each, (text, is_cut) in zip(batch, answers, strict=True)]
        return lines


def score(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """{exact, prompts, classes: {condition: {exact, prompts}}} of answered questions; exact is a share."""
    by_condition: dict[str, list[bool]] = {}
    for line in lines:
        by_condition.setdefault(line["condition"], []).append(line["is_right"])
    classes = {name: _share(found) for name, found in by_condition.items()}
    return _share([line["is_right"] for line in lines]) | {"classes": classes}


def _share(right: Sequence[bool]) -> dict[str, Any]:
    return {"exact": sum(right) / len(right), "prompts": len(right)}


def _line(question: Question, text: str, is_cut: bool) -> dict[str, Any]:
    is_right = not is_cut and text.strip() == question.expected.strip()
    return {
        "source": question.place, "prompt": question.prompt, "condition": question.condition, "answer": text,
        "expected": question.expected, "is_cut": is_cut, "is_right": is_right,
    }  # fmt: skip


def _answered(conversation: Conversation) -> tuple[Conversation, str]:
    """A conversation up to its last question, and the right answer. Raises: DataError."""
    *asked, answer = conversation.items
    if answer.role != "assistant" or not asked or not answer.content.strip():
        raise DataError("items: expected a question and, as the last message, the assistant's right answer")
    if answer.tool_calls or answer.reasoning:
        raise DataError(f"items[{len(asked)}]: a right answer is text, without reasoning and tool calls")
    plain = tuple(replace(message, weight=None, spans=()) for message in asked)
    return replace(conversation, items=plain), answer.content
