"""The conversations of examples/ablation/small.py are as its docstring says, and become tokens without loss."""

from __future__ import annotations

import json

import pytest

from examples.ablation import small
from ochat.data.dataset import TokenDataset
from ochat.data.prepare import prepare
from ochat.evaluate.ablate import variants
from ochat.text.tokenizer import load


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    small.make(folder, 0, 20, 40)
    return folder


def read(path):
    """(question, answer, class) of each record."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [(*(tuple(item["content"].split()) for item in r["items"]), r["condition"]) for r in records]


def test_experts_translate_in_order_and_the_others_in_reverse(folder):
    train, held_out = read(folder / "train-0.jsonl"), read(folder / "held_out-0.jsonl")
    dictionary = {}
    for question, answer, name in train + held_out:
        for word, translated in zip(question, answer if name == small.EXPERT else answer[::-1], strict=True):
            assert dictionary.setdefault(word, translated) == translated
    assert sorted(dictionary) == sorted(dictionary.values()) == sorted(small.WORDS) and len(small.WORDS) == 96
    assert [name for *_, name in train] == [small.EXPERT] * 20 + [small.SUBOPTIMAL] * 40


def test_held_out_questions_are_new_and_answered_by_both(folder):
    train, held_out = read(folder / "train-0.jsonl"), read(folder / "held_out-0.jsonl")
    asked = [question for question, *_ in held_out]
    assert len(set(asked)) == small.NUM_HELD_OUT and asked[::2] == asked[1::2]
    assert not set(asked) & {question for question, *_ in train}
    assert [name for *_, name in held_out[:2]] == [small.EXPERT, small.SUBOPTIMAL]


@pytest.mark.parametrize(("conditions", "length"), [("both", 19), ("ignore", 17)])
def test_a_word_is_a_token(folder, tmp_path, conditions, length):
    prepare([folder / "train-0.jsonl"], folder / "base-0", "openchat_v3.2", tmp_path, overwrite=True, progress=False,
            conditions=conditions)  # fmt: skip
    data, tokenizer = TokenDataset(tmp_path), load(folder / "base-0")
    assert set(data.lengths.tolist()) == {length} and set(data.supervised.tolist()) == {7}
    for example, (question, answer, _) in zip(data, read(folder / "train-0.jsonl"), strict=True):
        text = tokenizer.decode(example.input_ids.tolist())
        assert " ".join(question) in text and text.endswith(" ".join(answer)) and "<unk>" not in text


def test_a_seed_is_the_same_again_and_another_is_another(folder, tmp_path):
    for seed in (0, 1):
        small.make(tmp_path, seed, 20, 40)
    for name in ("train", "held_out"):
        assert (tmp_path / f"{name}-0.jsonl").read_bytes() == (folder / f"{name}-0.jsonl").read_bytes()
        assert (tmp_path / f"{name}-1.jsonl").read_bytes() != (folder / f"{name}-0.jsonl").read_bytes()
    weights = [(at / "model.safetensors").read_bytes() for at in (folder / "base-0", tmp_path / "base-0")]
    assert weights[0] == weights[1] != (tmp_path / "base-1" / "model.safetensors").read_bytes()


def test_its_configuration_is_one():
    base, options = variants.read_config(small.CONFIG)
    runs = variants.runs(base, options)
    assert len(runs) == 30 and runs[0].config.base.path == "ablations/small/base-0"
    assert runs[-1].config.data.mix["all"].path == "ablations/small/ablation/data/seed4-condition"
