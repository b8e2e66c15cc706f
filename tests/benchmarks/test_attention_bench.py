"""The benchmark of attention: its arithmetic by hand, candidates that fail, lie or switch torch's FlashAttention, the
verdict, and the whole program on tiny shapes without a card."""

import csv
import math
import sys
import time
import types

import pytest
import torch
import torch.nn.attention

from benchmarks import attention as bench_attention
from benchmarks import attention_backends, attention_cases, attention_verdict, ops
from benchmarks.attention import TINY, Group
from benchmarks.attention_backends import BACKENDS, Backend
from benchmarks.attention_cases import CHATS, LENGTHS, PASSES, Case, cost, definition, make_problem, results
from benchmarks.bench import Ceilings
from benchmarks.cases import MODELS
from ochat.model.attention import attend
from tests.model import test_attention

CPU = torch.device("cpu")
LLAMA = MODELS["Llama-3-8B"]
SMALL = Case(TINY, CHATS, num_tokens=128)
NAMED = {each.name: each for each in BACKENDS}


def session(seconds=1000.0):
    return ops.Session(CPU, Ceilings(1.0, 1.0), {}, time.monotonic() + seconds, quick=True)


def measured(case, *backends):
    rows = bench_attention.measure(Group(case, backends), session())
    return {(row["implementation"], row["pass"]): row for row in rows}


@pytest.mark.parametrize(("lengths", "window"), [("7", None), ("7", 3), ("7", 9), (CHATS, None), (CHATS, 5)])
def test_the_least_work_by_counting_every_pair(lengths, window):
    case = Case(LLAMA, lengths, window, num_tokens=200)
    pairs = sum(min(i + 1, window or i + 1) for length in case.documents() for i in range(length))
    tokens = 200 * (32 + 8) * 128
    assert cost(case, "forward") == (2 * 2 * 32 * 128 * pairs, 2 * 2 * tokens)
    assert cost(case, "forward+backward") == (2 * 7 * 32 * 128 * pairs, 2 * 6 * tokens)


def test_the_plan_has_every_length_heads_and_candidate_and_a_baseline_in_each_group():
    groups = bench_attention.groups("varlen", quick=False)
    assert groups[0].case == Case(LLAMA, CHATS) and groups[0].case.num_tokens == 16384
    heads = {(g.case.model.N, g.case.model.K, g.case.model.D) for g in groups}
    assert heads == {(32, 8, 128), (32, 32, 128), (32, 8, 64)}
    for name in ("Llama-3-8B", "Llama-2-7B", "Llama-3.2-1B"):
        assert {g.case.lengths for g in groups if g.case.model.name == name and not g.case.window} == set(LENGTHS)
    assert {g.case.lengths for g in groups if g.case.window} == {CHATS, "2048", "4096", "8192"}
    for case in {g.case for g in groups}:
        assert {each.name for g in groups if g.case == case for each in g.backends} == set(NAMED)
    assert all("varlen" in [each.name for each in g.backends] for g in groups)


@pytest.mark.parametrize("lengths", LENGTHS)
def test_documents_fill_the_tokens_as_the_loader_lays_them_out(lengths):
    case = Case(LLAMA, lengths)
    real = case.documents()
    documents = make_problem(Case(TINY, lengths), CPU).documents
    assert sum(real) == 16384 and min(real) > 0 and (lengths == CHATS or set(real) == {int(lengths)})
    assert documents.lengths[: len(real)] == real and not any(documents.lengths[len(real) :])
    assert documents.cu_seqlens.diff().tolist() == documents.lengths and documents.cu_seqlens.dtype == torch.int32
    assert max(real) <= documents.max_seqlen < 2 * max(real)


@pytest.mark.parametrize("window", [None, 5])
def test_the_definition_equals_the_written_out_softmax(window):
    """Out and gradients, in float64: one head at a time must not mix heads up."""
    problem = make_problem(Case(TINY, CHATS, window, num_tokens=96), CPU)
    wide = [x.detach().double().requires_grad_() for x in problem.inputs]
    out = test_attention.truth(*wide, problem.documents.lengths, window)
    wanted = [out, *torch.autograd.grad(out, wide, problem.upstream.double())]
    for found, expected in zip(definition(problem), wanted, strict=True):
        torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("window", [None, 5])
def test_the_flex_mask_is_the_definitions(window):
    problem = make_problem(Case(TINY, CHATS, window, num_tokens=256), CPU)
    found = results(NAMED["flex"].prepare(problem.documents, window), problem, "forward")
    torch.testing.assert_close(found[0].float(), definition(problem)[0], atol=2e-2, rtol=0)  # bf16 of values near 2


