"""`ochat ablate`: a variant is exactly its switches, a killed laboratory goes on and gives what an undisturbed one
does, intervals are a statistician's: pytest tests/evaluate/test_ablate.py"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise

import msgspec
import numpy as np
import pytest
from rich.console import Console

from ochat import config as configuration
from ochat.commands import ablate
from ochat.commands.eval import EvalOptions, evaluate
from ochat.data.dataset import TokenDataset
from ochat.errors import ConfigError
from ochat.evaluate.ablate import (
    crew,
    student,
    table,
    variants,
)
from ochat.evaluate.ablate.crew import Task
from ochat.evaluate.ablate.laboratory import Laboratory, last_step
from ochat.model import init_base
from ochat.model.config import ModelConfig
from ochat.model.init_base import InitBaseOptions
from ochat.text.template import load as load_template
from ochat.text.tokenizer import load as load_tokenizer
from ochat.train import inputs
from ochat.train.trainer import train
from tests import tiny
from tests.checkpoint.test_checkpoint_faults import descendants, wait_for

STEPS = 12
TOML = """
[base]
path = {base}
[data]
token_budget = 192
bins_per_step = 2
max_steps = {steps}
[classes.GPT4]
reward = 1.0
[classes.GPT3]
weight = 0.1
[optim]
lr = 1e-2
[train]
dtype = "float32"
device = "cpu"
[ablate]
dir = {folder}
input = [{chats}]
held_out = 0.3
template = "openchat_v3.2"
seeds = [3, 5]
"""


@pytest.fixture(scope="module")
def file(world, tmp_path_factory):
    """A laboratory's configuration."""
    folder = tmp_path_factory.mktemp("lab")
    named = {"base": world.base, "chats": world.folder / "conversations.jsonl", "folder": folder / "lab"}
    texts = {name: json.dumps(str(path)) for name, path in named.items()}
    path = folder / "lab.toml"
    path.write_text(TOML.format(**texts, steps=STEPS))
    return path


@pytest.fixture(scope="module")
def prepared(file):
    """A laboratory whose data is prepared, and whose runs have not begun."""
    laboratory = Laboratory(*variants.read(file, [f"--ablate.dir={file.parent / 'prepared'}"]))
    laboratory.open()
    return laboratory


def flat(config):
    return {f"{section}.{key}": value for section, values in msgspec.to_builtins(config).items()
            for key, value in values.items()}  # fmt: skip


def test_a_variant_is_exactly_its_switches(file):
    base, options = variants.read(file, ["--ablate.subsample=[0.6]"])
    runs = variants.runs(base, options)
    assert [run.seed for run in runs] == [3] * 8 + [5] * 8 and len({run.config.run.dir for run in runs}) == 16
    ours, *others = (flat(run.config) for run in runs[:8])
    assert ours["weights.source"] == "auto" and ours["classes.GPT3"]["weight"] == 0.1
    (tokens,) = {run.config.data.mix["all"].tokens for run in runs}
    assert tokens == STEPS * 2 * 192
    plain = {"path": ours["data.mix"]["all"]["path"].replace("condition", "plain")}
    plain = {"data.mix": {"all": ours["data.mix"]["all"] | plain}}
    switches = {
        "no-reward": {"weights.source": "none"},
        "no-condition": plain,
        "sft": plain | {"weights.source": "none"},
        "only-expert": {"data.only_class": "GPT4"},
        "only-suboptimal": {"data.only_class": "GPT3"},
        "c-rlft-expert-0.6": {"data.subsample": {"GPT4": 0.6}},
        "c-rlft-suboptimal-0.6": {"data.subsample": {"GPT3": 0.6}},
    }
    for run, other, (name, wanted) in zip(runs[1:8], others, switches.items(), strict=True):
        changed = {key: value for key, value in other.items() if value != ours[key] and key != "run.dir"}
        assert run.variant.name == name and changed == wanted
    for one, other in zip(runs[:8], runs[8:], strict=True):
        changed = {key for key, value in flat(one.config).items() if flat(other.config)[key] != value}
        assert changed == {"run.dir", "run.seed"}


