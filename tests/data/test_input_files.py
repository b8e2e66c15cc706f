"""Laws of inputs: a folder is its files in order, rows of Parquet are records: pytest tests/data/test_input_files.py"""

import json
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ochat.commands import prepare as command
from ochat.data import prepare
from ochat.data.dataset import TokenDataset
from ochat.data.readers import RecordFile, find_inputs
from ochat.errors import ConfigError, DataError
from tests.tiny_text import conversations, write_base, write_lines

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
ITEMS = st.lists(
    st.fixed_dictionaries({"role": TEXT, "content": TEXT}, optional={"weight": st.floats(-2, 2)}),
    min_size=1,
    max_size=3,
)
ROWS = st.lists(
    st.fixed_dictionaries(
        {"items": ITEMS}, optional={"condition": TEXT, "reward": st.floats(-2, 2), "n": st.integers(0, 9)}
    ),
    min_size=1,
    max_size=9,
)


def write_parquet(path, rows, row_group_size=None):
    parquet.write_table(pyarrow.Table.from_pylist(rows, schema=schema(rows)), path, row_group_size=row_group_size)
    return path


def schema(rows):
    """Of all rows together: pyarrow alone looks at the first."""
    return pyarrow.unify_schemas(
        [pyarrow.Table.from_pylist([row]).schema for row in rows], promote_options="permissive"
    )


@settings(max_examples=40, deadline=None)
@given(rows=ROWS, row_group_size=st.integers(1, 4))
def test_rows_are_the_objects_that_were_written(tmp_path_factory, rows, row_group_size):
    """What a row lacks stays away, although a table has every column in every row."""
    file = RecordFile(write_parquet(tmp_path_factory.mktemp("rows") / "in", rows, row_group_size))
    read = list(file)
    assert [record.value() for record in read] == rows
    assert [(r.line, r.number) for r in read] == [(i, i) for i in range(1, len(rows) + 1)]
    assert file.position == file.size


def test_parquet_prepares_to_what_json_lines_do(tmp_path):
    base, rows = write_base(tmp_path / "base"), conversations(seed=4, count=700)
    sources = [write_lines(tmp_path / "in.jsonl", rows), write_parquet(tmp_path / "in.parquet", rows, 300)]
    texts, tables = [], []
    for source in sources:
        prepare.prepare([source], base, "openchat_v3.2", tmp_path / "out", progress=False, overwrite=True)
        data = TokenDataset(tmp_path / "out")
        texts.append([(e.input_ids.tolist(), e.loss_weights.tolist(), e.condition) for e in data])
        tables.append([data.source_location(i).rpartition(":")[2] for i in range(len(data))])
    assert texts[0] == texts[1] and tables[0] == tables[1]


def test_a_bad_row_is_named_by_its_number(base, tmp_path):
    rows = [{"items": [{"role": "assistant", "content": "x"}]}, {"items": [{"role": "judge", "content": "x"}]}]
    path = write_parquet(tmp_path / "in.parquet", rows)
    with pytest.raises(DataError, match=r"in\.parquet:2: items\[0\]\.role: .*judge"):
        prepare.prepare([path], base, "openchat_v3.2", tmp_path / "out", progress=False)


@pytest.mark.parametrize("kept", [0.5, 0.98])
def test_a_cut_parquet_file_is_named(tmp_path, kept):
    path = write_parquet(tmp_path / "in.parquet", [{"n": n} for n in range(1000)], 100)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
    (bad,) = RecordFile(path)
    with pytest.raises(DataError, match=r"in\.parquet:1: damaged or cut Parquet file"):
        bad.value()


def test_damage_within_a_parquet_file_ends_it_there(tmp_path):
    path = write_parquet(tmp_path / "in.parquet", [{"text": f"{n} " * 50} for n in range(1000)], 100)
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 2000] = b"\xff" * 2000
    path.write_bytes(content)
    *good, bad = RecordFile(path)
    assert 0 < len(good) < 1000 and all(r.value()["text"].startswith(f"{r.line - 1} ") for r in good)
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
        path = write_parquet(tmp_path / f"{count}.parquet", [{"text": f"{n}" * 500} for n in range(count)])
        before = pyarrow.total_allocated_bytes()
        peak = 0
        for _ in RecordFile(path):
            peak = max(peak, pyarrow.total_allocated_bytes() - before)
        peaks.append(peak)
    assert peaks[1] < peaks[0] + 30e6, f"{peaks} bytes held for {2_000} and {20_000} rows of 2 kB"


def test_a_folder_is_its_files_in_order(tmp_path):
    names = ["b/2.jsonl", "b/10.JSON", "a.parquet", "c.jsonl.xz", "b.json.gz", "z.ndjson.zst"]
    others = ["README.md", "b/notes.txt", "b/model.safetensors"]
    hidden = [".git/x.jsonl", "b/.x.jsonl", ".DS_Store"]
    for name in [*names, *others, *hidden]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    found = find_inputs([tmp_path, tmp_path / "b" / "notes.txt"])
    expected = ["a.parquet", "b/10.JSON", "b/2.jsonl", "b.json.gz", "c.jsonl.xz", "z.ndjson.zst"]
    assert found.paths == [*(tmp_path / name for name in expected), tmp_path / "b" / "notes.txt"]
    assert sorted(found.skipped) == sorted(tmp_path / name for name in others)


def test_a_folder_with_nothing_to_read_is_named(tmp_path):
    with pytest.raises(DataError, match=r"nothing to read in this folder \(no file\); known endings: \.jsonl"):
        find_inputs([tmp_path])
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError, match=r"only notes\.txt"):
        find_inputs([tmp_path])


def test_a_folder_prepares_as_its_files_do(tmp_path, capsys):
    base, rows = write_base(tmp_path / "base"), conversations(seed=4, count=60)
    folder = tmp_path / "in"
    folder.mkdir()
    files = [write_lines(folder / "a.jsonl", rows[:30]), write_parquet(folder / "b.parquet", rows[30:])]
    (folder / "README.md").write_text("# The data")
    options = {"base": str(base), "template": "openchat_v3.2", "progress": False, "overwrite": True}
    contents = []
    for inputs in ([str(folder)], list(map(str, files))):
        command.main(command.PrepareOptions(tuple(inputs), output=str(tmp_path / "out"), **options))
        contents.append([(e.input_ids.tolist(), e.condition) for e in TokenDataset(tmp_path / "out")])
    assert contents[0] == contents[1] and len(contents[0]) > 50
    assert capsys.readouterr().out.count("1 files with unknown endings were not read") == 1


def test_values_that_json_lacks_become_text(tmp_path):
    import datetime

    row = {"items": "x", "when": datetime.datetime(2026, 1, 2), "nothing": None, "list": [1, None]}
    (record,) = RecordFile(write_parquet(tmp_path / "in.parquet", [row]))
    assert record.value() == {"items": "x", "when": "2026-01-02 00:00:00", "list": [1, None]}
    assert json.loads(record.data) == record.value()