@pytest.mark.parametrize(
    ("name", "module", "sides", "has_lse"),
    [
        ("flash-attn 2", "flash_attn", (-1, -1), False),
        ("flash-attn 3", "flash_attn_interface", (-1, -1), True),
        ("flash-attn 4", "flash_attn.cute", (None, None), True),
    ],
)
@pytest.mark.parametrize("window", [None, 3])
def test_packages_get_what_they_expect(monkeypatch, name, module, sides, has_lse, window):
    """A stand-in that computes with the definition from what the package's function is given."""

    def flash(q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, window_size):
        assert torch.equal(cu_seqlens_q, cu_seqlens_k) and max_seqlen_q == max_seqlen_k and causal
        assert window_size == (sides if window is None else (window - 1, 0))
        left = None if window_size == sides else window_size[0] + 1
        out = attend(q, k, v, cu_seqlens_q, max_seqlen_q, window=left)
        return (out, None) if has_lse else out

    fake = types.ModuleType(module)
    fake.flash_attn_varlen_func = flash
    monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, module, fake)
    case = Case(TINY, "16", window, num_tokens=64)
    for row in measured(case, NAMED[name]).values():
        assert row["status"] == "ok" and row["max_error"] < 0.02, row


def test_cudnn_is_asked_for_causal_attention_and_has_no_window(monkeypatch):
    calls = []

    def operator(q, k, v, bias, cu_q, cu_k, max_q, max_k, has_lse, dropout, is_causal, is_debug):
        calls.append((bias, max_q, max_k, has_lse, dropout, is_causal, is_debug))
        return attend(q, k, v, cu_q, max_q), None

    monkeypatch.setattr(attention_backends, "torch", types.SimpleNamespace(ops=types.SimpleNamespace(aten=None)))
    attention_backends.torch.ops.aten = types.SimpleNamespace(_cudnn_attention_forward=operator)
    problem = make_problem(SMALL, CPU)
    run = NAMED["cuDNN"].prepare(problem.documents, None)
    for which, has_lse in zip(PASSES, (False, True), strict=True):
        results(run, problem, which)
        longest = problem.documents.max_seqlen
        assert calls.pop() == (None, longest, longest, has_lse, 0.0, True, False)
    with pytest.raises(NotImplementedError, match="no sliding window"):
        NAMED["cuDNN"].prepare(problem.documents, 3)


@pytest.fixture
def registered():
    """Two of torch's registry, which note when they are switched on and off; "broken" can't be."""
    seen = []

    class Handle:
        def __init__(self, name):
            self.name = name
            seen.append(f"{name} on")

        def remove(self):
            seen.append(f"{self.name} off")

    def broken():
        raise ModuleNotFoundError("No module named 'fa'")

    registry = torch.nn.attention._registry
    for name, register in (("A", lambda: Handle("A")), ("B", lambda: Handle("B")), ("broken", broken)):
        torch.nn.attention.register_flash_attention_impl(name, register_fn=register)
    yield seen
    for name in ("A", "B", "broken"):
        del registry._FLASH_ATTENTION_IMPLS[name]


def test_torchs_flash_attention_is_each_backends_own_in_its_turns(registered):
    """Never on while another runs, and put back after a failure, or the next rows would be another's."""

    def noting(name, fails=False):
        def prepare(documents, window):
            def run(q, k, v):
                assert torch.nn.attention.current_flash_attention_impl() == name
                if fails:
                    raise RuntimeError("no kernel")
                return attend(q, k, v, documents.cu_seqlens, documents.max_seqlen, window=window)

            return run

        return prepare

    backends = [Backend("plain", noting(None)), Backend("A", noting("A"), flash="A")]
    backends += [Backend("B", noting("B", fails=True), flash="B"), Backend("broken", noting("broken"), flash="broken")]
    rows = measured(SMALL, *backends, Backend("last", noting(None)))
    failed = {name for (name, _), found in rows.items() if found["status"] == "failed"}
    assert failed == {"B", "broken"} and {name for name, _ in rows} - failed == {"plain", "A", "last"}
    assert rows["B", "forward"]["note"] == "RuntimeError: no kernel" and "'fa'" in rows["broken", "forward"]["note"]
    assert torch.nn.attention.current_flash_attention_impl() is None
    pairs = list(zip(registered[::2], registered[1::2], strict=True))
    assert {on for on, _ in pairs} == {"A on", "B on"} and all(on[0] == off[0] and "off" in off for on, off in pairs)