def test_what_a_variant_trains_on(prepared):
    """Tokens and weights of every conversation, by hand; the same number of full steps for all."""
    template, tokenizer = load_template("openchat_v3.2"), load_tokenizer(prepared.base.base.path)
    for run in prepared.runs[:6]:
        data, variant = inputs.open_data(run.config), run.variant
        classes = {"only-expert": {"GPT4"}, "only-suboptimal": {"GPT3"}}.get(variant.name, {"GPT3", "GPT4"})
        assert {example.condition for example in data} == classes
        for example in data:
            weights = set(example.loss_weights.tolist())
            assert weights == {0.0, np.float32(1.0 if not variant.has_reward or example.condition == "GPT4" else 0.1)}
            text = tokenizer.decode(example.input_ids.tolist())
            is_named = f"{example.condition} User:" in text and f"{example.condition} Assistant:" in text
            assert is_named == variant.has_condition and ("User:" in text)
        assert data.template.condition_roles == ("both" if variant.has_condition else "none")
        loader = inputs.open_loader(run.config, data, ModelConfig.load(run.config.base.path))
        filled = [sum(batch.num_tokens for batch in loader.step(step)) for step in range(loader.num_steps)]
        assert loader.num_steps == STEPS and min(filled) > 0.8 * 2 * 192
        assert {run.config.run.seed, template.name} == {3, "openchat_v3.2"}


def run_command(file, folder, *more):
    """The words of the command, two short runs."""
    some = '--ablate.variants=["c-rlft", "sft"]'
    return [str(file), f"--ablate.dir={folder}", some, "--ablate.seeds=[3]", "--checkpoint.every=4", *more]


@pytest.fixture(scope="module")
def killed(file):
    """A laboratory killed in its second run and started again: its folder, and who was alive after the kill."""
    folder, log = file.parent / "killed", file.parent / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "ochat", "ablate", *run_command(file, folder)],
            cwd=tiny.ROOT, env=tiny.environment(), stdout=output, stderr=output,
        )  # fmt: skip
    second = folder / "runs" / "sft-seed3"
    wait_for(process, lambda: any((second / "checkpoints").glob("step_*")), log)
    family = descendants(process.pid)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 10
    while alive := [pid for pid in family if os.path.exists(f"/proc/{pid}")]:
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    stamp = (folder / "runs" / "c-rlft-seed3" / "measured.json").stat().st_mtime_ns
    assert not (second / "measured.json").exists(), "it was to be killed before it was done"
    done = subprocess.run(
        [sys.executable, "-m", "ochat", "ablate", *run_command(file, folder)],
        cwd=tiny.ROOT, env=tiny.environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, alive, stamp, done.stdout


def test_a_killed_laboratory_leaves_nobody_and_repeats_nothing(killed):
    folder, alive, stamp, said = killed
    assert not alive
    assert (folder / "runs" / "c-rlft-seed3" / "measured.json").stat().st_mtime_ns == stamp
    assert "2 runs of 12 steps, 1 to do" in said and "sft-seed3 done" in said
    assert "resuming from" in (folder / "logs" / "sft-seed3.log").read_text()


def test_it_gives_what_an_undisturbed_run_gives(killed, file, tmp_path):
    folder = killed[0]
    results = {record["run"]: record for record in map(json.loads, (folder / "results.jsonl").open())}
    for name in ("c-rlft-seed3", "sft-seed3"):
        config = configuration.load(folder / "configs" / f"{name}.toml", [f"--run.dir={tmp_path / name}"])
        train(config)
        held_out = folder / "data" / ("plain-held-out" if name.startswith("sft") else "condition-held-out")
        conditions = () if name.startswith("sft") else ("GPT4", "GPT3")
        alone = evaluate(EvalOptions(tmp_path / name, held_out, conditions, dtype="float32"))
        assert results[name]["classes"] == json.loads(json.dumps(alone["classes"]))
        lines = [[line["loss"] for line in tiny.metrics(at / name)] for at in (folder / "runs", tmp_path)]
        assert lines[0] == lines[1] and len(lines[0]) == STEPS == results[name]["steps"]


def test_a_finished_laboratory_prints_its_table_again_and_trains_nothing(killed, file, capsys, monkeypatch):
    folder, *_, said = killed
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a process was started"))
    written = (folder / "table.json").read_text()
    for more in (["--table"], []):
        ablate.main(run_command(file, folder, *more))
        shown = capsys.readouterr().out
        assert f"wrote {folder / 'table.md'}" in shown
        assert shown.split("exact match")[1] == said.split("exact match")[1] and "only SFT" in shown
        assert (folder / "table.json").read_text() == written
    assert not (folder / "runs" / "sft-seed3" / "checkpoints").exists()
    assert (folder / "runs" / "sft-seed3" / "export" / "openchat.json").is_file()
    assert "| only SFT | 1 |" in (folder / "table.md").read_text()


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--optim.lr=2e-2"], "optim.lr is 0.02, and was 0.01 when"),
        (["--classes.GPT3.weight=0.2"], "classes.GPT3 is .*0.2"),
        (["--ablate.held_out=0.5"], "ablate.held_out is 0.5"),
        (["--ablate.limit=3"], "ablate.limit is 3"),
    ],
)
def test_another_setting_under_a_folder_is_named(killed, file, more, named):
    with pytest.raises(ConfigError, match=named):
        ablate.main(run_command(file, killed[0], *more))


