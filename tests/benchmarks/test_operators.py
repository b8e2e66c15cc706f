"""Operators: the least work by hand, inputs, time in turns, candidates that fail or compute something else, reports."""

import math
import sys
import time
import types

import pytest
import torch
import torch.nn.attention

from benchmarks import attention, csv_file, implementations, ops, report, timing
from benchmarks.attention import CHATS, LENGTHS
from benchmarks.attention_backends import BACKENDS, backend
from benchmarks.cases import MODELS, OPERATORS, Case, cost, make_problem
from benchmarks.implementations import Implementation
from benchmarks.timing import Ceilings
from tests.model import test_attention
from tests.model.test_attention import attend

CPU = torch.device("cpu")
LLAMA = MODELS["Llama-3-8B"]
TINY_SWIGLU = Case("swiglu", ops.TINY, 8)
NAMED = {each.name: each for each in BACKENDS}


def session(seconds=1000.0):
    return ops.Session(CPU, Ceilings(1.0, 1.0), {}, time.monotonic() + seconds, quick=True)


def tiny(lengths, window=None, tokens=128):
    return Case("attention", ops.TINY, tokens, variant=lengths, window=window)


def measured(monkeypatch, case, *candidates):
    """The rows of one case by implementation and pass; the candidates take the place of the registered ones."""
    monkeypatch.setattr(implementations, "of", lambda operator: list(candidates))
    return {(row["implementation"], row["pass"]): row for row in ops.measure(ops.Group(case), session())}


def test_a_csv_grows_and_keeps_its_columns(tmp_path):
    for value in (1.23456789, "x"):
        csv_file.CsvFile(tmp_path / "a.csv", ["one", "two"]).add({"one": value})
    assert csv_file.read(tmp_path / "a.csv") == [{"one": "1.2346", "two": ""}, {"one": "x", "two": ""}]
    with pytest.raises(SystemExit, match="has other columns"):
        csv_file.CsvFile(tmp_path / "a.csv", ["one"])


@pytest.mark.parametrize(
    ("operator", "flops", "forward_bytes", "both_bytes"),
    [
        ("rms_norm", 0, 2 * 2 * 1000 * 4096, 2 * 5 * 1000 * 4096),
        ("add_rms_norm", 0, 2 * 4 * 1000 * 4096, 2 * 8 * 1000 * 4096),
        ("rope", 0, 1000 * (2 * 2 * 40 * 128 + 2 * 64 * 4), 2 * 1000 * (2 * 2 * 40 * 128 + 2 * 64 * 4)),
        ("qkv_rope", 0, 1000 * (2 * 2 * 48 * 128 + 2 * 64 * 4), 2 * 1000 * (2 * 2 * 48 * 128 + 2 * 64 * 4)),
        ("qkv_norm_rope", 0, 1000 * (2 * 2 * 48 * 128 + 2 * 64 * 4), 1000 * (2 * (5 * 32 + 9 * 8) * 128 + 4 * 64 * 4)),
        ("swiglu", 0, 2 * 3 * 1000 * 14336, 2 * 8 * 1000 * 14336),
        ("geglu", 0, 2 * 3 * 1000 * 14336, 2 * 8 * 1000 * 14336),
        ("linear_cross_entropy", 2 * 1000 * 4096 * 128256, 2 * 4096 * 129256, 4 * 4096 * 129256),
    ],
)
def test_the_least_work_of_each_operator(operator, flops, forward_bytes, both_bytes):
    assert cost(Case(operator, LLAMA, 1000), "forward") == (flops, forward_bytes)
    assert cost(Case(operator, LLAMA, 1000), "forward+backward") == (3 * flops, both_bytes)


def test_the_least_work_of_the_optimizer_and_of_half_the_rows():
    whole, half = (cost(Case("linear_cross_entropy", LLAMA, 16384, share), "forward+backward") for share in (1.0, 0.5))
    assert half.flops * 2 == whole.flops
    assert Ceilings(790.0, 4300.0).floor_ms(whole.flops, whole.bytes) == pytest.approx(65.4, abs=0.05)
    layer = 6144 * 4096 + 4096 * 4096 + 3 * 14336 * 4096 + 2 * 4096
    for variant, element in (("bf16", 14), ("fp32", 28), ("fp32, bf16 copies", 30)):
        assert cost(Case("adamw", LLAMA, 16384, variant=variant), "step") == (0, element * LLAMA.L * layer)


