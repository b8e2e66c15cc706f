"""Laws of containers: the same conversations in every one of them give the same records; what is no container of
records is named, with a remedy that works; a field that JSON cannot hold is refused by its place if it is read.
"""

import bz2
import contextlib
import datetime
import gzip
import io
import json
import lzma
import os
import pickle
import re
import shutil
import struct
import subprocess
import tarfile
import zipfile
import zlib
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ochat.data.containers import arrow_stream, compressed
from ochat.data.describe import describe
from ochat.data.inputs import find_inputs, folder_columns, missing_parts
from ochat.data.readers import RecordFile
from ochat.errors import DataError
from ochat.text.record_formats import RecordReader
from ochat.text.records.map import ClassRule, RecordMap
from ochat.text.records.objects import Notes

pyarrow = pytest.importorskip("pyarrow")
ipc = pytest.importorskip("pyarrow.ipc")
parquet = pytest.importorskip("pyarrow.parquet")
zstandard = pytest.importorskip("zstandard")

BOM = "\ufeff".encode()
RECORDS = [
    {"messages": [{"role": "user", "content": f"caf\u00e9\u2028 {n}"}, {"role": "assistant", "content": "na\u00efve"}]}
    | ({"condition": "GPT4"} if n % 2 else {})
    for n in range(5)
]
LINES = [json.dumps(record, ensure_ascii=False) for record in RECORDS]
TEXT = "".join(line + "\n" for line in LINES).encode()
SKIPPED = struct.pack("<II", 0x184D2A50, 4) + b"size"  # a frame of zstd to skip


def read(path):
    """Its conversations, and metadata keys with how often they came."""
    notes = Notes()
    return [RecordReader().read(record.value(), notes)[0] for record in RecordFile(path)], notes.ignored


def saved(folder, data, name="in"):
    path = folder / name
    path.write_bytes(data)
    return path


WANTED = [RecordReader().read(record, Notes())[0] for record in RECORDS]


def encoded(name, bom=b""):
    return bom + TEXT.decode().encode(name)


TEXTS = {
    "lines": TEXT,
    "no last line end": TEXT[:-1],
    "a BOM": BOM + TEXT,
    "BOMs where files were joined": b"".join(BOM + line.encode() + b"\n" for line in LINES) + BOM,
    "line ends of Windows": TEXT.replace(b"\n", b"\r\n"),
    "line ends of old Macs": TEXT.replace(b"\n", b"\r"),
    "blank lines and form feeds": TEXT.replace(b"\n", b"\n\n \n\f\n\v\n"),
    "array": json.dumps(RECORDS).encode(),
    "array on many lines": json.dumps(RECORDS, indent=1).encode(),
    "arrays of old Macs": json.dumps(RECORDS, indent=1).replace("\n", "\r").encode(),
    "UTF-16": encoded("utf-16"),
    "UTF-16, big end first": encoded("utf-16-be", b"\xfe\xff"),
    "UTF-16 without BOM": encoded("utf-16-le"),
    "UTF-16 without BOM, big end first": encoded("utf-16-be"),
    "UTF-16 joined": encoded("utf-16")[:-2] + b"\n\0" + b"\xff\xfe",
    "UTF-16 behind blanks": "\n [".encode("utf-16-be") + ",".join(LINES).encode("utf-16-be") + "]".encode("utf-16-be"),
    "UTF-32": encoded("utf-32"),
    "UTF-32 without BOM": encoded("utf-32-le"),
    "UTF-32 without BOM, big end first": encoded("utf-32-be"),
    "text within text": "".join(json.dumps(line) + "\n" for line in LINES).encode(),
    "texts in an array": json.dumps(LINES).encode(),
    "objects of lists": "".join(
        json.dumps(r | {"messages": {key: [turn[key] for turn in r["messages"]] for key in ("content", "role")}}) + "\n"
        for r in RECORDS
    ).encode(),
    "gzip": gzip.compress(TEXT),
    "gzip of three": b"".join(gzip.compress(part) for part in (TEXT[:100], b"", TEXT[100:])),
    "bzip2": bz2.compress(TEXT),
    "bzip2 of three": b"".join(bz2.compress(part) for part in (TEXT[:100], b"", TEXT[100:])),
    "xz padded": lzma.compress(TEXT[:100]) + bytes(8) + lzma.compress(TEXT[100:]) + bytes(4),
    "zstd of pzstd": SKIPPED + zstandard.compress(TEXT[:100]) + SKIPPED + zstandard.compress(TEXT[100:]),
    "zstd, seekable": zstandard.compress(TEXT[:100]) + zstandard.compress(TEXT[100:]) + SKIPPED,
    "UTF-16 within gzip": gzip.compress(encoded("utf-16")),
}


@pytest.mark.parametrize("form", TEXTS)
def test_every_text_gives_the_same_conversations(tmp_path, form):
    assert read(saved(tmp_path, TEXTS[form])) == (WANTED, {})


def table(text="string", message=None, condition=None, in_list=pyarrow.list_):
    """RECORDS as a table, with texts of this type."""
    text = pyarrow.type_for_alias(text) if isinstance(text, str) else text
    message = message or pyarrow.struct([("role", text), ("content", text)])
    messages = [record["messages"] for record in RECORDS]
    if pyarrow.types.is_map(message):
        messages = [[list(turn.items()) for turn in turns] for turns in messages]
    columns = {
        "messages": pyarrow.array(messages, in_list(message)),
        "condition": pyarrow.array([record.get("condition") for record in RECORDS], condition or text),
    }
    return pyarrow.table(columns)


