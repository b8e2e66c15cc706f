"""What a step measured, against sums by hand; lines that a killed run wrote past its checkpoint are cut."""

import json

import numpy as np
import pytest
import torch
from ochat_kernels import LossOutput

from ochat.data.batch import Example, pack
from ochat.files.jsonl import JsonlWriter
from ochat.run.nonfinite import NonFiniteGuard
from ochat.train import metrics
from ochat.train.metrics import MetricsLog, StepMetrics

WEIGHTS = ([0, 1.0, -0.5, 0.25], [0, 0, 2.0])
CPU = torch.device("cpu")


def batch_and_output(multiple=1):
    """Two conversations of classes 1 and 0; labels 1 .. 3 of the first and 2 of the second are supervised."""
    examples = [Example(np.arange(len(w)), np.array(w, np.float32), "") for w in WEIGHTS]
    batch = pack(examples, [0, 1], [1, 0], pad_to=20, multiple=multiple)
    nll = torch.linspace(1, 2, 20)[batch.supervised_rows]
    correct = batch.supervised_rows % 2 == 0
    loss_sum = (batch.loss_weights[batch.supervised_rows] * nll).sum()
    return batch, LossOutput(loss_sum, batch.loss_weights.abs().sum(), nll, correct)


def test_means_are_weighted_by_absolute_weights_per_class_and_in_all():
    batch, out = batch_and_output()
    measured = StepMetrics(["a", "b", "none"], CPU)
    measured.add(batch, out)
    measured.add(batch, out)
    means = metrics.summarise(measured.to_tensor().tolist(), measured.class_names)
    nll, right = out.nll.double(), out.correct.double()  # of rows 0, 1, 2 and 5
    first, second = [(0, 1.0), (1, -0.5), (2, 0.25)], [(3, 2.0)]  # (place, weight)
    total = sum(abs(w) for _, w in first + second)
    assert means["loss"] == pytest.approx(sum(w * nll[r].item() for r, w in first + second) / total)
    assert means["accuracy"] == pytest.approx(sum(abs(w) * right[r].item() for r, w in first + second) / total)
    assert means["tokens"] == 2 * 7 and means["padded_tokens"] == 2 * 20 and means["supervised_tokens"] == 2 * 4
    assert means["square_lengths"] == 2 * (16 + 9)
    loss = sum(abs(w) * nll[r].item() for r, w in first) / 1.75
    assert means["classes"] == {
        "a": {"loss": pytest.approx(nll[3].item()), "accuracy": right[3].item(), "tokens": 2},
        "b": {"loss": pytest.approx(loss), "accuracy": pytest.approx(1.25 / 1.75), "tokens": 2 * 3},
        "none": {"loss": None, "accuracy": None, "tokens": 0},
    }
    assert metrics.summarise(StepMetrics(["a"], CPU).to_tensor().tolist(), ["a"])["loss"] == 0.0


def test_where_weights_change_the_loss_is_what_is_minimised_and_classes_say_by_how_much():
    """With weights that were divided by the step's, of which the sums know nothing."""
    batch, out = batch_and_output()
    factors = torch.tensor([0.5, 1.0, 0.25, 2.0])
    changed = batch.supervised_weights * factors / 10
    measured = StepMetrics(["a", "b", "none"], CPU)
    step_weight = torch.tensor(10.0, dtype=torch.float64)
    measured.add(batch, out._replace(loss_sum=(changed * out.nll).sum(), effective=changed), step_weight)
    plain = StepMetrics(["a", "b", "none"], CPU)
    plain.add(batch, out)
    names = measured.class_names
    means, before = (metrics.summarise(x.to_tensor().tolist(), names, has_dynamic=True) for x in (measured, plain))
    assert means["loss"] == pytest.approx(float((changed * out.nll).sum()) * 10 / 3.75) != before["loss"]
    for name, share in {"a": 2.0, "b": (0.5 * 1 + 1 * 0.5 + 0.25 * 0.25) / 1.75, "none": None}.items():
        found = means["classes"][name]
        assert found.pop("effective_weight") == (share and pytest.approx(share))
        assert before["classes"][name].pop("effective_weight") == (share and 1.0)
        assert found == before["classes"][name]


def test_rows_without_weight_count_nothing():
    sums = []
    for multiple in (1, 8):
        measured = StepMetrics(["a", "b"], CPU)
        measured.add(*batch_and_output(multiple))
        sums.append(measured.to_tensor())
    assert torch.equal(*sums)


