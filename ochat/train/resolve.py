"""Decide what "auto" means for train.kernels, train.recompute and parallel.reduce on the device of this run, and make
torch compute as run.deterministic asks.

    kernels("auto", device);  recompute(...)

The learning rate's "auto" is schedule.py's, that of train.attention attention_choice.py's.
"""

from __future__ import annotations

import os

import torch
from ochat_kernels.compiled import has_compiler

from ochat.config import TrainConfig
from ochat.distributed.processes import Ranks
from ochat.errors import ConfigError
from ochat.model import fp8, nf4
from ochat.model.config import ModelConfig
from ochat.plan import gpus
from ochat.plan.forecast import PlanInputs, reductions, with_policy
from ochat.plan.memory import CONTEXT_BYTES, GIB

FP8_CAPABILITY = (9, 0)
COMPILING_PAYS = 1e14  # FLOPs: some minutes on two cores, of which compiling takes one
# variable -> values that make it deterministic; the first is set if the variable is not
DETERMINISTIC = {
    "CUBLAS_WORKSPACE_CONFIG": (":4096:8", ":16:8"),  # otherwise cuBLAS may choose other kernels per stream
    "NCCL_NVLS_ENABLE": ("0",),  # NVLink switches sum in order of arrival
}


def kernels(asked: str, device: torch.device, flops: float, *, compiles: bool = False) -> str:
    """The implementation of the operators, one of ochat_kernels.IMPLEMENTATIONS. `flops`: of the whole run; compiling
    for a CPU pays from COMPILING_PAYS on. `compiles`: train.compile. Raises: ConfigError where it cannot run."""
    on_gpu = device.type == "cuda"
    if asked == "auto":
        if on_gpu:
            return "triton"
        return "compiled" if flops > COMPILING_PAYS and not compiles and has_compiler() else "reference"
    if asked == "compiled" and not has_compiler():
        raise ConfigError(
            "train.kernels = 'compiled' needs a C++ compiler (g++ or clang++); install one, or use 'auto'"
        )
    if asked == "triton" and not on_gpu and os.environ.get("TRITON_INTERPRET") != "1":
        raise ConfigError(
            "train.kernels = 'triton', but the run is on a CPU, where Triton only runs in its slow interpreter "
            "(TRITON_INTERPRET=1); use 'auto' or 'reference'"
        )
    return asked


def reduce(inputs: PlanInputs, ranks: Ranks) -> tuple[str, str]:
    """(parallel.reduce, what was decided and why), the same on every rank; "auto" chooses on known GPUs."""
    asked = inputs.parallel.reduce
    if asked != "auto":
        return asked, asked
    gpu = gpus.lookup(torch.cuda.get_device_name(ranks.device)) if ranks.device.type == "cuda" else None
    layout = inputs.layout(ranks.world, torch.cuda.device_count() or ranks.world)
    choices = reductions(layout)
    if gpu is None or len(choices) == 1:
        return choices[0].reduce, f"{choices[0].reduce}, chosen: " + ("one choice" if gpu else "no known GPU")
    room = _room(ranks)
    chosen = inputs.resolve(layout, room, gpu)
    taken = [inputs.resolve_recompute(each, room) for each in choices]
    times = [f"{each.reduce} takes {inputs.speed(gpu, each).step_seconds * 1e3:,.0f} ms" for each in taken]
    return chosen.reduce, f"{chosen.reduce}, chosen: {', '.join(times)} a step, as ochat plan predicts"


def linear(asked: str, device: torch.device, model: ModelConfig) -> None:
    """Check train.linear. Raises: ConfigError for a card or a model that has no products of fp8."""
    if asked != "fp8":
        return
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < FP8_CAPABILITY:
        raise ConfigError(
            f"train.linear = 'fp8' needs a Hopper GPU (H100, H200) or a newer one, and this is a "
            f"{torch.cuda.get_device_name(device)}; use 'bf16'"
        )
    fp8.check(model)


def quantize(asked: str, device: torch.device) -> None:
    """Check base.quantize. Raises: ConfigError where bitsandbytes is missing or does not work on the device."""
    if asked == "nf4":
        nf4.check(device)


def recompute(inputs: PlanInputs, ranks: Ranks) -> tuple[str, str]:
    """(policy, what was decided and why), the same on every rank. "auto" is the first of forecast.POLICIES whose
    memory, as `ochat plan` predicts it, every GPU has; `train.kernels` must be resolved.

    Raises: ConfigError for "elementwise" where the compiler cannot do it.
    """
    train, asked = inputs.train, inputs.train.recompute
    check_recompute(train)
    if asked != "auto":
        return asked, asked
    if ranks.device.type != "cuda" and not train.offload_activations:
        return "none", "none, chosen: on a CPU memory is seldom short"
    room = _room(ranks)
    layout = inputs.layout(ranks.world, ranks.world)
    policy = inputs.resolve_recompute(layout, room).recompute
    tried = inputs.policies[: inputs.policies.index(policy) + 1]
    needs = [f"{each} needs {inputs.memory(with_policy(layout, each)).total / GIB:,.1f}" for each in tried]
    return policy, f"{policy}, chosen: {', '.join(needs)} of {room / GIB:,.1f} GiB, as ochat plan predicts"


def check_recompute(train: TrainConfig) -> None:
    """Raises: ConfigError for results of a Triton kernel that a compiler should recompute."""
    if train.recompute == "elementwise" and train.compile and train.kernels == "triton":
        raise ConfigError(
            "train.recompute = 'elementwise' with train.compile = true and Triton kernels, into which a compiler "
            "does not see; set train.kernels = 'reference' or train.compile = false"
        )


def _room(ranks: Ranks) -> float:
    """Bytes that a step can use on every GPU."""
    return min(record["room"] for record in ranks.all_gather_json({"room": usable_bytes(ranks.device)}))


def usable_bytes(device: torch.device) -> float:
    """Bytes that a step can use on the GPU, CUDA's own context included; unlimited on a CPU."""
    if device.type != "cuda":
        return float("inf")
    free, total = torch.cuda.mem_get_info(device)
    return min(free + CONTEXT_BYTES, total)


def determinism(wanted: bool, *, compiles: bool = False) -> None:
    """Set up this process for run.deterministic; `wanted` = False undoes it. `compiles`: train.compile.

    Losses and weights are then equal on the same machine, number of processes and versions. CPUs, gloo and our Triton
    kernels (no atomics, no autotuning) are deterministic without it. Raises: ConfigError for an environment variable
    with another value. Costs on CUDA: the backward of attention sums in a fixed order (tens of percent of
    FlashAttention's), index sums sort first, NVLink switches do not sum, and the compiler picks kernels without timing
    them. Memory use does not change.
    """
    torch.use_deterministic_algorithms(wanted)
    # no code reads uninitialised memory; filling it would cost a pass over all of it
    torch.utils.deterministic.fill_uninitialized_memory = not wanted  # type: ignore[attr-defined]
    for name, values in DETERMINISTIC.items() if wanted else ():
        if os.environ.setdefault(name, values[0]) not in values:
            raise ConfigError(
                f"run.deterministic = true, but the environment says {name}={os.environ[name]}; unset it, or set "
                f"{' or '.join(values)}"
            )
    if wanted and compiles:
        from torch._inductor import config as inductor  # here: slow to import

        inductor.deterministic = True
