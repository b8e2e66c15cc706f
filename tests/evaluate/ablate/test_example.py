"""The conversations of examples/ablation/small.py are as its docstring says, and become tokens without loss."""

from __future__ import annotations

import pytest

from examples.ablation import small
from ochat.data.dataset import TokenDataset
from ochat.data.prepare import prepare
from ochat.evaluate.ablate import variants
from ochat.text.tokenizer import load
from tests.evaluate.conftest import read_lines


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder, and (question, answer, class) of each record for training and held out."""
    folder = tmp_path_factory.mktemp("small")
    small.make(folder, 0, 20, 40)
    lines = [read_lines(folder / f"{name}-0.jsonl") for name in ("train", "held_out")]
    return folder, *([(*(i["content"].split() for i in r["items"]), r["condition"]) for r in rs] for rs in lines)


def test_experts_translate_in_order_the_others_in_reverse_and_held_out_questions_are_new(made):
    _, train, held_out = made
    dictionary = {}
    for question, answer, name in train + held_out:
        for word, translated in zip(question, answer if name == small.EXPERT else answer[::-1], strict=True):
            assert dictionary.setdefault(word, translated) == translated
    assert sorted(dictionary) == sorted(dictionary.values()) == sorted(small.WORDS) and len(small.WORDS) == 96
    assert [name for *_, name in train] == [small.EXPERT] * 20 + [small.SUBOPTIMAL] * 40
    asked = [tuple(question) for question, *_ in held_out]
    assert len(set(asked)) == small.NUM_HELD_OUT and asked[::2] == asked[1::2]
    assert not set(asked) & {tuple(question) for question, *_ in train}
    assert [name for *_, name in held_out[:2]] == [small.EXPERT, small.SUBOPTIMAL]


@pytest.mark.parametrize(("conditions", "length"), [("both", 19), ("ignore", 17)])
def test_a_word_is_a_token(made, tmp_path, conditions, length):
    folder, train, _ = made
    prepare([folder / "train-0.jsonl"], folder / "base-0", "openchat_v3.2", tmp_path, overwrite=True, progress=False,
            conditions=conditions)  # fmt: skip
    data, tokenizer = TokenDataset(tmp_path), load(folder / "base-0")
    assert set(data.lengths.tolist()) == {length} and set(data.supervised.tolist()) == {7}
    for example, (question, answer, _) in zip(data, train, strict=True):
        text = tokenizer.decode(example.input_ids.tolist())
        assert " ".join(question) in text and text.endswith(" ".join(answer)) and "<unk>" not in text


def test_a_seed_is_the_same_again_and_another_is_another(made, tmp_path):
    for seed in (0, 1):
        small.make(tmp_path, seed, 20, 40)
    for name in ("train-{}.jsonl", "held_out-{}.jsonl", "base-{}/model.safetensors"):
        files = (made[0] / name.format(0), tmp_path / name.format(0), tmp_path / name.format(1))
        first, again, other = (path.read_bytes() for path in files)
        assert first == again != other


def test_its_configuration_is_one():
    runs = variants.runs(*variants.read_config(small.CONFIG))
    assert len(runs) == 30 and runs[0].config.base.path == "ablations/small/base-0"
    assert str(runs[-1].data) == "ablations/small/ablation/data/seed4-condition"
