"""The law of records: a key is read, mapped, ignored by name, or refused by name; never silent, however odd the record.

What is read shows in the ids and weights that training gets: they are others without the key, or with another value.
pytest tests/laws/test_record_law.py
"""

from __future__ import annotations

import copy
import json
import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ochat.data.readers import RecordFile
from ochat.errors import DataError
from ochat.text import template as templates
from ochat.text import tokenizer as tokenizers
from ochat.text.record_formats import RecordReader
from ochat.text.records.keys import CALL, DETAIL, LEVELS, MESSAGE, PART, RECORD
from ochat.text.records.levels import has_content
from ochat.text.records.map import RecordMap
from ochat.text.records.objects import Notes
from tests import text_kit

METADATA = ("uuid", "source", "timestamp", "prompt_id", "answer_type", "score", "\ud800", "")
KNOWN = {level.name: [name for key in level.keys for name in key.names] for level in LEVELS}
LIKELY = st.sampled_from(
    ["a", "", " ", "user", "assistant", "tool", "function_call", "text", "thinking", "[0, 1]", "{}", 0, 1, True, False]
    + [0.5, -2, 10**400, math.nan, math.inf, [], {}, [0, 1], [0, 1, 1], [[0, 1, 0.5]], [["q", "a"]], {"a": 1}]
    + [[{"role": "user", "content": "a"}], [{"text": "a"}, {"text": "b", "weight": 0}], {"name": "f"}]
    + [[{"function": {"name": "f", "arguments": '{"x": 1}'}}], [{"begin_offset": 0, "end_offset": 0, "train": True}]]
)
ODD = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.just("\ud800"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)
SAID = ("one two", "three")
CALLS = [[{"function": {"name": text, "arguments": {"x": 1}}}] for text in SAID]
WEIGHTS = (0.25, 3)
LISTED = [[{"role": "user", "content": text}, {"role": "assistant", "content": "b"}] for text in SAID]
PROBES: dict[str, tuple] = {  # level.meaning, or meaning -> values that are read each as another thing
    "messages": tuple(LISTED), "question": SAID, "extra": SAID, "answer": SAID, "system": SAID, "condition": SAID,
    "history": tuple([[text, "c"]] for text in SAID), "reward": WEIGHTS, "tools": tuple([{"name": n}] for n in SAID),
    "content": SAID, "text": SAID, "reasoning": SAID, "tool_calls": tuple(CALLS), "function_call": CALLS[0] + CALLS[1],
    "role": ("user", "assistant"), "tool": SAID, "tool_call_id": SAID, "label": (True, "good"), "record.text": SAID,
    "type": ("text", "thinking"), "name": SAID, "arguments": ({"x": 1}, {"x": 2}), "id": SAID, "call.type": ("a", "b"),
    "function": ({"name": "a"}, {"name": "b"}), "weight": WEIGHTS, "trained": (True, False), "start": (0, 1),
    "last": (0, 1), "spans": tuple([[0, 1, weight]] for weight in WEIGHTS),
    "train_detail": tuple([{"begin_offset": 0, "end_offset": 0, "weight": weight}] for weight in WEIGHTS),
    "weights": WEIGHTS, "mask": (0, 1),  # of each message
}  # fmt: skip
WEIGH = {"weight", "trained", "weights", "mask", "spans", "train_detail"}
NOT_WRITTEN = {"tool", "tool_call_id", "id"}  # by this template; a conversation has them


def test_every_meaning_has_probes():
    assert all(level.meanings.keys() and {*level.meanings.values()} <= {*PROBES} for level in LEVELS)


def probes(level, meaning, length=3):
    found = PROBES.get(f"{level.name}.{meaning}", PROBES[meaning])
    return [[value] * length for value in found] if meaning in ("weights", "mask") else found


def extra(level, most: int):
    """Some keys for an object of the level: most are known, do not say again what the object has, and have a value that
    fits."""
    new = sorted(
        {*level.meanings.values()} - {"role", "content", "type", "text", "messages", "question", "answer", "label"}
    )
    fitting = st.builds(
        lambda meaning, which, probe, length: (
            level.names(meaning)[which % len(level.names(meaning))], probes(level, meaning, length)[probe]
        ),
        st.sampled_from(new), st.integers(0, 9), st.integers(0, 1), st.integers(2, 4),
    )  # fmt: skip
    names = st.sampled_from(KNOWN[level.name]) | st.sampled_from(METADATA) | st.text(max_size=6)
    wild = st.tuples(names, LIKELY | ODD)
    return st.lists(fitting | fitting | fitting | wild, max_size=most).map(dict)


