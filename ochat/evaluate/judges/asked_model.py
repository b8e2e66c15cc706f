"""Who answers a benchmark's questions: a model here, or a server; both give each answer as soon as it is known.

    asked = asked_model(options, questions);  for question, answer in asked.answers(questions): ...

Answers do not depend on the questions beside them, nor on where a run was interrupted: each turn has a seed of its own.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from ochat.errors import ConfigError
from ochat.evaluate.judges.chat_server import ChatServer, ServerOptions
from ochat.evaluate.judges.parallel import in_parallel
from ochat.evaluate.judges.questions import Answer, Question
from ochat.files import atomic
from ochat.model.device import find_device
from ochat.text import template as templates
from ochat.text import tokenizer as tokenizers
from ochat.text.conversation import Conversation, Message
from ochat.text.openchat_json import load_template, read_description, warn_of_unknown_class
from ochat.text.template import Template
from ochat.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from ochat.model.transformer import Transformer

QUESTIONS_PER_BATCH = 16  # each holds a cache of keys and values as long as the batch's longest
WEIGHTS = (".safetensors", ".bin", ".pt", ".gguf")


@dataclass(frozen=True, kw_only=True)
class AskedOptions(ServerOptions):
    """The model that answers, here or behind --endpoint."""

    model: str  # an exported folder, a run or a checkpoint; with --endpoint: the name by which the server knows it
    condition: str | None = None  # the class whose answers are wanted; left out: the model's default; "": none
    template: str | None = None  # of a model here without openchat.json: a template's name or file
    seed: int = 0  # decides what sampling draws
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of the weights and the computation here
    device: str = "auto"  # auto: a card if there is one; or cpu, cuda, cuda:1, ...
    base: str = ""  # of a checkpoint of adapters: where their base lies now; empty: where the run had it


class AskedModel(Protocol):
    """Answers questions. `about`: by what it is told from other models, plain data."""

    about: dict[str, Any]

    def answers(self, questions: Sequence[Question]) -> Iterator[tuple[Question, Answer]]:
        """Each question with its answer, as they are known, in any order."""
        ...


def asked_model(options: AskedOptions, most: int, warn: Callable[[str], object]) -> AskedModel:
    """The one that the options name; answers have at most `most` tokens. Raises: as its class; ConfigError."""
    check_max_new_tokens(most)
    return ServedModel(options, most, warn) if options.endpoint else LocalModel(options, most)


def check_max_new_tokens(most: int) -> None:
    """Raises: ConfigError for less than 1."""
    if most < 1:
        raise ConfigError(f"--max-new-tokens {most}: at least 1 is needed")


def seed_of(seed: int, key: str, turn: int) -> int:
    """(0 to 2^31) of one turn of one question."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{key}/{turn}".encode()).digest()[:4]) >> 1


class ServedModel:
    """A model behind an OpenAI-compatible server; the class goes into the chat template's variable `condition`."""

    def __init__(self, options: AskedOptions, most: int, warn: Callable[[str], object]) -> None:
        self.options, self.most = options, most
        self.server = ChatServer(options, options.model, warn)
        self.about = {"model": options.model, "condition": options.condition}
        is_named = options.condition is not None
        self._class = {"chat_template_kwargs": {"condition": options.condition}} if is_named else {}

    def answers(self, questions: Sequence[Question]) -> Iterator[tuple[Question, Answer]]:
        """Raises: ServerError."""
        yield from in_parallel(self._answer, questions, self.options.concurrent)

    def _answer(self, question: Question) -> Answer:
        chat: list[dict[str, str]] = []
        cut = False
        for turn, text in enumerate(question.turns):
            chat.append({"role": "user", "content": text})
            seed = seed_of(self.options.seed, question.key, turn)
            more = self._class | ({"seed": seed} if question.temperature else {})
            reply = self.server.ask(chat, max_tokens=self.most, temperature=question.temperature, **more)
            chat.append({"role": "assistant", "content": reply.text.strip()})
            cut = cut or reply.is_cut
        return Answer(tuple(each["content"] for each in chat[1::2]), cut, time.time())


