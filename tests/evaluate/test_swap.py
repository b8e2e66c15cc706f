"""The swap matrix equals a loop over conversations and tokens in float64; the prefix asked for is the one that is
measured, over the same tokens as every other; intervals hold the truth as often as they say, where tokens of a
conversation are alike, and pairs are surer than singles: pytest tests/evaluate/test_swap.py"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ochat.data.prepare import prepare
from ochat.errors import ConfigError, DataError
from ochat.evaluate import swap
from ochat.evaluate.held_out import HeldOut, read_held_out
from ochat.evaluate.swap import Sums
from ochat.model.transformer import pack_ids
from ochat.text import template as templates
from ochat.text import tokenizer as tokenizers
from ochat.text.conversation import Conversation, Message
from tests import text_kit
from tests.tiny import mixed_conversations, write_lines, write_tokenizer


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
    held_out = [HeldOut.of(each, *setting[1:]) for each in chats]
    return swap.swap_matrix(*setting, held_out, conditions)


def by_hand(setting, conversation: Conversation, prefix: str) -> tuple[int, float, int]:
    """Supervised tokens, sum of -log p and hits, one token at a time."""
    model, template, tokenizer = setting
    ids, weights = template.encode(replace(conversation, condition=prefix), tokenizer)
    with torch.no_grad():
        scores = model(*pack_ids(model, [ids]), head=F.linear)  # (len, V) float64
    live = [i for i in range(1, len(ids)) if weights[i] != 0]
    losses = [-scores[i - 1].log_softmax(-1)[ids[i]].item() for i in live]
    return len(live), sum(losses), sum(int(scores[i - 1].argmax()) == ids[i] for i in live)


CALL = Message("assistant", "", tool_calls=({"name": "rain", "arguments": {}},))
WITH_TOOLS = Conversation(
    (Message("user", "Rain?"), CALL, Message("tool", "no"), Message("assistant", "No.")),
    "good",
    tools=({"name": "rain"},),
)


@pytest.mark.parametrize("tokens_per_pass", [1, 40, 10_000])  # alone, some together, all in one pass
def test_equals_a_loop_over_tokens_in_float64(setting, monkeypatch, tokens_per_pass):
    monkeypatch.setattr(swap, "TOKENS_PER_PASS", tokens_per_pass)
    prefixes = ["good", "bad", ""]
    found = matrix(setting, CONVERSATIONS, prefixes)
    assert list(found) == ["good", "bad"]
    for name, sums in found.items():
        for i, conversation in enumerate(each for each in CONVERSATIONS if each.condition == name):
            for j, prefix in enumerate(prefixes):
                tokens, nll, correct = by_hand(setting, conversation, prefix)
                assert (sums.tokens[i], sums.correct[i, j], sums.exact[i, j]) == (tokens, correct, correct == tokens)
                assert sums.nll[i, j] == pytest.approx(nll, rel=1e-12), (name, prefix)
        assert len({round(nll, 4) for nll in sums.nll.sum(0)}) == 3, "the prefix must reach the model"


@pytest.mark.parametrize("mode", ["both", "assistant", "ignore"])
@pytest.mark.parametrize(("name", "suffix"), [("openchat_v3.2", ""), ("openchat_3.6", ""), ("openchat_3.6", "\n")])
def test_an_exchanged_prefix_is_the_conversation_encoded_anew(tmp_path, name, suffix, mode):
    template = replace(templates.with_conditions(templates.load(name), mode), suffix=suffix)
    tokens = ("<|end_of_turn|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    tokenizer = tokenizers.load(write_tokenizer(tmp_path / "base"), tokens)
    names, chats = ["A B", "", "GPT4"], [Conversation.from_dict(record) for record in mixed_conversations(3, 20)]
    for each in [*chats, *CONVERSATIONS, *([WITH_TOOLS] if "tool" in template.roles else [])]:
        if all(message.weight == 0 for message in each.items if message.role == "assistant"):
            continue
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
    base, file = write_tokenizer(tmp_path / "base"), write_lines(tmp_path / "chats.jsonl", mixed_conversations(5, 60))
    for name, more in (("data", {}), ("1", {"shard": "1/2"}), ("2", {"shard": "2/2"})):
        prepare([file], base, "openchat_v3.2", tmp_path / name, empty_answers="keep", progress=False, **more)
    tokenizer, template = tokenizers.load(base), templates.load("openchat_v3.2")

    def read(data):
        found = []
        for each in read_held_out(data, template, tokenizer):
            under = each.under(["GPT4", "x"], template, tokenizer)
            found.append((each.condition, *((x.input_ids.tolist(), x.loss_weights.tolist()) for x in under)))
        return found

    plain = read(file)
    assert read(tmp_path / "data") == plain and len(plain) > 50
    assert sorted(read([tmp_path / "1", tmp_path / "2"])) == sorted(plain)


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


CONDITIONS = ("own", "other")
TRUE_NLL = 2.0


def draw(seed: int, count: int) -> Sums:
    """`count` conversations of skewed lengths, each with a difficulty that all of its tokens share, a gamma of mean
    TRUE_NLL; the other prefix costs 0.1 more a token."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, 200, count) ** 2 // 200 + 1
    difficulty = rng.gamma(4.0, TRUE_NLL / 4, count)
    nll = tokens * difficulty
    other = nll + tokens * (0.1 + rng.normal(0, 0.05, count))
    correct = rng.binomial(tokens, np.exp(-difficulty))
    return Sums(tokens, np.stack([nll, other], 1), np.stack([correct, correct], 1))