def metrics_log(path, **change):
    nonfinite = NonFiniteGuard(0, None, bins_of=list, newest=lambda: None)
    settings = {"flops": lambda *_: 10.0, "peak_flops": 1e3, "device": CPU, "nonfinite": nonfinite}
    return MetricsLog(JsonlWriter(path), ["a", "b"], **settings | change)


def test_mfu_and_rates_are_of_the_time_since_the_last_flush(tmp_path, monkeypatch):
    now = iter([100.0, 104.0, 104.0])
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(now))
    batch, out = batch_and_output()
    measured = StepMetrics(["a", "b"], CPU)
    measured.add(batch, out)
    book = metrics_log(tmp_path / "m.jsonl", flops=lambda tokens, squares, supervised: tokens + squares + supervised)
    for step in (1, 2):
        book.add(step, 0, 1e-3, measured.to_tensor(), torch.tensor(1.0))
    line = book.flush()[0]  # two steps in 4 seconds
    assert line["step_s"] == 2.0 and line["tokens_per_s"] == 3.5 and line["supervised_tokens_per_s"] == 2.0
    assert line["padded_tokens_per_s"] == 10.0 and line["mfu"] == pytest.approx((7 + 25 + 4) / 2 / 1e3)
    assert [json.loads(row)["step"] for row in (tmp_path / "m.jsonl").read_text().splitlines()] == [1, 2]


def test_lines_past_the_checkpoint_and_a_torn_last_line_are_cut(tmp_path, caplog):
    """Also within a character. U+2028, U+2029 and U+0085 end no line of JSON lines."""
    path = tmp_path / "samples.jsonl"
    lines = [{"step": step, "answer": "a\u2028b\u2029c\x85d\x1ce\r\u00fc"} for step in (1, 2)]
    JsonlWriter(path).append(lines)
    whole = path.read_bytes()
    path.write_bytes(whole + '{"step": 2, "answer": "\u00fc'.encode()[:-1])
    metrics.truncate_after(path, 2)
    assert path.read_bytes() == whole
    metrics.truncate_after(path, 1)
    assert json.loads(path.read_bytes()) == lines[0] and not caplog.text
    metrics.truncate_after(path, -1)
    assert path.read_bytes() == b""
    metrics.truncate_after(tmp_path / "missing.jsonl", 1)


DAMAGE = [
    b"\0" * 512, b"hello", b"\xff\xfe", b'{"step": "2"}', b"[1]", b"", b"[" * 5000, b'{"step": 1, "a": "\xed\xa0\x80"}',
    b'{"step": 1}'.decode().encode("utf-16-le"), b"\xef\xbb\xbf{", b'{"step": 1e999}',
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_line_is_kept_aside_before_the_checkpoint_and_dropped_behind_it(tmp_path, caplog, damage):
    path, aside = tmp_path / "metrics.jsonl", tmp_path / "metrics.damaged.jsonl"
    path.write_bytes(b'{"step": 1}\n' + damage + b'\n{"step": 3}\n' + damage + b'\n{"step": 4}\n')
    metrics.truncate_after(path, 3)
    assert path.read_bytes() == b'{"step": 1}\n{"step": 3}\n' and aside.read_bytes() == damage + b"\n"
    said = " ".join(caplog.messages)
    assert "line 2 is damaged; kept in metrics.damaged.jsonl" in said and "line 4 is damaged; dropped" in said
    metrics.warn_of_lost_steps(path, 3)
    assert "no line of step 2;" in caplog.messages[-1]
    path.write_bytes(damage + b"\n" + damage + b"\n" + damage + b"\n")
    metrics.truncate_after(path, 3)
    assert "line 1 is damaged, as are 2 more; kept" in caplog.messages[-1] and path.read_bytes() == b""
    assert aside.read_bytes() == 4 * (damage + b"\n")
    metrics.warn_of_lost_steps(path, 3)
    assert "no line of step 1 and 2 others up to step 3;" in caplog.messages[-1]


def test_a_file_that_begins_after_another_runs_checkpoint_has_lost_nothing(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    metrics.warn_of_lost_steps(path, 5)
    path.write_bytes(b'{"step": 6}\n{"step": 7}\n')
    metrics.warn_of_lost_steps(path, 7)
    assert not caplog.text


def test_a_known_card_has_its_data_sheets_peak(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert metrics.peak_flops(torch.device("cuda"), 0.0, torch.bfloat16)[0] == 989e12
    assert metrics.peak_flops(CPU, 2.5, torch.bfloat16) == (2.5e12, "configured")
    assert metrics.peak_flops(CPU, 0.0, torch.float32)[0] > 1e8
