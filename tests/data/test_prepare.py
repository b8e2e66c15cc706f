"""Laws of `ochat prepare`: the template's own ids come out, nothing goes missing: pytest tests/data/test_prepare.py"""

import contextlib
import io
import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
from rich.console import Console

from ochat.commands.prepare import SHOWN_CLASSES, print_report
from ochat.data import store_writer
from ochat.data.dataset import TokenDataset
from ochat.data.encode import Encoder, encode_all, num_supervised
from ochat.data.prepare import MOST_KEYS, prepare
from ochat.data.records import Record
from ochat.errors import ConfigError, DataError
from ochat.files import atomic
from ochat.text import template, tokenizer
from ochat.text.conversation import Conversation
from ochat.text.record_formats import RecordReader
from ochat.text.template import Span
from tests import text_kit, tiny
from tests.data.conftest import chat, examples, places
from tests.tiny import mixed_conversations, write_lines

TEMPLATE = "openchat_v3.2"


@pytest.fixture
def make(prepare_into, tmp_path):
    """make(records, **options) -> report of preparing them into tmp_path/out."""
    return lambda records, **options: prepare_into(tmp_path / "out", records, **options)


def trimmed(ids, weights):
    end = max((i + 1 for i, weight in enumerate(weights) if weight != 0), default=0)
    return ids[:end], weights[:end]


def counted(report):
    return [report.total[name] for name in ("kept", "truncated", "too_long", "unsupervised")]


@pytest.mark.parametrize("conditions", ["both", "assistant", "ignore"])
@pytest.mark.parametrize("context", [None, 60])
def test_examples_are_the_templates_own_cut_and_trimmed(make, base, tmp_path, conditions, context):
    records = mixed_conversations(seed=1, count=200)
    report = make(records, conditions=conditions, context=context)
    form, tokens = template.with_conditions(template.load(TEMPLATE), conditions), tokenizer.load(base)
    expected, num_cut = [], 0
    for record in records:
        ids, weights = trimmed(*form.encode(Conversation.from_dict(record), tokens))
        num_cut += len(ids) > (context or form.context)
        ids, weights = trimmed(ids[: context or form.context], weights[: context or form.context])
        if ids:
            expected.append((tuple(ids), tuple(weights), record["condition"]))
    assert examples(TokenDataset(tmp_path / "out")) == expected
    total = report.total
    assert total["kept"] == len(expected) and total["tokens"] == sum(len(ids) for ids, _, _ in expected)
    assert total["truncated"] + total["unsupervised"] == num_cut and total["kept"] + total["unsupervised"] == 200
    assert total["supervised"] == sum(sum(w != 0 for w in weights[1:]) for _, weights, _ in expected)
    assert (num_cut > 20) == (context == 60)


def test_workers_and_shards_change_nothing(make, tmp_path, monkeypatch):
    """Two processes and many small shards give the examples of one process and one shard."""
    records = mixed_conversations(seed=2, count=1500)
    make(records, workers=0)
    alone = TokenDataset(tmp_path / "out")
    expected = examples(alone), places(alone)
    monkeypatch.setattr(store_writer, "SHARD_TOKENS", 10_000)
    make(records, workers=2, overwrite=True)
    data = TokenDataset(tmp_path / "out")
    assert len(data.manifest["shards"]) == 3 and (examples(data), places(data)) == expected
    assert places(data)[777] == f"{tmp_path / 'in.jsonl'}:778"


def test_equal_input_gives_equal_files(make, tmp_path):
    contents = []
    for _ in range(2):
        make(mixed_conversations(seed=3, count=50), overwrite=True)
        contents.append({path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()})
    assert contents[0] == contents[1]


def test_several_files_and_a_default_class(base, tmp_path):
    first = write_lines(tmp_path / "a.jsonl", [chat("a"), {"instruction": "b?", "output": "b"}])
    turns = [{"from": "human", "value": "c?"}, {"from": "gpt", "value": "c"}]
    second = tmp_path / "b.json"
    second.write_text(json.dumps([{"conversations": turns}]))
    report = prepare([first, second], base, TEMPLATE, tmp_path / "out", default_condition="GPT3", progress=False)
    data = TokenDataset(tmp_path / "out")
    assert [e.condition for e in data] == ["GPT4", "GPT3", "GPT3"] and data.class_names == ("GPT4", "GPT3")
    assert places(data) == [f"{first}:1", f"{first}:2", f"{second}:1"]
    assert report.classes["GPT3"]["kept"] == 2 and report.classes["GPT4"]["kept"] == 1


