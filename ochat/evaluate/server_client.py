"""Ask a chat server what it makes of a conversation: the ids of its prompt, a greedy answer, and log-probabilities.

    server = Server("http://127.0.0.1:8000")
    reply = server.ask([{"role": "user", "content": "Hi"}], "GPT4", 32)      # reply.prompt_ids, reply.answer_ids

vLLM tells ids of prompt and answer, llama.cpp's server too; of any other OpenAI-compatible server only the number of
prompt tokens and the text are known. A key is read from OPENAI_API_KEY, and sent to that server alone.
"""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ochat.errors import ServerError
from ochat.evaluate import endpoint
from ochat.evaluate.endpoint import KEY

TOP = 5  # alternatives of each token whose log-probabilities are asked for
TIMEOUT_S = 600.0  # of a whole exchange
MOST_BYTES = 1 << 28  # of an answer
Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Reply:
    """What a server made of one conversation; None: it does not tell."""

    prompt_ids: list[int] | None
    num_prompt_tokens: int | None
    answer_ids: list[int] | None
    text: str
    logprobs: list[dict[int, float]] | None  # of each token of the answer: its own and the likeliest
    withheld: int = 0  # tokens of the answer that are not told: llama.cpp's that end within a character


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:  # it could carry key and prompts elsewhere
        return None


class Server:
    """A server at `url`, with or without /v1, and the one model that it has, or the one called `name`.

    Raises: ConfigError for another address than one of HTTP, or with user or password; ServerError where nothing
    answers.
    """

    def __init__(self, url: str, name: str) -> None:
        endpoint.check_address(url, "--server", "http://127.0.0.1:8000")
        self.url = url.rstrip("/").removesuffix("/v1")
        self._opener = urllib.request.build_opener(_NoRedirect)
        self._key = endpoint.read_key()
        self.model = self._find_model(name)
        self.kind, self.version = self._find_kind()

    def ask(self, messages: Messages, condition: str | None, most: int) -> Reply:
        """The answer of at most `most` tokens under the class `condition` (None: the default). Raises: ServerError."""
        chat: dict[str, Any] = {"messages": list(messages)}
        if condition is not None:
            chat["chat_template_kwargs"] = {"condition": condition}
        asked = {"model": self.model, "temperature": 0.0, "max_tokens": most} | chat
        prompt_ids = None
        if self.kind == "vLLM":
            asked |= {"return_token_ids": True, "return_tokens_as_token_ids": True}
        if self.kind == "llama.cpp":
            prompt_ids = self._llama_cpp_ids(chat)
            asked["cache_prompt"] = False  # what was computed in another batch has other last bits
        if self.kind:
            asked |= {"logprobs": True, "top_logprobs": TOP}
        found = self._post("/v1/chat/completions", asked)
        try:
            (choice,) = found["choices"]
            logprobs = [_by_id(each) for each in choice["logprobs"]["content"]] if self.kind else None
            answer_ids = choice.get("token_ids")
            if self.kind == "llama.cpp":
                answer_ids = [each["id"] for each in choice["logprobs"]["content"]]
            prompt_ids = found.get("prompt_token_ids") or prompt_ids
            usage = found.get("usage") or {}
            withheld = max(usage.get("completion_tokens", 0) - len(answer_ids or ()), 0)
            text = choice["message"].get("content") or ""
            return Reply(prompt_ids, usage.get("prompt_tokens"), answer_ids, text, logprobs, withheld)
        except (KeyError, TypeError, ValueError) as error:
            raise ServerError(f"{self.url}: an answer of another shape than a chat completion ({error!r})") from None

    def _llama_cpp_ids(self, chat: dict[str, Any]) -> list[int]:
        text = self._post("/apply-template", chat)["prompt"]
        return self._post("/tokenize", {"content": text, "add_special": True, "parse_special": True})["tokens"]

    def _find_model(self, name: str) -> str:
        models = [str(each.get("id")) for each in self._get("/v1/models").get("data") or []]
        named = [each for each in models if name in (each, each.rstrip("/").rpartition("/")[2])]
        if len(found := named or models) != 1:
            raise ServerError(
                f"{self.url}: serves {', '.join(models) or 'no model'}, and none alone is called {name!r}; start it "
                f"with that name (vLLM: --served-model-name {name})"
            )
        return found[0]

    def _find_kind(self) -> tuple[str, str]:
        """("vLLM" | "llama.cpp" | "", its version), of what only they have."""
        for kind, path, key in (("vLLM", "/version", "version"), ("llama.cpp", "/props", "build_info")):
            try:
                found = self._get(path)
            except ServerError:
                continue
            if key in found:
                return kind, str(found[key])
        return "", ""

    def _get(self, path: str) -> dict[str, Any]:
        return self._send(urllib.request.Request(self.url + path))

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        content = json.dumps(body).encode()
        return self._send(urllib.request.Request(self.url + path, content, {"Content-Type": "application/json"}))

    def _send(self, request: urllib.request.Request) -> dict[str, Any]:
        if self._key:
            request.add_unredirected_header("Authorization", f"Bearer {self._key}")
        try:
            status, content = endpoint.within(TIMEOUT_S, lambda: self._exchange(request), "a request")
            text = endpoint.hide(content.decode("utf-8", "replace"), self._key)
            found = json.loads(text) if status < 400 else None
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = endpoint.hide(str(getattr(error, "reason", error)), self._key)
            raise ServerError(
                f"{self.url}: no server answers there ({reason[:300]}); is it up, and is the address right?"
            ) from None
        if status >= 400:
            hint = f"; is {KEY} set to its key?" if status in (401, 403) else ""
            raise ServerError(f"{request.full_url}: HTTP {status} {' '.join(text.split())[:300]}{hint}")
        if not isinstance(found, dict):
            raise ServerError(f"{request.full_url}: another answer than a JSON object")
        return found

    def _exchange(self, request: urllib.request.Request) -> tuple[int, bytes]:
        try:
            with self._opener.open(request, timeout=TIMEOUT_S) as response:
                return response.status, response.read(MOST_BYTES)
        except urllib.error.HTTPError as error:
            return error.code, error.read(MOST_BYTES)


def _by_id(token: Mapping[str, Any]) -> dict[int, float]:
    return {_id(each): each["logprob"] for each in (*token.get("top_logprobs", ()), token)}


def _id(token: Mapping[str, Any]) -> int:
    return int(token["id"] if "id" in token else str(token["token"]).removeprefix("token_id:"))
