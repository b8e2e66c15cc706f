"""Scores are float64's log-softmax of the model's logits, packed as apart; their sums are what `ochat eval` measures;
what is written is read again: pytest tests/evaluate/test_score.py"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch
import torch.nn.functional as F
from safetensors.numpy import load_file

from ochat import cli
from ochat.commands.score import ScoreOptions, score
from ochat.data.dataset import TokenDataset
from ochat.data.prepare import prepare
from ochat.errors import ConfigError, DataError
from ochat.evaluate import held_out, swap
from ochat.evaluate import score as scoring
from ochat.evaluate.held_out import HeldOut
from ochat.model import hf
from ochat.model.transformer import pack_ids
from ochat.text import template as templates
from ochat.text import tokenizer as tokenizers
from ochat.text.conversation import Conversation
from tests import tiny
from tests.evaluate.test_swap import CONVERSATIONS
from tests.test_docs import blocks
from tests.tiny import write_lines

CONDITIONS = (scoring.OWN, "bad", scoring.NONE)


def held(setting, chats=CONVERSATIONS) -> list[HeldOut]:
    return [replace(HeldOut.of(each, *setting[1:]), place=f"chats.jsonl:{i + 1}") for i, each in enumerate(chats)]


def measured(setting, conditions=CONDITIONS, chats=CONVERSATIONS):
    conversations = held(setting, chats)
    table = scoring.supervised_tokens(conversations, setting[1])
    return table, scoring.measure(*setting, conversations, table, conditions)


def by_hand(setting, conversation: Conversation, prefix: str):
    """nll, entropy and rank of each supervised token, one at a time in float64."""
    model, template, tokenizer = setting
    ids, weights = template.encode(replace(conversation, condition=prefix), tokenizer)
    with torch.no_grad():
        scores = model(*pack_ids(model, [ids]), head=F.linear)  # (len, V) float64
    for i in (i for i in range(1, len(ids)) if weights[i] != 0):
        log_p = scores[i - 1].log_softmax(-1)
        better = sum(value > scores[i - 1][ids[i]] for value in scores[i - 1])
        yield -log_p[ids[i]].item(), -(log_p.exp() * log_p).sum().item(), int(better)


@pytest.mark.parametrize("tokens_per_pass", [1, 40, 10_000])  # alone, some together, all in one pass
def test_every_token_equals_the_logits_in_float64(setting, monkeypatch, tokens_per_pass):
    monkeypatch.setattr(swap, "TOKENS_PER_PASS", tokens_per_pass)
    table, scores = measured(setting)
    assert len(table.token_ids) > 20 and table.record_ids[2] == "chats.jsonl:3"
    for i, conversation in enumerate(CONVERSATIONS):
        own = slice(*table.offsets[i : i + 2])
        for column, prefix in enumerate((conversation.condition, "bad", "")):
            wanted = np.array(list(by_hand(setting, conversation, prefix)))
            found = (each[column, own] for each in (scores.nll, scores.entropy, scores.rank))
            for ours, truth in zip(found, wanted.T, strict=True):
                np.testing.assert_allclose(ours, truth, rtol=1e-6)  # the file holds float32
    assert (scores.rank > 0).any() and (scores.rank == 0).any() and len(set(scores.nll[0])) > 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_statistics_hold_for_large_logits_a_cap_and_chunks(dtype):
    """Entropy has no cancellation: a sure token's is about 0, not the rounding of its logits."""
    torch.manual_seed(0)
    logits, labels = torch.randn(9, 131, dtype=dtype) * 3 + 500, torch.randint(131, (9,))
    logits[0, 7] += 1000
    for cap in (0.0, 30.0):
        truth = logits.double() if not cap else cap * torch.tanh(logits.double() / cap)
        log_p = truth.log_softmax(-1)
        nll, entropy, rank = scoring.token_statistics(logits.clone(), labels, cap)
        exact = {torch.float32: 3e-5, torch.float64: 1e-12}[dtype]  # half a step of fp32 at 500
        torch.testing.assert_close(nll.double(), -log_p.gather(1, labels[:, None])[:, 0], rtol=exact, atol=exact)
        torch.testing.assert_close(entropy.double(), torch.special.entr(log_p.exp()).sum(-1), rtol=exact, atol=exact)
        assert cap or rank.tolist() == [int((row > row[y]).sum()) for row, y in zip(logits, labels, strict=True)]