def test_a_candidate_that_computes_something_else_gets_no_time():
    """Documents that see each other, a window ignored, NaN, gradients alone wrong: the reason is the row."""

    def whole(documents, window):
        total = int(documents.cu_seqlens[-1])
        return lambda q, k, v: attend(q, k, v, torch.tensor([0, total], dtype=torch.int32), total, window=window)

    def windowless(documents, window):
        return lambda q, k, v: attend(q, k, v, documents.cu_seqlens, documents.max_seqlen)

    def nan(documents, window):
        return lambda q, k, v: q * math.nan

    def half_gradient(documents, window):
        run = windowless(documents, None)
        plain = BACKENDS[0].prepare(documents, window)
        return lambda q, k, v: plain(q, k, v).detach() + 0.5 * (run(q, k, v) - run(q, k, v).detach())

    case = Case(TINY, "32", 8, num_tokens=128)
    liars = [Backend(f.__name__, f) for f in (whole, windowless, nan, half_gradient)]
    rows = measured(case, BACKENDS[0], *liars)
    for name in ("whole", "windowless", "nan"):
        assert "wrong by" in rows[name, "forward"]["note"] and "median_ms" not in rows[name, "forward"]
    assert rows["half_gradient", "forward"]["status"] == "ok"
    assert "wrong by" in rows["half_gradient", "forward+backward"]["note"]
    assert rows["sdpa", "forward"]["status"] == rows["sdpa", "forward+backward"]["status"] == "ok"


def test_without_time_or_truth_the_rows_say_so(monkeypatch):
    rows = list(bench_attention.measure(Group(SMALL, BACKENDS), session(seconds=-1.0)))
    assert [row["status"] for row in rows] == ["skipped"] * 2 * len(BACKENDS)

    def definition(problem):
        raise torch.OutOfMemoryError("too much")

    monkeypatch.setattr(attention_cases, "definition", definition)
    notes = {row["note"] for row in bench_attention.measure(Group(SMALL, BACKENDS[:2]), session())}
    assert notes == {"nothing to compare with: OutOfMemoryError: too much"}


def row(name, median, *, group="0", spread=0.1, which="forward+backward", status="ok"):
    times = {"median_ms": str(median), "p20_ms": str(median - spread), "p80_ms": str(median + spread)}
    shape = {"model": "m", "N": "4", "K": "2", "D": "16", "lengths": "2048", "window": ""}
    return shape | times | {
        "implementation": name, "baseline": "varlen", "group": group, "pass": which, "status": status
    }  # fmt: skip


def test_the_verdict_compares_with_the_baseline_of_the_same_group():
    """`flex` is slower by the clock, but its card was cooler: against its own baseline it is the fastest."""
    rows = [row("varlen", 10.0), row("FA3", 6.0), row("sdpa", 20.0), row("FA2", 9.0, which="forward")]
    rows += [row("varlen", 15.0, group="1"), row("flex", 7.5, group="1"), row("cuDNN", 1.0, status="failed")]
    (verdict,) = attention_verdict.verdicts(rows)
    assert (verdict.taken, verdict.fastest, verdict.runner_up) == ("flex", "flex", "FA3")
    assert verdict.times_baseline == pytest.approx(2.0) and verdict.margin == pytest.approx(2.0 / (10 / 6) - 1)


def test_the_baseline_stays_where_the_spread_hides_the_difference():
    close = [row("varlen", 10.0, spread=0.3), row("FA3", 9.8, spread=0.3)]
    assert [(v.taken, v.fastest) for v in attention_verdict.verdicts(close)] == [("varlen", "FA3")]
    clear = [row("varlen", 10.0, spread=0.05), row("FA3", 9.8, spread=0.05)]
    assert [v.taken for v in attention_verdict.verdicts(clear)] == ["FA3"]
    assert attention_verdict.verdicts([row("FA3", 9.8)]) == []
    (alone,) = attention_verdict.verdicts([row("varlen", 10.0)])
    assert (alone.taken, alone.runner_up, alone.margin) == ("varlen", "", 0.0)


def test_a_dry_run_measures_what_a_cpu_can_and_names_the_rest(tmp_path, capsys):
    assert bench_attention.main(["--out", str(tmp_path), "--device", "cpu", "--quick", "--commit", "x"]) == 0
    with (tmp_path / "attention.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == bench_attention.COLUMNS
    ok = {(row["implementation"], row["pass"]) for row in rows if row["status"] == "ok"}
    assert {("sdpa", which) for which in PASSES} <= ok
    assert {row["implementation"] for row in rows} == set(NAMED) and {row["window"] for row in rows} == {"", "24"}
    assert all(row["note"] for row in rows if row["status"] != "ok")
    for row in rows:
        if row["status"] == "ok":
            assert 0 < float(row["p20_ms"]) <= float(row["median_ms"]) <= float(row["p80_ms"])
            assert float(row["max_error"]) < 0.02 and row["commit"] == "x"
    printed = capsys.readouterr().out
    assert '"auto" at tiny (4/2 heads of 16), chats, window 24: sdpa' in printed and "not measured: cuDNN" in printed


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
@pytest.mark.parametrize(("options", "message"), [([], "no CUDA device"), (["--device", "cpu"], "takes --quick")])
def test_refuses_what_would_say_nothing(options, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        bench_attention.main(["--out", str(tmp_path), *options])
    assert message in capsys.readouterr().err
