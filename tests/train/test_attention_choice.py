"""train.attention = "auto": what is missing, wrong, not deterministic or broken is passed over with its reason, and the
fastest of the rest is taken, kept, and the same on all ranks: pytest tests/train/test_attention_choice.py"""

import dataclasses
import json
import sys
import time
import types
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ochat.data.batch import Example, pack
from ochat.errors import ConfigError
from ochat.model.attention import backends
from ochat.model.attention.backends import BACKENDS, Backend, Needs
from ochat.model.config import ModelConfig
from ochat.train import attention_choice, attention_trial
from ochat.train.attention_choice import choose, decide, kept_or_new
from ochat.train.attention_trial import Trial

CPU = torch.device("cpu")
LLAMA = ModelConfig("llama", 64, 32, 64, 2, 4, 2, 16)
GEMMA = dataclasses.replace(LLAMA, windows=(None, 4096), attention_softcap=5.0)
NAMES = ("fa3", "fa4", "cudnn", "flash", "varlen", "flex")


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(attention_trial, "TIMED_S", 0.0)


def batch():
    documents = [Example(np.ones(n, np.int64), np.ones(n, np.float32), "a") for n in (40, 3, 60)]
    return pack(documents, range(3), [0] * 3, pad_to=128)


def plain(_, q, k, v, documents, scores):
    lengths = documents.cu_seqlens.diff().tolist()
    return BACKENDS["sdpa"].call(None, q, k, v, documents._replace(lengths=lengths), scores)


def slow(*arguments):
    time.sleep(0.02)
    return plain(*arguments)


def without_window(*arguments):
    return plain(*arguments[:-1], dataclasses.replace(arguments[-1], window=None))


def without_softcap(*arguments):
    return plain(*arguments[:-1], dataclasses.replace(arguments[-1], softcap=0.0))


def one_document(_, q, k, v, documents, scores):
    whole = documents.cu_seqlens[[0, -1]]
    return plain(_, q, k, v, documents._replace(cu_seqlens=whole), scores)


def wrong_heads(_, q, k, v, documents, scores):
    return plain(_, q, k.flip(1), v.flip(1), documents, scores)


def nan_if_empty(*arguments):
    out = plain(*arguments)
    return out * float("nan") if (arguments[4].cu_seqlens.diff() == 0).any() else out


def half_gradient_of_k(_, q, k, v, documents, scores):
    return plain(_, q, (k + k.detach()) / 2, v, documents, scores)


def nan_gradient(_, q, k, v, documents, scores):
    return plain(_, q, k, v + 0 * v.abs().sqrt().sum() * float("inf"), documents, scores)


def unsteady(*arguments):
    return plain(*arguments) * (1 + 2**-7 * float(torch.rand(()) > 0.5))


def dying(*_):
    raise RuntimeError("no kernel image\nfor this device")


WRONG = {
    one_document: "is wrong in its result: off by",
    wrong_heads: "is wrong in its result",
    half_gradient_of_k: "is wrong in its gradient of k",
    nan_gradient: "has NaN or infinity in its",
    dying: "fails (RuntimeError: no kernel image)",
}


def stand_in(monkeypatch, **calls):
    """These backends alone, with sdpa; they take anything, anywhere."""
    rows = {name: dataclasses.replace(BACKENDS["sdpa"], call=calls[name], reads_lengths=False) for name in calls}
    for name in NAMES:
        row = rows.get(name, dataclasses.replace(BACKENDS["sdpa"], dtypes=()))
        monkeypatch.setitem(BACKENDS, name, row)


def trial(model=LLAMA, **needs):
    return Trial(model, Needs.of(model, torch.bfloat16, **needs), CPU)


def decided(tried, refused=None):
    missing = {name: row.lacks(tried.needs) for name, row in BACKENDS.items() if row.lacks(tried.needs)}
    return decide(tried, missing | (refused or {}), batch)


@pytest.mark.parametrize("fault", WRONG)
def test_a_backend_that_is_wrong_is_passed_over(monkeypatch, fault):
    stand_in(monkeypatch, fa3=fault, varlen=plain)
    backend, why = decided(trial())
    assert backend == "varlen" and why.startswith("varlen, chosen: varlen ") and f"not fa3, which {WRONG[fault]}" in why


