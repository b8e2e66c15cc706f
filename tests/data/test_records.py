"""Laws of reading records: every form of a file gives the same records at the right places; damage is named."""

import gzip
import json
import lzma
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ochat.data import readers, records
from ochat.data.readers import RecordFile
from ochat.errors import DataError

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
OBJECTS = st.lists(
    st.dictionaries(TEXT, TEXT | st.integers() | st.lists(TEXT, max_size=3), max_size=4), min_size=1, max_size=8
)


def zstd(data):
    return pytest.importorskip("zstandard").ZstdCompressor().compress(data)


COMPRESSORS = {"plain": bytes, "gz": gzip.compress, "xz": lzma.compress, "zst": zstd}


def write(tmp_path, data, name="in.jsonl"):
    path = tmp_path / name
    path.write_bytes(data if isinstance(data, bytes) else data.encode("utf-8"))
    return path


def lines(objects):
    return "".join(json.dumps(o, ensure_ascii=False) + "\n" for o in objects)


def forms(objects):
    """The same records as JSON Lines, with blank lines, and as an array on one line and on many."""
    yield lines(objects)
    yield lines(objects).rstrip("\n")
    yield "\n" + lines(objects).replace("\n", "\r\n\n")
    yield json.dumps(objects, ensure_ascii=False)
    yield json.dumps(objects, indent=2)
    yield "\ufeff" + json.dumps(objects)


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20], ids=["chunks of 1", "chunks of 7", "one chunk"])
@settings(max_examples=40, deadline=None)
@given(objects=OBJECTS)
def test_every_form_gives_the_same_records(tmp_path_factory, chunk, objects):
    tmp_path = tmp_path_factory.mktemp("records")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "CHUNK_BYTES", chunk)
        patch.setattr(records, "HEAD_BYTES", chunk + 8)
        for form in forms(objects):
            assert [r.value() for r in RecordFile(write(tmp_path, form))] == objects


@pytest.mark.parametrize("compress", COMPRESSORS.values(), ids=COMPRESSORS)
def test_compression_is_told_by_content(tmp_path, compress):
    objects = [{"n": n} for n in range(1000)]
    file = RecordFile(write(tmp_path, compress(lines(objects).encode())))
    assert [r.value() for r in file] == objects
    assert file.position == file.size


def test_places_are_those_of_an_editor(tmp_path):
    array = '[\n  {\n   "a": 1\n  },\n\n  {"a": 2}, {"a": 3}\n]\n'
    for text, wanted in (
        ('{"a":1}\n\n{"a":2}\n', [(1, 1), (3, 2)]),
        (array, [(2, 1), (6, 2), (6, 3)]),
        ('{\n "items": [\n  1\n ]\n}', [(1, 1)]),
    ):
        assert [(r.line, r.number) for r in RecordFile(write(tmp_path, text))] == wanted


A, B = {"a": 1}, {"a": 2}
IN_LINES = {  # a bad line -> what is said of it
    b'{"a": 1': "not JSON: Expecting ',' delimiter .column 8.,",
    b'{"a": "x': "not JSON: Unterminated string starting at .column 7.,",
    b"{bad": "not JSON: Expecting property name .* .column 2., near '{bad'",
    b'{"a": 1,, "b": 2, "c": 3}': "not JSON: .* near '.*,,",
    b"hello there, this is no JSON": "not JSON",
    b'{"a": "\xff\xfe"}': "not UTF-8 at byte 7",
    b"[1, 2]": "must be a JSON object, not list",
    b"3": "must be a JSON object, not int",
    b'{"a": ' + b"9" * 5000 + b"}": "cannot be read",
    b'{"a": ' + b"[" * 200_000 + b"]" * 200_000 + b"}": "cannot be read",
}
ELSEWHERE = {  # a text -> its records, and what is said of a bad one
    b'[{"a": 1},\n {"a": "cut': [A, "2: .*cut off"],
    b'[{"a": 1},\n {"a": 2}': [A, B, "2: .*no ']'"],
    b'[{"a": 1},\n {"a": 2},': [A, B, "2: "],
    b'[{"a": 1}\n {"a": 2}]': [A, "2: .*expected ','"],
    b'[{"a": 1}]\n {"a": 2}': [A, "2: .*after the end"],
    b'[{"a": 1},\n {"a": oops this is wrong}]': [A, "2: .*near"],
    b'[{"a": 1},\n{"a": "\xff"},\n{"a": 2}]': [A, "2: not UTF-8 at byte 7", B],
    b'{"a\n{"a": 2}\n': [r"1: not JSON: .* \(column \d+\), near", B],
    b'{\n{"a": 2}\n': [r"1: not JSON: .* \(column \d+\), near", B],
    b'{"a": {"items": [\n{"a": 2}\n': [r"1: not JSON: .* \(column \d+\), near", B],
    b"[\n]": ["2: .*empty"],
    b"": ["1: the file is empty"],
    b" \n\t\n": ["1: the file is empty"],
}
BAD = {b'{"a": 1}\n' + line + b'\n{"a": 2}\n': [A, f"2: .*{said}", B] for line, said in IN_LINES.items()} | ELSEWHERE


