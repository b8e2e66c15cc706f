"""`ochat report`: the page holds the run's own numbers, needs nothing else, and shows hostile content as text:
pytest tests/report"""

from __future__ import annotations

import base64
import json
import math
import re
import shutil
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ochat import cli
from ochat.commands import report as report_module
from ochat.commands.report import ReportOptions
from ochat.errors import ConfigError, DataError
from ochat.report import run_record
from tests import tiny
from tests.tiny import write_lines

pytest.importorskip("plotly")
from ochat.report import charts, tables  # noqa: E402 (they draw with plotly)

VOID = {"meta", "link", "img", "input", "br", "hr"}
HOSTILE = '</script><script>alert("1")</script><img src=x onerror=alert(2)> <b>&amp;\u2028 \'"` {{ 7*7 }}'


class Page(HTMLParser):
    """The elements of a page; every element that is opened is closed, in order."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.inside: dict[str, list[str]] = {"script": [], "style": [], "text": []}
        self.feed(path.read_text("utf-8"))
        self.close()
        assert self.open == []
        self.scripts, self.styles, self.text = self.inside["script"], self.inside["style"], "".join(self.inside["text"])

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.open += [tag] if tag not in VOID else []

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.inside.get(self.open[-1] if self.open else "text", self.inside["text"]).append(data)

    @property
    def charts(self) -> dict[str, list[dict]]:
        """Title -> traces."""
        titles = [attributes["aria-label"] for _, attributes in self.elements if attributes.get("role") == "img"]
        return {title: each["data"] for title, each in zip(titles, json.loads(self.scripts[0]), strict=True)}


def line(step: int, **more: object) -> dict:
    """A line of metrics.jsonl as the trainer writes it."""
    classes = {
        name: {"loss": base + 1 / step, "accuracy": 0.5, "tokens": 10} for name, base in (("GPT4", 1.0), ("GPT3", 2.0))
    }
    return {
        "step": step, "epoch": (step - 1) // 50, "loss": 1.2 + math.sin(step) / step, "accuracy": 0.4,
        "lr": 1e-3 / step, "grad_norm": 1.0 + step % 7, "tokens_per_s": 1000.0 + step, "supervised_tokens_per_s": 100.0,
        "padded_tokens_per_s": 1200.0, "mfu": 0.31, "peak_mem_gib": 2.5, "step_s": 0.5, "tokens": 300,
        "supervised_tokens": 40, "classes": classes,
    } | more  # fmt: skip


def write_run(folder: Path, num_steps: int = 30, *, config: str = "", **more: object) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(config or "[data]\ntoken_budget = 100\nbins_per_step = 4\nmax_steps = 30\n")
    write_lines(folder / "metrics.jsonl", [line(step, **more) for step in range(1, num_steps + 1)])
    return folder


def report(*runs: Path, **more: object) -> Page:
    output = runs[0].parent / "page.html"
    report_module.main(ReportOptions(runs, output, **more))  # type: ignore[arg-type]
    return Page(output)


def drawn(page: Page, title: str) -> dict[str, tuple[list, list]]:
    """The curves of a chart: legend's name -> (x, y) of its own points, not of the moving mean."""
    traces = [trace for trace in page.charts[title] if trace.get("hoverinfo") != "skip"]
    return {trace["name"]: (values(trace["x"]), values(trace["y"])) for trace in traces}


def values(column: dict | list) -> list:
    """The numbers as plotly.js reads them from a figure's JSON; None for NaN."""
    if isinstance(column, dict):
        column = np.frombuffer(base64.b64decode(column["bdata"]), column["dtype"]).tolist()
    return [None if isinstance(each, float) and math.isnan(each) else each for each in column]


@pytest.fixture(scope="module")
def reported(world, alone):
    return report(world.folder / "alone")