def begin(folder):
    """A run that has made a step."""
    (folder / "runs" / "c-rlft-seed3").mkdir(parents=True)
    (folder / "runs" / "c-rlft-seed3" / "metrics.jsonl").write_text('{"step": 1}\n')


def test_another_base_under_a_folder_is_named_and_a_moved_one_is_not(file, world, tmp_path):
    options = [f"--ablate.dir={tmp_path / 'lab'}"]
    Laboratory(*variants.read(file, options)).open()
    begin(tmp_path / "lab")
    shutil.copytree(world.base, tmp_path / "moved")
    options.append(f"--base.path={tmp_path / 'moved'}")
    Laboratory(*variants.read(file, options)).open()
    init_base.main(
        InitBaseOptions(
            tmp_path / "other", random=world.folder / "model.json", tokenizer=world.base, seed=1, dtype="float32"
        )
    )
    options[-1] = f"--base.path={tmp_path / 'other'}"
    with pytest.raises(ConfigError, match=r"the checksum of the base is '\w+', and was"):
        Laboratory(*variants.read(file, options)).open()


def test_what_was_wrong_before_the_first_step_can_be_put_right(file, tmp_path):
    def opened(*more):
        laboratory = Laboratory(*variants.read(file, [f"--ablate.dir={tmp_path}", *more]))
        laboratory.open()
        return len(TokenDataset(laboratory.data(laboratory.runs[0], is_held_out=True)))

    with pytest.raises(ConfigError, match="no such class"):
        opened("--ablate.expert=GPT5")
    few, many = opened("--ablate.held_out=0.3"), opened("--ablate.held_out=0.8")
    assert many > 1.5 * few


@pytest.mark.parametrize("more", [["--ablate.expert=GPT5"], ["--ablate.expert=GPT3", "--ablate.suboptimal=GPT4"]])
def test_a_table_is_of_the_classes_that_were_trained(killed, file, more):
    with pytest.raises(ConfigError, match="ablate.expert is 'GPT.', and was 'GPT4' when"):
        ablate.main(run_command(file, killed[0], "--table", *more))


def test_a_table_of_nothing_is_said(file, tmp_path):
    with pytest.raises(ConfigError, match="nothing: no laboratory was begun there"):
        ablate.main(run_command(file, tmp_path / "nothing", "--table"))
    assert not (tmp_path / "nothing").exists()