def one(**fields):
    return json.dumps({"items": [{"role": "assistant", "content": "x"} | fields]}).encode()


BAD = {
    "not JSON": (b"{oops, this is no JSON at all", "not JSON"),
    "NaN weight": (one(weight=float("nan")), r"items\[0\]\.weight: .*nan"),
    "nothing supervised": (one(role="user"), "no message to learn from"),
    "lone surrogate": (one(content="\ud800"), r"items\[0\]\.content: .*surrogate"),
    "no UTF-8": (b'{"items": [{"role": "user", "content": "\xff"}]}', "not UTF-8"),
    "a special token": (one()[:-1] + b', "condition": "a<|end_of_turn|>GPT4"}', "spells the special token"),
    "a class that means all": (one()[:-1] + b', "condition": "all"}', "condition: 'all' means all classes together"),
    "a class of two lines": (one()[:-1] + b', "condition": "a\\nb"}', r"condition: 'a.nb' holds U\+000A"),
    "a turned class": (one()[:-1] + ', "condition": "GPT\u202e4"}'.encode(), r"U\+202E \(right-to-left"),
    "a message's hidden class": (one(condition="GPT\u200b4"), r"items\[0\].condition: .*U\+200B"),
    "a long key": (b'{"items": [], "' + b"k" * 10**6 + b'": 1}', "items: empty"),
    "lists without end": (b"[" * 10**6, "JSON"),
    "nested items": (b'{"items": ' + b"[" * 900 + b"]" * 900 + b"}", "expected an object"),
    "zeros": (b"\0" * 100, "zero bytes in place of text"),
}


@pytest.mark.parametrize("kind, workers", [*((kind, 0) for kind in BAD), ("NaN weight", 1)])
def test_a_bad_record_stops_with_its_place_or_goes_to_the_rejects(base, tmp_path, kind, workers):
    line, reason = BAD[kind]
    good = [json.dumps(chat(answer)).encode() for answer in "abc"]
    path, options = tmp_path / "in.jsonl", {"workers": workers, "progress": False}
    path.write_bytes(b"\n".join([*good[:2], line, good[2]]))
    with pytest.raises(DataError, match=rf"in\.jsonl:3: .*{reason}") as error:
        prepare([path], base, TEMPLATE, tmp_path / "out", **options)
    assert len(str(error.value)) < 3000
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl"], "a failed prepare leaves nothing"

    report = prepare([path], base, TEMPLATE, tmp_path / "out", on_bad="skip", **options)
    assert (report.total["kept"], report.rejected) == (3, 1)
    (reject,) = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert (reject["file"], reject["line"]) == (str(path), 3) and "in.jsonl:3" not in reject["reason"]
    assert reject["text"] == line.decode("utf-8", "replace")[:2000]


@pytest.mark.parametrize("name", [b"caf\xe9.jsonl", b"caf\xe9.txt", b"test-caf\xe9.jsonl"])
def test_a_file_name_that_is_no_text_is_refused_before_it_is_written_down(base, tmp_path, name):
    """Named itself or found in a folder, read or left out."""
    folder = tmp_path / "in"
    folder.mkdir()
    write_lines(folder / "a.jsonl", [chat()])
    other = write_lines(folder / os.fsdecode(name), [chat()])
    for given in (folder, other):
        with pytest.raises(DataError, match=r"caf.udce9.* the name is no UTF-8 text, .*; rename it"):
            prepare([given], base, TEMPLATE, tmp_path / "out", progress=False)


@pytest.mark.parametrize("on_bad", ["error", "skip"])
@pytest.mark.parametrize("content", ["", "\n", "[]"])
def test_empty_input_is_an_error(base, tmp_path, content, on_bad):
    path = tmp_path / "in.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=r"in\.jsonl.*(empty|no conversation is left)"):
        prepare([path], base, TEMPLATE, tmp_path / "out", on_bad=on_bad, progress=False)
    assert not (tmp_path / "out").exists()