@pytest.mark.parametrize(
    ("call", "model", "needs"),
    [(without_window, GEMMA, {}), (without_softcap, GEMMA, {}), (nan_if_empty, LLAMA, {"has_empty": True})],
)
def test_what_the_model_or_the_run_needs_is_tested(monkeypatch, call, model, needs):
    """And only that: the same backends are right for a plain Llama."""
    stand_in(monkeypatch, flash=call, varlen=plain)
    assert trial(model, **needs).fault("flash") and not trial(model, **needs).fault("varlen")
    assert not trial().fault("flash")


def test_a_deterministic_run_takes_what_repeats_itself(monkeypatch):
    stand_in(monkeypatch, flash=unsteady, varlen=plain)
    torch.manual_seed(0)
    faults = {trial(is_deterministic=True).fault("flash") for _ in range(12)} - {""}
    assert any("other numbers when run again" in each for each in faults)
    assert not trial(is_deterministic=True).fault("varlen")


def test_the_fastest_is_taken_and_flex_only_where_nothing_else_passes(monkeypatch):
    stand_in(monkeypatch, fa3=slow, varlen=plain, flex=plain)
    backend, why = decided(trial())
    assert backend == "varlen" and why.index("varlen ") < why.index("fa3 ") and "flex" not in why.partition("not ")[0]
    stand_in(monkeypatch, fa3=dying, flex=slow)
    assert decided(trial())[0] == "flex"
    stand_in(monkeypatch, fa3=dying)
    backend, why = decided(trial())
    assert backend == "sdpa" and "the last; not " in why


def test_a_failure_on_the_real_batch_is_a_reason_too(monkeypatch):
    def too_large(*arguments):
        if len(arguments[1]) == 128:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried")
        return plain(*arguments)

    stand_in(monkeypatch, flash=too_large, flex=plain)
    backend, why = decided(trial())
    assert backend == "flex" and "not flash, which fails (OutOfMemoryError: CUDA out of memory. Tried)" in why


def test_a_backend_that_plans_every_batch_anew_pays_for_it(monkeypatch):
    """Its first turn of a shape is the usual one in a run."""
    seen = set()

    def planning(*arguments):
        shape = len(arguments[4].cu_seqlens), len(arguments[1])
        time.sleep(0.0 if shape in seen else 0.2)
        seen.add(shape)
        return plain(*arguments)

    for plans, taken in ((True, "varlen"), (False, "cudnn")):
        seen.clear()
        stand_in(monkeypatch, cudnn=planning, varlen=slow)
        row = dataclasses.replace(BACKENDS["cudnn"], plans_shapes=plans, takes_empty=lambda: False)
        monkeypatch.setitem(BACKENDS, "cudnn", row)
        assert decided(trial())[0] == taken


