"""Ask a model a benchmark's questions: one in this process, or one that an OpenAI-compatible endpoint serves.

    answerer = LocalAnswerer(Path("models/mine"), max_new_tokens=1024, condition="GPT4")
    for answer in answerer.answers(questions): ...

An answer depends neither on the other questions nor on an interruption: each turn has a seed of its own. The endpoint's
key is read from OPENAI_API_KEY. It is sent to that endpoint alone, and never logged or written.
"""

from __future__ import annotations

import hashlib
import importlib
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from ochat.errors import ConfigError, ServerError
from ochat.evaluate.answer_files import Answer, Question
from ochat.evaluate.endpoint import KEY, hide, read_key, within
from ochat.export.open_model import folder_of, open_model, stop_ids
from ochat.files import checksums
from ochat.infer.generate import complete
from ochat.model.config import ModelConfig
from ochat.model.transformer import Transformer
from ochat.text import tokenizer as tokenizers
from ochat.text.conversation import Conversation, Message
from ochat.text.openchat_json import template_as

log = logging.getLogger(__name__)
QUESTIONS_PER_BATCH = 16  # each holds a cache of keys and values as long as the batch's longest
WEIGHTS = (".safetensors", ".bin", ".pt", ".gguf")


def turn_seed(seed: int, key: str, turn: int) -> int:
    """The seed, from 0 to 2^31, of one turn of the question `key`."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{key}/{turn}".encode()).digest()[:4]) >> 1


def fingerprint(folder: Path) -> str:
    """A digest of a model folder: the content of its small files (settings, checksums of the weights) and the sizes of
    its weights."""
    parts = []
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        content = str(path.stat().st_size) if path.suffix in WEIGHTS else checksums.sha256(path)
        parts.append(f"{path.name}={content}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


@dataclass
class EndpointAnswerer:
    """A model that a server holds. The class goes into the chat template's variable `condition`."""

    endpoint: str
    model: str
    max_new_tokens: int
    condition: str | None
    seed: int
    concurrent: int
    requests_per_minute: float
    retries: int
    timeout_s: float

    def __post_init__(self) -> None:
        """Needs the package openai. Raises: ConfigError for an unreadable key."""
        import openai

        self.about: dict[str, Any] = {"model": self.model, "condition": self.condition}
        self._next_start, self._lock = 0.0, threading.Lock()
        self._key = read_key()
        self._client: Any = openai.OpenAI(
            base_url=self.endpoint,
            api_key=self._key or "none",
            max_retries=self.retries,
            timeout=self.timeout_s,
            http_client=self._http_client(),
        )

    def _http_client(self) -> Any:
        """One whose exchanges end by timeout_s as a whole. A redirect, which could carry the request elsewhere, is an
        error."""
        import openai

        before, seconds = self._before_request, self.timeout_s

        class Client(openai.DefaultHttpxClient):
            def send(self, request: Any, **options: Any) -> Any:
                before(request)
                send = super().send
                try:
                    return within(seconds, lambda: send(request, **options), "a request")
                except TimeoutError as error:  # openai tries again after that of its library, httpx or httpx2
                    http = importlib.import_module(type(request).__module__.partition(".")[0])
                    raise http.ReadTimeout(str(error), request=request) from None

        return Client(follow_redirects=False, event_hooks={"response": [self._warn]})

    def answers(self, questions: Sequence[Question]) -> Iterator[Answer]:
        """`concurrent` questions at a time. After an error or Ctrl-C no question is begun; answers under way are still
        given, and then the first error is raised. Raises: ServerError."""
        waiting, failure = iter(questions), None
        running: set[Future[Answer]] = set()
        with ThreadPoolExecutor(self.concurrent) as pool:
            while True:
                if failure is None:
                    running |= {
                        pool.submit(self._answer, each) for each in islice(waiting, self.concurrent - len(running))
                    }
                if not running:
                    break
                try:
                    done, running = wait(running, return_when=FIRST_COMPLETED)
                except KeyboardInterrupt as error:
                    done, failure = set(), failure or error
                for future in done:
                    failure = failure or future.exception()
                    if future.exception() is None:
                        yield future.result()
        if failure is not None:
            raise failure

    def _before_request(self, request: Any) -> None:
        """Keep to requests_per_minute, which counts retries too; send no key where there is none."""
        if not self._key:
            request.headers.pop("Authorization", None)
        with self._lock:
            start = max(time.monotonic(), self._next_start)
            self._next_start = start + (60 / self.requests_per_minute if self.requests_per_minute else 0.0)
        time.sleep(max(start - time.monotonic(), 0.0))

    def _warn(self, response: Any) -> None:
        if response.status_code >= 400:
            reason = hide(response.reason_phrase, self._key)[:100]
            log.warning("%s: HTTP %d %s", self.endpoint, response.status_code, reason)

    def _answer(self, question: Question) -> Answer:
        chat: list[dict[str, str]] = []
        is_cut = False
        for turn, text in enumerate(question.turns):
            chat.append({"role": "user", "content": text})
            more = {"seed": turn_seed(self.seed, question.key, turn)} if question.temperature else {}
            choice = self._ask(chat, temperature=question.temperature, **more)
            is_cut |= choice.finish_reason == "length"
            said = hide(choice.message.content or "", self._key)
            chat.append({"role": "assistant", "content": said.strip()})
        return Answer(question.key, tuple(each["content"] for each in chat[1::2]), is_cut, time.time())

    def _ask(self, chat: list[dict[str, str]], **settings: Any) -> Any:
        """The choice that the server answers with. Raises: ServerError."""
        import openai

        extra = {} if self.condition is None else {"chat_template_kwargs": {"condition": self.condition}}
        settings |= {"max_tokens": self.max_new_tokens, "extra_body": extra}
        try:
            choice = self._client.chat.completions.create(model=self.model, messages=list(chat), **settings).choices[0]
            if choice.message.content is None and choice.finish_reason != "length":
                raise ServerError(f"{self.endpoint}, model {self.model}: an answer without text")
            return choice
        except openai.APIStatusError as error:
            hint = f"; is {KEY} set to its key?" if error.status_code in (401, 403) else ""
            words = " ".join(hide(str(error), self._key).split())[:300] + hint
        except openai.APIConnectionError as error:
            words = f"no answer ({error.__cause__ or error})"
        except (ValueError, LookupError, TypeError, AttributeError, openai.APIResponseValidationError) as error:
            words = f"a broken answer ({error})"
        words = hide(words, self._key)
        raise ServerError(
            f"{self.endpoint}, model {self.model}: {words}. The same command resumes from the answers kept"
        )