JSON_TEXTS = pyarrow.table(
    {
        name: [json.dumps(r[name]) if name == "messages" else r.get(name) for r in RECORDS]
        for name in ("messages", "condition")
    }
)
NULLS = [
    ("weight", pyarrow.float32()),
    ("tool_calls", pyarrow.list_(pyarrow.string())),
    ("at", pyarrow.timestamp("ns")),
]
ROWS = {
    "text": table(),
    "large text": table("large_string"),
    "bytes": table("binary"),
    "large bytes": table("large_binary"),
    "dictionary": table(condition=pyarrow.dictionary(pyarrow.int32(), pyarrow.string())),
    "maps": table(message=pyarrow.map_("string", "string")),
    "maps of bytes": table(message=pyarrow.map_("binary", "binary")),
    "fields that are null": table(message=pyarrow.struct([("role", "string"), ("content", "string"), *NULLS])),
    "messages as JSON text": JSON_TEXTS,
    "messages of the type JSON": JSON_TEXTS.set_column(
        0, "messages", pyarrow.ExtensionArray.from_storage(pyarrow.json_(), JSON_TEXTS["messages"].combine_chunks())
    ),
    "objects of lists": table().set_column(
        0,
        "messages",
        [[{key: [turn[key] for turn in record["messages"]] for key in ("role", "content")} for record in RECORDS]],
    ),
}
IN_ARROW = {  # types that Parquet lacks
    "views of text": table("string_view"),
    "views of lists": table(in_list=pyarrow.list_view),
    "runs": table().set_column(
        1, "condition", [pyarrow.RunEndEncodedArray.from_arrays(range(1, 6), [None, "GPT4"] * 2 + [None])]
    ),
}


def write_arrow(path, rows, opened=ipc.new_stream, compression=None, batch=2):
    with opened(str(path), rows.schema, options=ipc.IpcWriteOptions(compression=compression)) as writer:
        writer.write_table(rows, batch)
    return path


WRITERS = {
    "Parquet": lambda path, rows: parquet.write_table(rows, path, row_group_size=2),
    "Arrow stream": write_arrow,
    "Arrow file": lambda path, rows: write_arrow(path, rows, ipc.new_file),
    "Arrow file, lz4": lambda path, rows: write_arrow(path, rows, ipc.new_file, "lz4"),
    "Arrow stream, zstd": lambda path, rows: write_arrow(path, rows, compression="zstd"),
}


CONTAINED = [(rows, writer) for rows in ROWS | IN_ARROW for writer in WRITERS if rows in ROWS or writer != "Parquet"]


@pytest.mark.parametrize(("rows", "writer"), CONTAINED)
def test_every_table_gives_the_same_conversations(tmp_path, rows, writer):
    WRITERS[writer](tmp_path / "in", (ROWS | IN_ARROW)[rows])
    file = RecordFile(tmp_path / "in")
    assert [record.line for record in file] == [1, 2, 3, 4, 5]
    assert file.position == file.size
    assert read(tmp_path / "in") == (WANTED, {})


# fields of other types


DATE, MOMENT = datetime.date(2026, 1, 2), datetime.datetime(2026, 1, 2)
OTHERS = {  # a type, a value, and what is said of it
    "date32": (pyarrow.date32(), DATE, r"date32\[day\]"),
    "a date that Python lacks": (pyarrow.date32(), 2**30, r"date32\[day\]"),
    "date64": (pyarrow.date64(), DATE, r"date(32|64)\[(day|ms)\]"),  # Parquet has days alone
    "timestamp": (pyarrow.timestamp("us", "UTC"), MOMENT, r"timestamp\[us, tz=UTC\]"),
    "nanoseconds": (pyarrow.timestamp("ns"), 1, r"timestamp\[ns\]"),
    "time": (pyarrow.time64("ns"), 1, r"time64\[ns\]"),
    "duration": (pyarrow.duration("ns"), 1, r"duration\[ns\]"),
    "decimal": (pyarrow.decimal128(5, 2), Decimal("1.50"), r"decimal128\(5, 2\)"),
    "interval": (pyarrow.month_day_nano_interval(), (1, 2, 3), "month_day_nano_interval"),
    "bytes": (pyarrow.binary(), b"\x89PNG\xff", r"bytes that are no UTF-8 text \(at byte 0\)"),
    "uuid": (pyarrow.uuid(), b"\xff" * 16, "UUID|uuid|bytes"),
}


def read_row(tmp_path, row, schema, reader=None):
    parquet.write_table(pyarrow.Table.from_pylist([row], pyarrow.schema(schema)), tmp_path / "in")
    (record,) = RecordFile(tmp_path / "in")
    notes = Notes()
    return (reader or RecordReader()).read(record.value(), notes), notes.ignored


@pytest.mark.parametrize("other", [name for name in OTHERS if name not in ("interval", "uuid")])
def test_a_value_that_json_lacks_is_refused_where_it_is_read_alone(tmp_path, other):
    kind, value, said = OTHERS[other]
    said = f"{said}, which JSON lacks: cast the column"
    good = {"instruction": "a", "output": "b"}
    texts = [("instruction", "string"), ("output", "string")]
    (conversation,), ignored = read_row(tmp_path, good | {"when": value}, [*texts, ("when", kind)])
    assert ignored == {"when": 1} and conversation.items[0].content == "a"
    with pytest.raises(DataError, match=f"reward: expected a number, got .*{said}"):
        read_row(tmp_path, good | {"reward": value}, [*texts, ("reward", kind)])
    with pytest.raises(DataError, match=f"instruction: expected text or messages, got .*{said}"):
        read_row(tmp_path, good | {"instruction": value}, [("instruction", kind), texts[1]])
    with pytest.raises(DataError, match=f"when: .*{said}"):
        reader = RecordReader(map=RecordMap(condition=ClassRule("when")))
        read_row(tmp_path, good | {"when": value}, [*texts, ("when", kind)], reader)
    turns = [{"role": "user", "content": "a", "at": value}, {"role": "assistant", "content": "b", "at": None}]
    text = pyarrow.string()
    message = pyarrow.struct([("role", text), ("content", text), ("at", kind)])
    _, ignored = read_row(tmp_path, {"messages": turns}, [("messages", pyarrow.list_(message))])
    assert ignored == {"message.at": 1}
    turns = [{"role": "user", "content": value}]
    message = pyarrow.struct([("role", text), ("content", kind)])
    with pytest.raises(DataError, match=rf"messages\[0\].content: expected text, got .*{said}"):
        read_row(tmp_path, {"messages": turns}, [("messages", pyarrow.list_(message))])
    call = pyarrow.struct([("name", text), ("arguments", pyarrow.struct([("at", kind)]))])
    message = pyarrow.struct([("role", text), ("tool_calls", pyarrow.list_(call))])
    turns = [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"at": value}}]}]
    with pytest.raises(DataError, match=r"messages\[0\].tool_calls\[0\].arguments: .*which JSON lacks"):
        read_row(tmp_path, {"messages": turns}, [("messages", pyarrow.list_(message))])