def test_sums_are_what_the_swap_matrix_measures(world, chats, exported):
    model, tokenizer, template = hf.load(exported, dtype="float32"), tokenizers.load(exported), None
    template = held_out.choose_template(world.data, exported, None, tokenizer)
    classes = ["GPT3", "GPT4"]
    matrix = swap.swap_matrix(
        model, template, tokenizer, held_out.read_held_out(world.data, template, tokenizer), classes
    )
    conversations = held_out.open_conversations(world.data, template, tokenizer)
    table = scoring.supervised_tokens(conversations, template)
    scores = scoring.measure(model, template, tokenizer, conversations, table, classes)
    for column in range(2):
        sums = scores.sums(table.conversations, len(table.record_ids), column)
        for name, wanted in matrix.items():
            of_class = np.array(table.classes) == name
            assert (sums["nll"][of_class] == wanted.nll[:, column]).all(), "to the bit"
            assert (sums["num_tokens"][of_class] == wanted.tokens).all()
            hits = [
                (scores.rank[column, a:b] == 0).sum() for a, b in zip(table.offsets, table.offsets[1:], strict=False)
            ]
            assert (np.array(hits)[of_class] == wanted.correct[:, column]).all()


def run(model, data, output, **more):
    return score(ScoreOptions(model, data, output, dtype="float32", **more))


def test_files_hold_every_token_and_the_tables_its_sums(world, chats, exported, tmp_path):
    table, scores = run(exported, world.data, tmp_path / "scores", condition=("own", "GPT3", "none"))
    found = load_file(tmp_path / "scores" / "tokens.safetensors")
    data = TokenDataset(world.data)
    assert bytes(found["conditions"]).decode().splitlines() == ["own", "GPT3", "none"]
    assert bytes(found["record_ids"]).decode().splitlines() == [data.source_location(i) for i in range(len(data))]
    assert found["lengths"].tolist() == data.lengths.tolist()
    assert np.diff(found["offsets"]).tolist() == data.supervised.tolist()
    wanted = np.concatenate([each.input_ids[1:][each.loss_weights[1:] != 0] for each in data])
    assert found["token_ids"].tolist() == wanted.tolist() and found["nll"].shape == (3, len(wanted))
    for name in ("nll", "entropy", "rank"):
        assert np.array_equal(found[name], getattr(scores, name)) and np.isfinite(found[name]).all()
    is_other = np.repeat([each.condition != "GPT3" for each in data], np.diff(found["offsets"]))
    assert np.array_equal(found["nll"][0][~is_other], found["nll"][1][~is_other])
    assert (found["nll"][0][is_other] != found["nll"][1][is_other]).all()

    by_message = parquet.read_table(tmp_path / "scores" / "messages.parquet").to_pylist()
    rows = parquet.read_table(tmp_path / "scores" / "conversations.parquet").to_pylist()
    records = [json.loads(line) for line in chats.read_text().splitlines()]
    assert len(rows) == 3 * len(records) and [row["condition"] for row in rows[:: len(records)]] == [
        "own",
        "GPT3",
        "none",
    ]
    for row in rows:
        own = [
            each
            for each in by_message
            if (each["record_id"], each["condition"]) == (row["record_id"], row["condition"])
        ]
        record = records[row["line"] - 1]
        assert (row["file"], row["class"]) == (str(chats), record["condition"])
        assert [each["message"] for each in own] == [i for i, item in enumerate(record["items"]) if item["weight"]]
        for key in ("num_tokens", "nll", "entropy"):
            assert sum(each[key] for each in own) == pytest.approx(row[key], rel=1e-12)
        assert sum(each["mean_rank"] * each["num_tokens"] for each in own) == pytest.approx(
            row["mean_rank"] * row["num_tokens"]
        )


def test_a_file_of_conversations_has_the_scores_of_its_data_set(world, chats, exported, tmp_path):
    for name, data in (("set", world.data), ("file", chats)):
        run(exported, data, tmp_path / name)
    one, other = (load_file(tmp_path / name / "tokens.safetensors") for name in ("set", "file"))
    assert one.keys() == other.keys() and all(np.array_equal(one[key], other[key]) for key in one)