def test_the_page_needs_nothing_else(reported):
    for tag, attributes in reported.elements:
        assert tag not in ("link", "base", "iframe", "object", "embed", "img", "form")
        assert not {"src", "srcset", "action", "data", "background"} & attributes.keys()
        assert attributes.get("href", "#").startswith("#")
        assert not any(name.startswith("on") for name in attributes)
    policy = [a["content"] for tag, a in reported.elements if tag == "meta" and "http-equiv" in a]
    assert len(policy) == 1 and policy[0].startswith("default-src 'none';") and "http" not in policy[0]
    data, plotly, script = reported.scripts
    assert "plotly.js" in plotly[:200] and len(plotly) > 1e6
    for text in (*reported.styles, script, data):
        assert not re.search(r"https?:|@import|url\(|\bimport\b|fetch\(|XMLHttpRequest", text)
    ids = [a["id"] for _, a in reported.elements if "id" in a]
    targets = [a["href"][1:] for tag, a in reported.elements if tag == "a"]
    assert len(ids) == len(set(ids)) and targets and set(targets) <= set(ids)


def test_effective_weights_are_drawn_where_a_run_has_them(tmp_path, reported):
    row = {"loss": 1.0, "accuracy": 0.5, "tokens": 10}
    classes = {name: row | {"effective_weight": share} for name, share in (("GPT4", 0.75), ("GPT3", 0.25))}
    found = drawn(report(write_run(tmp_path / "run", classes=classes)), "Effective weight")
    assert {name: set(y) for name, (_, y) in found.items()} == {"GPT4": {0.75}, "GPT3": {0.25}}
    assert "Effective weight" not in reported.charts


def test_every_curve_is_the_run_s_own_numbers(world, alone, reported):
    keys = {
        ("Learning rate", "lr"): "lr", ("Gradient norm", "gradient norm"): "grad_norm", ("MFU", "MFU"): "mfu",
        ("Peak memory", "memory"): "peak_mem_gib", ("Tokens a second", "real"): "tokens_per_s",
        ("Tokens a second", "supervised"): "supervised_tokens_per_s", ("Loss", "all"): "loss",
        ("Tokens a second", "padded"): "padded_tokens_per_s", ("Accuracy", "all"): "accuracy",
    }  # fmt: skip
    wanted = {where: (alone, [each[key] for each in alone]) for where, key in keys.items()}
    measured = tiny.metrics(world.folder / "alone", "eval.jsonl")
    for name in ("GPT4", "GPT3"):
        for title, lines in (("Loss", alone), ("Accuracy", alone), ("Held-out loss", measured)):
            key = title.split()[-1].lower()
            wanted[title, name] = lines, [each["classes"][name][key] for each in lines]
    wanted["Fill", "fill"] = alone, [each["tokens"] / (96 * 4) for each in alone]
    for (title, curve), (lines, y) in wanted.items():
        assert drawn(reported, title)[curve] == ([each["step"] for each in lines], y), title


def test_the_page_tells_the_plan_checkpoints_samples_and_configuration(world, alone, reported):
    run = world.folder / "alone"
    planned = json.loads((run / "plan.json").read_text())
    x, y = drawn(reported, "Balance")["balance"]
    assert y == planned["imbalance"]["worst"] and len(x) == planned["steps_per_epoch"][0] - 1
    assert max(y) == planned["imbalance_worst"] and np.mean(y) == pytest.approx(planned["imbalance_mean"])
    losses = [f"{each['classes']['GPT4']['loss']:.4f}" for each in tiny.metrics(run, "eval.jsonl")]
    answers = [each["answer"] for each in tiny.metrics(run, "samples.jsonl")]
    state = ["ended", f"{len(alone)} of {planned['num_steps']}", "★ best", f"step_{len(alone)}"]
    for text in (*state, *losses, *answers, (run / "config.toml").read_text()):
        assert text in reported.text


def test_of_many_evaluations_the_best_is_shown_and_marked(tmp_path):
    run = write_run(tmp_path / "run")
    (run / "plan.json").write_text(json.dumps({"steps_per_epoch": [100, 300]}))
    losses = [{"step": step, "loss": abs(step - 333) + 0.5, "classes": {}} for step in range(400)]
    write_lines(run / "eval.jsonl", losses)
    (record,) = run_record.named([run])
    record.refresh()
    table = tables.evaluations(record)
    assert table is not None and len(table.rows) <= tables.MAX_ROWS and "of 400 evaluations" in table.note
    (row,) = (table.rows[place] for place in table.marked)
    assert row == ["★ best", "333", f"{1 + 233 / 300:.4g}", "0.5000", "-"]
    assert [row[1] for row in (table.rows[0], table.rows[-1])] == ["0", "399"]
    found = report(run)
    assert [a.get("class") for tag, a in found.elements if tag == "tr"].count("marked") == 1