@pytest.mark.parametrize(("lengths", "window"), [("7", None), ("7", 3), ("7", 9), (CHATS, None), (CHATS, 5)])
def test_the_least_work_of_attention_by_counting_every_pair(lengths, window):
    case = Case("attention", LLAMA, 200, variant=lengths, window=window)
    pairs = sum(min(i + 1, window or i + 1) for length in attention.lengths_of(case) for i in range(length))
    tokens = 200 * (32 + 8) * 128
    assert attention.cost(case, "forward") == (2 * 2 * 32 * 128 * pairs, 2 * 2 * tokens)
    assert attention.cost(case, "forward+backward") == (2 * 7 * 32 * 128 * pairs, 2 * 6 * tokens)


@pytest.mark.parametrize("supervised", [1.0, 0.75, 0.25])
def test_the_share_of_live_rows_is_exact(supervised):
    case = Case("linear_cross_entropy", ops.TINY, 1024, supervised)
    arguments = make_problem(case, CPU, 0).arguments
    live = (arguments["labels"] != -100) & (arguments["loss_weights"] != 0)
    assert live.sum() == case.live_rows == 1024 * supervised
    assert torch.equal(arguments["rows"], live.nonzero().squeeze(1))


def test_inputs_are_random_and_repeatable():
    for operator in OPERATORS:
        case = Case(operator, ops.TINY, 8, variant="bf16" if operator == "adamw" else "")
        first, again, other = (next(iter(make_problem(case, CPU, seed).arguments.values()))[0] for seed in (0, 0, 1))
        assert torch.equal(first, again) and not torch.equal(first, other) and first.float().std() > 0


@pytest.mark.parametrize("lengths", LENGTHS)
def test_documents_fill_the_tokens_as_the_loader_lays_them_out(lengths):
    case = Case("attention", ops.TINY, 16384, variant=lengths)
    real, documents = attention.lengths_of(case), attention.documents(case, CPU)
    assert sum(real) == 16384 and min(real) > 0 and (lengths == CHATS or set(real) == {int(lengths)})
    assert documents.lengths[: len(real)] == real and not any(documents.lengths[len(real) :])
    assert documents.cu_seqlens.diff().tolist() == documents.lengths and documents.cu_seqlens.dtype == torch.int32
    assert max(real) <= documents.max_seqlen < 2 * max(real)


def test_errors_are_relative_and_see_nan():
    a = torch.tensor([1.0, -4.0])
    assert timing.max_error([a + 1.0], [a]) == 0.25
    assert math.isnan(timing.max_error([a, a * math.nan], [a, a]))
    with pytest.raises(ValueError, match="expected"):
        timing.max_error([a], [a[:1]])


def test_calls_take_turns_and_a_compiler_that_never_ends_is_stopped():
    seen = []
    times = timing.interleave({name: lambda name=name: seen.append(name) for name in "abc"}, 3, CPU)
    assert seen == list("abc" * 3) and all(len(each) == 3 and min(each) >= 0 for each in times.values())
    with pytest.raises(TimeoutError, match="not ready"), timing.time_limit(0.05):
        while True:
            pass


def absent():
    raise ModuleNotFoundError("No module named 'peer'\nin two lines")


def test_a_failing_peer_is_a_row_with_its_reason(monkeypatch):
    """Not importable, of another shape, without weights: each is a row, and the others are measured all the same."""
    reference = implementations.of("swiglu")[1]
    wrong = Implementation("wrong", lambda: lambda a: a["gate_up"][:, :3])
    unweighted = Implementation("unweighted", lambda: lambda a: a["gate_up"].chunk(2, -1)[0] * 2, is_weighted=False)
    rows = measured(monkeypatch, TINY_SWIGLU, reference, Implementation("absent", absent), wrong, unweighted)
    assert len(rows) == 8
    for which in TINY_SWIGLU.passes:
        assert rows["absent", which]["status"] == rows["wrong", which]["status"] == "failed"
        assert rows["absent", which]["note"] == "ModuleNotFoundError: No module named 'peer'"
        assert "shape" in rows["wrong", which]["note"]
        assert rows["reference", which]["status"] == "ok" and rows["reference", which]["max_error"] == 0
        assert rows["unweighted", which]["status"] == "unweighted" and rows["unweighted", which]["max_error"] > 0.1


