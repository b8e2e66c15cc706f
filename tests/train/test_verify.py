"""A file of a data set or of a base that is cut, changed or gone stops a run before its first step, by name.

pytest tests/train/test_verify.py
"""

import hashlib
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from ochat.commands import init_base
from ochat.commands.init_base import InitBaseOptions
from ochat.data import prepare, readers, store_writer
from ochat.errors import CheckpointError, ConfigError, DataError
from ochat.export.hf_folder import export
from ochat.files import checksums
from ochat.model import hf
from ochat.model.safetensors_files import open_folder
from tests import tiny


def cut(path):
    path.write_bytes(path.read_bytes()[:-3])


DAMAGES = [tiny.flip, cut, lambda path: path.write_bytes(path.read_bytes() + b"\0"), Path.unlink]


@pytest.fixture(scope="module")
def shard_set(world, tmp_path_factory):
    """A data set of several shards, and rejects."""
    folder = tmp_path_factory.mktemp("sets")
    (folder / "in.jsonl").write_text((world.folder / "conversations.jsonl").read_text() + "{bad\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store_writer, "SHARD_TOKENS", 400)
        patch.setattr(readers, "BATCH_RECORDS", 4)
        options = {"progress": False, "on_bad": "skip"}
        prepare.prepare([folder / "in.jsonl"], world.base, "openchat_v3.2", folder / "data", **options)
    assert len(list((folder / "data").glob("shard-*"))) > 2
    return folder / "data"


@pytest.fixture
def data(shard_set, tmp_path):
    return shutil.copytree(shard_set, tmp_path / "data")


@pytest.fixture
def base(world, tmp_path):
    return shutil.copytree(world.base, tmp_path / "base")


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_data_set_is_refused_by_the_name_of_any_of_its_files(world, data, tmp_path, damage):
    paths = sorted(data.iterdir())
    for path in paths:
        content = path.read_bytes()
        damage(path)
        with pytest.raises(DataError, match=path.name):
            tiny.train(world, tmp_path / "run", f"--data.path={data}")
        path.write_bytes(content)
    assert len(paths) > 4 and not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    "options",
    [
        ["--data.eval_path={damaged}"],
        ["--data.path=", '--data.mix.a.path="{whole}"', '--data.mix.b.path="{damaged}"'],
        ['--data.path=["{whole}", "{damaged}"]'],
    ],
)
def test_so_is_every_other_set_that_a_run_reads(world, data, tmp_path, options):
    tiny.flip(data / "shard-00001.safetensors")
    with pytest.raises(DataError, match="shard-00001.safetensors: its content has changed"):
        tiny.train(world, tmp_path / "run", *(each.format(whole=world.data, damaged=data) for each in options))


def test_without_verification_sizes_and_layout_still_count(world, data, tmp_path):
    """One token is another one then: that is what the option gives up."""
    options = [f"--data.path={data}", "--data.verify=false", "--data.max_steps=1", "--samples.max_new_tokens=1"]
    tiny.flip(data / "shard-00001.safetensors", at=0.999)
    assert len(tiny.train(world, tmp_path / "run", *options)) == 1
    content = (data / "shard-00001.safetensors").read_bytes()
    for damaged, message in ((content[:-3], r"\d+ bytes instead of"), (b"\xff" * len(content), "damaged")):
        (data / "shard-00001.safetensors").write_bytes(damaged)
        with pytest.raises(DataError, match=f"shard-00001.safetensors: {message}"):
            tiny.train(world, tmp_path / "run2", *options)


