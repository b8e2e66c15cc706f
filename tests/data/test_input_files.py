"""Laws of inputs: a folder is its files in order, rows of Parquet are records: pytest tests/data/test_input_files.py"""

import json
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ochat.commands import prepare as command
from ochat.data.dataset import TokenDataset
from ochat.data.readers import RecordFile, find_inputs
from ochat.errors import ConfigError, DataError
from tests.data.conftest import examples, places
from tests.tiny_text import conversations, write_lines

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
        path = write_parquet(tmp_path / f"{count}.parquet", [{"text": f"{n}" * 500} for n in range(count)])
        before = pyarrow.total_allocated_bytes()
        peak = 0
        for _ in RecordFile(path):
            peak = max(peak, pyarrow.total_allocated_bytes() - before)
        peaks.append(peak)
    assert peaks[1] < peaks[0] + 30e6, f"{peaks} bytes held for {2_000} and {20_000} rows of 2 kB"


def test_a_folder_is_its_files_in_order(tmp_path):
    with pytest.raises(DataError, match=r"nothing to read in this folder \(no file\); known endings: \.jsonl"):
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
    rows, folder = conversations(seed=4, count=700), tmp_path / "in"
    folder.mkdir()
    write_lines(folder / "a.jsonl", rows[:300])
    write_parquet(folder / "b.parquet", rows[300:], 150)
    (folder / "README.md").write_text("# The data")
    found, lines = [], []
    for source in (write_lines(tmp_path / "in.jsonl", rows), folder):
        options = {"base": str(base), "template": "openchat_v3.2", "output": str(tmp_path / f"out{len(found)}")}
        command.main(command.PrepareOptions((str(source),), **options, progress=False))
        found.append(TokenDataset(options["output"]))
        lines.append([int(place.rpartition(":")[2]) for place in places(found[-1])])
    assert examples(found[0]) == examples(found[1]) and len(found[1]) > 600
    assert lines[1] == [line - 300 * (line > 300) for line in lines[0]]
    assert capsys.readouterr().out.count("1 files with unknown endings were not read") == 1


def test_values_that_json_lacks_become_text(tmp_path):
    import datetime

    row = {"items": "x", "when": datetime.datetime(2026, 1, 2), "nothing": None, "list": [1, None]}
    (record,) = RecordFile(write_parquet(tmp_path / "in.parquet", [row]))
    assert record.value() == {"items": "x", "when": "2026-01-02 00:00:00", "list": [1, None]}
    assert json.loads(record.data) == record.value()