def test_without_time_the_rows_say_so():
    rows = list(ops.measure(ops.Group(TINY_SWIGLU, implementations.OURS), session(seconds=-1.0)))
    assert [row["status"] for row in rows] == ["skipped"] * 4


def test_the_plan_of_the_phases():
    """8B first; every operator, model and odd vocabulary; attention with every length and a baseline in each group."""
    real = ops.Session(CPU, Ceilings(1.0, 1.0), {}, math.inf, quick=False)
    ours, rest, attending = (ops.groups(phase, real) for phase in ("ours", "rest", "attention"))
    assert ours[0].case == Case("linear_cross_entropy", LLAMA, 16384)
    assert {g.case.supervised for g in ours if g.case.operator == "linear_cross_entropy"} == {1.0, 0.75, 0.5, 0.25}
    assert {g.case.operator for g in ours} == set(OPERATORS) == {g.case.operator for g in rest}
    assert {g.case.model.name for g in ours + rest} == set(MODELS) and {32002, 128257} < {g.case.model.V for g in rest}
    assert {g.case.variant for g in attending} == set(LENGTHS) and {g.case.window for g in attending} == {None, 1024}
    for case in {g.case for g in attending}:
        assert {name for g in attending if g.case == case for name in g.names} == set(NAMED)
    assert all(real.attention_baseline in g.names for g in attending)


@pytest.mark.parametrize("window", [None, 5])
def test_the_definition_of_attention_equals_the_written_out_softmax(window):
    """Out and gradients; the flex mask too."""
    problem = attention.make_problem(tiny(CHATS, window, 256), CPU, 0)
    wide = [problem.arguments[name].detach().double().requires_grad_() for name in "qkv"]
    out = test_attention.truth(*wide, problem.arguments["documents"].lengths, window)
    wanted = [out, *torch.autograd.grad(out, wide, problem.upstream[0].double())]
    found = attention.definition(problem)
    for got, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=1e-4)
    flex = NAMED["flex"].load()(problem.detached())
    torch.testing.assert_close(flex.float(), found[0], atol=2e-2, rtol=0)  # bf16 of values near 2


def test_untrimmed_documents_are_the_same_and_empty_ones(monkeypatch):
    seen = []

    def varlen(q, k, v, places, _, longest, *rest, **options):
        seen.append((len(places) - 1, longest))
        return attend(q, k, v, places, longest)

    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", types.SimpleNamespace(varlen_attn=varlen))
    rows = measured(monkeypatch, tiny("16", None, 64), *(NAMED[x] for x in ("sdpa", "varlen", "varlen, untrimmed")))
    assert {row["status"] for row in rows.values()} == {"ok"}
    assert set(seen) == {(4, 64), (64, 64)}


@pytest.fixture
def registered():
    """Two of torch's registry, which note when they are switched on and off; "broken" can't be."""
    seen = []

    def register(name):
        seen.append(f"{name} on")
        return types.SimpleNamespace(remove=lambda: seen.append(f"{name} off"))

    registry = torch.nn.attention._registry
    for name, load in (("A", lambda: register("A")), ("B", lambda: register("B")), ("broken", absent)):
        torch.nn.attention.register_flash_attention_impl(name, register_fn=load)
    yield seen
    for name in ("A", "B", "broken"):
        del registry._FLASH_ATTENTION_IMPLS[name]