def test_other_data_under_a_folder_is_named(file, world, tmp_path):
    chats = tmp_path / "chats.jsonl"
    lines = (world.folder / "conversations.jsonl").read_text().splitlines(keepends=True)
    chats.write_text("".join(lines))
    options = [f"--ablate.dir={tmp_path / 'lab'}", f'--ablate.input=["{chats}"]']
    Laboratory(*variants.read(file, options)).open()
    Laboratory(
        *variants.read(file, [*options, "--ablate.seeds=[8]", "--ablate.jobs=3", "--run.deterministic=true"])
    ).open()
    begin(tmp_path / "lab")
    chats.write_text("".join(lines[:-1]))
    with pytest.raises(ConfigError, match=r"the content of .*chats.jsonl is '\w+', and was"):
        Laboratory(*variants.read(file, options)).open()


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--ablate.seed=[1]"], "unknown key 'ablate.seed'; did you mean 'seeds'"),
        (['--ablate.variants=["rlft"]'], r"ablate.variants\[0\] = 'rlft': expected one of 'c-rlft'"),
        (["--ablate.held_out=chats.jsonl"], "ablate.held_out = 'chats.jsonl': expected an array, .* or a number"),
        (["--ablate.held_out=[]"], "ablate.held_out = .*: expected files of held-out conversations, or a share"),
        (["--ablate.suboptimal=GPT4"], "expected the name of another class"),
        (["--ablate.seeds=[1, 1]"], "ablate.seeds = .*each once"),
        (["--ablate.subsample=[1.0]"], "ablate.subsample = 1.0"),
        (["--optim.lr=auto"], "optim.lr = 'auto': expected a number"),
        (["--data.max_steps=0"], "data.max_steps = 0: expected the steps"),
        (["--data.path=x"], "data.path: the laboratory sets it"),
        (["--run.dir=x"], "run.dir: the laboratory sets it"),
        (["--weights.source=none"], "weights.source = 'none'"),
    ],
)
def test_what_cannot_be_is_named(file, more, named):
    with pytest.raises(ConfigError, match=named):
        variants.read(file, more)


def test_a_class_that_the_data_lacks_is_named(file, tmp_path):
    laboratory = Laboratory(*variants.read(file, [f"--ablate.dir={tmp_path}", "--ablate.expert=GPT5"]))
    with pytest.raises(ConfigError, match="GPT5.*GPT3.*GPT4|GPT5"):
        laboratory.open()


def test_a_single_run_refuses_the_section_by_name(file):
    with pytest.raises(ConfigError, match=r"has a section \[ablate\], which is for `ochat ablate"):
        configuration.load(file)
    with pytest.raises(ConfigError, match=r"no section \[ablate\]"):
        variants.read(_plain(file))


def _plain(file):
    path = file.parent / "plain.toml"
    path.write_text(file.read_text().split("[ablate]")[0])
    return path


def test_help_lists_every_key_that_it_takes(capsys):
    with pytest.raises(SystemExit) as stopped:
        ablate.main(["--help"])
    shown = capsys.readouterr().out
    assert stopped.value.code == 0 and "[ablate]" in shown
    for key in msgspec.structs.fields(variants.AblateConfig):
        assert f"ablate.{key.name}" in shown
    keys = [line.split(" ")[0] for line in shown.splitlines()]
    assert "data.token_budget" in keys and "run.deterministic" in keys
    assert not [key for key in keys if key.startswith(("run.dir", "run.seed", "data.mix", "data.path", "data.epochs"))]


def python(tmp_path, name, code, steps=3):
    return Task(name, [("-c", code)], tmp_path / name, steps, lambda: 0, lambda: None)


