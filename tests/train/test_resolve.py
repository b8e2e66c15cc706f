"""train.recompute = "auto" takes the policy that recomputes least and still fits: pytest tests/train/test_resolve.py"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from msgspec import structs

from ochat.config import BaseConfig, Config, DataConfig, TrainConfig
from ochat.errors import ConfigError
from ochat.model.config import ModelConfig
from ochat.model.transformer import RECOMPUTE
from ochat.plan.forecast import PlanInputs
from ochat.plan.lengths import LengthCounts
from ochat.plan.memory import GIB
from ochat.plan.roofline import Workload
from ochat.train import resolve

LLAMA_8B = ModelConfig("llama", 128256, 4096, 14336, 32, 32, 8, 128)
GPU, CPU = torch.device("cuda", 0), torch.device("cpu")


def chosen(room_gib: float, monkeypatch, device=GPU, **options) -> tuple[str, str]:
    """The policy and its reason on 8 GPUs with this much room each."""
    data = DataConfig("data", token_budget=8192, bins_per_step=8)
    config = Config(base=BaseConfig("base"), data=data, train=TrainConfig(**options))
    monkeypatch.setattr(resolve, "usable_bytes", lambda _: room_gib * GIB)
    eight = SimpleNamespace(
        device=device, world=8, all_gather_json=lambda record: [record, {"room": record["room"] + GIB}]
    )
    workload = Workload(LengthCounts.of(np.array([data.token_budget])), supervised_share=1.0)
    sections = config.data, structs.replace(config.train, kernels="triton"), config.optim, config.parallel, config.lora
    return resolve.recompute(PlanInputs(LLAMA_8B, workload, 0, *sections), eight)  # type: ignore[arg-type]


def test_auto_recomputes_the_least_that_fits_on_every_gpu(monkeypatch):
    """8B on 8 cards, as tests/plan/test_forecast.py knows its memory."""
    taken = [chosen(room, monkeypatch)[0] for room in range(40, 200)]
    assert taken == sorted(taken, key=["block", "elementwise", "none"].index) and set(taken) == set(RECOMPUTE)
    for policy in RECOMPUTE[:2]:
        room = 40 + taken.index(policy)  # the least in GiB that it is taken in
        needs = float(chosen(room, monkeypatch)[1].split(f"{policy} needs ")[1].split()[0])
        assert room - 1.05 < needs <= room  # told to a tenth
    assert chosen(10, monkeypatch)[0] == "block"  # nothing fits: what needs the least


def test_auto_keeps_everything_on_a_cpu_and_a_named_policy_stays(monkeypatch):
    assert chosen(10, monkeypatch, device=CPU)[0] == "none"
    assert chosen(1000, monkeypatch, device=CPU, offload_activations=True)[0] == "block"
    for asked in RECOMPUTE:
        assert chosen(10, monkeypatch, recompute=asked) == (asked, asked)


def test_kernels_follow_the_device(monkeypatch):
    assert [resolve.kernels(asked, each, 1.0) for asked in ("auto", "reference") for each in (GPU, CPU)] == [
        "triton", "reference", "reference", "reference",
    ]  # fmt: skip
    monkeypatch.setattr(resolve, "has_compiler", lambda: True)
    long = 2 * resolve.COMPILING_PAYS
    assert resolve.kernels("auto", CPU, long) == resolve.kernels("compiled", CPU, 1.0) == "compiled"
    assert resolve.kernels("auto", GPU, long) == "triton"
    assert resolve.kernels("auto", CPU, long, compiles=True) == "reference"
    monkeypatch.setattr(resolve, "has_compiler", lambda: False)
    assert resolve.kernels("auto", CPU, long) == "reference"
    with pytest.raises(ConfigError, match="'compiled' needs a C\\+\\+ compiler"):
        resolve.kernels("compiled", CPU, long)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ConfigError, match="train.kernels = 'triton'"):
        resolve.kernels("triton", CPU, 1.0)


def test_elementwise_is_not_for_compiled_triton_kernels(monkeypatch):
    assert {chosen(room, monkeypatch, compile=True)[0] for room in range(40, 200, 4)} == {"none", "block"}
    with pytest.raises(ConfigError, match="train.kernels = 'reference'"):
        chosen(100, monkeypatch, recompute="elementwise", compile=True)
    train, others = TrainConfig(compile=True, kernels="reference"), [None] * 4
    inputs = PlanInputs(LLAMA_8B, None, 0, None, train, *others[1:])  # type: ignore[arg-type]
    assert inputs.policies == RECOMPUTE