def test_several_runs_lie_over_each_other(tmp_path):
    one = write_run(tmp_path / "one", config="[optim]\nlr = 1e-3\n[run]\nseed = 1\n")
    config = "[optim]\nlr = 2e-3\n[run]\nseed = 1\n[weights]\nsource = 'none'\n"
    two = write_run(tmp_path / "two", 20, config=config, loss=0.5)
    both = report(one, two)
    compared = drawn(both, "Loss: all")
    assert compared["one"] == ([*range(1, 31)], [line(step)["loss"] for step in range(1, 31)])
    assert compared["two"] == ([*range(1, 21)], [0.5] * 20)
    assert set(drawn(both, "Loss: GPT4")) == {"one", "two"} == set(drawn(both, "Gradient norm"))
    looks = [(t["line"].get("dash"), t["marker"]["symbol"]) for t in both.charts["Loss: all"]]
    assert len(set(looks)) == 2 and len({dash for dash, _ in looks}) == 2  # distinct without colour
    differences = both.text[both.text.index("Differences of configuration") :]
    differences = differences[: differences.index("Training")]
    assert "optim.lr" in differences and "weights.source" in differences and "run.seed" not in differences


def test_runs_of_one_name_are_told_apart(tmp_path):
    runs = [write_run(tmp_path / parent / "run") for parent in "ab"]
    assert [run.name for run in run_record.named(runs)] == ["a/run", "b/run"]
    with pytest.raises(ConfigError, match="is given twice"):
        run_record.named([runs[0], tmp_path / "b" / ".." / "a" / "run"])


def test_hostile_content_is_shown_as_text(tmp_path):
    run = write_run(tmp_path / "a <b>&'\"run", config=f"# {HOSTILE}\n[data]\nmax_steps = 30\n")
    classes = {HOSTILE: {"loss": 1.0, "accuracy": 0.5}, "": {"loss": 2.0}}
    write_lines(run / "eval.jsonl", [{"step": 5, "loss": 1.0, "accuracy": 0.1, "classes": classes}])
    write_lines(run / "metrics.jsonl", [line(step, classes=classes) for step in range(1, 9)])
    sample = {"step": 5, "prompt": HOSTILE, "condition": HOSTILE, "answer": HOSTILE + "\ud800"}
    write_lines(run / "samples.jsonl", [sample])
    write_lines(run / "bad_steps.jsonl", [{"step": 3, "loss": HOSTILE, "grad_norm": "nan", "bins": [[HOSTILE], 3]}])
    (run / "plan.json").write_text(json.dumps({"num_steps": HOSTILE, "facts": {"model": HOSTILE, "data": 3}}))
    found = report(run)
    assert sum(tag == "script" for tag, _ in found.elements) == 3 and "img" not in {tag for tag, _ in found.elements}
    assert found.text.count(HOSTILE) >= 5
    names = [trace["name"] for traces in found.charts.values() for trace in traces]
    assert names and not any("<" in name for name in names)  # Plotly reads tags in names
    assert "49" not in found.text.replace(time.strftime("%H:%M:%S"), "").split("Configuration")[-1]


def test_what_is_torn_or_no_number_is_a_gap(tmp_path):
    run = write_run(tmp_path / "run")
    good = [json.dumps(line(step)) for step in range(1, 4)]
    huge = json.dumps(line(5)).replace('"mfu": 0.31', '"mfu": 1' + "0" * 400)
    gaps = line(4, loss=math.nan, grad_norm=math.inf, lr="fast", mfu=None, classes=[1])
    torn = ["[1, 2]", "{not json", '{"loss": 3}', "[" * 100_000]
    last = [json.dumps(line(6, skipped=True, loss=None)), json.dumps(line(7))[:40]]
    content = [*good, json.dumps(gaps), huge, *torn, *last]
    (run / "metrics.jsonl").write_text("\n".join(content))
    (run / "eval.jsonl").write_text('{"step": 1, "loss": "low", "classes": {"GPT4": 3}}\n{"step": 2, "lo')
    (run / "samples.jsonl").write_bytes(b'\xff\xfe\n{"step": 1, "prompt": ')
    (run / "swap.json").write_text('{"classes": 7}')
    found = report(run)
    assert drawn(found, "Loss")["all"][0] == [1, 2, 3, 4, 5, 6]
    assert [y is None for y in drawn(found, "Loss")["all"][1]] == [False, False, False, True, False, True]
    assert drawn(found, "MFU")["MFU"][1] == [0.31, 0.31, 0.31, None, None, 0.31]
    assert "4 lines of metrics.jsonl could not be read" in found.text
    assert "not what `ochat eval --output FILE` writes" in found.text
    assert "NaN" not in found.scripts[0] and "Infinity" not in found.scripts[0]


