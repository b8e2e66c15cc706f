"""Every family trains, on any number of processes, resumes bit for bit, and leaves as what transformers computes.

`pytest -m "slow or not slow" tests/laws/test_families.py` tries all of them, with all weights trained and with LoRA.
"""

import json
import shutil

import pytest
import transformers

from ochat.export.hf_folder import export
from ochat.model import families, hf
from tests import model_families, tiny

STEPS = 20
# the windows of model_families are shorter than the conversations of the tiny world
FAMILIES = [family for family in model_families.FAMILIES if family not in ("llama-tied-odd-head", "llama-biases")]
OPTIONS = [f"--data.max_steps={STEPS}", "--data.epochs=9", "--checkpoint.every=10", "--checkpoint.keep=0"]
OPTIONS += ["--train.recompute=elementwise"]  # exact, and every operator is called by its repeatable form
WAYS = {"whole": [], "lora": ["--lora.rank=4", "--optim.lr=1e-2"]}
QUICK = {  # what differs most from Llama
    "whole": {"phi3", "smollm3-windows", "granite", "gemma2", "gemma3", "olmo3"},
    "lora": {"phi3", "gemma3"},
}
CASES = [
    pytest.param(family, way, marks=[] if family in QUICK[way] else pytest.mark.slow)
    for family in FAMILIES
    for way in WAYS
]


def _make(family, folder):
    """The tiny world with a base of one family."""
    given = model_families.config(family).to_dict()
    record = {key: value for key, value in given.items() if value is not None and key not in ("dtype", "vocab_size")}
    sizes = {key: tiny.MODEL[key] for key in ("vocab_size", "bos_token_id", "eos_token_id", "initializer_range")}
    return tiny.make(folder, model=record | sizes | {"max_position_embeddings": 512})


@pytest.mark.parametrize(("family", "way"), CASES)
def test_a_family_trains_resumes_and_is_exported(family, way, tmp_path):
    small = _make(family, tmp_path / "world")
    options = [*OPTIONS, *WAYS[way]]
    lines = tiny.train(small, tmp_path / "one", *options)
    assert len(lines) == STEPS and lines[-1]["loss"] < 0.95 * lines[0]["loss"]
    tiny.train_on_ranks(small, tmp_path / "two", 2, *options)
    for ours, theirs in zip(tiny.metrics(tmp_path / "two"), lines, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
    _resume(small, tmp_path / "one", lambda run: tiny.train(small, run, *options))
    _resume(small, tmp_path / "two", lambda run: tiny.train_on_ranks(small, run, 2, *options))

    export(tmp_path / "one", tmp_path / "out", dtype="float32")
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="float32").eval()
    ours = hf.load(tmp_path / "out", dtype="float32")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == ours.config.model_type
    ids = model_families.random_ids(40, 9)
    for sequence, logits in zip(ids, ours.logits(ids), strict=True):
        wanted = model_families.peer_logits(peer, sequence)
        assert (logits - wanted).abs().max() <= 2e-5 * wanted.abs().max()


def _resume(small, run, train):
    """Goes on from step 10 and compares curve and files."""
    again = run.with_name(f"{run.name} again")
    shutil.copytree(run, again)
    shutil.rmtree(again / "checkpoints" / f"step_{STEPS}")
    train(again)
    assert tiny.curve(tiny.metrics(again)) == tiny.curve(tiny.metrics(run))
    for path in sorted((run / "checkpoints" / f"step_{STEPS}").glob("*.safetensors")):
        assert path.read_bytes() == (again / "checkpoints" / f"step_{STEPS}" / path.name).read_bytes(), path.name


def test_every_family_is_there():
    there = {model_families.config(family).model_type for family in FAMILIES}
    assert there == set(families.FAMILIES)
