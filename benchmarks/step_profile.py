"""One step under torch's profiler: its longest kernels beside the least time of what they do; rows of kernels.csv.

    rows = longest(profiled(step, device), Work.of(case, counts), ceilings)
Products have the FLOPs of their shapes, attention those of the visible pairs, our kernels the bytes of cases.py; others
have no floor.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity

from benchmarks import cases, step_cases, timing
from benchmarks.step_cases import Case
from benchmarks.timing import Ceilings

MOST = 40
COLUMNS = [
    *("date", "commit", "device", "torch", "triton", "driver", "model", "token_budget", "bins_per_step", "options"),
    *("kernel", "operator", "shapes", "calls", "total_ms", "share", "floor_ms", "floor_fraction"),
]
PRODUCTS = {"aten::mm": (0, 1), "aten::addmm": (1, 2), "aten::_scaled_mm": (0, 1)}  # which inputs are multiplied
# parts of names of kernels -> (operator of cases.py, whether it is backward)
OPERATORS = {
    "rms_norm_fwd": ("add_rms_norm", False), "rms_norm_bwd": ("add_rms_norm", True),
    "glu_fwd": ("swiglu", False), "glu_bwd": ("swiglu", True),
}  # fmt: skip
FORWARD_ATTENTION, BACKWARD_ATTENTION = ("flash_fwd", "fmha_fwd", "sdpa_fprop"), ("flash_bwd_dq_dk_dv", "fmha_bwd")


class Ran(NamedTuple):
    """A kernel, or on a CPU an operator, that ran once; the operator that launched it, and the shapes of its inputs."""

    kernel: str
    operator: str
    shapes: tuple
    microseconds: float


@dataclass(frozen=True)
class Work:
    """What a step does, as far as floors need it."""

    model: cases.Model
    num_layers: int
    micro_batches: int
    token_budget: int
    pairs: int  # of tokens that see each other, a layer
    update_bytes: int  # that the optimizer moves

    @classmethod
    def of(cls, case: Case, square_lengths: int) -> Work:
        model = step_cases.SMALL_MODELS.get(case.model) or cases.MODELS[case.model]
        variant = "bf16" if set(step_cases.BF16) <= set(case.options) else "fp32, bf16 copies"
        num_parameters = step_cases.model_config(case).num_parameters()
        return cls(model, step_cases.LAYERS[case.model], case.bins_per_step, case.token_budget,
                   square_lengths // 2, cases.OPTIMIZER_VARIANTS[variant] * num_parameters)  # fmt: skip


def profiled(step: Callable[[], Any], device: torch.device) -> list[Ran]:
    """Everything that one call ran."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with torch.profiler.profile(activities=activities, record_shapes=True) as profiler:
        step()
        timing.synchronize(device)
    operators = [each for each in profiler.events() or () if each.device_type == DeviceType.CPU]
    found = []
    for each in operators:
        shapes = tuple(map(tuple, each.input_shapes or ()))
        if device.type == "cuda":
            found += [Ran(kernel.name, each.name, shapes, kernel.duration) for kernel in each.kernels]
        elif each.self_cpu_time_total > 0:
            found.append(Ran(each.name, each.name, shapes, each.self_cpu_time_total))
    return found


def longest(ran: Iterable[Ran], work: Work, ceilings: Ceilings) -> list[dict[str, Any]]:
    """Rows of all kernels together, and of those of one name, operator and shapes that took longest."""
    groups: dict[tuple, list[float]] = defaultdict(list)
    for each in ran:
        groups[each.kernel, each.operator, each.shapes].append(each.microseconds)
    total_ms = sum(map(sum, groups.values())) / 1e3
    rows = [{"kernel": "(all)", "calls": sum(map(len, groups.values())), "total_ms": total_ms, "share": 1.0}]
    for (kernel, operator, shapes), taken in sorted(groups.items(), key=lambda item: -sum(item[1]))[:MOST]:
        ms, floor_ms = sum(taken) / 1e3, floor_of(kernel, operator, shapes, len(taken), work, ceilings)
        rows.append({
            "kernel": kernel[:120], "operator": operator, "shapes": " ".join(map(str, filter(None, shapes))),
            "calls": len(taken), "total_ms": ms, "share": ms / total_ms, "floor_ms": floor_ms,
            "floor_fraction": floor_ms / ms if floor_ms else None,
        })  # fmt: skip
    return rows


def floor_of(kernel: str, operator: str, shapes: tuple, calls: int, work: Work, ceilings: Ceilings) -> float | None:
    """The least milliseconds of all these calls; None: not known."""
    if operator in PRODUCTS and kernel:
        (m, k), (_, n) = (shapes[i] for i in PRODUCTS[operator])
        rate = 2 if "scaled" in operator else 1
        return ceilings.floor_ms(2 * m * n * k * calls // rate, 0)
    if "adamw" in kernel:
        return ceilings.floor_ms(0, work.update_bytes)
    for part, (name, is_backward) in OPERATORS.items():
        if part in kernel:
            case = cases.Case(name, work.model, work.token_budget)
            forward, both = (cases.cost(case, which) for which in ("forward", "forward+backward"))
            return ceilings.floor_ms(0, calls * (both.bytes - forward.bytes if is_backward else forward.bytes))
    for names, products in ((FORWARD_ATTENTION, 4), (BACKWARD_ATTENTION, 10)):  # as in attention.cost
        if any(name in kernel for name in names):
            return ceilings.floor_ms(products * work.model.N * work.model.D * work.pairs * work.num_layers, 0)
    return None