@pytest.mark.parametrize("other", ["interval", "uuid"])
def test_metadata_may_be_of_any_type(tmp_path, other):
    kind, value, _ = OTHERS[other]
    ids = pyarrow.array([value], kind)
    write_arrow(tmp_path / "in", pyarrow.table({"instruction": ["a"], "output": ["b"], "id": ids}))
    assert read(tmp_path / "in")[1] == {"id": 1}


LEAVES = [(kind, value) for name, (kind, value, _) in OTHERS.items() if name != "uuid"] + [
    (pyarrow.string(), "a"), (pyarrow.binary(), b"a"), (pyarrow.float64(), float("nan")), (pyarrow.bool_(), True),
    (pyarrow.uint64(), 2**64 - 1), (pyarrow.null(), None), (pyarrow.float16(), np.float16(1)),
]  # fmt: skip
COLUMNS = st.recursive(
    st.sampled_from(LEAVES) | st.sampled_from([(kind, None) for kind, _ in LEAVES]),
    lambda inner: st.one_of(
        inner.map(lambda it: (pyarrow.list_(it[0]), [it[1], it[1]])),
        inner.map(lambda it: (pyarrow.large_list(it[0]), [])),
        inner.map(lambda it: (pyarrow.list_(it[0], 1), [it[1]])),
        inner.map(lambda it: (pyarrow.map_(pyarrow.string(), it[0]), [("a", it[1]), ("b", None)])),
        st.tuples(inner, inner).map(lambda its: (pyarrow.struct(zip("ab", (it[0] for it in its), strict=True)),
                                                 dict(zip("ab", (it[1] for it in its), strict=True)))),
    ),
    max_leaves=4,
)  # fmt: skip


DATE_AND_NULLS = pyarrow.struct([("a", pyarrow.date32()), ("b", pyarrow.list_(pyarrow.null()))])


@settings(max_examples=150, deadline=None)
@given(column=COLUMNS)
@example((DATE_AND_NULLS, {"a": DATE, "b": [None, None]}))
def test_a_column_of_any_type_is_metadata_and_refused_as_text(tmp_path_factory, column):
    """It is counted unless it is null, and never read as text, whatever lies in it."""
    kind, value = column
    path = tmp_path_factory.mktemp("column") / "in"
    texts, column = pyarrow.array(["a", "b", "c"]), pyarrow.array([value, None, value], kind)
    for writer in ("Arrow stream", "Arrow file, lz4"):
        WRITERS[writer](path, pyarrow.table({"instruction": texts, "output": texts, "x": column}))
        found, ignored = read(path)
        assert [conversation.items[0].content for conversation in found] == ["a", "b", "c"]
        assert ignored == ({"x": 2} if value is not None else {})
        WRITERS[writer](path, pyarrow.table({"instruction": texts, "output": column}))
        for record in RecordFile(path):
            with contextlib.suppress(DataError):
                (conversation,) = RecordReader().read(record.value(), Notes())
                assert {message.content for message in conversation.items} <= set("abc")


# keys that come twice


TWICE = {  # a record -> where
    '{"condition": "a", "condition": "a", "items": []}': "condition",
    '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "content": "b"}]}': (
        r"messages\[1\].content"
    ),
    '{"a": [[{"b": {"c": 1, "d": 2, "c": 3}}]]}': r"a\[0\]\[0\].b.c",
    '[{"role": "user", "role": "user"}]': r"\[0\].role",
}


@pytest.mark.parametrize("text", TWICE)
@pytest.mark.parametrize("pretty", [False, True])
def test_a_key_that_comes_twice_is_named_with_its_place(tmp_path, text, pretty):
    path = saved(tmp_path, (text.replace(", ", ",\n") if pretty else text).encode())
    with pytest.raises(DataError, match=f"in:1: {TWICE[text]}: the key comes twice in one object; keep one of the two"):
        read(path)


def test_a_key_that_comes_twice_in_other_places_is_named_too(tmp_path):
    inner = '[{"role": "user", "content": "a", "content": "b"}]'
    with pytest.raises(DataError, match="^messages: content: the key comes twice"):
        read(saved(tmp_path, json.dumps({"messages": inner}).encode()))
    maps = pyarrow.array([[[("role", "user"), ("role", "b")]]], pyarrow.list_(pyarrow.map_("string", "string")))
    parquet.write_table(pyarrow.table({"messages": maps}), tmp_path / "in")
    with pytest.raises(DataError, match=r"in:1: messages\[0\].role: the key comes twice"):
        read(tmp_path / "in")
    twice = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, ["output", "output"])
    for writer in WRITERS.values():
        writer(tmp_path / "in", twice)
        with pytest.raises(DataError, match="in:1: .*output.*"):
            read(tmp_path / "in")


def test_a_million_keys_take_no_time(tmp_path):
    keys = ", ".join(f'"{n}": 0' for n in range(300_000))
    with pytest.raises(DataError, match="299999: the key comes twice"):
        read(saved(tmp_path, f'{{{keys}, "299999": 1}}'.encode()))


# lists


