"""examples/guided.py answers as our own guidance does, where the server lists every token, and says less where it does
not. The server is a stand-in with the requests and replies of vLLM's: pytest tests/infer/test_guided_example.py"""

from __future__ import annotations

import pytest
import torch

from examples import guided
from ochat.infer.generate import generate
from ochat.model import hf
from tests.model_families import make, random_ids


class StandIn:
    """vLLM's answers to what the example asks, by a small model. A class is a prompt of its own."""

    def __init__(self, model, prompts):
        self.model, self.prompts, self.asked = model, prompts, 0

    def post(self, url, path, body=None):
        if path == "/v1/models":
            return {"data": [{"id": "mine"}]}
        assert body["model"] == "mine"
        if path == "/tokenize":
            return {"tokens": self.prompts[body["chat_template_kwargs"]["condition"]]}
        if path == "/detokenize":
            return {"prompt": " ".join(map(str, body["tokens"]))}
        assert path == "/v1/completions" and body["max_tokens"] == 1 and body["return_tokens_as_token_ids"]
        self.asked += 1
        found = self.model.logits([body["prompt"]])[0][-1].log_softmax(-1)
        likeliest = found.topk(len(found) if body["logprobs"] == -1 else body["logprobs"])
        listed = {f"token_id:{token}": p for p, token in zip(*(x.tolist() for x in likeliest), strict=True)}
        return {"choices": [{"logprobs": {"top_logprobs": [listed]}}]}


@pytest.fixture
def server(tmp_path, monkeypatch):
    make("mistral", tmp_path)
    wanted, other = random_ids(9, 14)
    found = StandIn(hf.load(tmp_path, dtype="float32"), {"GPT4": wanted, "GPT3": other})
    monkeypatch.setattr(guided, "post", found.post)
    return found


@torch.no_grad()
@pytest.mark.parametrize("guidance", [1.0, 1.5, 4.0])
def test_two_requests_a_token_give_the_guided_answer(server, guidance):
    sides = [server.prompts["GPT4"]], [server.prompts["GPT3"]]
    settings = {"max_new_tokens": 16, "guidance": guidance, "against": sides[1]}
    whole = generate(server.model, sides[0], stop_ids=(), **settings)[0]
    stop = whole[9]
    wanted = whole[: whole.index(stop)]
    asked = {"condition": "GPT4", "against": "GPT3", "guidance": guidance, "stop_ids": {stop}}
    assert guided.answer("url", "Hi", **asked, top=-1, most=16) == " ".join(map(str, wanted))
    assert server.asked == 2 * (len(wanted) + 1)
    assert guided.answer("url", "Hi", **asked | {"stop_ids": ()}, top=-1, most=3) == " ".join(map(str, whole[:3]))


def test_a_token_that_is_not_listed_against_counts_with_the_least_likely_that_is(monkeypatch):
    lists, asked = iter([{1: -1.0, 2: -1.5}, {1: -0.5, 3: -2.0}]), []  # 2 is not listed against: at most -2.0
    monkeypatch.setattr(guided, "logprobs", lambda *_: next(lists))
    monkeypatch.setattr(guided, "prompt", lambda *_: [])
    monkeypatch.setattr(guided, "post", lambda *words: asked.append(words) or {"data": [{"id": "m"}], "prompt": ""})
    guided.answer("u", "Hi", condition="GPT4", against="GPT3", guidance=2.0, stop_ids=(), top=2, most=1)
    # 2 * -1.5 - 1 * -2.0 = -1.0 is above 2 * -1.0 - 1 * -0.5 = -1.5
    assert asked[-1] == ("u", "/detokenize", {"model": "m", "tokens": [2]})
