"""Guidance by a server that knows nothing of it: vLLM is asked twice for each token, under two classes.

    python examples/guided.py http://127.0.0.1:8000 "Why is the sky blue?" --stop-ids 49152 \\
        --condition GPT4 --against GPT3 --guidance 1.5

The next token is that with the largest s * log p(token | condition) - (s - 1) * log p(token | against): the order of
`ochat generate --guidance s`, as log-probabilities are logits less a constant. A server tells them of its likeliest
tokens only (vLLM: --max-logprobs, 20 by default). So only tokens that it lists under `condition` can be taken, and one
that it does not list under `against` counts with the least likely that is listed, which is too much: the answer may
differ from that of all logits. With --max-logprobs -1 and --top -1 vLLM lists the whole vocabulary: megabytes a token.
"""

from __future__ import annotations

import argparse
import json
import urllib.request
from collections.abc import Collection
from typing import Any


def answer(
    url: str,
    question: str,
    *,
    condition: str,
    against: str,
    guidance: float,
    stop_ids: Collection[int],
    top: int,
    most: int,
) -> str:
    """The guided greedy answer, of at most `most` tokens. `stop_ids`: eos_token_id in the export's
    generation_config.json. Costs: two requests a token; the server keeps what it computed of the prompts."""
    model = post(url, "/v1/models")["data"][0]["id"]
    prompts = [prompt(url, model, question, name) for name in (condition, against)]
    said: list[int] = []
    while len(said) < most:
        wanted, other = (logprobs(url, model, ids + said, top) for ids in prompts)
        least = min(other.values())
        scores = {token: guidance * p - (guidance - 1) * other.get(token, least) for token, p in wanted.items()}
        token = max(scores, key=scores.__getitem__)
        if token in stop_ids:
            break
        said.append(token)
    return post(url, "/detokenize", {"model": model, "tokens": said})["prompt"]


def prompt(url: str, model: str, question: str, condition: str) -> list[int]:
    """The ids of the question under a class; "": none."""
    chat = {"model": model, "messages": [{"role": "user", "content": question}]}
    return post(url, "/tokenize", chat | {"chat_template_kwargs": {"condition": condition}})["tokens"]


def logprobs(url: str, model: str, ids: list[int], top: int) -> dict[int, float]:
    """Token -> log-probability of what may follow, the `top` likeliest."""
    asked = {"model": model, "prompt": ids, "max_tokens": 1, "temperature": 0, "logprobs": top}
    found = post(url, "/v1/completions", asked | {"return_tokens_as_token_ids": True})["choices"][0]["logprobs"]
    return {int(name.removeprefix("token_id:")): p for name, p in found["top_logprobs"][0].items()}


def post(url: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """The server's reply to a request; without a body of GET."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url + path, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as reply:
        return json.load(reply)


def main() -> None:
    """Print the answer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("question")
    parser.add_argument("--condition", default="GPT4")
    parser.add_argument("--against", default="GPT3", help="the class to keep away from; an empty one: none")
    parser.add_argument("--guidance", type=float, default=1.5, help="1 or more")
    parser.add_argument("--stop-ids", type=int, nargs="+", required=True, help="eos_token_id in generation_config.json")
    parser.add_argument("--top", type=int, default=20, help="log-probabilities that are asked for")
    parser.add_argument("--most", type=int, default=512, help="tokens of the answer")
    print(answer(**vars(parser.parse_args())))


if __name__ == "__main__":
    main()