def test_a_failing_run_is_named_and_the_others_go_on(tmp_path):
    said = io.StringIO()
    good = "import pathlib, sys, os; pathlib.Path(sys.argv[1] if sys.argv[1:] else 'x')"
    tasks = [python(tmp_path, "bad", "print('why'); raise SystemExit(3)"), python(tmp_path, "good", good)]
    tasks += [dataclasses.replace(tasks[1], name="two", programs=[("-c", "print(1)"), ("-c", "print(2)")])]
    failed = crew.work(tasks, [{"A": "1"}], Console(file=said, width=100))
    assert [task.name for task in failed] == ["bad"] and crew.tail(failed[0].log) == "why"
    assert crew.tail(tasks[1].log) == "1\n2"
    assert [line.split()[:2] for line in said.getvalue().splitlines()] == [
        ["bad", "failed"], ["good", "done"], ["two", "done"]]  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_waits_until_all_have_saved(tmp_path, number):
    code = (
        "import pathlib, signal, sys, time\n"
        "def save(*_): time.sleep(0.5); print('saved', flush=True); sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, save); print('ready', flush=True); time.sleep(60)"
    )
    tasks = [python(tmp_path, name, code) for name in ("a", "b")]

    def interrupt():
        if all(task.log.exists() and "ready" in task.log.read_text() for task in tasks):
            signal.raise_signal(number)
        return 0

    tasks = [dataclasses.replace(task, done=interrupt) for task in tasks]
    before = signal.getsignal(signal.SIGTERM)
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores Ctrl-C
    try:
        with pytest.raises(KeyboardInterrupt):
            crew.work(tasks, [{}, {}], Console(file=io.StringIO()))
    finally:
        signal.signal(signal.SIGINT, inherited)
    assert [crew.tail(task.log) for task in tasks] == ["ready\nsaved"] * 2
    assert signal.getsignal(signal.SIGTERM) == before


def test_processes_have_slots_to_themselves(tmp_path):
    """Never two at once in one slot, and as many at once as there are slots."""
    code = "import os, time; t = time.time(); time.sleep(0.3); print(os.environ['SLOT'], t, time.time())"
    tasks = [python(tmp_path, f"t{i}", code) for i in range(5)]
    assert crew.work(tasks, [{"SLOT": "a"}, {"SLOT": "b"}], Console(file=io.StringIO())) == []
    spans = {"a": [], "b": []}
    for task in tasks:
        slot, begin, end = crew.tail(task.log).split()
        spans[slot].append((float(begin), float(end)))
    assert len(spans["a"]) + len(spans["b"]) == 5 and min(map(len, spans.values())) >= 1
    for busy in spans.values():
        assert all(one[1] <= other[0] for one, other in pairwise(sorted(busy)))


def test_a_program_that_fails_ends_its_task(tmp_path):
    finished = []
    task = dataclasses.replace(
        python(tmp_path, "x", ""), programs=[("-c", "raise SystemExit(1)"), ("-c", "print('never')")],
        finish=lambda: finished.append(1),
    )  # fmt: skip
    assert crew.work([task], [{}], Console(file=io.StringIO())) == [task]
    assert "never" not in task.log.read_text() and not finished


def test_cores_and_devices_are_shared_out(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert ablate.slots(3, []) == [{"OMP_NUM_THREADS": "2"}] * 3
    found = ablate.slots(3, ["4", "6"])
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in found] == ["4", "6", "4"]
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert ablate.slots(1, []) == [{"OMP_NUM_THREADS": "5"}]


def test_the_last_whole_line_of_a_growing_file(tmp_path):
    assert last_step(tmp_path) == {}
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert last_step(tmp_path) == {"step": 2} and last_step(tmp_path, tail_bytes=8) == {}


PUBLISHED = {1: 12.7062, 2: 4.30265, 3: 3.18245, 4: 2.77645, 5: 2.57058, 9: 2.26216, 10: 2.22814, 29: 2.04523}


def test_intervals_are_students():
    """Of the printed tables; and they hold the truth as often as they say, of five normal draws."""
    for degrees, wanted in PUBLISHED.items():
        assert student.quantile(degrees) == pytest.approx(wanted, abs=6e-6 * wanted)
    assert student.quantile(4, 0.99) == pytest.approx(4.60409, abs=1e-5)
    found = student.mean_of([1.0, 2.0, 4.0])
    half = 4.302653 * np.std([1, 2, 4], ddof=1) / np.sqrt(3)
    assert found["mean"] == pytest.approx(7 / 3) and found["interval"] == pytest.approx([7 / 3 - half, 7 / 3 + half])
    assert student.mean_of([0.5]) == {"mean": 0.5, "interval": None, "values": [0.5]}
    draws = np.random.default_rng(0).normal(3.0, 2.0, (4000, 5))
    held = [low <= 3.0 <= high for low, high in (student.mean_of(row)["interval"] for row in draws.tolist())]
    assert 0.94 < np.mean(held) < 0.96  # three standard errors are 0.0103