def test_a_conversation_of_several_classes_is_its_own_condition(world, exported, tmp_path):
    """Its ids are scored as they are, and each message is counted under its own class."""
    items = [{"role": role, "content": "1+1"} for role in ("user", "assistant") * 2]
    items[2]["condition"] = items[3]["condition"] = "GPT3"
    source = write_lines(tmp_path / "mixed.jsonl", [{"items": items, "condition": "GPT4"}])
    prepare([source], world.base, "openchat_v3.2", tmp_path / "mixed", progress=False)
    (example,) = TokenDataset(tmp_path / "mixed")
    for name, data in (("set", tmp_path / "mixed"), ("file", source)):
        _, scores = run(exported, data, tmp_path / name)
        log_p = hf.load(exported, dtype="float32").logits([example.input_ids.tolist()])[0].log_softmax(-1)
        at = np.flatnonzero(example.loss_weights[1:])
        truth = [-log_p[i, example.input_ids[i + 1]].item() for i in at]
        np.testing.assert_allclose(scores.nll[0], truth, rtol=1e-5)
        rows = parquet.read_table(tmp_path / name / "messages.parquet").to_pylist()
        assert [(row["message"], row["class"]) for row in rows] == [(1, "GPT4"), (3, "GPT3")]
        assert [row["class"] for row in parquet.read_table(tmp_path / name / "conversations.parquet").to_pylist()] == [
            "GPT4"
        ]


def test_a_token_without_room_under_a_longer_class_is_said_to_be_missing(setting):
    model, template, tokenizer = setting
    short = replace(template, context=len(HeldOut.of(CONVERSATIONS[0], template, tokenizer).input_ids))
    longer = "gooder"
    table, scores = measured((model, short, tokenizer), (scoring.OWN, longer), CONVERSATIONS[:2])
    alone = measured((model, short, tokenizer), (scoring.OWN,), CONVERSATIONS[:2])[1]
    gone = scores.rank[0] < 0
    assert 0 < gone.sum() < len(gone) and not (alone.rank < 0).any()
    for column in range(2):
        assert ((scores.rank[column] < 0) == gone).all() and (np.isnan(scores.nll[column]) == gone).all()
        sums = scores.sums(table.conversations, 2, column)
        assert sums["num_tokens"].sum() == (~gone).sum() and np.isfinite(sums["nll"]).all()
    np.testing.assert_allclose(scores.nll[0][~gone], alone.nll[0][~gone], rtol=1e-6)