@dataclass
class LocalAnswerer:
    """A model in this process. Its weights are loaded when questions are asked."""

    source: Path
    max_new_tokens: int
    condition: str | None
    seed: int
    template: str | None
    dtype: str
    device: str
    base: str

    def __post_init__(self) -> None:
        """Raises: ConfigError and CheckpointError, for what can be known before the weights are read."""
        folder = folder_of(self.source)
        self.context = ModelConfig.load(folder).max_position_embeddings
        self.tokenizer = tokenizers.load(folder)
        self.speaks = template_as(folder, self.template, self.condition, self.tokenizer)
        self.stop_ids = stop_ids(folder, self.speaks, self.tokenizer)
        self.about: dict[str, Any] = {"model": fingerprint(folder), "condition": self.speaks.default_condition}
        self.about |= {"template": self.speaks.name, "dtype": self.dtype}  # what decides the answers

    def answers(self, questions: Sequence[Question]) -> Iterator[Answer]:
        """In batches of one temperature. Raises: ConfigError naming a question that fills the model's context, before
        the weights are loaded; as open_model."""
        for question in questions:
            if (count := len(self._prompt(question.turns[:1]))) >= self.context:
                raise ConfigError(f"{question.place}: {count} tokens, but the model's context is {self.context}")
        if not questions:
            return
        model = open_model(self.source, dtype=self.dtype, device=self.device, base=self.base)
        for temperature in dict.fromkeys(question.temperature for question in questions):
            alike = [question for question in questions if question.temperature == temperature]
            for first in range(0, len(alike), QUESTIONS_PER_BATCH):
                yield from self._answer(model, alike[first : first + QUESTIONS_PER_BATCH], temperature)

    def _prompt(self, texts: Sequence[str]) -> list[int]:
        """The ids of what user and assistant say in turns, ready for the next answer."""
        items = tuple(Message(role, text) for role, text in zip(cycle(("user", "assistant")), texts, strict=False))
        return self.speaks.encode_prompt(Conversation(items), self.tokenizer)

    def _answer(self, model: Transformer, batch: Sequence[Question], temperature: float) -> Iterator[Answer]:
        """Turn by turn. A turn that fills the context gets an empty answer that is cut."""
        said: list[list[str]] = [[] for _ in batch]
        cut: set[int] = set()
        for turn in range(max(len(question.turns) for question in batch)):
            asked = [index for index, question in enumerate(batch) if turn < len(question.turns)]
            for index in asked:
                said[index].append(batch[index].turns[turn])
            fits = {index: ids for index in asked if len(ids := self._prompt(said[index])) < self.context}
            seeds = [turn_seed(self.seed, batch[index].key, turn) for index in fits]
            settings = {"temperature": temperature, "seed": seeds}
            found = complete(model, list(fits.values()), self.tokenizer, self.stop_ids, self.max_new_tokens, **settings)
            answers = dict.fromkeys(asked, ("", True)) | dict(zip(fits, found, strict=True))
            for index, (text, is_cut) in answers.items():
                said[index].append(text.strip())
                cut |= {index} if is_cut else set()
        for index, question in enumerate(batch):
            yield Answer(question.key, tuple(said[index][1::2]), index in cut, time.time())
