"""A checkpoint is complete or refused by the file's name, is written during training, and is read in slices: only the
rows that a rank holds, whatever the number of processes that wrote them."""

import contextlib
import json
import os
import re
import resource
import shutil
import time

import ochat_kernels
import pytest
import torch
from safetensors.torch import load_file

from ochat.checkpoint import load as checkpoint
from ochat.checkpoint import manifest
from ochat.checkpoint.manifest import Manifest, verify_checkpoint
from ochat.checkpoint.save import AsyncCheckpointer
from ochat.config import OptimConfig, ParallelConfig, TrainConfig
from ochat.distributed import local_shards
from ochat.errors import CheckpointError
from ochat.export import hf_folder
from ochat.files.safetensors_file import PinnedSafetensors, StoredTensor
from ochat.model import hf
from ochat.model.config import ModelConfig
from ochat.model.transformer import Transformer
from ochat.run import layout
from ochat.train import optim, sharding
from tests import pool, tiny
from tests.checkpoint.test_checkpoint_faults import ALONE

WEIGHTS, OPTIMIZER = (f"{kind}-00001-of-00001.safetensors" for kind in manifest.KINDS)
OPTIONS = ["--data.epochs=2", "--checkpoint.every=5", "--checkpoint.keep=0"]


@pytest.fixture
def run(world, alone, tmp_path):
    """A copy of the finished run; its checkpoints are of steps 5, 10, 15 and the last."""
    shutil.copytree(world.folder / "alone", tmp_path / "run")
    return tmp_path / "run"


def step(run, number):
    return run / "checkpoints" / f"step_{number}"


def keep_only(run, *numbers):
    for folder in layout.checkpoint_folders(run):
        if int(folder.name[5:]) not in numbers:
            shutil.rmtree(folder)


DAMAGES = {
    "bytes instead of": lambda path: os.truncate(path, path.stat().st_size - 2),
    "damaged": tiny.flip,
    "missing": os.unlink,
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", [WEIGHTS, OPTIMIZER, "tokenizer.json", "manifest.json"])
def test_a_damaged_file_is_named(run, name, damage):
    verify_checkpoint(step(run, 10), ALONE)
    DAMAGES[damage](step(run, 10) / name)
    with pytest.raises(CheckpointError, match=f"step_10/{name}: .*{'' if name == 'manifest.json' else damage}"):
        verify_checkpoint(step(run, 10), ALONE)


X = {"bytes": 1, "sha256": ""}


@pytest.mark.parametrize(
    ("key", "change", "says"),
    [
        ("step", lambda _: "10", "int.*step"),
        ("skipped", lambda _: 11, "11 of 10 steps cannot have been skipped"),
        ("files", lambda files: files | {"../../x": X}, "'../../x' is no file"),
        ("files", lambda files: files | {"/etc/passwd": X}, "'/etc/passwd' is no file"),
        ("files", lambda files: files | {"x": {"bytes": 1}}, "sha256"),
        ("files", lambda files: {name: files[name] for name in files if name != OPTIMIZER}, OPTIMIZER),
        ("shards", lambda shards: [shards[0] | {"embed.weight": [0, 200]}], "embed.weight ends at row 200 of 260"),
        ("shards", lambda shards: [shards[0] | {"embed.weight": [-1, 260]}], "rows of embed.weight do not follow"),
        ("shards", lambda shards: [shards[0] | {"embed.weight": [0, 0]}], "rows of embed.weight do not follow"),
        ("shards", lambda _: [], "length >= 1.*shards"),
        ("parameters", lambda known: known | {"x": {"shape": [3], "dtype": "float32"}}, "x ends at row 0 of 3"),
        ("parameters", lambda known: known | {"x": {"shape": [], "dtype": "float32"}}, "length >= 1.*shape"),
        ("parameters", lambda known: known | {"x": json.loads("[" * 99 + "]" * 99)}, "nested more than"),
    ],
)
def test_a_manifest_that_lies_is_refused_by_its_checksum_and_under_a_right_one(run, key, change, says):
    path = step(run, 10) / "manifest.json"
    record = json.loads(path.read_text())
    record[key] = change(record[key])
    path.write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match="step_10.*manifest.json"):
        verify_checkpoint(path.parent, ALONE)
    del record["sha256"]
    path.write_text(json.dumps(record | {"sha256": manifest.digest(record)}))
    with pytest.raises(CheckpointError, match=f"manifest.json: .*{says}"):
        Manifest.read(path.parent)