TURNS = [[{"role": "user", "content": f"a{n}"}, {"role": "assistant", "content": "b"}] for n in range(3)]
SHARE = [{"from": "human", "value": "a0"}, {"from": "gpt", "value": "b"}]
LISTS = {  # a file -> how many conversations
    "a list a line": ("".join(json.dumps(turns) + "\n" for turns in TURNS), 3),
    "the last without a line end": ("\n".join(map(json.dumps, TURNS)), 3),
    "with names of ShareGPT and more keys": ("\n".join([json.dumps([t | {"id": 1} for t in SHARE])] * 2), 2),
    "a list alone": (json.dumps(TURNS[0]), 1),
    "on many lines": (json.dumps(TURNS[0], indent=2), 1),
    "on many lines, one after another": ("\n".join(json.dumps(turns, indent=2) for turns in TURNS), 3),
    "of ShareGPT": (json.dumps(SHARE), 1),
    "longer than is looked at": (json.dumps([{"role": "user", "content": "a" * (1 << 17)}, TURNS[0][1]]) * 2, 2),
    "lists in a list": (json.dumps(TURNS), 3),
    "lists in a list, on many lines": (json.dumps(TURNS, indent=2), 3),
    "records in a list": (json.dumps([{"messages": turns} for turns in TURNS]), 3),
}


@pytest.mark.parametrize("form", LISTS)
def test_a_list_of_messages_is_one_conversation(tmp_path, form):
    text, count = LISTS[form]
    for data in (text.encode(), gzip.compress(text.encode())):
        found, _ = read(saved(tmp_path, data))
        assert [len(conversation.items) for conversation in found] == [2] * count