def test_a_kill_between_two_names_leaves_no_copy_beyond_the_next_start(make, tmp_path, monkeypatch, caplog):
    """Wherever it falls, with a held-out set too."""
    records = [chat(str(i)) | {"system": str(i)} for i in range(40)]
    make(records, held_out=0.5)
    for last in range(1, 6):
        left, rename = [last], os.rename

        def killed(*names, rename=rename, left=left):
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            rename(*names)

        with monkeypatch.context() as patch:
            patch.setattr("ochat.data.store_writer.os.rename", killed)
            patch.setattr(atomic, "remove", lambda path: None)  # nor does it tidy
            with contextlib.suppress(KeyboardInterrupt):
                make(records, held_out=0.5, overwrite=True)
        assert [path for path in tmp_path.iterdir() if ".replaced-" in path.name]
        make(records, held_out=0.5, overwrite=True)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out", "out-held-out"]
    assert any("replaced-" in message for message in caplog.messages)


def test_over_long_conversations_are_cut_dropped_or_refused(make, tmp_path):
    asks = chat("asks")  # a question after the last answer makes no conversation too long
    asks["items"].append({"role": "user", "content": "x" * 100})
    records = [asks, chat("long " * 20), chat("late", system="s" * 80)]
    report = make(records, context=70)
    assert counted(report) == [2, 1, 0, 1]
    assert TokenDataset(tmp_path / "out").lengths.tolist()[1] == 70
    report = make(records, context=70, over_long="drop", overwrite=True)
    assert counted(report) == [1, 0, 2, 0]
    with pytest.raises(DataError, match=r"in\.jsonl:2: \d+ tokens, the context is 70"):
        make(records, context=70, over_long="error", on_bad="skip", overwrite=True)
    assert len(TokenDataset(tmp_path / "out")) == 1, "what was there before the failure still is"


def test_an_output_in_the_way_is_kept(make, tmp_path):
    make([chat()])
    with pytest.raises(ConfigError, match="--overwrite"):
        make([chat()])
    (tmp_path / "out" / "manifest.json").unlink()
    with pytest.raises(ConfigError, match="no data set"):
        make([chat()], overwrite=True)


def test_a_tokenizer_without_the_templates_token_is_named(base, tmp_path):
    with pytest.raises(ConfigError, match=r"<\|eot_id\|>.*init-base"):
        prepare([write_lines(tmp_path / "a.jsonl", [chat()])], base, "openchat_3.6", tmp_path / "out")


SHARES, SHARDS = (-0.1, 1.0, 5, math.nan), ("0/2", "3/2", "1", "a/b", "1/2/3", "-1/2", "/", "1/0")
IMPOSSIBLE = [({"context": 1}, "--context"), ({"workers": -1}, "--workers")]
IMPOSSIBLE += [({"held_out": share}, f"--held-out {share}") for share in SHARES]
IMPOSSIBLE += [({"shard": text}, f"--shard {text}: i/n is needed") for text in SHARDS]


@pytest.mark.parametrize(("options", "message"), IMPOSSIBLE)
def test_impossible_options_are_named(make, options, message):
    with pytest.raises(ConfigError, match=message):
        make([chat()], **options)


def test_the_table_shows_every_class(make):
    report = make([chat(), chat(condition="GPT3"), chat(condition="")])
    console = Console(file=io.StringIO(), width=80)
    print_report(report, console)
    text = console.file.getvalue()
    assert all(name in text for name in ("GPT4", "GPT3", "(none)", "all", "supervised")) and "…" not in text


def test_thousands_of_classes_stay_short(make):
    """As when somebody takes the column of ids for classes."""
    report = make([*(chat(condition=f"id{n}") for n in range(1000)), *(chat() for _ in range(100))])
    console = Console(file=io.StringIO(), width=80)
    print_report(report, console)
    lines = console.file.getvalue().splitlines()
    assert len(lines) < SHOWN_CLASSES + 20 and any("... of 1,001" in line for line in lines)
    (few,) = (line for line in lines if line.startswith("classes with less than 1% of the supervised tokens: id0 ("))
    assert len(few) < 1000 and few.endswith(", ...") and "GPT4" not in few


