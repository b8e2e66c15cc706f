"""The swap matrix equals a loop over conversations and tokens; the prefix asked for is the one that is measured."""

from __future__ import annotations

from dataclasses import replace

import ochat_kernels
import pytest
import torch

from ochat.data import template as templates
from ochat.data import tokenizer as tokenizers
from ochat.data.conversation import Conversation, Message
from ochat.errors import DataError
from ochat.evaluate import swap
from ochat.model.transformer import Transformer
from tests import test_init_base


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    folder = tmp_path_factory.mktemp("swap")
    test_init_base.write_json_tokenizer(folder)
    tokenizer = tokenizers.load(folder, ("<|end_of_turn|>",))
    model = Transformer(
        replace(test_init_base.CONFIG, vocab_size=tokenizer.vocab_size), ochat_kernels.load("reference")
    )
    model.initialize(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)  # far from uniform predictions, so that a wrong row or prefix shows
    return model, templates.load("openchat_v3.2"), tokenizer


def chat(condition: str, *texts: str, weight: float | None = None) -> Conversation:
    items = [Message("assistant" if i % 2 else "user", text, weight if i % 2 else 0.0) for i, text in enumerate(texts)]
    return Conversation(tuple(items), condition=condition)


CONVERSATIONS = [
    chat("good", "what is the cat", "the cat sat", weight=1.0),
    chat("bad", "what is the cat", "dog", weight=0.1),
    chat("good", "say a b c", "", "and again", "a b c 123 the the the", weight=1.0),
    chat("bad", "x", "yyyy zz 9", weight=-0.1),  # a negative weight is supervised too
]


def by_hand(setting, answers: str, prefix: str) -> float:
    """Mean of -log p over the supervised tokens, one conversation and token at a time, in double precision."""
    model, template, tokenizer = setting
    losses = []
    for conversation in CONVERSATIONS:
        if conversation.condition == answers:
            ids, weights = template.encode(replace(conversation, condition=prefix), tokenizer)
            scores = model.logits([ids])[0].double().log_softmax(-1)
            losses += [-scores[i - 1, ids[i]].item() for i in range(1, len(ids)) if weights[i] != 0]
    return sum(losses) / len(losses)


@pytest.mark.parametrize("tokens_per_pass", [1, 40, 10_000])  # alone, some together, all in one pass
def test_equals_a_loop_over_tokens(setting, monkeypatch, tokens_per_pass):
    monkeypatch.setattr(swap, "TOKENS_PER_PASS", tokens_per_pass)
    matrix = swap.swap_matrix(*setting, CONVERSATIONS, ["good", "bad", ""])
    assert list(matrix) == ["good", "bad"] and all(list(row) == ["good", "bad", ""] for row in matrix.values())
    for answers, row in matrix.items():
        for prefix, nll in row.items():
            assert nll == pytest.approx(by_hand(setting, answers, prefix), rel=1e-5), (answers, prefix)  # fp32 logits
        assert len({round(nll, 4) for nll in row.values()}) == 3, "the prefix must reach the model"


def test_nothing_to_measure_is_an_error(setting):
    with pytest.raises(DataError, match="at least one"):
        swap.swap_matrix(*setting, [], ["good"])
    with pytest.raises(DataError, match="at least one"):
        swap.swap_matrix(*setting, CONVERSATIONS, [])
    with pytest.raises(DataError, match="'mute' hold no supervised token"):
        swap.swap_matrix(*setting, [*CONVERSATIONS, chat("mute", "a", "b", weight=0.0)], ["good"])
