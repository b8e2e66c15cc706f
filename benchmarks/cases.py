"""The operators at the shapes of real models: inputs, and the least work of each. attention.py adds attention.

    case = Case("swiglu", MODELS["Llama-3-8B"], num_tokens=16384)
    problem = make_problem(case, torch.device("cuda"), seed=0); cost(case, "forward")
Letters: T tokens, R live rows, H hidden, F FFN, N query heads, K key/value heads, D head dim, V vocabulary, L layers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

EPS = 1e-5
SPAN = 128  # tokens of one turn: supervised and other tokens alternate in spans, as in conversations


@dataclass(frozen=True)
class Model:
    name: str
    H: int
    F: int
    N: int
    K: int
    D: int
    V: int
    L: int = 1  # layers whose parameters one optimizer step takes: about 900 million elements for each model

    def layer_shapes(self) -> list[tuple[int, ...]]:
        """Of the parameters of one layer: fused qkv, output, fused gate/up, down, two norms."""
        qkv = ((self.N + 2 * self.K) * self.D, self.H)
        feed_forward = [(2 * self.F, self.H), (self.H, self.F)]
        return [qkv, (self.H, self.N * self.D), *feed_forward, (self.H,), (self.H,)]


MODELS = {
    model.name: model
    for model in [
        Model("Llama-3-8B", H=4096, F=14336, N=32, K=8, D=128, V=128256, L=4),
        Model("Llama-2-7B", H=4096, F=11008, N=32, K=32, D=128, V=32000, L=4),
        Model("Llama-3.2-1B", H=2048, F=8192, N=32, K=8, D=64, V=128256, L=15),
        Model("Llama-3.2-3B", H=3072, F=8192, N=24, K=8, D=128, V=128256, L=9),
    ]
}
OPERATORS = ["linear_cross_entropy", "rms_norm", "add_rms_norm", "rope", "qkv_rope", "qkv_norm_rope", "swiglu", "geglu"]
OPERATORS += ["adamw"]
OPTIMIZER_VARIANTS = {"bf16": 14, "fp32": 28, "fp32, bf16 copies": 30}  # bytes an element
ELEMENT_BYTES = 2  # activations are bf16


@dataclass(frozen=True)
class Case:
    """One operator at one shape."""

    operator: str
    model: Model
    num_tokens: int  # T
    supervised: float = 1.0  # fraction of live rows; the head alone has others than 1
    variant: str = ""  # the optimizer's dtypes (OPTIMIZER_VARIANTS), or the documents' lengths (attention.LENGTHS)
    window: int | None = None  # attention's, in tokens

    @property
    def live_rows(self) -> int:
        return int(_live(self).sum())

    @property
    def title(self) -> str:
        """Its name in a table."""
        window = f", window {self.window}" if self.window else ""
        vocabulary = f", V {self.model.V}" if self.operator == "linear_cross_entropy" else ""
        share = f", {self.supervised:.0%} supervised" if self.supervised < 1 else ""
        return f"{self.model.name}{vocabulary}{share}{', ' + self.variant if self.variant else ''}{window}"

    @property
    def passes(self) -> list[str]:
        return ["step"] if self.operator == "adamw" else ["forward", "forward+backward"]


class Cost(NamedTuple):
    """The least work of an operator: FLOPs of matrix products, and bytes moved (norm weights left out)."""

    flops: int
    bytes: int


def cost(case: Case, which: str) -> Cost:
    """The floor of one pass of a case; a backward pass counts what it must read and write itself.

    rms_norm 2 + 3 passes over (T, H); add_rms_norm 4 + 4; rope 2 + 2 over (T, (N + K) D) and the angles twice, qkv_rope
    the same over (T, (N + 2K) D); qkv_norm_rope reads q and k once more; swiglu and geglu 3 + 5 over (T, F); the head
    2 R H V FLOPs forward, 6 with gradients; adamw each state, parameter and gradient once.
    """
    m, T, both = case.model, case.num_tokens, which == "forward+backward"
    if case.operator == "rms_norm":
        return Cost(0, ELEMENT_BYTES * T * m.H * (5 if both else 2))
    if case.operator == "add_rms_norm":
        return Cost(0, ELEMENT_BYTES * T * m.H * (8 if both else 4))
    if case.operator in ("rope", "qkv_rope", "qkv_norm_rope"):
        heads = m.N + m.K * (1 if case.operator == "rope" else 2)
        again = (m.N + m.K) * (both and case.operator == "qkv_norm_rope")
        return Cost(0, T * m.D * ((4 * heads + 4) * (2 if both else 1) + 2 * again))
    if case.operator in ("swiglu", "geglu"):
        return Cost(0, ELEMENT_BYTES * T * m.F * (8 if both else 3))
    if case.operator == "linear_cross_entropy":
        once = ELEMENT_BYTES * (case.live_rows * m.H + m.V * m.H)  # read; as much again is written for the gradients
        return Cost((6 if both else 2) * case.live_rows * m.H * m.V, once * (2 if both else 1))
    return Cost(0, OPTIMIZER_VARIANTS[case.variant] * num_parameters(case))


def num_parameters(case: Case) -> int:
    return case.model.L * sum(math.prod(shape) for shape in case.model.layer_shapes())


@dataclass(frozen=True)
class Problem:
    """The arguments of an operator by name, which of them need a gradient, and the upstream gradients."""

    arguments: dict[str, Any]
    wanted: list[str]
    upstream: list[Tensor]

    def detached(self) -> dict[str, Any]:
        """The same tensors without gradients: some operators look at `requires_grad` even under no_grad."""
        return {name: x.detach() if isinstance(x, Tensor) else x for name, x in self.arguments.items()}

    def num_bytes(self) -> int:
        lists = [x if isinstance(x, list) else [x] for x in self.arguments.values()]
        return sum(x.numel() * x.element_size() for items in lists for x in items if isinstance(x, Tensor))


def make_problem(case: Case, device: torch.device, seed: int) -> Problem:
    """Random inputs, never zeros: a matrix product of zeros runs faster than one of data."""
    make = {
        "rope": _rope,
        "qkv_rope": _product,
        "qkv_norm_rope": _product,
        "swiglu": _gated,
        "geglu": _gated,
        "linear_cross_entropy": _head,
        "adamw": _adamw,
    }
    return make.get(case.operator, _norm)(case, Draw(device, seed))


class Draw:
    """Normal values from one seeded generator on the device."""

    def __init__(self, device: torch.device, seed: int) -> None:
        self.device = device
        self.generator = torch.Generator(device).manual_seed(seed)

    def __call__(self, *shape: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device, dtype=dtype).mul_(scale)


def _norm(case: Case, draw: Draw) -> Problem:
    shape = (case.num_tokens, case.model.H)
    weight = draw(case.model.H, scale=0.1).add_(1.0)
    inputs = {"x": draw(*shape), "weight": weight}
    if case.operator == "add_rms_norm":
        inputs = {"x": draw(*shape), "residual": draw(*shape), "weight": weight}
    upstream = [draw(*shape) for _ in range(len(inputs) - 1)]
    return _problem(inputs, {"eps": EPS}, upstream)


def _rope(case: Case, draw: Draw) -> Problem:
    m, T = case.model, case.num_tokens
    packed = draw(T, (m.N + 2 * m.K) * m.D)  # q and k are views of one product, as in the model
    q, k, _ = packed.split([m.N * m.D, m.K * m.D, m.K * m.D], dim=1)
    angles = draw(T, m.D // 2, dtype=torch.float32, scale=math.pi)
    inputs = {"q": q.view(T, m.N, m.D).detach(), "k": k.view(T, m.K, m.D).detach()}
    return _problem(inputs, {"cos": angles.cos(), "sin": angles.sin()}, [draw(T, m.N, m.D), draw(T, m.K, m.D)])


def _product(case: Case, draw: Draw) -> Problem:
    m, T = case.model, case.num_tokens
    inputs = {"qkv": draw(T, (m.N + 2 * m.K) * m.D)}
    angles = draw(T, m.D // 2, dtype=torch.float32, scale=math.pi)
    fixed: dict[str, Any] = {"cos": angles.cos(), "sin": angles.sin(), "num_heads": m.N, "num_kv_heads": m.K}
    if case.operator == "qkv_norm_rope":
        inputs |= {name: draw(m.D, scale=0.1).add_(1.0) for name in ("q_weight", "k_weight")}
        fixed["eps"] = EPS
    return _problem(inputs, fixed, [draw(T, count, m.D) for count in (m.N, m.K, m.K)])


def _gated(case: Case, draw: Draw) -> Problem:
    F = case.model.F
    return _problem({"gate_up": draw(case.num_tokens, 2 * F)}, {}, [draw(case.num_tokens, F)])


def _head(case: Case, draw: Draw) -> Problem:
    m, T = case.model, case.num_tokens
    live = _live(case).to(draw.device)
    labels = torch.randint(m.V, (T,), generator=draw.generator, device=draw.device).masked_fill_(~live, -100)
    weights = draw(T, dtype=torch.float32).masked_fill_(~live, 0.0)
    inputs = {"hidden": draw(T, m.H), "weight": draw(m.V, m.H, scale=m.H**-0.5)}
    fixed = {"labels": labels, "loss_weights": weights, "rows": live.nonzero().squeeze(1)}
    return _problem(inputs, fixed, [torch.ones((), device=draw.device)])


def _adamw(case: Case, draw: Draw) -> Problem:
    dtype = torch.bfloat16 if case.variant == "bf16" else torch.float32
    shapes = case.model.layer_shapes() * case.model.L
    arguments: dict[str, Any] = {
        "params": [draw(*shape, dtype=dtype, scale=0.02) for shape in shapes],
        "grads": [draw(*shape, dtype=dtype, scale=1e-3) for shape in shapes],
        "exp_avgs": [draw(*shape, dtype=dtype, scale=1e-3) for shape in shapes],
        "exp_avg_sqs": [draw(*shape, dtype=dtype, scale=1e-3).square_() for shape in shapes],
    }
    if "copies" in case.variant:
        arguments["copies"] = [draw(*shape) for shape in shapes]
    settings = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "step": 100}
    return Problem(arguments | settings, [], [])


def _problem(inputs: dict[str, Tensor], fixed: dict[str, Any], upstream: list[Tensor]) -> Problem:
    return Problem({name: x.requires_grad_() for name, x in inputs.items()} | fixed, list(inputs), upstream)


def _live(case: Case) -> Tensor:
    """(T,) bool: spans of SPAN tokens (less where there are few), of every four the first `4 * supervised`."""
    span = max(1, min(SPAN, case.num_tokens // 4))
    return (torch.arange(case.num_tokens) // span) % 4 < 4 * case.supervised