def test_an_explicit_checkpoint_that_is_damaged_is_refused_and_so_is_its_export(world, run, tmp_path):
    tiny.flip(step(run, 10) / WEIGHTS)
    with pytest.raises(CheckpointError, match=f"{WEIGHTS}: damaged"):
        tiny.train(world, tmp_path / "other", *OPTIONS, f"--run.resume={step(run, 10)}")
    with pytest.raises(CheckpointError, match=f"{WEIGHTS}: damaged"):
        hf_folder.export(step(run, 10), tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "other" / "metrics.jsonl").exists()


def test_auto_resumes_from_the_newest_complete_one_and_reports_what_it_skipped(world, alone, run, capsys):
    keep_only(run, 5, 10, 15)
    tiny.flip(step(run, 15) / OPTIMIZER)
    (step(run, 10) / WEIGHTS).unlink()
    (run / "checkpoints" / ".step_20.tmp").mkdir()
    lines = tiny.train(world, run, *OPTIONS)
    said = " ".join(capsys.readouterr().out.split())
    assert re.search(f"skipping step_15: .*{OPTIMIZER}: damaged", said)
    assert re.search(f"skipping step_10: .*{WEIGHTS}: missing", said) and re.search("resuming from .*step_5", said)
    assert tiny.curve(lines) == tiny.curve(alone)
    assert tiny.is_equal(*(tiny.state(folder, len(alone)) for folder in (run, world.folder / "alone")))
    for number in (10, 15):  # written again
        verify_checkpoint(step(run, number), ALONE)
    assert not list((run / "checkpoints").glob(".*"))


def test_a_run_whose_checkpoints_are_all_damaged_does_not_restart(world, run):
    keep_only(run, 10, 15)
    before = (run / "metrics.jsonl").read_text()
    for number in (10, 15):
        tiny.flip(step(run, number) / WEIGHTS)
    with pytest.raises(CheckpointError, match="none of step_15, step_10 can be loaded"):
        tiny.train(world, run, *OPTIONS)
    assert (run / "metrics.jsonl").read_text() == before


def test_the_newest_k_and_every_nth_stay_and_a_damaged_later_one_takes_no_place(world, run):
    keep_only(run, 5, 15)
    tiny.flip(step(run, 15) / WEIGHTS)
    options = ["--data.epochs=2", "--data.max_steps=14", "--run.resume_mismatched=true"]
    tiny.train(world, run, *options, "--checkpoint.every=2", "--checkpoint.keep=1", "--checkpoint.keep_every=6")
    assert [folder.name for folder in layout.checkpoint_folders(run)] == ["step_6", "step_12", "step_14", "step_15"]
    assert (run / "latest").read_text() == "checkpoints/step_14\n"


def test_another_runs_checkpoint_is_resumed_only_on_request_and_never_one_of_other_shapes(world, run, tmp_path):
    keep_only(run, 5)
    with pytest.raises(CheckpointError, match="run.seed is 0 there and 3 here.*--run.resume_mismatched=true"):
        tiny.train(world, run, *OPTIONS, "--run.seed=3")
    lines = tiny.train(world, run, *OPTIONS, "--run.seed=3", "--run.resume_mismatched=true", "--data.max_steps=7")
    assert [line["step"] for line in lines] == list(range(1, 8))
    assert Manifest.read(step(run, 7)).identity["run.seed"] == 3
    other = tiny.make(tmp_path / "other", model={"intermediate_size": 64})
    with pytest.raises(CheckpointError, match=r"mlp.down.weight is float32 \[32, 48\] there and float32 \[32, 64\]"):
        tiny.train(other, run, *OPTIONS, "--run.resume_mismatched=true")