@pytest.mark.parametrize("missing", ["config.toml", "metrics.jsonl"])
def test_a_run_that_lacks_files_is_shown_as_far_as_it_goes(tmp_path, missing):
    run = write_run(tmp_path / "run")
    (run / missing).unlink()
    found = report(run)
    assert bool(found.charts) == (missing == "config.toml")
    assert ("No step has been logged yet" in found.text) == (missing == "metrics.jsonl")


numbers = st.one_of(st.floats(-1e6, 1e6), st.just(math.nan))


@given(st.lists(numbers, min_size=1, max_size=300), st.integers(2, 40))
def test_a_thinned_curve_keeps_its_ends_and_extremes(values, half):
    y = np.array(values)
    x = np.arange(len(y), dtype=float)
    xs, ys = charts.thin(x, y, 2 * half)
    assert min(2 * half, len(y)) >= len(xs) == len(ys) and xs.tolist() == sorted(set(xs))
    assert np.array_equal(ys, y[xs.astype(int)], equal_nan=True)
    assert (xs[0], xs[-1]) == (0, len(y) - 1) and (len(xs) == len(y) or len(y) > 2 * half)
    if np.isfinite(y).any():
        assert np.nanmin(ys) == np.nanmin(y) and np.nanmax(ys) == np.nanmax(y)


@given(st.lists(numbers, min_size=1, max_size=60), st.integers(0, 10))
def test_the_moving_mean_is_the_mean_of_the_neighbours(values, half):
    y = np.array(values)
    for place, mean in enumerate(charts.moving_mean(y, 2 * half + 1)):
        near = y[max(place - half, 0) : place + half + 1]
        near = near[np.isfinite(near)]
        assert np.isnan(mean) if not len(near) else mean == pytest.approx(near.mean(), abs=1e-6)


def test_a_run_of_100_000_steps_stays_a_small_page_with_its_spike(tmp_path):
    run = write_run(tmp_path / "run", 1)
    lines = [json.dumps(line(step)) for step in range(1, 1001)]
    parts = [text.split('"step": ')[1].split(",", 1)[1] for text in lines]
    with (run / "metrics.jsonl").open("w") as file:
        for step in range(1, 100_001):
            file.write(f'{{"step": {step},{parts[step % 1000]}\n')
            if step == 70_001:
                file.write(json.dumps(line(70_001, loss=99.0)) + "\n")
    found = report(run)
    x, y = drawn(found, "Loss")["all"]
    assert len(x) <= charts.MAX_POINTS and max(y) == 99.0 and x[y.index(99.0)] == 70_001 and x[-1] == 100_000
    assert len(found.scripts[0]) < 3e6


def test_swap_matrices_are_shown(tmp_path):
    run = write_run(tmp_path / "run")
    cells = {
        "GPT4": {"nll": 0.5, "nll_interval": [0.4, 0.6], "accuracy": 0.9, "accuracy_interval": None},
        "GPT3": {"nll": 0.75, "nll_interval": None, "accuracy": None},
    }
    record = {"model": "m", "data": "d", "conditions": ["GPT4", "GPT3"], "classes": {"GPT4": {"prefixes": cells}}}
    record["verdict"] = "The prefix <works>."
    (tmp_path / "swap.json").write_text(json.dumps(record))
    found = report(run, swap=(tmp_path / "swap.json",))
    assert "0.500 [0.400, 0.600]" in found.text and "0.750" in found.text and "GPT4 ★" in found.text
    assert "90.0%" in found.text and "The prefix <works>. Nats a token" in found.text
    shutil.move(tmp_path / "swap.json", run / "swap.json")
    assert "0.500 [0.400, 0.600]" in report(run).text
    (tmp_path / "other.json").write_text('{"classes": {"a": {"prefixes": {}}}}')
    with pytest.raises(DataError, match="not what `ochat eval --output FILE` writes"):
        report(run, swap=(tmp_path / "other.json",))