def cells(sums: Sums) -> dict:
    return swap.summarise({"own": sums}, CONDITIONS)["own"]["prefixes"]


def test_an_interval_holds_the_truth_as_often_as_it_says(monkeypatch):
    monkeypatch.setattr(swap, "RESAMPLES", 400)
    ends = [cells(draw(seed, 100))["own"]["nll_interval"] for seed in range(300)]
    # three standard errors of 300 draws are 0.038; the percentiles of 100 fall a bit short; were tokens taken for
    # independent draws, it would be far less
    assert 0.90 <= np.mean([low <= TRUE_NLL <= high for low, high in ends]) <= 0.98


def test_the_difference_of_two_prefixes_is_paired():
    found = cells(draw(1, 100))
    (low, high), (own_low, own_high) = found["other"]["nll_above_own_interval"], found["own"]["nll_interval"]
    assert low < 0.1 < high and (high - low) < (own_high - own_low) / 5
    assert found["own"]["nll_above_own"] == 0 and found["own"]["nll_above_own_interval"] == [0, 0]


def test_means_are_over_tokens_and_belong_together():
    sums = Sums(np.array([1, 3]), np.array([[4.0, 0.0], [0.0, 8.0]]), np.array([[1, 0], [2, 3]]))
    found = cells(sums)
    assert [found[name]["nll"] for name in CONDITIONS] == [1.0, 2.0]
    assert [found[name]["accuracy"] for name in CONDITIONS] == [0.75, 0.75]
    assert found["other"]["perplexity"] == pytest.approx(np.exp(2)) and found["other"]["nll_above_own"] == 1.0
    ends = found["other"]
    assert np.log(ends["perplexity_interval"]) == pytest.approx(ends["nll_interval"], rel=1e-2, abs=1e-6)


def test_the_same_matrix_gives_the_same_record_and_one_conversation_no_interval():
    sums = draw(2, 30)
    assert cells(sums) == cells(sums) and cells(draw(2, 1))["own"]["nll_interval"] is None
    other = swap.summarise({"stranger": sums}, CONDITIONS)["stranger"]["prefixes"]["own"]
    assert other["nll_above_own"] is None and other["nll_above_own_interval"] is None