def test_a_table_of_messages_in_a_list_is_no_conversation(tmp_path):
    rows = [{"thread": n // 2, "role": ("user", "assistant")[n % 2], "content": "a"} for n in range(8)]
    with pytest.raises(DataError, match="content"):
        read(saved(tmp_path, json.dumps(rows).encode()))


def test_a_bad_list_costs_its_line_alone(tmp_path):
    lines = [json.dumps(turns) for turns in TURNS]
    path = saved(tmp_path, "\n".join([*lines, '[{"role": "user"', lines[0]]).encode())
    *good, bad, last = RecordFile(path)
    assert len([record.value() for record in [*good, last]]) == 4
    with pytest.raises(DataError, match="in:4: not JSON"):
        bad.value()


# what is refused


def archive(kind, name="a.jsonl"):
    buffer = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(buffer, "w") as file:
            file.writestr(name, TEXT)
    else:
        with tarfile.open(fileobj=buffer, mode=kind) as file:
            info = tarfile.TarInfo(name)
            info.size = len(TEXT)
            file.addfile(info, io.BytesIO(TEXT))
    return buffer.getvalue()


def array_file():
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(3))
    return buffer.getvalue()


ODS = b"application/vnd.oasis.opendocument.spreadsheet"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
NAMED = {  # content -> what is said of it, in place of records
    "zip": (archive("zip"), "a zip archive; unpack it with python -m zipfile"),
    "empty zip": (b"PK\x05\x06" + bytes(18), "a zip archive"),
    "xlsx": (archive("zip", "xl/workbook.xml"), "an Excel workbook; save the sheet as CSV"),
    "xls": (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(99), "an Excel workbook"),
    "tar": (archive("w"), "a tar archive; unpack it with python -m tarfile"),
    "tar.gz": (archive("w:gz"), "a tar archive within gzip; unpack it with python -m tarfile"),
    "tar.bz2": (archive("w:bz2"), "a tar archive within bzip2; unpack it"),
    "tar.zst": (zstandard.compress(archive("w")), "a tar archive within zstd; unpack it once with zstd"),
    "gz of gz": (gzip.compress(gzip.compress(TEXT)), "gzip within gzip; unpack it once"),
    "parquet.gz": (gzip.compress(b"PAR1" + bytes(99)), "Parquet within gzip; unpack it once"),
    "zip in xz": (lzma.compress(archive("zip")), "a zip archive within xz; unpack it once with xz -dc"),
    "lz4": (b"\x04\x22\x4d\x18d@\xa7", "lz4; unpack it with lz4 -d"),
    "lzma": (lzma.compress(TEXT, lzma.FORMAT_ALONE), "lzma of the old kind; unpack it with xz -dc -F lzma"),
    "7z": (b"7z\xbc\xaf\x27\x1c\0\4", "a 7z archive; unpack it with 7z x"),
    "csv": (b"instruction,input,output\nWho?,,Jan\n", "CSV .'instruction,input,output'.; make JSON Lines of it with"),
    "csv of Excel": (BOM + b"instruction;output\r\nWho?;Jan\r\n", "a table with ';' between its columns"),
    "tsv": (b"prompt\tresponse\nWho?\tJan\n", "TSV .*; make JSON Lines of it with"),
    "tsv of Excel": ("prompt\tresponse\nWho?\tJan\n".encode("utf-16"), "TSV .*; make JSON Lines of it with"),
    "csv of code": (b'prompt,response\n"a","\n{\n{}\n[]\n"\n', "CSV"),
    "csv.gz": (gzip.compress(b"a,b\n1,2\n"), "CSV .* within gzip; unpack it once with gzip -dc"),
    "words": (b"hello\nworld\n", "text that is no JSON .'hello'."),
    "yaml": (b"- role: user\n  content: hello, world\n", "text that is no JSON"),
    "web page": (b"\n<!DOCTYPE html><html>", "a web page; the download failed"),
    "xml": (b'<?xml version="1.0"?>', "XML"),
    "git-lfs": (LFS, "the pointer of a file in git-lfs; fetch the file itself with git lfs pull"),
    "pickle": (b"\x80\x04\x95\x10\0\0\0\0\0\0\0", "a pickle; it can run any program"),
    "npy": (array_file(), "an array of numpy"),
    "safetensors": (struct.pack("<Q", 2) + b'{"a": {}}', "safetensors; records are needed"),
    "sqlite": (b"SQLite format 3\0" + bytes(99), "an SQLite database"),
    "pdf": (b"%PDF-1.7", "PDF"),
    "encrypted": (b"PARE" + bytes(99), "encrypted Parquet"),
    "zeros": (bytes(5000), "nothing but zero bytes; it was not written to its end"),
    "resource fork": (b"\0\5\x16\7\0\2\0\0Mac OS X" + bytes(80), "what macOS keeps beside a file; give the"),
    "lzip": (b"LZIP\1\f", "lzip; unpack it with lzip -dc"),
    "brotli": (b"\x1b\x5f\0\xf8\x8d\x94", "a binary file of a kind that is not known"),
    "deflate": (zlib.compress(TEXT), "a binary file of a kind that is not known"),
    "ods": (archive("zip", "mimetype").replace(TEXT[:46], ODS), "a spreadsheet; save the sheet as CSV"),
    "npz": (archive("zip", "a.npy"), "an array of numpy"),
    "pickle of text": (pickle.dumps([1], 0), "a pickle"),
}  # fmt: skip


@pytest.mark.parametrize("kind", NAMED)
@pytest.mark.parametrize("name", ["a b.jsonl", "it's"])
def test_what_holds_no_records_is_named_before_anything_is_read(tmp_path, kind, name):
    content, said = NAMED[kind]
    with pytest.raises(DataError, match=rf"{name}:1: it is {said}") as error:
        RecordFile(saved(tmp_path, content, name))
    assert "save" not in str(error.value) or "as CSV" in str(error.value)


@pytest.mark.parametrize("name", ["in.x", "in.jsonl", "it's", "a b.tar.gz"])
@pytest.mark.parametrize("kind", ["csv", "csv of Excel", "tsv", "tsv of Excel", "zip", "tar", "tar.gz", "lzma"])
def test_the_remedy_works(tmp_path, kind, name):
    path = saved(tmp_path, NAMED[kind][0], name)
    with pytest.raises(DataError) as error:
        RecordFile(path)
    command = re.sub(".*?: it is .*? with (?=python|xz)|, and give that folder", "", str(error.value))
    before = set(tmp_path.iterdir())
    subprocess.run(command, shell=True, check=True, cwd=tmp_path)
    (made,) = set(tmp_path.iterdir()) - before
    (path,) = find_inputs([made]).paths
    assert path.read_bytes() == TEXT or read(path)[0][0].items[1].content == "Jan"
    assert (tmp_path / name).read_bytes() == NAMED[kind][0]


TWICE_PACKED = ["gz of gz", "csv.gz", "zip in xz", "tar.zst"]


@pytest.mark.parametrize("kind", TWICE_PACKED)
@pytest.mark.parametrize("name", ["in.x", "it's"])
def test_the_remedy_for_what_is_packed_twice_works(tmp_path, kind, name):
    """What it unpacks is read, or named with a remedy of its own."""
    if kind == "tar.zst" and not shutil.which("zstd"):
        pytest.skip("no zstd")
    path = saved(tmp_path, NAMED[kind][0], name)
    with pytest.raises(DataError) as error:
        RecordFile(path)
    command = str(error.value).partition("unpack it once with ")[2].removesuffix(", and give that")
    subprocess.run(command, shell=True, check=True, cwd=tmp_path)
    (made,) = set(tmp_path.iterdir()) - {path}
    with (
        pytest.raises(DataError, match="it is (CSV|a zip archive|a tar archive)[^w]*;")
        if "gz of" not in kind
        else (contextlib.nullcontext())
    ):
        assert read(made) == (WANTED, {})


BAD_LINES = {  # a line among others -> what is said of it
    b"\0" * 40: "zero bytes in place of text",
    LINES[0].encode() + BOM + LINES[1].encode(): "a BOM in the middle of a line",
    str(RECORDS[0]).encode(): "Python's notation, not JSON",
    '{"a": "caf\u00e9"}'.encode("cp1252"): r"not UTF-8 at byte 10 of the record \(0xe9\): .* cat .*in \| iconv",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=range(len(BAD_LINES)))
@pytest.mark.parametrize("comment", [b"", b"// chats of May\n"], ids=["", "comment"])
def test_a_line_of_a_known_fault_is_named(tmp_path, line, comment):
    path = saved(tmp_path, comment + b"\n".join([LINES[0].encode(), line, LINES[0].encode()]))
    *comments, good, bad, other = RecordFile(path)
    assert len(comments) == bool(comment)
    assert good.value() == other.value() == RECORDS[0]
    with pytest.raises(DataError, match=f"in:{2 + bool(comment)}: .*{BAD_LINES[line]}"):
        bad.value()


INSIDE = {  # a file -> what is said of it, with a command that makes JSON Lines
    "wrapped": (json.dumps({"version": 1, "it's": RECORDS}), """the records lie under "it's\""""),
    "wrapped, on many lines": (json.dumps({"data": RECORDS, "size": [5]}, indent=2), "the records lie under 'data'"),
    "splits": (json.dumps({"train": RECORDS, "test": RECORDS[:1]}), "the records lie under 'train', 'test'"),
    "by name": (
        json.dumps({f"id{n}": record for n, record in enumerate(RECORDS)}),
        "the records lie under keys of their own",
    ),
    "columns": (
        json.dumps({key: [r.get(key) for r in RECORDS] for key in ("condition", "messages")}),
        "the table is written by columns",
    ),
    "columns of pandas": (
        json.dumps({key: {str(n): r.get(key) for n, r in enumerate(RECORDS)} for key in ("condition", "messages")}),
        "the table is written by columns",
    ),
}
PACK = {"gzip": gzip.compress, "bzip2": bz2.compress, "xz": lzma.compress, "zstd": zstandard.compress}


@pytest.mark.parametrize("pack", ["plain", "gzip", "xz"])
@pytest.mark.parametrize("kind", INSIDE)
def test_records_inside_of_something_are_taken_out_by_the_remedy(tmp_path, kind, pack):
    text, said = INSIDE[kind]
    data = text.encode("utf-16") if pack == "gzip" else text.encode()
    with pytest.raises(DataError, match=f"it's.*:1: .*{said}; make JSON Lines of it") as error:
        read(saved(tmp_path, PACK.get(pack, bytes)(data), "it's.json"))
    subprocess.run(str(error.value).partition("of it: ")[2], shell=True, check=True, cwd=tmp_path)
    assert read(tmp_path / "NEW.jsonl") == (WANTED, {})


@pytest.mark.parametrize("pack", ["plain", "gzip", "zstd"])
def test_text_of_windows_becomes_utf_8_by_the_remedy(tmp_path, pack):
    if pack == "zstd" and not shutil.which("zstd"):
        pytest.skip("no zstd")
    text = TEXT.decode().replace("\u2028", "\u20ac").encode("cp1252")
    with pytest.raises(DataError, match="in:1: not UTF-8") as error:
        read(saved(tmp_path, PACK.get(pack, bytes)(text)))
    subprocess.run(str(error.value).partition("makes UTF-8: ")[2], shell=True, check=True, cwd=tmp_path)
    assert "".join(c.items[0].content for c in read(tmp_path / "NEW.jsonl")[0]).startswith("caf\u00e9\u20ac 0")


def test_a_record_is_not_taken_for_what_holds_records(tmp_path):
    """Alone in its file it looks the same as others do."""
    for record in ({"conversations": [["a", "b"], ["c", "d"]]}, {"instruction": "a", "output": ["b", "c"]}):
        said = []
        for count in (1, 2):
            with pytest.raises(DataError) as error:
                read(saved(tmp_path, (json.dumps(record) + "\n").encode() * count))
            said.append(str(error.value))
        assert said[0] == said[1]
    for extra in ({"data": RECORDS}, {"0": RECORDS[0]}, {"train": RECORDS[:1], "weights": [0, 1]}):
        with contextlib.suppress(DataError):
            assert len(read(saved(tmp_path, json.dumps(RECORDS[0] | extra).encode()))[0]) == 1
            continue
        assert "train" in extra, extra


def test_lists_of_different_lengths_are_no_messages(tmp_path):
    turns = {"role": ["user", "assistant"], "content": ["a"]}
    with pytest.raises(DataError, match=r"messages: lists of different lengths .*: role 2, content 1"):
        read(saved(tmp_path, json.dumps({"messages": turns}).encode()))


def test_calls_and_parts_may_be_objects_of_lists(tmp_path):
    calls = {"name": ["f", "g"], "arguments": ["{}", '{"a": 1}']}
    parts = {"type": ["text", "text"], "text": ["a", "b"], "weight": [None, 0.5]}
    turns = {"role": ["user", "assistant"], "content": [parts, None], "tool_calls": [None, calls]}
    ((asks, answers),) = (c.items for c in read(saved(tmp_path, json.dumps({"messages": turns}).encode()))[0])
    assert asks.content == "a\nb" and asks.spans[0].weight == 0.5
    assert answers.tool_calls == ({"name": "f", "arguments": {}}, {"name": "g", "arguments": {"a": 1}})
    for column in ("prompt", "completion"):
        both = {"prompt": "a", "completion": "b"} | {column: {"role": ["assistant"], "content": ["c"]}}
        (found,), _ = read(saved(tmp_path, json.dumps(both).encode()))
        assert "c" in [message.content for message in found.items]


@pytest.mark.parametrize("kind", PACK)
@pytest.mark.parametrize("end", [b"\n", b""], ids=["line end", "no line end"])
def test_what_follows_the_end_of_compressed_data_is_named(tmp_path, kind, end):
    """All records before it are read."""
    *good, bad = RecordFile(saved(tmp_path, PACK[kind](TEXT[:-1] + end) + b"\0\0JUNKJUNKJUNKJUNK"))
    assert [record.value() for record in good] == RECORDS
    with pytest.raises(DataError, match=f"in:6: bytes that are no {kind} follow the end of the data .*JUNK"):
        bad.value()


@pytest.mark.parametrize("kind", PACK)
def test_records_before_a_cut_are_read(tmp_path, kind):
    data = PACK[kind](TEXT)
    data = b"".join((data, PACK[kind](b"".join(b"%d\n" % n for n in range(9999)))[:-20]))
    *good, bad = RecordFile(saved(tmp_path, data))
    assert [record.value() for record in good[:5]] == RECORDS
    with pytest.raises(DataError, match=r"damaged or cut compressed file"):
        bad.value()


def test_utf_16_that_is_cut_is_named(tmp_path):
    *good, bad = RecordFile(saved(tmp_path, encoded("utf-16") + b"\0"))
    assert [record.value() for record in good] == RECORDS
    with pytest.raises(DataError, match=r"in:6: not UTF-16, as which the file begins .* damaged or cut"):
        bad.value()


# folders


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")


def names(folder, paths):
    return [str(path.relative_to(folder)) for path in paths]


SPLITS = {  # a file -> whether it is of another split
    "data/train-00000-of-00001.parquet": False,
    "data/test-00000-of-00001.parquet": True,
    "data/validation-00000-of-00002.parquet": True,
    "data/test_sft-00000-of-00001-f7dfac4afe5b93f4.parquet": True,
    "data/train_sft-00000-of-00003.parquet": False,
    "test.jsonl": True,
    "dev.json": True,
    "alpaca.test.jsonl.gz": True,
    "chats_eval.jsonl": True,
    "test/data-00000-of-00001.arrow": True,
    "train/data-00000-of-00001.arrow": False,
    "en/validation/0.jsonl.zst": True,
    "train_test.jsonl": False,
    "latest.jsonl": False,
    "unit_test_answers.jsonl": False,
    "evaluate_this.jsonl": False,
    "default/partial-train/0000.parquet": False,
    "default/partial-test/0000.parquet": True,
    "split=test/0.jsonl": True,
    "split=train/0.jsonl": False,
    "holdout.jsonl": True,
}


@pytest.mark.parametrize("name", SPLITS)
def test_files_of_other_splits_are_left_out_and_listed(tmp_path, name):
    folder = tmp_path / "test-set"  # the folder's own name says nothing
    touch(folder, name, "chats.jsonl")
    found = find_inputs([folder])
    read, left = (["chats.jsonl"], [name]) if SPLITS[name] else (sorted(["chats.jsonl", name]), [])
    assert (names(folder, found.paths), names(folder, found.other_splits), found.skipped) == (read, left, [])
    assert find_inputs([folder], all_splits=True).paths == sorted([folder / name, folder / "chats.jsonl"])
    assert find_inputs([folder / name]).paths == [folder / name]
    if SPLITS[name]:
        assert find_inputs([folder, folder / name]).other_splits == [], "it is read"
    (folder / "chats.jsonl").unlink()
    if SPLITS[name]:
        with pytest.raises(DataError, match="of test and validation splits only files that --input names are read"):
            find_inputs([folder])


def test_what_others_write_beside_the_records_is_no_input(tmp_path):
    kept = ["a.jsonl", "data/train-00000-of-00001.arrow"]
    others = [
        "README.md", "_SUCCESS", "_temporary/0.json", "cache-0d9f.arrow", "data/tmp1x.arrow", "dataset_dict.json",
        "dataset_info.json", "dataset_infos.json", "state.json", "x.csv",
    ]  # fmt: skip
    touch(tmp_path, *kept, *others, ".git/a.jsonl", ".a.jsonl")
    found = find_inputs([tmp_path])
    assert names(tmp_path, found.paths) == kept
    assert names(tmp_path, found.skipped) == sorted(others)


def test_a_delta_table_is_named(tmp_path):
    touch(tmp_path, "t/a.parquet", "t/_delta_log/0.json", "b.jsonl")
    for folder in (tmp_path, tmp_path / "t"):
        with pytest.raises(DataError, match="/t: a Delta table, which also keeps rows that were deleted"):
            find_inputs([folder])
    assert find_inputs([tmp_path / "t" / "a.parquet"]).paths


PARTS = ("train-00000-of-00002.parquet", "train-00001-of-00002-0a.parquet", "b-00000-of-00001.json")


def test_parts_that_are_missing_are_said(tmp_path):
    files = [tmp_path / name for name in PARTS]
    assert missing_parts([*files, tmp_path / "c.jsonl"]) == []
    assert missing_parts(files[1:]) == [f"{tmp_path}/train-*: 1 of 2 parts"]
    assert missing_parts([files[0], tmp_path / "sub" / PARTS[1]]) == [
        f"{folder}/train-*: 1 of 2 parts" for folder in (tmp_path, tmp_path / "sub")
    ]


def test_a_file_that_is_there_twice_is_refused(tmp_path):
    touch(tmp_path, "a.jsonl", "a.jsonl.gz", "b.json")
    with pytest.raises(DataError, match=r"a\.jsonl and .*a\.jsonl\.gz: the same file in two forms\?"):
        find_inputs([tmp_path])
    touch(tmp_path, "sub/b.json", "sub/b.PARQUET")
    with pytest.raises(DataError, match=r"b\.PARQUET and .*b\.json: the same file in two forms\?"):
        find_inputs([tmp_path / "sub"])
    assert len(find_inputs([tmp_path / "sub" / "b.json", tmp_path / "sub" / "b.PARQUET"]).paths) == 2
    for twice in ([tmp_path / "b.json"] * 2, [tmp_path / "b.json", f"{tmp_path}/./b.json::GPT4"]):
        with pytest.raises(DataError, match=r"b\.json: comes twice in --input"):
            find_inputs(twice)


def test_links_are_followed_once_and_one_that_leads_nowhere_is_named(tmp_path):
    touch(tmp_path, "real/a.jsonl", "in/b.jsonl")
    (tmp_path / "in" / "more").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "back").symlink_to(tmp_path / "in")
    found = find_inputs([tmp_path / "in"])
    assert names(tmp_path, found.paths) == ["in/b.jsonl", "in/more/a.jsonl"]
    (tmp_path / "in" / "lost.jsonl").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"lost\.jsonl: no such file"):
        [RecordFile(path) for path in find_inputs([tmp_path / "in"]).paths]