def test_metadata_with_a_new_key_in_every_record_stays_short(make, tmp_path):
    """Most keys are counted together, but for those that come first and those that may say a class."""
    count, keys = 2000, ("id", "b", "c")
    records = [chat() | {f"{key}{n}": n for key in keys} | {"id": n} for n in range(count)]
    report = make([*records, *(chat(source="a") for _ in range(7))])
    ignored = json.loads((tmp_path / "out" / "manifest.json").read_text())["counts"]["ignored"]
    assert ignored == report.ignored and len(ignored) <= MOST_KEYS + 2
    assert (ignored["id"], ignored["source"]) == (count, 7) and sum(ignored.values()) == count * 4 + 7
    console = Console(file=io.StringIO(), width=80)
    print_report(report, console)
    (line,) = (line for line in console.file.getvalue().splitlines() if line.startswith("ignored"))
    assert (
        len(line) < 1000 and "id in 2,000" in line and "source in 7" in line and "and more, see manifest.json" in line
    )


ENDLESS = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell in the background hands down an ignored one
import sys
from pathlib import Path
from ochat.data import prepare as module
from ochat.data.records import Record
record = Record("f", 1, 1, b'{"items": [{"role": "assistant", "content": "x"}]}')
def batches(*_):
    while True:
        yield [record] * 100, 0
module.batches = batches
if __name__ == "__main__":
    source, base, output, workers = sys.argv[1:]
    module.prepare([source], base, "openchat_v3.2", output, progress=False, workers=int(workers))
"""


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=["Ctrl-C", "terminate", "kill"])
def test_an_interrupted_prepare_leaves_nothing_that_loads(base, tmp_path, how, workers):
    script, out = tmp_path / "endless.py", tmp_path / "data" / "out"
    script.write_text(ENDLESS)
    source = write_lines(tmp_path / "in.jsonl", [chat()])
    command = [sys.executable, script, source, base, out, str(workers)]
    process = subprocess.Popen(command, env=tiny.environment(), stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "data").is_dir() or not any((tmp_path / "data").iterdir()):
        assert process.poll() is None and time.monotonic() < deadline, "it never started to write"
        time.sleep(0.05)
    time.sleep(0.3)
    os.killpg(process.pid, how)
    process.wait(30)
    assert not out.exists()
    if how == signal.SIGTERM:
        assert process.returncode in (128 + how, 1), "1: a worker went first"
    for left in (tmp_path / "data").iterdir():
        assert how == signal.SIGKILL, "the others clean up"
        with pytest.raises(DataError, match="not a prepared data set"):
            TokenDataset(left)
    prepare([source], base, TEMPLATE, out, progress=False)
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["out"], "the next prepare sweeps"


@pytest.mark.parametrize("missing", ["meta-llama/Llama-2-7b-hf", "/no/such/folder"])
def test_a_base_that_is_no_folder_says_how_to_get_one(tmp_path, missing):
    fetched = missing if missing[0] != "/" else "ORG/NAME"
    with pytest.raises(ConfigError, match=f"{missing}.*safetensors.*hf download {fetched} --local-dir DIR"):
        prepare([write_lines(tmp_path / "a.jsonl", [chat()])], missing, TEMPLATE, tmp_path / "out")


@pytest.mark.parametrize(
    ("workers", "text", "counts"), [(0, "word " * 400, (200, 3000)), (1, "yes", (2_000, 20_000))], ids=["alone", "pool"]
)
def test_memory_is_a_few_batches(base, tmp_path, workers, text, counts):
    """Ten times the input takes no more memory, in the process that does everything and in the one that writes."""
    peaks = []
    for count in counts:
        source = write_lines(tmp_path / f"{count}.jsonl", [chat(text)] * count)
        arguments = (str(source), str(base), str(tmp_path / f"out{count}"), str(workers))
        command = [sys.executable, "-c", PEAK_MIB, *arguments]
        peaks.append(float(subprocess.check_output(command, env=tiny.environment())))
    assert peaks[1] - peaks[0] < 15, f"{peaks} MiB for {counts} records"


PEAK_MIB = """
import resource, sys
from ochat.data import prepare, store_writer
store_writer.SHARD_TOKENS = 1 << 18
source, base, output, workers = sys.argv[1:]
prepare.prepare([source], base, "openchat_v3.2", output, workers=int(workers), progress=False)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