def test_two_processes_share_the_reading_and_both_stop(world, data, tmp_path):
    """Each reads half of the files; neither continues if one finds damage."""
    by_size = sorted(data.glob("shard-*"), key=lambda path: (-path.stat().st_size, path))
    tiny.flip(by_size[1])  # the second rank's
    done = tiny.train_on_ranks(world, tmp_path / "run", 2, f"--data.path={data}", check=False)
    assert done.returncode != 0 and f"{by_size[1].name}: its content has changed" in done.stdout + done.stderr
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer_config.json", "config.json", "second shard"])
def test_a_damaged_base_is_refused_by_name(world, base, tmp_path, damage, name):
    """Of a config or a tokenizer that is no longer one, its reader may be the one to say so. Shards have no sums, and
    any flipped bit is a number too."""
    if name == "second shard":
        name, damage = tiny.split(base)[1].name, cut if damage is tiny.flip else damage
    damage(base / name)
    with pytest.raises((CheckpointError, ConfigError), match=name):
        tiny.train(world, tmp_path / "run", f"--base.path={base}")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_sums_are_written_and_read_as_sha256sum_does(base):
    """Also with the mark of binary mode and with paths that begin with a dot."""
    subprocess.run(["sha256sum", "--check", "--quiet", "--strict", checksums.SUMS], cwd=base, check=True)
    assert {path.name for path in checksums.expected(base)} == {p.name for p in base.iterdir()} - {checksums.SUMS}
    for options, pattern in (("", "*.safetensors"), ("-b", "*.safetensors"), ("", "./*.safetensors")):
        subprocess.run(f"sha256sum {options} {pattern} > {checksums.SUMS}", shell=True, cwd=base, check=True)
        checksums.compare(checksums.expected(base))
    tiny.flip(base / "model.safetensors")
    with pytest.raises(CheckpointError, match="model.safetensors: damaged"):
        checksums.compare(checksums.expected(base))


@pytest.mark.parametrize("line", ["", "abc  model.safetensors", "{sum}  ../model.safetensors", "{sum}  /etc/passwd"])
def test_sums_that_are_none_are_refused(base, line):
    (base / checksums.SUMS).write_text(line.format(sum="0" * 64) + "\n")
    with pytest.raises(CheckpointError, match=checksums.SUMS):
        checksums.expected(base)


def test_the_hubs_records_of_a_download_are_its_sums(world, base, tmp_path):
    """Both ways in which its tools leave files: links to blobs named by their sums, and metadata beside copies."""
    files = tiny.split(base)
    linked = shutil.copytree(base, tmp_path / "linked")
    (tmp_path / "blobs").mkdir()
    (base / ".cache" / "huggingface" / "download").mkdir(parents=True)
    for path in files:
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        shutil.move(linked / path.name, tmp_path / "blobs" / sha256)
        (linked / path.name).symlink_to(f"../blobs/{sha256}")
        record = base / ".cache" / "huggingface" / "download" / f"{path.name}.metadata"
        record.write_text(f"{'a' * 40}\n{sha256}\n1700000000.0\n")
    for folder in (base, linked):
        assert len(checksums.expected(folder)) == len(files)
        hf.load(folder)
        tiny.flip(folder / files[1].name, at=0.9)
        with pytest.raises(CheckpointError, match=f"{files[1].name}: damaged"):
            tiny.train(world, tmp_path / "run", f"--base.path={folder}")
        with pytest.raises(CheckpointError, match=f"{files[1].name}: damaged"):
            init_base.main(InitBaseOptions(tmp_path / "new", hf=folder))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_named_with_file_and_tensor(world, base, tmp_path, value):
    assert len(tiny.split(base)) > 2
    name = "model.layers.1.mlp.down_proj.weight"
    tensor = open_folder(base)[name]
    content = bytearray(tensor.path.read_bytes())
    at = content.index(tensor.read().numpy().tobytes()) + 4 * 100
    content[at : at + 4] = np.float32(value).tobytes()
    tensor.path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{tensor.path.name}: {name} holds a value that is NaN or infinite"):
        tiny.train(world, tmp_path / "run", f"--base.path={base}")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_an_exported_model_is_a_base_with_sums(alone, world, tmp_path):
    export(world.folder / "alone", tmp_path / "out")
    assert torch.isfinite(hf.load(tmp_path / "out").embed.weight).all()
    tiny.flip(tmp_path / "out" / "model.safetensors", at=0.9)
    with pytest.raises(CheckpointError, match="model.safetensors: damaged"):
        hf.load(tmp_path / "out")