def test_torchs_flash_attention_is_active_only_in_its_own_turns(monkeypatch, registered):
    """Also after a failure."""

    def noting(name, fails=False):
        def run(documents, q, k, v):
            assert torch.nn.attention.current_flash_attention_impl() == name
            if fails:
                raise RuntimeError("no kernel")
            return attend(q, k, v, documents.cu_seqlens, documents.max_seqlen)

        return lambda documents, window: lambda *qkv: run(documents, *qkv)

    candidates = [backend("sdpa", noting(None)), backend("A", noting("A"), flash="A")]
    candidates += [backend("B", noting("B", True), flash="B"), backend("broken", noting("broken"), flash="broken")]
    rows = measured(monkeypatch, tiny(CHATS), *candidates, backend("last", noting(None)))
    assert {name for (name, _), found in rows.items() if found["status"] == "failed"} == {"B", "broken"}
    assert rows["B", "forward"]["note"] == "RuntimeError: no kernel" and "'peer'" in rows["broken", "forward"]["note"]
    assert torch.nn.attention.current_flash_attention_impl() is None
    pairs = list(zip(registered[::2], registered[1::2], strict=True))
    assert {on for on, _ in pairs} == {"A on", "B on"} and all(on[0] == off[0] and "off" in off for on, off in pairs)


def test_a_backend_that_computes_something_else_gets_no_time(monkeypatch):
    """Documents that see each other, a window ignored, NaN, wrong gradients: the row says so."""

    def half_gradient(documents, window):
        plain, where = NAMED["sdpa"].load(), {"documents": documents, "window": window}
        return lambda q, k, v: 0.5 * ((out := plain({"q": q, "k": k, "v": v} | where)) + out.detach())

    def whole(q, k, v, window):
        return attend(q, k, v, torch.tensor([0, len(q)], dtype=torch.int32), len(q), window=window)

    wrong = {
        "whole": lambda documents, window: lambda q, k, v: whole(q, k, v, window),
        "windowless": lambda documents, _: lambda q, k, v: attend(q, k, v, documents.cu_seqlens, documents.max_seqlen),
        "nan": lambda *_: lambda q, k, v: q * math.nan + k.sum() + v.sum(),
        "half the gradient": half_gradient,
    }
    liars = [backend(name, load) for name, load in wrong.items()]
    rows = measured(monkeypatch, tiny("32", 8), NAMED["sdpa"], *liars)
    for each in liars:
        assert "wrong by" in rows[each.name, "forward"]["note"] and "median_ms" not in rows[each.name, "forward"]
    assert rows["sdpa", "forward"]["status"] == rows["sdpa", "forward+backward"]["status"] == "ok"


def row(name, median, *, group="0", spread=0.1, which="forward+backward", status="ok"):
    times = {"median_ms": str(median), "p20_ms": str(median - spread), "p80_ms": str(median + spread)}
    shape = {"operator": "attention", "model": "m", "N": "4", "K": "2", "D": "16", "variant": "2048", "window": ""}
    rest = {"implementation": name, "baseline": "varlen", "group": group, "pass": which, "status": status}
    return shape | times | rest


def test_backends_are_compared_with_the_baseline_of_their_group():
    """`flex` is slower by the clock, but its GPU was cooler: against its own baseline it is the fastest."""
    rows = [row("varlen", 10.0), row("FA3", 6.0), row("sdpa", 20.0), row("FA2", 9.0, which="forward")]
    rows += [row("varlen", 15.0, group="1"), row("flex", 7.5, group="1"), row("cuDNN", 1.0, status="failed")]
    (found,) = report.compare(rows)
    assert (found.taken, found.fastest, found.runner_up) == ("flex", "flex", "FA3")
    assert found.times_baseline == pytest.approx(2.0) and found.margin == pytest.approx(2.0 / (10 / 6) - 1)


def test_the_baseline_stays_where_the_spread_hides_the_difference():
    for spread, taken in ((0.3, "varlen"), (0.05, "FA3")):
        close = [row("varlen", 10.0, spread=spread), row("FA3", 9.8, spread=spread)]
        assert [(each.taken, each.fastest) for each in report.compare(close)] == [(taken, "FA3")]
    assert report.compare([row("FA3", 9.8)]) == []
    (alone,) = report.compare([row("varlen", 10.0)])
    assert (alone.taken, alone.runner_up, alone.margin) == ("varlen", "", 0.0)
