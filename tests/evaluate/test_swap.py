"""The swap matrix equals a loop over conversations and tokens in float64; the prefix asked for is the one that is
measured, over the same tokens as every other: pytest tests/evaluate/test_swap.py"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import ochat_kernels
import pytest
import torch
import torch.nn.functional as F

from ochat.data.prepare import prepare
from ochat.errors import DataError
from ochat.evaluate import swap
from ochat.evaluate.held_out import HeldOut, read_held_out
from ochat.infer.generate import generate
from ochat.model.transformer import Transformer, pack_ids
from ochat.text import template as templates
from ochat.text import tokenizer as tokenizers
from ochat.text.conversation import Conversation, Message
from ochat.text.template import Span
from tests.model import test_init_base
from tests.tiny_text import conversations, write_base, write_lines


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    folder = tmp_path_factory.mktemp("swap")
    test_init_base.write_json_tokenizer(folder)
    tokenizer = tokenizers.load(folder, ("<|end_of_turn|>",))
    config = replace(test_init_base.CONFIG, vocab_size=tokenizer.vocab_size)
    model = Transformer(config, ochat_kernels.load("reference"))
    model.initialize(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)  # far from uniform predictions, so that a wrong row or prefix shows
    return model.double(), templates.load("openchat_v3.2"), tokenizer


def chat(condition: str, *texts: str, weight: float | None = None) -> Conversation:
    items = [Message("assistant" if i % 2 else "user", text, weight if i % 2 else 0.0) for i, text in enumerate(texts)]
    return Conversation(tuple(items), condition=condition)


CONVERSATIONS = [
    chat("good", "what is the cat", "the cat sat", weight=1.0),
    chat("bad", "what is the cat", "dog", weight=0.1),
    chat("good", "say a b c", "", "and again", "a b c 123 the the the", weight=1.0),
    replace(chat("bad", "x", "yyyy zz 9", weight=-0.1), system="be bad"),  # a negative weight is supervised too
]


def matrix(setting, chats, conditions):
    model, template, tokenizer = setting
    return swap.swap_matrix(
        model, template, tokenizer, [HeldOut.of(each, template, tokenizer) for each in chats], conditions
    )


def by_hand(setting, conversation: Conversation, prefix: str) -> tuple[int, float, int]:
    """Supervised tokens, sum of -log p and hits, one token at a time."""
    model, template, tokenizer = setting
    ids, weights = template.encode(replace(conversation, condition=prefix), tokenizer)
    with torch.no_grad():
        scores = model(*pack_ids(model, [ids]), head=F.linear)  # (len, V) float64
    live = [i for i in range(1, len(ids)) if weights[i] != 0]
    losses = [-scores[i - 1].log_softmax(-1)[ids[i]].item() for i in live]
    return len(live), sum(losses), sum(int(scores[i - 1].argmax()) == ids[i] for i in live)


@pytest.mark.parametrize("tokens_per_pass", [1, 40, 10_000])  # alone, some together, all in one pass
def test_equals_a_loop_over_tokens_in_float64(setting, monkeypatch, tokens_per_pass):
    monkeypatch.setattr(swap, "TOKENS_PER_PASS", tokens_per_pass)
    prefixes = ["good", "bad", ""]
    found = matrix(setting, CONVERSATIONS, prefixes)
    assert list(found) == ["good", "bad"]
    for name, sums in found.items():
        chats = [each for each in CONVERSATIONS if each.condition == name]
        for i, conversation in enumerate(chats):
            for j, prefix in enumerate(prefixes):
                tokens, nll, correct = by_hand(setting, conversation, prefix)
                assert (sums.tokens[i], sums.correct[i, j]) == (tokens, correct)
                assert sums.nll[i, j] == pytest.approx(nll, rel=1e-12), (name, prefix)
        assert len({round(nll, 4) for nll in sums.nll.sum(0)}) == 3, "the prefix must reach the model"


@pytest.mark.parametrize("mode", ["both", "assistant", "ignore"])
@pytest.mark.parametrize("name", ["openchat_v3.2", "openchat_3.6"])
def test_an_exchanged_prefix_is_the_conversation_encoded_anew(tmp_path, name, mode):
    template = templates.with_conditions(templates.load(name), mode)
    tokens = ("<|end_of_turn|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    tokenizer = tokenizers.load(write_base(tmp_path / "base"), tokens)
    chats = [Conversation.from_dict(record) for record in conversations(3, 20)] + CONVERSATIONS
    for each in chats:
        if all(message.weight == 0 for message in each.items if message.role == "assistant"):
            continue
        names = ["A B", "", "GPT4"]
        written = HeldOut.of(each, template, tokenizer).under(names, template, tokenizer)
        for condition, example in zip(names, written, strict=True):
            ids, weights = template.encode(replace(each, condition=condition), tokenizer)
            end = int(np.flatnonzero(weights)[-1]) + 1
            assert example.input_ids.tolist() == ids[:end]
            assert example.loss_weights.tolist() == pytest.approx(weights[:end])


def test_every_prefix_has_the_same_tokens_however_short_the_context(setting):
    _, template, tokenizer = setting
    held_out = HeldOut.of(CONVERSATIONS[2], template, tokenizer)
    names, counts = ["", "a class with a long name"], set()
    longest = max(len(each.input_ids) for each in held_out.under(names, template, tokenizer))
    for context in range(1, longest + 1):
        short = replace(template, context=context)
        examples = held_out.under(names, short, tokenizer)
        supervised = [each.input_ids[each.loss_weights != 0].tolist() for each in examples]
        assert supervised[0] == supervised[1] and max(len(each.input_ids) for each in examples) <= context
        counts.add(len(supervised[0]))
    _, weights = template.encode(CONVERSATIONS[2], tokenizer)
    assert counts == set(range(np.count_nonzero(weights) + 1))


def test_a_prepared_set_and_its_shards_read_as_its_conversations(tmp_path):
    """Weights given and left out, system texts and trailing questions among them."""
    base, file = write_base(tmp_path / "base"), write_lines(tmp_path / "chats.jsonl", conversations(5, 60))
    for name, more in (("data", {}), ("1", {"shard": "1/2"}), ("2", {"shard": "2/2"})):
        prepare([file], base, "openchat_v3.2", tmp_path / name, on_bad="skip", progress=False, **more)
    tokenizer, template = tokenizers.load(base), templates.load("openchat_v3.2")

    def read(data):
        examples = [
            (each, each.under(["GPT4", "x"], template, tokenizer)) for each in read_held_out(data, template, tokenizer)
        ]
        return [
            (e.condition, *((x.input_ids.tolist(), x.loss_weights.tolist()) for x in under)) for e, under in examples
        ]

    plain = read(file)
    assert read(tmp_path / "data") == plain and len(plain) > 50
    assert sorted(read([tmp_path / "1", tmp_path / "2"])) == sorted(plain)


def test_exact_is_what_greedy_decoding_says(setting):
    """Of true answers, which end at a token that the model itself says, and of such with a slip or an end too early."""
    model, template, tokenizer = setting
    names, rng = ["good", "bad"], np.random.default_rng(0)
    template, chats, asked = replace(template, default_condition=""), [], {name: [] for name in names}
    for number in range(24):
        own = names[number % 2]
        chatted = chat(own, " ".join(rng.choice(["the", "cat", "sat", "b", "9"], 4)))
        prompt = {name: template.encode_prompt(replace(chatted, condition=name), tokenizer) for name in names}
        (free,) = generate(model, [prompt[own]], max_new_tokens=6, stop_ids=())
        new = next((k for k in range(2, 6) if free[k] not in free[:k]), 1)
        answer, stop = free[:new], free[new]
        if number % 3 == 1:
            answer[rng.integers(new)] = int(rng.integers(tokenizer.vocab_size))
        elif number % 3 == 2:
            answer = answer[:-1]
        spans = template.encode_spans(chatted, tokenizer)[1]
        ids, opened = [*prompt[own], *answer, stop], len(prompt[own])
        spans += [Span(opened, "prefix", None), Span(len(ids), "assistant", 1.0)]
        chats.append(HeldOut(np.array(ids), spans, own))
        asked[own].append((prompt, answer, stop))
    found = swap.swap_matrix(model, template, tokenizer, chats, names)
    for own in names:
        said = [
            [
                generate(model, [prompt[name]], max_new_tokens=len(answer) + 1, stop_ids={stop}) == [answer]
                for name in names
            ]
            for prompt, answer, stop in asked[own]
        ]
        assert found[own].exact.tolist() == said and 4 <= np.sum(said) <= 20
    summary = swap.summarise(found, names)["good"]["prefixes"]["good"]
    assert summary["exact"] == found["good"].exact[:, 0].mean()


@pytest.mark.parametrize(
    ("chats", "conditions", "needle"),
    [
        ([], ["good"], "at least one"),
        (CONVERSATIONS, [], "at least one"),
        ([*CONVERSATIONS, chat("mute", "a", "b", weight=0.0)], ["good"], "'mute'"),
    ],
)
def test_nothing_to_measure_is_an_error(setting, chats, conditions, needle):
    with pytest.raises(DataError, match=needle):
        matrix(setting, chats, conditions)
