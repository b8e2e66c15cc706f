"""Jobs run one per slot, a failure stops no other, and an interrupt waits until all have saved."""

from __future__ import annotations

import os
import signal
from functools import partial
from itertools import pairwise

import pytest

from ochat.evaluate.ablate.job_runner import Job, run_jobs, slots, tail


def python(tmp_path, name, *programs, steps_done=lambda: 0, finish=lambda: None):
    return Job(name, [("-c", code) for code in programs], tmp_path / name, 3, steps_done, finish)


def test_a_failing_program_ends_its_job_and_no_other(tmp_path, caplog):
    finished = []
    programs = {"bad": ("print('why'); raise SystemExit(3)", "print('never')"), "good": ("print(1)", "print(2)")}
    jobs = [python(tmp_path, name, *programs[name], finish=partial(finished.append, name)) for name in programs]
    caplog.set_level("INFO", "ochat")
    assert run_jobs(jobs, [{}]) == jobs[:1] and finished == ["good"]
    assert [tail(job.log) for job in jobs] == ["why", "1\n2"]
    assert [record.getMessage().split(" after")[0] for record in caplog.records] == ["bad failed", "good done"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_waits_until_all_have_saved(tmp_path, number):
    code = (
        "import signal, sys, time\n"
        "def save(*_): time.sleep(0.5); print('saved', flush=True); sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, save); print('ready', flush=True); time.sleep(60)"
    )

    def interrupt():
        if not sent and all(job.log.exists() and "ready" in job.log.read_text() for job in jobs):
            sent.append(number)
            signal.raise_signal(number)
        return 0

    jobs = [python(tmp_path, name, code, steps_done=interrupt) for name in ("a", "b")]
    sent, before = [], signal.getsignal(signal.SIGTERM)
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores Ctrl-C
    try:
        with pytest.raises(KeyboardInterrupt):
            run_jobs(jobs, [{}, {}])
    finally:
        signal.signal(signal.SIGINT, inherited)
    assert [tail(job.log) for job in jobs] == ["ready\nsaved"] * 2
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_slot_has_one_process_at_a_time(tmp_path):
    code = "import os, time; t = time.time(); time.sleep(0.3); print(os.environ['SLOT'], t, time.time())"
    jobs = [python(tmp_path, f"t{i}", code) for i in range(5)]
    assert run_jobs(jobs, [{"SLOT": "a"}, {"SLOT": "b"}]) == []
    spans = [tail(job.log).split() for job in jobs]
    for slot in ("a", "b"):
        busy = sorted((float(begin), float(end)) for name, begin, end in spans if name == slot)
        assert busy and all(one[1] <= other[0] for one, other in pairwise(busy))


def test_cores_and_devices_are_shared_out(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert slots(3, []) == [{"OMP_NUM_THREADS": "2"}] * 3
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in slots(3, ["4", "6"])] == ["4", "6", "4"]
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert slots(1, []) == [{"OMP_NUM_THREADS": "5"}]