COLUMNS_OF = {  # a path -> the columns that its folders give
    "a/b.jsonl": {},
    "model=gpt-4/day=2026-01-02/0.parquet": {"model": "gpt-4", "day": "2026-01-02"},
    "in/score=7/part=0.5/good=true/x=007/y=NaN/z=null/0.parquet": {
        "score": 7, "part": 0.5, "good": True, "x": "007", "y": "NaN", "z": "null",
    },
    "language=%C3%A9%3D1/topic=__HIVE_DEFAULT_PARTITION__/0.jsonl": {"language": "\u00e9=1", "topic": None},
    "=x/y=/a=b.jsonl": {"y": ""},
}  # fmt: skip


@pytest.mark.parametrize("path", COLUMNS_OF)
def test_names_of_folders_are_columns(path):
    found = folder_columns(Path(path))
    assert found == COLUMNS_OF[path] and list(map(type, found.values())) == list(map(type, COLUMNS_OF[path].values()))


def test_columns_of_folders_are_read_as_those_of_records_are(tmp_path):
    """Weights, classes and metadata; what the record says as well must be the same."""
    folder = tmp_path / "weight=0.5" / "condition=GPT4" / "source=x"
    folder.mkdir(parents=True)
    turns = RECORDS[0]["messages"]
    for record in (turns, {"messages": turns}, {"messages": turns, "weight": None, "condition": "GPT4"}):
        (conversation,), ignored = read(saved(folder, json.dumps(record).encode(), "a.jsonl"))
        assert (conversation.condition, conversation.items[1].weight, ignored) == ("GPT4", 0.5, {"source": 1})
    with pytest.raises(DataError, match="a.jsonl:1: condition: the record has another value than its folder"):
        read(saved(folder, json.dumps({"messages": turns, "condition": "GPT3"}).encode(), "a.jsonl"))
    with pytest.raises(DataError, match="two of its folders give weight"):
        RecordFile(folder / "weight=1" / "a.jsonl")


