"""A chat: the turns so far, the class that answers, each answer as it comes, and what the other classes would say.

    chat = Chat(model, tokenizer, template, stop_ids, classes=["GPT4", "GPT3"], max_new_tokens=512)
    for text in chat.ask("Why is the sky blue?"): ...      # then chat.ending;  chat.answers() is of all classes

Every turn encodes the whole chat anew, as a server does, so an answer is what `ochat generate` gives to the same turns.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ochat.errors import ConfigError
from ochat.infer.generate import complete, steps
from ochat.model.transformer import Transformer
from ochat.text.conversation import Conversation, Message
from ochat.text.openchat_json import with_class
from ochat.text.template import Template
from ochat.text.tokenizer import Tokenizer


@dataclass
class Chat:
    """`classes`: those that the model knows, [] where it does not say. `settings`: of sampling, as generate.steps."""

    model: Transformer
    tokenizer: Tokenizer
    template: Template  # whose default condition is the class that answers
    stop_ids: Collection[int]  # where an answer ends
    classes: Sequence[str]
    max_new_tokens: int
    seed: int = 0
    settings: dict[str, Any] = field(default_factory=dict)
    system: str = ""
    items: tuple[Message, ...] = ()
    # of the last answer: it reached its end, --max-new-tokens or the model's context, or was not waited for
    ending: Literal["complete", "length", "context", "stopped"] = "complete"
    tried: list[str] = field(default_factory=list)  # the classes that have answered
    num_answers: int = 0

    @property
    def condition(self) -> str:
        """The class that answers; "": none."""
        return self.template.default_condition

    @property
    def context(self) -> int:
        """The most tokens that a chat may have."""
        return self.model.config.max_position_embeddings

    def switch(self, condition: str, option: str = "") -> None:
        """Another class answers from now on; earlier answers are shown to it as its own. Raises: as with_class."""
        self.template = with_class(self.template, condition, self.classes, self.tokenizer, option)

    def ask(self, question: str) -> Generator[str]:
        """The answer, a part at a time. The turn is kept once the iterator ends or is closed, unless nothing was said.

        Raises: at once ConfigError where the chat fills the model's context, DataError where the template cannot write
        it.
        """
        items = (*self.items, Message("user", question))
        return self._answer(items, self._prompt(items, self.condition))

    def answers(self) -> dict[str, tuple[str, bool]]:
        """{class: its answer to the last question, and whether it was cut}, of all classes: those that the model knows,
        or else that have answered. The class that has just answered says the same again.

        Raises: as ask; ConfigError before any question.
        """
        if not self.items:
            raise ConfigError("no question yet; ask one first")
        prompts = {name: self._prompt(self.items[:-1], name) for name in self.classes or self.tried}
        options: dict[str, Any] = {"seed": self.seed + self.num_answers - 1} | self.settings
        # one by one: in bfloat16 neighbours change the last bit, and so the answer that was just given
        return {
            name: complete(self.model, [prompt], self.tokenizer, self.stop_ids, self.max_new_tokens, **options)[0]
            for name, prompt in prompts.items()
        }

    def forget(self) -> None:
        """Start anew, as the same class."""
        self.items = ()

    def _prompt(self, items: tuple[Message, ...], condition: str) -> list[int]:
        template = replace(self.template, default_condition=condition)
        ids = template.encode_prompt(Conversation(items, system=self.system), self.tokenizer)
        if len(ids) >= self.context:
            raise ConfigError(
                f"the chat has {len(ids):,} tokens with this question, but the model's context is {self.context:,}; "
                "ask less, or start a new chat"
            )
        return ids

    def _answer(self, items: tuple[Message, ...], prompt: list[int]) -> Generator[str]:
        options: dict[str, Any] = {"seed": self.seed + self.num_answers} | self.settings
        left = room = min(self.max_new_tokens, self.context - len(prompt))
        self.ending, self.num_answers, said = "stopped", self.num_answers + 1, []

        def new_ids() -> Iterator[int]:
            nonlocal left
            for tokens in steps(self.model, [prompt], max_new_tokens=room, stop_ids=self.stop_ids, **options):
                left -= len(tokens)
                yield from tokens.values()

        try:
            for text in self.tokenizer.decode_stream(new_ids()):
                said.append(text)
                yield text
            self.ending = "complete" if left else "length" if room == self.max_new_tokens else "context"
        finally:
            if text := "".join(said):
                self.items = (*items, Message("assistant", text))
                self.tried += [] if self.condition in self.tried else [self.condition]
