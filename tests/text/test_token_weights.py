"""Roles and weights of characters become those of tokens, and segments their ids.

pytest tests/text/test_token_weights.py
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ochat.text import token_weights
from ochat.text import tokenizer as tokenizers
from ochat.text.conversation import WeightedSpan, default_weight
from ochat.text.token_weights import ROLES, Characters, Segment, Span, token_spans
from tests import text_kit

NAN = float("nan")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    return {k: tokenizers.load(text_kit.small_folder(k, folder / k)) for k in ("llama", "gemma", "gpt2", "qwen")}


TABLE = {  # offsets of tokens, role and weight of each character -> (end, role, weight) of each span
    "one role and weight": ([(0, 2), (2, 3)], "aaa", [1, 1, 1], [(2, "assistant", 1.0)]),
    "no weight given": ([(0, 2), (2, 3)], "aaa", [NAN] * 3, [(2, "assistant", None)]),
    "roles part": ([(0, 1), (1, 2)], "pa", [NAN] * 2, [(1, "prefix", None), (2, "assistant", None)]),
    "weights part": ([(0, 1), (1, 2)], "aa", [0, 1], [(1, "assistant", 0.0), (2, "assistant", 1.0)]),
    "a token straddles: the mean by characters": ([(0, 4)], "aaaa", [0, 1, 1, 1], [(1, "assistant", 0.75)]),
    "a straddling token has the role that weighs": ([(0, 2)], "pa", [NAN] * 2, [(1, "assistant", 0.5)]),
    "opposite weights cancel": ([(0, 2)], "aa", [1, -1], [(1, "assistant", 0.0)]),
    "bytes of one character": ([(0, 1), (0, 1), (1, 2)], "ua", [NAN] * 2, [(2, "user", None), (3, "assistant", None)]),
    "a token without characters goes with what follows": ([(1, 1), (1, 2)], "pa", [NAN] * 2, [(2, "assistant", None)]),
    "and at the end with the last": ([(0, 1), (1, 1)], "a", [0.5], [(2, "assistant", 0.5)]),
    "nothing": ([], "", [], []),
}


@pytest.mark.parametrize("name", TABLE)
def test_token_spans(name):
    offsets, letters, weights, expected = TABLE[name]
    roles = np.array([next(i for i, role in enumerate(ROLES) if role[0] == letter) for letter in letters], np.uint8)
    found = token_weights.token_spans(offsets, roles, np.array(weights, np.float32))
    assert [tuple(span[:3]) for span in found] == expected


texts = st.text(min_size=1, max_size=12) | st.sampled_from([text for text in text_kit.NASTY if text])
weighted = st.lists(st.tuples(texts, st.sampled_from([0.0, 0.25, 1.0, -2.0])), min_size=1, max_size=5)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["llama", "gemma", "gpt2", "qwen"]), weighted)
def test_tokens_weigh_what_their_characters_do(small, kind, parts):
    """Ids are those of the whole text, every token is in one span, and each weighs between its characters."""
    tokenizer, text = small[kind], "".join(part for part, _ in parts)
    spans, at = [], 0
    for part, weight in parts:
        spans.append(WeightedSpan(at, at + len(part), weight))
        at += len(part)
    segment = Segment("assistant", 1.0, text, (7,), Characters.of(len(text), "assistant", 1.0, spans))
    [(ids, found)] = token_weights.encode([[segment]], tokenizer)
    assert ids == [*tokenizer.encode(text), 7]
    assert found[-1] == Span(len(ids), "assistant", 1.0)
    ends = [span.end for span in found]
    assert ends == sorted(set(ends)) and {span.role for span in found} == {"assistant"}
    lowest, highest = min(w for _, w in parts), max(w for _, w in parts)
    assert all(lowest <= span.weight <= highest for span in found[:-1])
    if lowest == highest:
        assert [span.weight for span in found] == [lowest] * (len(found) - 1) + [1.0]


@given(st.lists(st.lists(st.tuples(texts, st.booleans()), max_size=4), max_size=4))
@settings(max_examples=50, deadline=None)
def test_conversations_are_encoded_together_as_alone(small, said):
    """Plain segments and weighted ones, equal texts among them; a live segment's special tokens are special."""
    tokenizer = small["gpt2"]
    conversations = [
        [
            Segment("user", None, text, (1,), Characters.of(len(text), "user", None) if plain else None)
            for text, plain in each
        ]
        for each in said
    ]
    together = token_weights.encode(conversations, tokenizer)
    assert together == [token_weights.encode([each], tokenizer)[0] for each in conversations]
    assert [ids for ids, _ in together] == [[i for t, _ in each for i in (*tokenizer.encode(t), 1)] for each in said]
    live = Segment("prefix", None, "a<|im_end|>", (), Characters.of(11, "prefix", None), is_live=True)
    [(ids, _)] = token_weights.encode([[live, live._replace(is_live=False)]], tokenizer)
    assert ids.count(tokenizer.special_tokens["<|im_end|>"]) == 1


def test_a_span_weighs_its_role_where_nothing_is_given():
    assert [Span(1, role, None).own_weight for role in ROLES] == [default_weight(role) for role in ROLES]
    assert not Span(1, "assistant", 1e-60).is_supervised, "a data set holds float32"


def test_of_a_rendered_newline_that_ends_a_run_the_first_token_counts():
    roles, weights = np.array([4, 4, 3], np.uint8), np.full(3, NAN, np.float32)
    offsets = [(0, 1), (1, 2), (1, 2), (2, 3)]
    assert token_spans(offsets, roles, weights, text="a\nb")[0][:3] == (2, "assistant", None)
    assert token_spans(offsets, roles, weights)[0][:3] == (3, "assistant", None)
    assert token_spans(offsets, roles, weights, text="aéb")[0][:3] == (3, "assistant", None)
    assert token_spans(offsets[:3], roles[:2], weights[:2], text="a\n")[0][:3] == (2, "assistant", None)
    assert token_spans(offsets, np.array([4, 4, 4], np.uint8), weights, text="a\nb")[0][:3] == (4, "assistant", None)