def test_the_command_prints_means_and_leaves_nothing_half_done(world, chats, exported, tmp_path, capsys, monkeypatch):
    output = tmp_path / "scores"
    cli.run("score", [str(exported), str(chats), str(output), "--condition", "own", "GPT3", "--dtype", "float32"])
    said = capsys.readouterr().out
    rows = parquet.read_table(output / "conversations.parquet").to_pylist()
    for name in ("GPT3", "GPT4"):
        own = [row for row in rows if (row["class"], row["condition"]) == (name, "own")]
        assert f"{sum(r['nll'] for r in own) / sum(r['num_tokens'] for r in own):.3f}" in said
    assert "tokens/s" in said and str(output / "tokens.safetensors") in said
    monkeypatch.setattr("ochat.evaluate.score_files._write_table", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(exported, chats, tmp_path / "other")
    assert [path.name for path in tmp_path.iterdir()] == ["scores"]


@pytest.mark.parametrize(
    ("more", "error", "needle"),
    [
        ({"condition": ("a<|end_of_turn|>",)}, ConfigError, "--condition.*special token"),
        ({"device": "cuda:9"}, ConfigError, "--device cuda:9"),
        ({"template": "openchat_v9"}, ConfigError, "openchat_v9"),
        ({"data": '{"items": []}'}, DataError, ":2: items"),
        ({"output": Path("/proc/nowhere")}, ConfigError, "/proc/nowhere"),
        ({"output": "taken"}, ConfigError, "taken: exists"),
    ],
)
def test_what_cannot_be_is_named(chats, exported, tmp_path, monkeypatch, more, error, needle):
    given = {"data": chats, "output": tmp_path / "scores"} | more
    if "data" in more:
        given["data"] = tmp_path / "bad.jsonl"
        given["data"].write_text(f"{chats.read_text().splitlines()[0]}\n{more['data']}\n")
    if more.get("output") == "taken":
        given["output"] = tmp_path / "taken"
        given["output"].write_text("")
    if "output" not in more:
        monkeypatch.setattr("ochat.export.open_model.open_model", lambda *_, **__: pytest.fail("too late"))
    with pytest.raises(error, match=needle):
        run(exported, **given)


def test_data_of_another_model_and_classes_without_prefixes_are_refused(world, chats, exported, other_base, tmp_path):
    plain = tmp_path / "plain"
    prepare([chats], world.base, "openchat_v3.2", plain, conditions="ignore", progress=False)
    for model, data, more, needle in (
        (world.base, plain, {"condition": ("GPT4",)}, "--condition GPT4: the template"),
        (other_base, world.data, {}, "another tokenizer"),
        (exported, plain, {}, "another template"),
    ):
        with pytest.raises(ConfigError, match=needle):
            run(model, data, tmp_path / "scores", **more)
    table, _ = run(world.base, plain, tmp_path / "scores")
    assert set(table.classes) == {"GPT3", "GPT4"}


def test_nothing_supervised_is_an_error(exported, tmp_path):
    silent = tiny.conversations(3)
    for record in silent:
        for item in record["items"]:
            item["weight"] = 0.0
    with pytest.raises(DataError, match="nothing to score"):
        run(exported, write_lines(tmp_path / "silent.jsonl", silent), tmp_path / "scores")


def test_the_templates_own_context_cuts_a_file_as_prepare_does(setting, tmp_path):
    """Also where another class's prefix is shorter, and would leave room for more."""
    model, template, tokenizer = setting
    chats = [replace(each, condition="a class of many letters") for each in CONVERSATIONS]
    short = replace(templates.load("openchat_v3.2"), context=80)
    table, scores = measured((model, short, tokenizer), (scoring.NONE,), chats)
    assert table.lengths.max() == 80 and not (scores.rank < 0).any()


def test_every_recipe_of_the_page_runs_and_its_weights_prepare(world, chats, exported, tmp_path, monkeypatch):
    page = (tiny.ROOT / "docs" / "scoring.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    Path("chats.jsonl").write_text(chats.read_text())
    for name, model, conditions in (
        ("scores", exported, ()), ("scores/base", world.base, ()), ("scores/reference", exported, ()),
        ("scores/first", exported, ()), ("scores/both", exported, ("GPT4", "GPT3")),
    ):  # fmt: skip
        template = "openchat_v3.2" if model == world.base else None
        run(model, Path("chats.jsonl"), Path(name), condition=conditions, template=template)
    count = len(chats.read_text().splitlines())
    write_lines(Path("rewards.jsonl"), [{"record_id": f"chats.jsonl:{i + 1}", "reward": i % 7} for i in range(count)])
    found = blocks("python", page)
    assert len(found) == 4
    for number, code in enumerate(found):
        Path("token_weights.safetensors").unlink(missing_ok=True)
        exec(compile(code, f"docs/scoring.md, block {number}", "exec"), {})
        more = {"token_weights": "token_weights.safetensors", "progress": False}
        prepare(["chats.jsonl"], world.base, "openchat_v3.2", f"data/{number}", **more)
        assert set(TokenDataset(f"data/{number}").class_names) == {"GPT3", "GPT4"}
    records = [json.loads(line) for line in Path("chats.jsonl").read_text().splitlines()]
    write_lines(Path("chats.jsonl"), [{"items": record["items"]} for record in records])
    more = {"reward_from": "rewards.jsonl", "condition_from": "reward", "quantiles": 3, "progress": False}
    prepare(["chats.jsonl"], world.base, "openchat_v3.2", "data/classed", **more)
    data = TokenDataset("data/classed")
    assert [each.condition for each in data] == [f"reward:{(i % 7 >= 2) + (i % 7 >= 4)}" for i in range(count)]