parts = st.builds(lambda more: {"type": "text", "text": "ab"} | more, extra(PART, 1))
contents = st.sampled_from(["ab", "c d", ""]) | st.lists(parts, min_size=1, max_size=2)
roles = st.sampled_from(["user", "gpt", "assistant", "assistant", "tool", "observation"])
turns = st.builds(lambda r, c, more: {"role": r, "content": c} | more, roles, contents, extra(MESSAGE, 2))
answered = st.lists(turns, max_size=2).map(
    lambda said: [{"role": "user", "content": "y"}, *said, {"role": "assistant", "content": "z"}]
)
pair_weights = st.sampled_from([{}, {"weight": 0.25}, {"train": False}, {"loss_weight": 3, "train": True}])
pairs = st.lists(
    st.builds(lambda w, more: {"input": "q", "output": "a"} | w | more, pair_weights, extra(RECORD, 1)),
    min_size=1,
    max_size=2,
)
bodies = st.builds(
    lambda key, value: {key: value}, st.sampled_from(RECORD.names("messages")), answered | answered | pairs
) | st.fixed_dictionaries({"prompt": st.just("q") | st.lists(turns, min_size=1), "completion": st.just("a")})
records = st.builds(lambda body, more: body | more, bodies, extra(RECORD, 3))


def objects_of(level, value, path=()):
    """Where every object is that is read, and its level."""
    if isinstance(value, list):
        for i, item in enumerate(value):
            yield from objects_of(level, item, (*path, i))
    if not isinstance(value, dict):
        return
    if level is MESSAGE and value.get("role") is value.get("from") is None and value.get("output") is not None:
        level = RECORD  # a question and its answer in place of a message
    yield level, path
    below = {RECORD: BELOW_RECORD, MESSAGE: BELOW_MESSAGE, CALL: {"function": CALL}}.get(level, {})
    for name, item in value.items():
        if (meaning := level.meanings.get(name)) in below:
            yield from objects_of(below[meaning], item, (*path, name))


BELOW_RECORD = dict.fromkeys(("messages", "question", "extra", "answer", "history"), MESSAGE) | {"tool_calls": CALL}
BELOW_MESSAGE = {"content": PART, "tool_calls": CALL, "function_call": CALL, "train_detail": DETAIL}


def at(record, path):
    for step in path:
        record = record[step]
    return record


@pytest.fixture(scope="module", params=["qwen3", "openchat_v3.2"])
def encode(request, tmp_path_factory):
    """What training has of conversations: ids, their weights, class and reward; "refused" if they cannot be written.

    One template renders, and writes reasoning and calls; the other joins segments.
    """
    template = templates.load(request.param)
    template = templates.with_reasoning(template, "all" if request.param == "qwen3" else "template")
    folder = text_kit.small_folder("qwen", tmp_path_factory.mktemp("qwen"))
    tokenizer = tokenizers.load(folder, ("<|end_of_turn|>",))
    known: dict[str, object] = {}

    def encoded(found):
        if (text := repr(found)) not in known:
            try:
                known[text] = [
                    (*map(list, template.encode(each, tokenizer)), each.condition, each.reward)
                    for each in (() if found == "refused" else found)
                ] or "refused"
            except DataError:
                known[text] = "refused"
        return known[text]

    return encoded


def result(record, **options):
    """What the record is read as and what is counted, or that it is refused. Raises nothing else."""
    notes = Notes()
    try:
        return RecordReader(empty_answers="keep", **options).read(record, notes), notes.ignored
    except DataError as error:
        assert 0 < len(str(error)) < 1000
        return "refused", Counter()


def alone(record, path, name):
    """The record without all that weighs, but for one key and what is around it."""
    record = copy.deepcopy(record)
    for level, where in reversed(list(objects_of(RECORD, record))):
        each = at(record, where) if level is not DETAIL else ()
        for other in [other for other in each if level.meanings.get(other) in WEIGH]:
            if (*where, other) != (*path, name)[: len(where) + 1]:
                del each[other]
    return record


@settings(max_examples=300, deadline=None)
@given(record=records)
def test_every_key_matters_is_counted_or_refuses_the_record(encode, record):
    """A value that is not counted is read: ids or weights are others without it, or with another value in its place."""
    before = copy.deepcopy(record)
    found, ignored = result(record)
    assert repr(record) == repr(before), "reading changes nothing"
    if encode(found) == "refused":
        return
    for level, path in list(objects_of(RECORD, record)):
        for name, value in at(record, path).items():
            without = copy.deepcopy(record)
            del at(without, path)[name]
            left = result(without)
            if value is None:
                assert left == (found, ignored), "null is absent"
                continue
            if not has_content(value) or left == (found, ignored - Counter([level.shown(name)])) != (found, ignored):
                continue
            assert name in level.meanings, f"{name} is lost"
            meaning, record_alone = level.meanings[name], alone(record, path, name)
            here, outcomes = at(record_alone, path), [result(record_alone)[0]]
            said = [text for key, text in here.items() if level.meanings.get(key) in ("content", "text")]
            if meaning in WEIGH and level in (MESSAGE, PART) and not any(map(has_content, said)):
                continue  # nothing that could weigh
            length = len(value) if isinstance(value, list) else value.count(",") + 1 if isinstance(value, str) else 3
            for probe in probes(level, meaning, length):
                here[name] = probe
                outcomes.append(result(record_alone)[0])
            del here[name]
            outcomes.append(result(record_alone)[0])
            seen = outcomes if meaning in NOT_WRITTEN else [encode(outcome) for outcome in outcomes]
            assert any(each != seen[0] for each in seen), f"{level.name}.{name} makes no difference"