def test_intervals_equal_scipys():
    stats = pytest.importorskip("scipy.stats")
    for degrees in (1, 2, 3, 4, 7, 30, 101):
        for level in (0.5, 0.95, 0.999):
            assert student.quantile(degrees, level) == pytest.approx(stats.t.ppf((1 + level) / 2, degrees), rel=1e-9)


def result(variant, seed, exact, nll, conditions=("GPT4", "GPT3")):
    prefixes = {
        name: {"exact": exact / (1 + i), "nll": nll * (1 + i), "exact_interval": [0.1, 0.2], "nll_interval": [1, 2]}
        for i, name in enumerate(conditions)
    }
    classes = {"GPT4": {"conversations": 50, "prefixes": prefixes}}
    interval = {"method": "percentile bootstrap"}
    return {"variant": variant, "title": variant.upper(), "seed": seed, "conditions": list(conditions),
            "classes": classes, "interval": interval}  # fmt: skip


def test_the_table_is_means_over_seeds_and_differences_by_seed():
    results = [result("c-rlft", seed, 0.9 + seed / 100, 0.1) for seed in (0, 1, 2)]
    results += [result("sft", seed, 0.2 + seed / 100, 0.5, ("",)) for seed in (2, 1, 7)]
    results += [result("no-reward", 1, 0.6, 0.2)]
    record = table.summarise(results, "GPT4", "GPT3")
    ours, sft, single = record["rows"]
    assert ours["exact"]["expert"]["values"] == [0.9, 0.91, 0.92] and ours["exact"]["above_ours"] is None
    assert ours["nll"]["suboptimal"]["mean"] == pytest.approx(0.2)
    low, high = ours["exact"]["expert"]["interval"]
    assert (low + high) / 2 == pytest.approx(0.91) and high - low == pytest.approx(2 * 4.302653 * 0.01 / 3**0.5)
    assert sft["exact"]["suboptimal"] is None and sft["seeds"] == [2, 1, 7]
    assert sft["exact"]["above_ours"]["values"] == pytest.approx([0.22 - 0.92, 0.21 - 0.91])  # seeds 2 and 1, paired
    assert single["exact"]["expert"]["interval"] == [0.1, 0.2] and single["exact"]["above_ours"]["interval"] is None
    text = table.markdown(record)
    assert "| C-RLFT | 3 | 91.0 [88.5, 93.5] |" in text and "-70.0 [-70.0, -70.0]" in text
    assert "t interval over seeds, 95%; of one seed percentile bootstrap, 95%" in text
    shown = io.StringIO()
    console = Console(file=shown, width=80)
    for each in table.tables(record):
        console.print(each)
    assert max(map(len, shown.getvalue().splitlines())) <= 80 and "91.0" in shown.getvalue()


def test_no_interval_goes_where_its_measure_cannot():
    results = [result("c-rlft", seed, exact, 1.0) for seed, exact in enumerate((1.0, 0.9))]
    results += [result("sft", seed, 0.01, nll) for seed, nll in enumerate((0.2, 2.0))]
    ours, sft = table.summarise(results, "GPT4", "GPT3")["rows"]
    assert ours["exact"]["expert"]["interval"] == [pytest.approx(0.3147, abs=1e-4), 1.0]
    assert sft["exact"]["above_ours"]["interval"] == [-1.0, pytest.approx(-0.3047, abs=1e-4)]
    assert sft["nll"]["expert"]["interval"][0] == 0.0 and sft["nll"]["above_ours"]["interval"][0] < -5