class LocalModel:
    """A model of ours, in this process. It is loaded when the first question is asked."""

    def __init__(self, options: AskedOptions, most: int) -> None:
        """Raises: ConfigError and CheckpointError, for what can be known before the weights are read."""
        from ochat.export.open_model import folder_of  # torch takes seconds to import; --help should not

        self.options, self.most = options, most
        self.device = find_device(options.device)
        self.folder = folder_of(Path(options.model))
        self.tokenizer: Tokenizer = tokenizers.load(self.folder)
        self.template = self._template()
        self.about = {"model": fingerprint(self.folder), "condition": self.template.default_condition}
        self.about |= {"template": self.template.name, "dtype": options.dtype}
        self._model: Transformer | None = None

    def _template(self) -> Template:
        template, condition = load_template(self.folder, self.options.template), self.options.condition
        template.check(self.tokenizer)
        if condition is not None:
            template = templates.speaking_as(template, condition, self.tokenizer)
        warn_of_unknown_class(template.default_condition, read_description(self.folder).get("classes"))
        return template

    def prompt(self, question: Question, given: Sequence[str] = ()) -> list[int]:
        """The ids of the turns that are answered by `given` and of the next one, ready for its answer."""
        turns = zip(question.turns, (*given, ""), strict=False)
        items = [Message(role, text) for pair in turns for role, text in zip(("user", "assistant"), pair, strict=True)]
        return self.template.encode_prompt(Conversation(tuple(items)), self.tokenizer)

    def check(self, questions: Sequence[Question]) -> None:
        """Raises: ConfigError naming a question that fills the model's context."""
        from ochat.model.config import ModelConfig

        context = ModelConfig.load(self.folder).max_position_embeddings
        for question in questions:
            if len(ids := self.prompt(question)) >= context:
                raise ConfigError(f"{question.place}: {len(ids)} tokens, but the model's context is {context}")

    def answers(self, questions: Sequence[Question]) -> Iterator[tuple[Question, Answer]]:
        """In batches of one temperature. Raises: as `check`, before anything is loaded, and open_model."""
        self.check(questions)
        for temperature in dict.fromkeys(question.temperature for question in questions):
            alike = [question for question in questions if question.temperature == temperature]
            for first in range(0, len(alike), QUESTIONS_PER_BATCH):
                batch = alike[first : first + QUESTIONS_PER_BATCH]
                yield from zip(batch, self._answer(batch, temperature), strict=True)

    def _answer(self, batch: Sequence[Question], temperature: float) -> list[Answer]:
        given: list[list[str]] = [[] for _ in batch]
        cut = [False] * len(batch)
        for turn in range(max(len(question.turns) for question in batch)):
            asked = [index for index, question in enumerate(batch) if turn < len(question.turns)]
            prompts = [self.prompt(batch[index], given[index]) for index in asked]
            seeds = [seed_of(self.options.seed, batch[index].key, turn) for index in asked]
            texts = self._generate(prompts, temperature, seeds)
            for index, (text, is_cut) in zip(asked, texts, strict=True):
                given[index].append(text)
                cut[index] |= is_cut
        return [Answer(tuple(turns), is_cut, time.time()) for turns, is_cut in zip(given, cut, strict=True)]

    def _generate(
        self, prompts: Sequence[list[int]], temperature: float, seeds: Sequence[int]
    ) -> list[tuple[str, bool]]:
        """(text, whether it was cut) for each; a later turn that finds the context full is answered by nothing."""
        from ochat.infer.generate import generate

        model = self._loaded()
        context = model.config.max_position_embeddings
        fits = [index for index, prompt in enumerate(prompts) if len(prompt) < context]
        stop = self.tokenizer.special_tokens[self.template.eot]
        found = generate(
            model,
            [prompts[index] for index in fits],
            max_new_tokens=self.most,
            stop_ids=[stop],
            temperature=temperature,
            seed=[seeds[index] for index in fits],
        )
        texts = [("", True)] * len(prompts)
        for index, ids in zip(fits, found, strict=True):
            is_cut = len(ids) == min(self.most, context - len(prompts[index]))
            texts[index] = (self.tokenizer.decode(ids).strip(), is_cut)
        return texts

    def _loaded(self) -> Transformer:
        from ochat.export.open_model import open_model

        if self._model is None:
            options = self.options
            self._model = open_model(Path(options.model), dtype=options.dtype, device=self.device, base=options.base)
        return self._model


def fingerprint(folder: Path) -> str:
    """Of a model's folder: what its small files hold (settings, checksums of the weights), and the weights' sizes."""
    parts = []
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        content = str(path.stat().st_size) if path.suffix in WEIGHTS else atomic.sha256(path)
        parts.append(f"{path.name}={content}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
