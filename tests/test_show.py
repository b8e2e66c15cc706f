"""`ochat show`: every token once, in order, with its weight; the choice of conversations.

pytest tests/test_show.py
"""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from ochat import cli
from ochat.commands import show
from ochat.commands.show import ShowOptions
from ochat.data import shown
from ochat.data.dataset import TokenDataset
from ochat.data.prepare import prepare
from ochat.errors import ConfigError, DataError
from tests.tiny import write_lines, write_tokenizer

RECORDS = [
    {"items": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello\nyou"}], "condition": "GPT4",
     "id": 7},
    {"items": [{"role": "user", "content": "é漢", "weight": 1}, {"role": "assistant", "content": "ab", "weight": -0.5}],
     "condition": "GPT3", "reward": 0.25},
    {"items": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "wrong right", "spans": [[0, 6, 0]]}],
     "condition": "GPT4", "system": "S"},
    {"items": [{"role": "user", "content": "y"}, {"role": "assistant", "content": "half two one", "weight": 0.5,
                                                  "spans": [[5, 8, 2], [8, 12, 1]]}], "condition": "GPT4"},
]  # fmt: skip


@pytest.fixture
def data(tmp_path):
    source = write_lines(tmp_path / "in.jsonl", RECORDS)
    prepare([source], write_tokenizer(tmp_path / "base"), "openchat_v3.2", tmp_path / "out", progress=False)
    return tmp_path / "out"


def printed(data, width=100, **options) -> str:
    tokens, console = show.read_tokenizer(data), Console(file=io.StringIO(), width=width, highlight=False)
    for each in shown.conversations(data, range(len(RECORDS))):
        show.show(each, tokens, console, **options)
    return console.file.getvalue()  # type: ignore[union-attr]


def test_what_is_shown_is_what_is_trained(data):
    trained, dataset = list(shown.conversations(data, range(len(RECORDS)))), TokenDataset(data)
    for each, example, record in zip(trained, dataset, RECORDS, strict=True):
        weights = []
        for span in each.spans:
            weights += [span.own_weight] * (span.end - len(weights))
        assert each.input_ids == example.input_ids.tolist() and weights == example.loss_weights.tolist()
        assert each.condition == record["condition"] and each.reward == record.get("reward")
        assert each.place.endswith(f"in.jsonl:{each.index + 1}")


def test_every_text_is_printed_with_its_weight_and_place(data):
    text = printed(data)
    for wanted in ("«Hello\n", "you<|end_of_turn|>»", "«é漢<|end_of_turn|>»", "«[-0.5]ab", "in.jsonl:2", "reward 0.25"):
        assert wanted in text, wanted
    assert "wrong «right<|end_of_turn|>»" in text and "[0]" not in text
    assert "«[0.5]half [2]two[1] one[0.5]<|end_of_turn|>»" in text
    assert len(printed(data, most_lines=1).splitlines()) < len(text.splitlines())


def test_ids_are_all_printed_in_order(data):
    text = printed(data, width=10_000, with_ids=True)
    ids = [i for each in shown.conversations(data, range(len(RECORDS))) for i in each.input_ids]
    assert [int(number) for number in re.findall(r"\((\d+)\) ", text)] == ids


def test_conversations_are_chosen_by_class_or_place(data, capsys):
    for options, wanted in (
        ((), ["index 0 ", "index 1 ", "index 2 "]),
        (("--n", "1"), ["index 0 "]),
        (("--class", "GPT4"), ["index 0 ", "index 2 ", "index 3 "]),
        (("--class=GPT4", "--index=1"), ["index 1 "]),
        (("--line", "2"), ["index 1 "]),
        (("--line", "in.jsonl:3"), ["index 2 "]),
    ):
        cli.call("show", [str(data), *options])
        out = capsys.readouterr().out
        assert re.findall(r"index \d ", out) == wanted, options
        assert out.startswith("template openchat_v3.2 · context 4,096 · ignored, as metadata: id in 1")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, "--n 0: at least 1"),
        ({"index": 4}, "no conversation 4; it has 4"),
        ({"line": "5"}, "no conversation from line 5: look for it in rejects.jsonl"),
        ({"line": "n.jsonl:1"}, "no conversation from line n.jsonl:1"),
        ({"line": "a:b"}, "--line a:b: a number is needed"),
        ({"index": -1}, "no conversation -1"),
        ({"class_": "GPT5"}, "--class 'GPT5'.*it has 'GPT4', 'GPT3'"),
    ],
)
def test_what_is_not_there_is_refused(data, options, message):
    with pytest.raises((ConfigError, DataError), match=message):
        show.main(ShowOptions(data, **options))


def test_a_set_without_a_tokenizer_needs_a_base(data, tmp_path):
    (data / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match="--base"):
        show.main(ShowOptions(data))
    show.main(ShowOptions(data, base=str(tmp_path / "base")))