@settings(max_examples=300, deadline=None)
@given(record=records)
def test_a_records_weight_multiplies_every_token(encode, record):
    """Those of spans and parts, and of earlier turns, too."""
    without = {name: value for name, value in record.items() if RECORD.meanings.get(name) not in ("weight", "trained")}
    once, scaled, untrained = (
        encode(result(without | more)[0]) for more in ({}, {"weight": 0.5}, {"train": False, "loss_weight": 3})
    )
    assert (once == "refused") == (scaled == "refused") == (untrained == "refused")
    if once != "refused":
        for (ids, weights, *_), (ids_scaled, half, *_), (_, none, *_) in zip(once, scaled, untrained, strict=True):
            assert ids == ids_scaled and not any(none)
            assert half == pytest.approx([weight / 2 for weight in weights])


@given(records, st.sets(st.sampled_from([name for names in KNOWN.values() for name in names])))
def test_what_is_ignored_by_name_makes_no_difference(record, ignored):
    """A record reads as one that does not have the ignored keys."""
    without = copy.deepcopy(record)
    for level, each in reversed(list(objects_of(RECORD, without))):
        for name in [name for name in at(without, each) if level.ignores(name, frozenset(ignored))]:
            del at(without, each)[name]
    assert result(record, ignore=frozenset(ignored))[0] == result(without)[0]


@given(ODD | st.dictionaries(st.text(max_size=6), ODD))
def test_no_value_is_too_odd_to_be_refused(value):
    result(value)


one_answer = st.sampled_from(["b", "", [], {"role": "assistant", "content": "b"}]) | answered | turns | ODD


@given(records | st.just({}), one_answer, one_answer)
def test_two_answers_and_a_prompt_are_read_or_refused(record, chosen, rejected):
    """The class of each answer, and the prompt without the last answer; raises nothing but a DataError."""
    classes = {"chosen": "x", "rejected": "y"}
    both = record | {"chosen": chosen, "rejected": rejected}
    for key in ("completion", "condition"):
        both.pop(key, None)
    found, _ = result(both, map=RecordMap(answers=classes))
    if found != "refused":
        assert [each.condition for each in found] == [classes[k] for k in classes if both[k] is not None]
    try:
        RecordReader().read_prompt(record, Notes())
    except DataError as error:
        assert str(error)


nulls = st.lists(
    st.tuples(st.integers(0, 9), st.sampled_from([*{name for names in KNOWN.values() for name in names}, *METADATA])),
    max_size=4,
)


@given(records, nulls)
def test_null_is_absent(record, added):
    with_nulls = copy.deepcopy(record)
    for which, name in added:
        objects = list(objects_of(RECORD, with_nulls))
        at(with_nulls, objects[which % len(objects)][1]).setdefault(name, None)
    assert result(with_nulls) == result(record)


MAPPED = {*RecordMap.__struct_fields__} - {"condition"}


@settings(max_examples=400)
@given(records, st.data())
def test_a_mapped_column_reads_as_the_tables_key(record, data):
    """Columns of the record, and the keys of role and content in its messages."""
    renamed, columns, back = copy.deepcopy(record), {}, {}
    messages = [at(renamed, path) for level, path in objects_of(RECORD, renamed) if level is MESSAGE]
    for name in data.draw(st.permutations(sorted(record))):
        meaning = RECORD.meanings.get(name)
        is_body = name == "input" and isinstance(record[name], dict)  # which is part of the record
        if meaning in MAPPED - columns.keys() and not is_body:
            columns[meaning] = f"my {meaning}"
            back[f"my {meaning}"] = name
            renamed[f"my {meaning}"] = renamed.pop(name)
    for name in ("role", "content"):
        columns[name] = f"my {name}"
        for message in messages:
            if name in message:
                message[f"my {name}"] = message.pop(name)
    found, ignored = result(renamed, map=RecordMap(**columns))
    assert (found, Counter({back.get(name, name): count for name, count in ignored.items()})) == result(record)


@settings(max_examples=200, deadline=None)
@given(record=records)
def test_a_parquet_file_reads_as_json_lines(record, tmp_path_factory):
    """Where a column can hold the values: every struct of a column has all its keys there, most of them null."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path_factory.mktemp("parquet") / "a.parquet"
    try:
        lines = json.loads(json.dumps(record))
        parquet.write_table(pyarrow.Table.from_pylist([lines]), path)
    except (pyarrow.ArrowException, ValueError, TypeError, OverflowError):  # no column holds it
        return
    [read_back] = [each.value() for each in RecordFile(path)]
    assert result(read_back) == result(lines)