CLASSES = {  # an input -> its files and their class
    "a.jsonl": (["a.jsonl"], ""),
    "a.jsonl::GPT4": (["a.jsonl"], "GPT4"),
    "a.jsonl:: GPT 4 ": (["a.jsonl"], "GPT 4"),
    "sub::GPT3": (["sub/b.jsonl", "sub/c.jsonl"], "GPT3"),
    "sub/::GPT3": (["sub/b.jsonl", "sub/c.jsonl"], "GPT3"),
    "x::y.jsonl": (["x::y.jsonl"], ""),
    "x::y.jsonl::GPT4": (["x::y.jsonl"], "GPT4"),
    "C:\\chats\\a.jsonl::GPT4": (["C:\\chats\\a.jsonl"], "GPT4"),
    "nowhere.jsonl::GPT4": (["nowhere.jsonl"], "GPT4"),
}


@pytest.mark.parametrize("given", CLASSES)
def test_an_input_may_name_a_class(tmp_path, monkeypatch, given):
    monkeypatch.chdir(tmp_path)
    touch(tmp_path, "a.jsonl", "sub/b.jsonl", "sub/c.jsonl", "x::y.jsonl", "C:\\chats\\a.jsonl")
    found = find_inputs([given])
    expected, name = CLASSES[given]
    assert list(map(str, found.paths)) == expected and found.conditions == [name] * len(expected)


