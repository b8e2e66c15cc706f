"""What only a card can show of the trainer: nothing in a step waits on the host, and what waits there comes back.

PYTHONPATH=.:kernels python -m pytest -m gpu tests/laws/test_cuda.py
"""

import pytest
import torch

from ochat import config as configuration
from ochat.train.trainer import Trainer, train
from tests import tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a card"),
]
# a named attention, as "auto" compares values, which a fake device lacks
OPTIONS = ("--train.device=cuda", "--train.dtype=bfloat16", "--train.attention=varlen", "--data.max_steps=4")
OFFLOADED = ("--train.recompute=block", "--train.offload_activations=true")
CHOICES = {
    "plain": (),
    "bad steps allowed": ("--train.max_nonfinite_steps=3",),
    "elementwise": ("--train.recompute=elementwise",),
    "block": ("--train.recompute=block",),
    "offloaded": OFFLOADED,
    "narrow": ("--optim.master_dtype=bfloat16", "--optim.moment_dtype=bfloat16"),
    "in backward": ("--optim.in_backward=true", "--optim.clip=0", "--data.bins_per_step=1"),
    "adapters": ("--lora.rank=4",),
    "changed weights and their average": ("--loss.dynamic=eaft", "--optim.ema=0.9"),
}


@pytest.mark.parametrize("choice", CHOICES)
def test_the_host_waits_for_nothing_in_a_step(world, tmp_path, monkeypatch, choice):
    """After the first step, which compiles and fills tables; between steps a log line may wait."""
    step, watched = Trainer.step, []

    def watch(trainer, number, batches):
        if number == 0:
            return step(trainer, number, batches)
        watched.append(number)
        torch.cuda.set_sync_debug_mode("error")
        try:
            step(trainer, number, batches)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Trainer, "step", watch)
    for name in ("after", "finish"):  # they read values, which a fake device lacks
        monkeypatch.setattr(Trainer, name, lambda *_: None)
    file, *overrides = tiny.options(world, tmp_path / "run", *OPTIONS, *CHOICES[choice])
    train(configuration.load(file, overrides))
    assert watched == [1, 2, 3]


def test_a_wait_would_be_seen():
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            torch.ones((), device="cuda").item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_inputs_of_blocks_come_back_from_the_host_as_they_were(world, tmp_path):
    """Over more blocks than there are buffers in flight."""
    deep = tiny.make(tmp_path / "deep", model={"num_hidden_layers": 9})
    runs = {}
    for name, choice in {"kept": ("--train.recompute=block",), "offloaded": OFFLOADED}.items():
        lines = tiny.train(deep, tmp_path / name, *OPTIONS, "--run.deterministic=true", *choice)
        runs[name] = [(line["loss"], line["grad_norm"]) for line in lines]
    assert runs["kept"] == runs["offloaded"] and len(runs["kept"]) == 4