def test_a_broken_gpu_ends_the_run_with_the_way_out(monkeypatch):
    stand_in(monkeypatch, fa4=dying)

    def lost(_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(Trial, "now", lost)
    with pytest.raises(ConfigError, match="'fa4' broke the GPU .no kernel image.*|.*set train.attention = 'varlen'"):
        decided(trial())


def test_a_choice_is_kept_until_something_changes(monkeypatch, tmp_path):
    stand_in(monkeypatch, flash=plain, varlen=slow)
    keep, made = tmp_path / "run" / "attention.json", []

    def first_batch():
        made.append(1)
        return batch()

    def choice(refused=None, **needs):
        return kept_or_new(trial(**needs), refused or {}, first_batch, keep)["backend"]

    missing = {name: "is not there" for name in NAMES if name not in ("flash", "varlen")}
    assert choice(missing) == choice(missing) == "flash" and len(made) == 1
    assert json.loads(keep.read_text())["backend"] == "flash"
    assert choice(missing | {"flash": "is gone"}) == "varlen" and len(made) == 2  # then varlen is kept
    assert choice(missing) == "varlen" and len(made) == 2
    assert choice(missing, is_deterministic=True) == "flash" and len(made) == 3
    monkeypatch.setattr(attention_choice, "version", lambda name: "9.9")
    assert choice(missing, is_deterministic=True) == "flash" and len(made) == 4
    keep.write_text("{")
    with pytest.raises(ConfigError, match="attention.json.*delete it"):
        choice(missing)


def ranks(device, others=(), is_first=True):
    """This rank and others, which answer so in turn."""
    answers = iter(others)
    raised = lambda problem, kind: (_ for _ in ()).throw(kind(problem)) if problem else None  # noqa: E731
    gathered = lambda record: [record, next(answers)] if is_first else [next(answers), record]  # noqa: E731
    return SimpleNamespace(device=device, is_first=is_first, raise_on_all_ranks=raised, all_gather_json=gathered)


def test_all_ranks_take_the_first_ones_choice_of_what_all_have(monkeypatch, tmp_path):
    stand_in(monkeypatch, flash=plain, varlen=slow)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    cuda = torch.device("cuda")
    monkeypatch.setattr(attention_choice, "Trial", lambda model, needs, _: Trial(model, needs, CPU))
    needs, keep = Needs.of(LLAMA, torch.bfloat16), tmp_path / "attention.json"
    without = dict.fromkeys(BACKENDS, "") | {"flash": "cannot be imported (...)"}
    backend, why = choose("auto", LLAMA, needs, ranks(cuda, [without, {}]), batch, keep)
    assert backend == "varlen" and "not flash, which cannot be imported (...)" in why
    theirs = {"backend": "fa4", "reason": "fa4, chosen: ..."}
    second = ranks(cuda, [without, theirs], is_first=False)
    assert choose("auto", LLAMA, needs, second, batch, keep) == ("fa4", "fa4, chosen: ...")


def test_a_cpu_takes_sdpa_untested_and_a_named_backend_is_checked(tmp_path):
    arguments = Needs.of(LLAMA, torch.bfloat16), ranks(CPU), None, tmp_path / "attention.json"
    assert choose("auto", LLAMA, *arguments) == ("sdpa", "sdpa, chosen: on a CPU")
    assert choose("sdpa", LLAMA, *arguments) == ("sdpa", "sdpa")
    with pytest.raises(ConfigError, match="'fa3' runs on CUDA.*'auto'"):
        choose("fa3", LLAMA, *arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("module", "raised", "told"),
    [
        (None, None, "cannot be imported (ModuleNotFoundError: "),
        ("empty", None, "cannot be imported (AttributeError: "),
        ("broken", ImportError("libcudart.so.12: cannot open"), "cannot be imported (ImportError: libcudart.so.12"),
        ("odd", OSError("undefined symbol: _ZN3c10\nmore"), "cannot be imported (OSError: undefined symbol: _ZN3c10)"),
    ],
)
def test_a_package_that_is_missing_or_cannot_be_imported_is_a_reason(monkeypatch, module, raised, told):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    if raised is not None:
        monkeypatch.setattr(backends, "import_module", lambda _: (_ for _ in ()).throw(raised))
    elif module:
        monkeypatch.setitem(sys.modules, "flash_attn_interface", types.ModuleType(module))
    found = BACKENDS["fa3"].is_missing(torch.device("cuda"))
    assert found.startswith(told) and found.endswith("; build the folder hopper/ of Dao-AILab/flash-attention")
    assert isinstance(BACKENDS["fa3"], Backend) and "\n" not in found


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("model", [LLAMA, GEMMA], ids=["llama", "gemma"])
def test_something_passes_on_the_card(tmp_path, model):
    model, cuda = dataclasses.replace(model, head_dim=64), torch.device("cuda", 0)
    alone = SimpleNamespace(
        device=cuda, is_first=True, all_gather_json=lambda record: [record], raise_on_all_ranks=lambda *_: None
    )
    needs = Needs.of(model, torch.bfloat16)
    backend, why = choose("auto", model, needs, alone, batch, tmp_path / "attention.json")
    assert backend != "sdpa", why