def test_no_checkpoint_is_written_or_removed_through_a_link(world, tmp_path):
    """A stale temporary folder, the serving files and a checkpoint may be links; the folder of all of them may too."""
    other, run = shutil.copytree(world.base, tmp_path / "other"), tmp_path / "run"
    before = {path.name: path.read_bytes() for path in other.iterdir()}
    (tmp_path / "disk").mkdir()
    run.mkdir()
    (run / "checkpoints").symlink_to(tmp_path / "disk")
    for name in (".step_1.tmp", ".step_2.tmp", ".step_3.old"):
        (run / "checkpoints" / name).symlink_to(other)
    (run / "serving").symlink_to(other)
    options = ["--data.max_steps=3", "--checkpoint.every=1", "--checkpoint.keep=1"]
    tiny.train(world, run, *options)
    assert {path.name: path.read_bytes() for path in other.iterdir()} == before
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["step_3"]
    Manifest.read(run / "checkpoints" / "step_3").check_sizes()


def test_no_pickle_is_written_and_none_can_be_read(world, alone):
    files = [path for path in (world.folder / "alone").rglob("*") if path.is_file()]
    assert len(files) > 20
    for path in files:
        start = path.read_bytes()[:2]
        assert start != b"PK" and start[:1] != b"\x80", path  # a zip of torch.save, a bare pickle
    for path in (tiny.ROOT / "ochat").rglob("*.py"):
        calls = r"torch\.(load|save)\(|import pickle|pickle\.|(gather|broadcast|scatter)_object\("
        assert not re.search(calls, path.read_text()), path


