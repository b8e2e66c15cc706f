"""Laws of reading: every form of a file gives the same records at the right places; damage is named; a folder is its
files in order; rows of Parquet are records.
"""

import gzip
import json
import lzma
import random
import sys
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ochat.commands import prepare as command
from ochat.data import readers
from ochat.data.containers import pieces
from ochat.data.dataset import TokenDataset
from ochat.data.readers import RecordFile, find_inputs
from ochat.errors import ConfigError, DataError
from tests.data.conftest import examples, places
from tests.tiny import mixed_conversations, write_lines

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
zstandard = pytest.importorskip("zstandard")

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
OBJECTS = st.lists(
    st.dictionaries(TEXT, TEXT | st.integers() | st.lists(TEXT, max_size=3), max_size=4), min_size=1, max_size=8
)
ITEM = st.fixed_dictionaries({"role": TEXT, "content": TEXT}, optional={"weight": st.floats(-2, 2)})
OPTIONAL = {"condition": TEXT, "reward": st.floats(-2, 2), "n": st.integers(0, 9)}
ROW = st.fixed_dictionaries({"items": st.lists(ITEM, min_size=1, max_size=3)}, optional=OPTIONAL)
COMPRESSORS = {"plain": bytes, "gz": gzip.compress, "xz": lzma.compress, "zst": zstandard.compress}


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
        patch.setattr(pieces, "HEAD_BYTES", chunk + 8)
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


def write_parquet(path, rows, row_group_size=None):
    schemas = [pyarrow.Table.from_pylist([row]).schema for row in rows]  # pyarrow alone looks at the first row
    schema = pyarrow.unify_schemas(schemas, promote_options="permissive")
    parquet.write_table(pyarrow.Table.from_pylist(rows, schema=schema), path, row_group_size=row_group_size)
    return path


@settings(max_examples=40, deadline=None)
@given(rows=st.lists(ROW, min_size=1, max_size=9), row_group_size=st.integers(1, 4))
def test_rows_are_the_objects_that_were_written(tmp_path_factory, rows, row_group_size):
    """What a row lacks stays away, although a table has every column in every row."""
    file = RecordFile(write_parquet(tmp_path_factory.mktemp("rows") / "in", rows, row_group_size))
    read = list(file)
    assert [record.value() for record in read] == rows
    assert [(r.line, r.number) for r in read] == [(i, i) for i in range(1, len(rows) + 1)]
    assert file.position == file.size


DAMAGE = {
    "half": (lambda content: content[: len(content) // 2], 0),
    "its end": (lambda content: content[: len(content) * 49 // 50], 0),
    "middle": (lambda content: content[: len(content) // 2] + b"\xff" * 2000 + content[len(content) // 2 + 2000 :], 1),
}


@pytest.mark.parametrize("lost", DAMAGE)
def test_damage_ends_a_parquet_file_there(tmp_path, lost):
    path = write_parquet(tmp_path / "in.parquet", [{"text": f"{n} " * 50} for n in range(1000)], 100)
    change, least = DAMAGE[lost]
    path.write_bytes(change(path.read_bytes()))
    *good, bad = RecordFile(path)
    assert least <= len(good) < 1000 and all(r.value()["text"].startswith(f"{r.line - 1} ") for r in good)
    with pytest.raises(DataError, match=rf"in\.parquet:{len(good) + 1}: damaged or cut Parquet file"):
        bad.value()


def test_an_empty_table_is_an_error(tmp_path):
    parquet.write_table(pyarrow.table({"items": pyarrow.array([], pyarrow.string())}), tmp_path / "in.parquet")
    (bad,) = RecordFile(tmp_path / "in.parquet")
    with pytest.raises(DataError, match="the file is empty"):
        bad.value()


@pytest.mark.parametrize(("start", "package"), [(b"PAR1", "pyarrow"), (b"\x28\xb5\x2f\xfd", "zstandard")])
def test_a_package_that_is_missing_is_named(tmp_path, monkeypatch, start, package):
    (tmp_path / "in").write_bytes(start)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf"in: .*{package}: pip install 'ochat-crlft\[data\]'"):
        RecordFile(tmp_path / "in")


def test_parquet_memory_does_not_grow_with_a_row_group(tmp_path):
    """A file of a single row group is read in batches, too."""
    peaks = []
    for count in (2_000, 20_000):
        texts = [{"text": random.Random(n).randbytes(1000).hex()} for n in range(count)]  # they compress badly
        path = write_parquet(tmp_path / f"{count}.parquet", texts)
        before = pyarrow.total_allocated_bytes()
        peak = 0
        for _ in RecordFile(path):
            peak = max(peak, pyarrow.total_allocated_bytes() - before)
        peaks.append(peak)
    assert peaks[1] < peaks[0] + 5e6, f"{peaks} bytes held for {2_000} and {20_000} rows of 2 kB"


def test_a_folder_is_its_files_in_order(tmp_path):
    with pytest.raises(DataError, match=r"nothing to read in this folder \(no file\); name files .*ending: \.jsonl"):
        find_inputs([tmp_path])
    names = ["b/2.jsonl", "b/10.JSON", "a.parquet", "c.jsonl.xz", "b.json.gz", "z.ndjson.zst"]
    others = ["README.md", "b/notes.txt", "d/model.safetensors"]
    hidden = [".git/x.jsonl", "b/.x.jsonl", ".DS_Store"]
    for name in [*names, *others, *hidden]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    found = find_inputs([tmp_path, tmp_path / "b" / "notes.txt"])
    expected = ["a.parquet", "b/10.JSON", "b/2.jsonl", "b.json.gz", "c.jsonl.xz", "z.ndjson.zst"]
    assert found.paths == [*(tmp_path / name for name in expected), tmp_path / "b" / "notes.txt"]
    assert sorted(found.skipped) == sorted(tmp_path / name for name in others)
    with pytest.raises(DataError, match=r"only model\.safetensors"):
        find_inputs([tmp_path / "d"])


def test_a_folder_of_lines_and_rows_prepares_as_one_file_does(base, tmp_path, capsys):
    rows, folder = mixed_conversations(seed=4, count=700), tmp_path / "in"
    folder.mkdir()
    write_lines(folder / "a.jsonl", rows[:300])
    write_parquet(folder / "b.parquet", rows[300:], 150)
    (folder / "README.md").write_text("# The data")
    found, lines = [], []
    for source in (write_lines(tmp_path / "in.jsonl", rows), folder):
        options = {"base": str(base), "template": "openchat_v3.2", "output": str(tmp_path / f"out{len(found)}")}
        command.main(command.PrepareOptions((str(source),), **options, empty_answers="keep", progress=False))
        found.append(TokenDataset(options["output"]))
        lines.append([int(place.rpartition(":")[2]) for place in places(found[-1])])
    assert examples(found[0]) == examples(found[1]) and len(found[1]) > 600
    assert lines[1] == [line - 300 * (line > 300) for line in lines[0]]
    assert capsys.readouterr().out.count("README.md) not read, as no file of records") == 1