@pytest.mark.parametrize("text", BAD, ids=range(len(BAD)))
def test_a_bad_record_is_named_and_its_neighbours_are_read(tmp_path, text):
    """Damage that hides where the next record begins is the last one."""
    for record, wanted in zip(RecordFile(write(tmp_path, text)), BAD[text], strict=True):
        if isinstance(wanted, dict):
            assert record.value() == wanted
            continue
        with pytest.raises(DataError, match=rf"in\.jsonl:{wanted}"):
            record.value()


@pytest.mark.parametrize("blank", ["", "\n", "\n \n"])
@pytest.mark.parametrize("whole", ['{"a": ["x", -1.5e+3, true, {"b": "\\u00e9"}]}'])
def test_only_a_last_record_is_cut_and_every_cut_is_told(tmp_path, whole, blank):
    """After whichever character a file ends, the rest of the record is said to be missing; the same text elsewhere is
    wrong, and so is a last one with nothing missing."""
    for end in range(1, len(whole)):
        good, bad = RecordFile(write(tmp_path, '{"a": 1}\n' + whole[:end] + blank))
        assert good.value() == {"a": 1}
        with pytest.raises(DataError, match=r"in\.jsonl:2: not JSON, the record is cut off"):
            bad.value()
        bad, _ = RecordFile(write(tmp_path, whole[:end] + '\n{"a": 1}\n'))
        with pytest.raises(DataError, match=r"in\.jsonl:1: not JSON: .* \(column \d+\)"):
            bad.value()
    for wrong in ("{bad", "{bad}", '{"a" 1}'):
        _, bad = RecordFile(write(tmp_path, '{"a": 1}\n' + wrong + blank))
        with pytest.raises(DataError, match=r"in\.jsonl:2: not JSON: .* \(column \d+\)"):
            bad.value()


@pytest.mark.parametrize("kind", ["gz", "xz", "zst"])
@pytest.mark.parametrize("form", [lines, json.dumps], ids=["lines", "array"])
def test_a_cut_compressed_file_is_named(tmp_path, kind, form):
    data = COMPRESSORS[kind](form([{"n": n, "text": "word " * (n % 50)} for n in range(20000)]).encode())
    *_, bad = RecordFile(write(tmp_path, data[: len(data) // 2]))
    with pytest.raises(DataError, match="cut compressed file"):
        bad.value()


@pytest.mark.parametrize("path", ["nowhere.jsonl", "."])
def test_a_missing_file_is_named(tmp_path, path):
    with pytest.raises(DataError, match="no such file|a folder"):
        RecordFile(tmp_path / path)


@pytest.mark.parametrize(
    "form", [lines, json.dumps, lambda o: json.dumps(o, indent=1)], ids=["lines", "array", "pretty"]
)
def test_memory_does_not_grow_with_the_file(tmp_path, form):
    path = write(tmp_path, form([{"text": "x" * 1000}] * 30_000))
    tracemalloc.start()
    count = sum(1 for _ in RecordFile(path))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 30_000 and path.stat().st_size > 30e6
    assert peak < 12e6