@pytest.mark.parametrize(
    ("text", "column"),
    [("weight = 'wait'", "wait"), ("condition = 'maker'", "maker"), ("[answers]\nanswer = ''\nother = ''", "other")],
)
def test_a_column_of_the_map_that_no_record_has_is_refused(make, tmp_path, text, column):
    """Its weights would be 1. One record that has it is enough, and a part of the data may have none."""
    (tmp_path / "map.toml").write_text(text)
    record = {"question": "1+1?", "answer": "2", "waits": 0.5, "condition": ""}
    options = {"map": str(tmp_path / "map.toml"), "default_condition": "GPT4"}
    with pytest.raises(ConfigError, match=f"no record has the column '{column}'"):
        make([record], **options)
    make([record], shard="1/2", **options)
    assert make([record, {**record, column: "0.5" if column != "wait" else 0.5}], overwrite=True, **options)


THOUGHTS = [  # template, --reasoning, places of the answers of reasoning alone that are not written
    ("chatml_8192", "drop", "13"),
    ("chatml", "drop", "13"),
    ("qwen3", "drop", "13"),
    ("qwen3", "last", "1"),
    ("qwen3", "template", "1"),
    ("qwen3", "all", ""),
]


@pytest.mark.parametrize(("name", "mode", "lost"), THOUGHTS)
def test_an_answer_whose_only_words_are_left_out_is_an_empty_one(name, mode, lost, tmp_path):
    asked, thought = {"role": "user", "content": "1+1"}, {"role": "assistant", "content": "", "reasoning": "easy"}
    spoken = thought | {"content": "2"}
    tokens = tokenizer.load(text_kit.small_folder("qwen", tmp_path))
    form = template.with_reasoning(template.load(name), mode)

    def encoded(items, empty_answers="refuse"):
        batch = [Record("in.jsonl", 1, 1, json.dumps({"messages": items}).encode())]
        return Encoder(tokens, form, RecordReader(empty_answers=empty_answers), 4096, "error")(batch)

    for place, items in (("1", [asked, thought, asked, spoken]), ("3", [asked, spoken, asked, thought])):
        found, kept = encoded(items), encoded(items, "keep")
        assert [reject.reason.split(":")[0] for reject in found.rejects] == [f"items[{place}]"] * (place in lost)
        assert kept.noted["an empty answer"] == (place in lost) and not kept.rejects
        is_left_out = "--reasoning all writes it" in "".join(kept.noted)
        assert is_left_out == (mode == "template")  # that of the first answer
    assert not encoded([asked, thought | {"weight": 0}, asked, spoken]).rejects


SPELLING = [  # a record that spells the token, each in another place
    {"system": "{}", "messages": []},
    {"messages": [{"role": "assistant", "content": "{}"}]},
    {"messages": [{"role": "assistant", "tool_calls": [{"name": "{}"}]}]},
    {"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"a": ["{}"]}}]}]},
    {"messages": [{"role": "assistant", "tool_calls": [{"name": "f"}]}, {"role": "tool", "content": "{}"}]},
    {"messages": [], "tools": [{"name": "f", "description": "{}"}]},
]


@pytest.mark.parametrize("record", SPELLING)
def test_special_tokens_that_a_record_spells_are_counted(record, tmp_path):
    added = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    tokens = tokenizer.load(text_kit.small_folder("gpt2", tmp_path), added)
    encode = Encoder(tokens, template.load("openchat_3.6"), RecordReader(), 4096, "error")
    ends = [{"role": "user", "content": "x"}], [{"role": "assistant", "content": "y"}]
    record = record | {"messages": [*ends[0], *record["messages"], *ends[1]]}
    for spelt, count in (("<|eot_id|>", 1), ("eot", 0)):
        line = json.dumps(record).replace("{}", spelt).encode()
        found = encode([Record("in.jsonl", 1, 1, line)])
        assert not found.rejects and found.noted["a special token in their text, read as ordinary text"] == count


class Killer:
    """An encoder that takes its process down, as the kernel does with one that wants too much memory."""

    def __call__(self, batch):
        os._exit(9)


def test_a_worker_that_dies_names_where_it_was():
    batch = [Record("in.jsonl", line, line, b"{}") for line in (7, 8, 9)]
    with pytest.raises(DataError, match=r"in\.jsonl:7: a worker died on this record or one of the 2 after it"):
        list(encode_all([(batch, 0)], Killer(), 1))


def test_a_first_token_is_never_a_label():
    assert num_supervised([Span(3, "assistant", None), Span(5, "user", None), Span(6, "user", 0.5)]) == 3
    assert num_supervised([Span(1, "assistant", 1.0)]) == 0