@pytest.mark.parametrize("world_size", [1, 3, 20])  # 20 divides nothing, and leaves ranks without rows of some
def test_a_rank_reads_its_own_share_of_the_base_and_of_a_checkpoint(world, alone, world_size, monkeypatch):
    """Every rank in turn, on a process group of one real member: each reads its rows alone, about 1/world of the bytes,
    together they read each byte once, and what they hold is their rows of the whole."""
    found, shares = Manifest.read(step(world.folder / "alone", 5)), []
    weights, optimizer = (load_file(found.folder / name) for name in (WEIGHTS, OPTIMIZER))
    base = dict(hf.load(world.base, dtype="float32").named_parameters())
    plain = StoredTensor.rows

    def counted(*args):
        rows = plain(*args)
        shares[-1] += rows.nbytes
        return rows

    monkeypatch.setattr(StoredTensor, "rows", counted)
    monkeypatch.setattr(StoredTensor, "read", lambda *_: pytest.fail("a whole tensor was read"))

    def part(whole):
        return (*whole.chunk(world_size), *[whole[:0]] * world_size)[rank]

    for rank in range(world_size):
        with sharded(world, rank, world_size) as model:
            shares.append(0)
            checkpoint.load_base(world.base, model)
            for name, parameter in model.named_parameters():
                assert torch.equal(local_shards.local_shard(parameter), part(base[name])), name
            adamw = optim.build(model, OptimConfig())
            optim.start_state(adamw, found.step, found.skipped)
            checkpoint.load_state(found, model, adamw.state)
            for name, parameter in model.named_parameters():
                assert torch.equal(local_shards.local_shard(parameter), part(weights[name])), name
                for moment in manifest.MOMENTS:
                    held = local_shards.local_shard(adamw.state[parameter][moment])
                    assert torch.equal(held, part(optimizer[f"{moment}.{name}"])), name
    total = 4 * 4 * sum(parameter.numel() for parameter in base.values())  # base, masters, two moments in fp32
    assert sum(shares) == total
    assert max(shares) == sum(16 * -(-len(p) // world_size) * p[0].numel() for p in base.values())
    assert max(shares) <= 1.05 * total / world_size or world_size > 3


@contextlib.contextmanager
def sharded(world, rank, world_size):
    """The model of the world as one rank of several holds it, unfilled."""
    with torch.device("meta"):
        model = Transformer(ModelConfig.load(world.base), ochat_kernels.load("reference"))
    if world_size == 1:
        yield model.to_empty(device="cpu")
        return
    with pool.in_name_only(rank, world_size) as ranks:
        sharding.wrap(model, ranks, TrainConfig(recompute="none"), ParallelConfig(), torch.float32)
        yield model.to_empty(device="cpu")


def test_training_continues_during_a_save_which_holds_its_own_step(world, alone, tmp_path, monkeypatch, capsys):
    """Each save takes far longer than the steps until the next one, so that each next one has to wait."""
    seconds, save_plainly, write_plainly = [], AsyncCheckpointer.save, PinnedSafetensors.write

    def save(self, number):
        begin = time.monotonic()
        save_plainly(self, number)
        seconds.append(time.monotonic() - begin)

    def write(self, path):
        time.sleep(0.5)
        return write_plainly(self, path)

    monkeypatch.setattr(PinnedSafetensors, "write", write)
    monkeypatch.setattr(AsyncCheckpointer, "save", save)
    lines = tiny.train(world, tmp_path / "run", *OPTIONS)
    assert tiny.curve(lines) == tiny.curve(alone)
    assert seconds[0] < 0.5 < max(seconds)  # two files of half a second each: the first save waits for neither
    said = " ".join(capsys.readouterr().out.split())
    assert "the checkpoint of step 10 waits until the one before is written" in said
    for number in (5, 10, 15, len(alone)):
        ours, theirs = (step(run, number) / WEIGHTS for run in (tmp_path / "run", world.folder / "alone"))
        assert ours.read_bytes() == theirs.read_bytes()


@pytest.fixture
def limit(monkeypatch):
    """limit(first, end): from the save of step `first` to that of `end`, no file of this process grows beyond `most`
    bytes. A write then fails half-way, as on a full disk; it needs no rights."""
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    plain = AsyncCheckpointer.save

    def start(first, end, most=200_000):
        def save(self, number):
            self.wait()
            resource.setrlimit(resource.RLIMIT_FSIZE, (most if first <= number < end else unlimited[0], unlimited[1]))
            plain(self, number)

        monkeypatch.setattr(AsyncCheckpointer, "save", save)

    yield start
    resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)


@pytest.mark.parametrize("most", [200_000, 100])
def test_a_save_that_fails_is_reported_and_retried_at_the_next(world, alone, tmp_path, limit, capsys, most):
    """With the smaller limit the lines of metrics.jsonl have to wait too; none is lost."""
    limit(10, 15, most)
    lines, run_dir = tiny.train(world, tmp_path / "run", *OPTIONS), tmp_path / "run"
    said = " ".join(capsys.readouterr().out.split())
    assert tiny.curve(lines) == tiny.curve(alone)
    assert "WARNING the checkpoint of step 10 could NOT be saved" in said and "resumes from" in said
    assert ("metrics.jsonl cannot be written (File too large)" in said) == (most == 100)
    folders = layout.checkpoint_folders(run_dir)
    assert [layout.step_of(folder) for folder in folders] == [5, 15, len(alone)]
    assert not list((run_dir / "checkpoints").glob(".*"))
    assert (run_dir / "latest").read_text() == f"checkpoints/step_{len(alone)}\n"
    for folder in folders:
        verify_checkpoint(folder, ALONE)


def test_a_last_save_that_fails_is_an_error_that_the_same_command_repairs(world, alone, tmp_path, limit):
    limit(10, 10**9)
    with pytest.raises(CheckpointError, match="the last checkpoint, of step .*resumes from .*step_5"):
        tiny.train(world, tmp_path / "run", *OPTIONS)
    assert [folder.name for folder in layout.checkpoint_folders(tmp_path / "run")] == ["step_5"]
    limit(0, 0)
    assert tiny.curve(tiny.train(world, tmp_path / "run", *OPTIONS)) == tiny.curve(alone)


def test_a_shard_that_another_machine_wrote_to_a_disk_of_its_own_fails_the_save(world, tmp_path, monkeypatch):
    plain = PinnedSafetensors.write

    def write(self, path):
        written = plain(self, path)
        path.unlink()
        return written

    monkeypatch.setattr(PinnedSafetensors, "write", write)
    with pytest.raises(CheckpointError, match="weights-.* is not there; all processes need the same run folder"):
        tiny.train(world, tmp_path / "run", "--data.max_steps=2")
    assert not layout.checkpoint_folders(tmp_path / "run")