def ablated() -> dict:
    """A table.json as `ochat ablate` writes it, of two variants."""

    def cells(*means: float | None) -> dict:
        found = [m if m is None else {"mean": m, "interval": [m - 0.125, m + 0.25], "values": [m]} for m in means]
        return dict(zip(("expert", "suboptimal", "above_ours"), found, strict=True))

    ours = {"variant": "ours", "title": "C-<b>", "seeds": [0, 1]}
    ours |= {"exact": cells(0.5, 0.25, None), "nll": cells(1, 2, None)}
    sft = {"variant": "sft", "title": "SFT", "seeds": [0], "exact": cells(0.25, None, -0.25), "nll": cells(3, None, 2)}
    return {"expert": "GPT4", "suboptimal": "GPT3", "rows": [ours, sft]}


def test_an_ablation_is_shown_with_its_intervals(tmp_path):
    run = write_run(tmp_path / "run")
    (tmp_path / "table.json").write_text(json.dumps(ablated()))
    found = report(run, ablation=tmp_path)
    for text in ("50.0% [37.5%, 75.0%]", "-25.0% [-37.5%, +0.0%]", "+2.000 [+1.875, +2.250]", "C-<b>"):
        assert text in found.text
    expert, suboptimal = found.charts["Exact match of expert answers"]
    assert (expert["x"], expert["y"]) == ([0.5, 0.25], ["C-&lt;b&gt;", "SFT"]) and suboptimal["x"] == [0.25]
    assert expert["error_x"]["array"] == [0.25, 0.25] and expert["error_x"]["arrayminus"] == [0.125, 0.125]
    diverged = ablated()
    diverged["rows"][1]["nll"]["expert"]["mean"] = float("nan")
    for broken in ({}, {"rows": 3}, ablated() | {"rows": [{"title": "x"}]}, diverged):
        (tmp_path / "table.json").write_text(json.dumps(broken))
        with pytest.raises(DataError, match="not what `ochat ablate` writes"):
            report(run, ablation=tmp_path)
    with pytest.raises(DataError, match=r"no table\.json is there"):
        report(run, ablation=run)


def test_watching_follows_the_run_and_leaves_a_page_that_stands_still(tmp_path, monkeypatch):
    """Written once where the run is not live; again after a change; a last time when the run ends, or on Ctrl-C."""
    run, is_live, pages = write_run(tmp_path / "run", 3), [False], []
    monkeypatch.setattr(run_record.lock, "is_held", lambda _: is_live[-1])

    def change(_: float) -> None:
        pages.append((run / "report.html").read_text())
        if len(pages) == 1:
            with (run / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(line(4)) + "\n")
        elif len(pages) == 2:
            is_live[-1] = False
        else:
            raise KeyboardInterrupt

    monkeypatch.setattr(run_record.time, "sleep", change)
    for now, seen in ((False, []), (True, ["3 of 30", "4 of 30"]), (True, ["4 of 30"])):
        is_live[-1], pages_before = now, len(pages)
        report_module.main(ReportOptions((run,), watch=True))
        last = (run / "report.html").read_text()
        assert "location.reload" not in last and ('class="state stopped"' in last) is not is_live[-1]
        for page, steps in zip(pages[pages_before:], seen, strict=True):
            assert "location.reload" in page and "running" in page and steps in page


def test_wrong_options_are_named(tmp_path, monkeypatch, capsys):
    run = write_run(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    for options, named in (
        (ReportOptions(()), "name at least one run"),
        (ReportOptions((run, write_run(tmp_path / "other"))), "several runs need --output"),
        (ReportOptions((run,), tmp_path / "page.txt"), r"ends in \.html"),
        (ReportOptions((run,), tmp_path / "no" / "page.html"), "cannot be written"),
        (ReportOptions((tmp_path / "empty",)), "no run is there"),
    ):
        with pytest.raises(ConfigError, match=named):
            report_module.main(options)
    cli.run("report", [str(run)])
    assert "report.html" in capsys.readouterr().out and (run / "report.html").is_file()
    monkeypatch.setitem(sys.modules, "plotly", None)
    with pytest.raises(ConfigError, match=r"ochat-crlft\[report\]"):
        report_module.main(ReportOptions((run,)))