@pytest.mark.parametrize("given", ["a.jsonl::", "::GPT4", "a.jsonl:: "])
def test_half_a_class_is_refused(tmp_path, monkeypatch, given):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="PATH::CLASS is needed"):
        find_inputs([given])


def test_one_colon_is_told_from_two(tmp_path):
    touch(tmp_path, "a.jsonl", "b:jsonl")
    with pytest.raises(DataError, match=r"a\.jsonl:GPT4: no such file; .* two colons .*a\.jsonl::GPT4$"):
        find_inputs([f"{tmp_path}/a.jsonl:GPT4"])
    assert find_inputs([tmp_path / "b:jsonl"]).paths == [tmp_path / "b:jsonl"]


def test_a_missing_file_with_a_class_is_named(tmp_path):
    (path,), (name,), *_ = find_inputs([f"{tmp_path}/nowhere.jsonl::GPT4"])
    with pytest.raises(DataError, match=r"/nowhere\.jsonl: no such file"):
        RecordFile(path, name)


def test_a_pipe_is_named(tmp_path):
    os.mkfifo(tmp_path / "in")
    with pytest.raises(DataError, match="in: a pipe or a device; write it into a file"):
        RecordFile(tmp_path / "in")


def test_a_folder_is_described_as_its_files_are(tmp_path):
    parquet.write_table(table(), tmp_path / "train.parquet")
    touch(tmp_path, "test.jsonl", "README.md")
    of_folder, of_file = (describe(path).partition("\n")[2] for path in (tmp_path, tmp_path / "train.parquet"))
    assert of_folder == of_file and "condition" in of_file


# bounds

BLOCK = 46 << 20


def test_a_small_bomb_of_bzip2_comes_in_pieces(tmp_path):
    """45 MB from each block of 40 bytes, of which one read of the file holds all."""
    path = saved(tmp_path, bz2.compress(b"a" * BLOCK) * 6)
    assert path.stat().st_size < 3000
    with path.open("rb") as raw:
        sizes = [len(chunk) for chunk in compressed.decompress(raw, "bzip2")]
    assert sum(sizes) == 6 * BLOCK and max(sizes) <= 2 << 20
    (bad,) = RecordFile(saved(tmp_path, bz2.compress(b'{"a": "' + b"a" * BLOCK) * 2))
    assert "a line of more than 32 MiB" in bad.error


def test_zstd_of_a_large_window_is_refused_with_the_command_that_reads_it(tmp_path):
    """What `zstd --long=31` writes of large files: a window of 256 MiB, and one block as it is."""
    block = struct.pack("<I", len(TEXT) << 3 | 1)[:3] + TEXT
    path = saved(tmp_path, b"\x28\xb5\x2f\xfd\x00" + bytes([18 << 3]) + block, "it's.zst")
    (bad,) = RecordFile(path)
    assert "zstd that takes too much memory" in bad.error and "zstd --long=31 -dc '" in bad.error
    if shutil.which("zstd"):
        command = bad.error.partition("unpack it with ")[2].partition(";")[0]
        subprocess.run(command, shell=True, check=True, cwd=tmp_path)
        assert (tmp_path / "NEW.jsonl").read_bytes() == TEXT


@pytest.mark.parametrize("compression", ["lz4", "zstd", None])
@pytest.mark.parametrize("opened", [ipc.new_file, ipc.new_stream])
def test_a_batch_of_arrow_is_measured_before_it_is_unpacked(tmp_path, monkeypatch, compression, opened):
    """Dictionaries too. What is not compressed is mapped, of whatever size."""
    monkeypatch.setattr(arrow_stream, "MAX_BATCH_BYTES", 1 << 20)
    texts = pyarrow.array(["a" * 100_000] * 20)
    dictionary = pyarrow.array(["b" * (2 << 20)]).dictionary_encode()
    for column, is_large in ((texts, True), (texts.slice(0, 5), False), (dictionary, True)):
        write_arrow(tmp_path / "in", pyarrow.table({"output": column}), opened, compression, batch=100)
        before = pyarrow.total_allocated_bytes()
        found = [record.error for record in RecordFile(tmp_path / "in")]
        if compression and is_large:
            assert len(found) == 1 and "a batch of more than" in found[0]
        else:
            assert found == [""] * len(column)
        assert pyarrow.total_allocated_bytes() <= before + (4 << 20)


@pytest.mark.parametrize("opened", [ipc.new_file, ipc.new_stream])
def test_damaged_arrow_is_named_or_read(tmp_path, opened):
    """Whatever byte is wrong, reading ends, in rows of text or in an error."""
    good = write_arrow(tmp_path / "in", table(), opened).read_bytes()
    places = np.random.default_rng(0)
    for _ in range(300):
        data = bytearray(good)
        for at in places.integers(0, len(data), 3):
            data[at] ^= int(places.integers(1, 256))
        path = saved(tmp_path, bytes(data), "bad")
        try:
            for record in RecordFile(path):
                if not record.error:
                    json.loads(record.data)
        except DataError:
            pass
    for end in range(8, len(good) - 600, 97):
        *_, last = RecordFile(saved(tmp_path, good[:end], "cut"))
        assert last.error or opened is ipc.new_stream
