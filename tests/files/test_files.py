"""Files appear whole or not at all, and untrusted ones are read within bounds: pytest tests/files"""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest
import torch

from ochat.errors import ConfigError
from ochat.files import atomic, safetensors_file
from ochat.files.jsonl import JsonlWriter, read_lines


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_whole_and_leaves_no_temporary(tmp_path):
    atomic.write_json(tmp_path / "a.json", {"é": 1})
    atomic.write_json(tmp_path / "a.json", {"é": 2})
    assert (tmp_path / "a.json").read_text("utf-8") == '{\n  "é": 2\n}\n' and names(tmp_path) == ["a.json"]


def test_a_folder_replaces_a_damaged_one(tmp_path):
    for name, content in (("step_1", "old"), (".step_1.tmp", "new")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(content)
    atomic.replace_dir(tmp_path / ".step_1.tmp", tmp_path / "step_1")
    assert names(tmp_path) == ["step_1"] and (tmp_path / "step_1" / "file").read_text() == "new"


def test_leftovers_of_a_killed_process_are_removed_and_nothing_else(tmp_path):
    for name in (".step_1.tmp", ".step_2.old", "step_3", ".other.tmp"):
        (tmp_path / name).mkdir()
    atomic.remove_leftovers(tmp_path, "step_")
    assert names(tmp_path) == [".other.tmp", "step_3"]


def test_a_staging_folder_goes_with_an_error_and_stays_once_renamed(tmp_path):
    with pytest.raises(RuntimeError), atomic.staging_dir(tmp_path / "a") as folder:
        (folder / "file").touch()
        raise RuntimeError
    assert names(tmp_path) == []
    with atomic.staging_dir(tmp_path / "a") as folder:
        folder.rename(tmp_path / "a")
    assert names(tmp_path) == ["a"]


def test_what_was_replaced_by_a_killed_process_is_removed_and_said(tmp_path, caplog):
    gone = [f".out.{what}-{2**22 + 1}" for what in ("partial", "replaced")]
    kept = [f".out.replaced-{os.getppid()}", ".out.replaced-x", ".outx.replaced-1"]
    for name in [*gone, *kept]:
        (tmp_path / name).mkdir()
    with atomic.staging_dir(tmp_path / "out"):
        pass
    assert names(tmp_path) == sorted(kept)
    assert sorted(caplog.messages) == [
        f"removed {tmp_path / x}, which a process that was killed had left" for x in gone
    ]


def test_nothing_is_written_or_removed_through_a_link(tmp_path):
    """Links under the names of temporary files and folders, and of outputs."""
    other, place = tmp_path / "other", tmp_path / "place"
    for folder in (other, place):
        folder.mkdir()
    (other / "file").write_text("theirs")
    for name in (".a.json.tmp", "a.safetensors.tmp"):
        (place / name).symlink_to(other / "file")
    for name in (".step_1.tmp", ".step_2.old", "step_2", f".out.partial-{os.getpid()}", ".here.tmp", "linked"):
        (place / name).symlink_to(other)
    atomic.write_json(place / "a.json", {})
    safetensors_file.write(place / "a.safetensors", {"a": torch.zeros(1)})
    with pytest.raises(OSError, match="a link"):
        atomic.make_dir(place / ".here.tmp")
    atomic.remove_dir(place / "step_2")
    atomic.remove_leftovers(place, "step_")
    with atomic.staging_dir(place / "out") as folder:
        (folder / "file").write_text("ours")
    with pytest.raises(ConfigError, match=f"linked: a link; .*{other}"), atomic.staging_dir(place / "linked"):
        pass
    assert names(place) == [".here.tmp", "a.json", "a.safetensors", "linked"]
    assert names(other) == ["file"] and (other / "file").read_text() == "theirs"


@pytest.mark.parametrize("output", ["..", "", "file/a", "file/a/b", "x" * 300])
def test_a_folder_that_cannot_be_made_is_refused(tmp_path, output, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=output or "names no new folder"), atomic.staging_dir(Path(output)):
        pass
    assert names(tmp_path) == ["file"]


def test_the_folder_of_a_living_process_stays(tmp_path):
    """Somebody else's is left alone, and so are names that only look alike."""
    kept = [f".out.partial-{os.getppid()}", ".out.partial-x", f".other.partial-{2**22 + 1}"]
    for name in [*kept, f".out.partial-{2**22 + 1}"]:  # beyond the largest number a process can have
        (tmp_path / name).mkdir()
    with atomic.staging_dir(tmp_path / "out"):
        pass
    assert names(tmp_path) == sorted(kept)


@pytest.mark.parametrize(
    ("name", "is_right"), [("a.json", True), ("", False), ("a/b", False), ("..", True), ("x" * 256, False), (3, False)]
)
def test_names_of_files(name, is_right):
    assert atomic.is_file_name(name) is is_right


def test_lines_wait_for_a_disk_that_is_full(tmp_path, monkeypatch, caplog):
    path = tmp_path / "metrics.jsonl"
    writer = JsonlWriter(path)
    writer.append([{"step": 1}])
    full = JsonlWriter(path)
    full.path = type(path)("/dev/full")
    full.append([{"step": 2}])
    full.append([{"step": 3}])
    assert caplog.text.count("cannot be written") == 1
    full.path = path
    full.append([{"step": 4}])
    assert [line["step"] for line in read_lines(path)] == [1, 2, 3, 4]


def test_only_complete_lines_with_a_step_are_read(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\nnonsense\n[1]\n{"loss": 2}\n{"step": NaN}\n{"step": 2}\n{"step": 3}')
    assert [line["step"] for line in read_lines(path)] == [1, 2] and read_lines(tmp_path / "none") == []


def test_a_tensor_file_on_a_full_disk_is_an_error_of_the_disk(tmp_path):
    """A limit on the size of files stands in for the disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(OSError, match=r"a\.safetensors: cannot be written"):
            safetensors_file.write(tmp_path / "a.safetensors", {"a": torch.zeros(5000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not (tmp_path / "a.safetensors").exists()