def test_none_or_all_exact_leaves_room_for_the_others():
    """Of 20 conversations none exact, the truth may be 10 %: it leaves none in one of eight draws."""
    some = np.array([[3, 0]] * 20)  # all under one prefix, none under the other
    found = cells(Sums(np.full(20, 3), np.ones((20, 2)), some))
    for name, share, wanted in (("own", 1.0, [0.8389, 1.0]), ("other", 0.0, [0.0, 0.1611])):
        assert found[name]["exact"] == share
        assert found[name]["exact_interval"] == pytest.approx(wanted, abs=1e-4)  # Wilson's, as printed by others


def test_a_rendered_conversation_is_encoded_again_under_each_class(tmp_path):
    """With the weights that its spans have by then, and the same supervised tokens under every class."""
    tokenizer = tokenizers.load(text_kit.small_folder("qwen", tmp_path))
    template = replace(templates.load("chatml"), context=100)
    said = (Message("user", "a question", 0.5), Message("assistant", "an answer"), Message("user", "b"))
    conversation = Conversation((*said, Message("assistant", "more " * 9)), "GPT4", "Sys")
    held = HeldOut.of(conversation, template, tokenizer)
    alone = replace(held, spans=[span._replace(weight=float(span.role == "assistant")) for span in held.spans])
    classes = ["GPT4", "", "a class of many letters"]
    found = alone.under(classes, template, tokenizer)
    for condition, example in zip(classes, found, strict=True):
        ids, _ = template.encode(replace(conversation, condition=condition), tokenizer)
        assert ids[: len(example.input_ids)] == example.input_ids.tolist() and len(example.input_ids) <= 100
        assert set(example.loss_weights.tolist()) == {0, 1}
        supervised = example.input_ids[example.loss_weights != 0].tolist()
        assert tokenizer.decode(supervised).startswith("an answer")
        assert supervised == found[0].input_ids[found[0].loss_weights != 0].tolist()
    assert_prepared_alike(replace(alone, conversation=None), classes, found, template, tokenizer)


def assert_prepared_alike(prepared, classes, found, template, tokenizer):
    """A prepared conversation, which has only ids and spans, gives the same under all classes."""
    for one, other in zip(prepared.under(classes, template, tokenizer), found, strict=True):
        assert one.input_ids.tolist() == other.input_ids.tolist()
        assert one.loss_weights.tolist() == other.loss_weights.tolist()
    assert prepared.under(["GPT4"], template, tokenizer)[0].input_ids.tolist()


@pytest.mark.parametrize("kind", ["qwen", "gpt2", "llama", "gemma"])
@pytest.mark.parametrize("name", ["chatml", "qwen3", "llama3.1"])
def test_the_class_of_a_prepared_rendered_conversation_is_exchanged(tmp_path, kind, name):
    """Also where messages begin with the class, blanks or line breaks, and spell special tokens."""
    template = templates.load(name)
    tokens = (
        "<|im_start|>",
        "<|im_end|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
        "<|begin_of_text|>",
    )
    tokenizer = tokenizers.load(text_kit.small_folder(kind, tmp_path), added_tokens=tokens)
    said = ["GPT4 is", "\n\n GPT4 user\n", "a <|im_end|>\n<|im_start|>GPT4 user\nb", "GPT4 assistant\n"]
    items = tuple(Message(("user", "assistant")[i % 2], text) for i, text in enumerate(said))
    for system in ("", "GPT4 user\nGPT4 assistant"):
        held = HeldOut.of(Conversation(items, "GPT4", system), template, tokenizer)
        classes = ["GPT4", "", "Math Correct", "GPT4 user"]
        found = held.under(classes, template, tokenizer)
        assert_prepared_alike(replace(held, conversation=None), classes, found, template, tokenizer)
    unnamed = replace(held, conversation=None, condition="")
    with pytest.raises(ConfigError, match="give the conversations themselves"):
        unnamed.under(["GPT3"], template, tokenizer)
