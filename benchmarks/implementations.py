"""Every operator by our kernels, its PyTorch definition, torch.compile, torch and other packages.

    for each in of("rms_norm"): function = each.load(); outputs = function(arguments)
`load` imports when it is called; if it fails, the table shows the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Arguments = dict[str, Any]
Function = Callable[[Arguments], Any]
OURS = ("triton", "reference")


@dataclass(frozen=True)
class Implementation:
    name: str
    load: Callable[[], Function]
    is_weighted: bool = True  # False: has no per-token weights, so it computes something else, and less
    is_compiled: bool = False  # takes seconds to compile for every shape
    active: Callable[[], AbstractContextManager] = nullcontext  # the context in which it runs


def of(operator: str) -> list[Implementation]:
    """Ours and the definition first, then others that have the operator."""
    if operator == "attention":
        from benchmarks.attention_backends import BACKENDS  # imports this module

        return list(BACKENDS)
    ours = [Implementation(name, lambda name=name: _own(name, operator)) for name in OURS]
    return [*ours, Implementation("compiled", lambda: _compiled(operator), is_compiled=True), *_OTHERS[operator]]


def outputs_of(result: Any) -> list[Tensor]:
    """The differentiable outputs: of the head, the loss alone."""
    if hasattr(result, "loss_sum"):
        return [result.loss_sum]
    return [result] if isinstance(result, Tensor) else list(result or ())


def _own(name: str, operator: str) -> Function:
    function = getattr(import_module("ochat_kernels").load(name), operator)
    return lambda arguments: function(**arguments)


def _compiled(operator: str) -> Function:
    torch._dynamo.reset()  # else the next shape is compiled for any shape
    definition = _whole_logits if operator == "linear_cross_entropy" else _own("reference", operator)
    backend = "inductor" if torch.cuda.is_available() else "aot_eager"  # a CPU only shows that it can be traced
    return torch.compile(definition, dynamic=False, backend=backend)


def _whole_logits(a: Arguments) -> Tensor:
    """The head as one would write it for a compiler; the definition loops over chunks."""
    logits = F.linear(a["hidden"], a["weight"]).float()
    return (F.cross_entropy(logits, a["labels"], reduction="none") * a["loss_weights"]).sum()


def _torch_rms_norm() -> Function:
    return lambda a: F.rms_norm(a["x"], a["weight"].shape, a["weight"], a["eps"])


def _torch_head() -> Function:
    function = F.linear_cross_entropy  # torch >= 2.13
    return lambda a: (function(a["hidden"], a["weight"], a["labels"], reduction="none") * a["loss_weights"]).sum()


def _torch_adamw() -> Function:
    """torch.optim.AdamW(fused=True) on the given states; it has no stochastic rounding."""
    made: list[torch.optim.Optimizer] = []

    def step(a: Arguments) -> None:
        if not made or made[0].param_groups[0]["params"][0] is not a["params"][0]:
            made[:] = [_optimizer(a)]
        made[0].step()

    return step


def _optimizer(a: Arguments) -> torch.optim.Optimizer:
    settings = {name: a[name] for name in ("lr", "betas", "eps", "weight_decay")}
    optimizer = torch.optim.AdamW(a["params"], fused=True, **settings)
    states = zip(a["params"], a["grads"], a["exp_avgs"], a["exp_avg_sqs"], strict=True)
    for param, grad, exp_avg, exp_avg_sq in states:
        param.grad = grad
        step = torch.full((), a["step"] - 1.0, device=param.device)
        optimizer.state[param] = {"step": step, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    return optimizer


def _liger(name: str) -> Any:
    return getattr(import_module("liger_kernel.ops"), name).apply


def _liger_rms_norm() -> Function:
    apply = _liger("LigerRMSNormFunction")  # not in place: that overwrites the gradient from above
    return lambda a: apply(a["x"], a["weight"], a["eps"], 0.0, "llama", False)


def _liger_add_rms_norm() -> Function:
    apply = _liger("LigerFusedAddRMSNormFunction")
    return lambda a: apply(a["x"], a["residual"], a["weight"], a["eps"], 0.0, "llama", False)


def _liger_rope() -> Function:
    """It takes (1, heads, T, D) and one angle a pair, and turns q and k in place."""
    apply = _liger("LigerRopeFunction")

    def function(a: Arguments) -> list[Tensor]:
        heads = [a[name].transpose(0, 1)[None] for name in ("q", "k")]
        q, k = apply(*heads, a["cos"], a["sin"], None, 1, a["q"].shape[-1])
        return [q[0].transpose(0, 1), k[0].transpose(0, 1)]

    return function


def _liger_swiglu() -> Function:
    apply = _liger("LigerFusedGateUpSiLUMulFunction")
    return lambda a: apply(a["gate_up"])


def _liger_head(reduction: str) -> Function:
    apply = _liger("LigerFusedLinearCrossEntropyFunction")
    options = (None, None, -100, 0.0, 0.0, reduction, None, False, torch.float32)  # the last: dW is added up in fp32
    if reduction == "sum":
        return lambda a: apply(a["hidden"], a["weight"], a["labels"], *options)[0]
    return lambda a: (apply(a["hidden"], a["weight"], a["labels"], *options)[0] * a["loss_weights"]).sum()


def _cce_head() -> Function:
    function = import_module("cut_cross_entropy").linear_cross_entropy
    return lambda a: (function(a["hidden"], a["weight"], a["labels"], reduction="none") * a["loss_weights"]).sum()


def _quack_rms_norm() -> Function:
    function = import_module("quack.rmsnorm").rmsnorm
    return lambda a: function(a["x"], a["weight"], eps=a["eps"])


def _quack_add_rms_norm() -> Function:
    function = import_module("quack.rmsnorm").rmsnorm
    return lambda a: function(a["x"], a["weight"], residual=a["residual"], eps=a["eps"], prenorm=True)


def _quack_rope() -> Function:
    """It takes (1, T, heads, D), one tensor at a time."""
    function = import_module("quack.rotary").apply_rotary_emb
    return lambda a: [function(a[name][None], a["cos"], a["sin"])[0] for name in ("q", "k")]


def _quack_head() -> Function:
    function = import_module("quack.linear_cross_entropy").chunked_linear_cross_entropy
    return lambda a: function(a["hidden"], a["weight"], a["labels"], reduction="sum")


_OTHERS = {
    "rms_norm": [
        Implementation("torch", _torch_rms_norm),
        Implementation("liger", _liger_rms_norm),
        Implementation("quack", _quack_rms_norm),
    ],
    "add_rms_norm": [
        Implementation("liger", _liger_add_rms_norm),
        Implementation("quack", _quack_add_rms_norm),
    ],
    "rope": [Implementation("liger", _liger_rope), Implementation("quack", _quack_rope)],
    "swiglu": [Implementation("liger", _liger_swiglu)],
    "linear_cross_entropy": [
        Implementation("torch", _torch_head),
        Implementation("liger", lambda: _liger_head("none")),
        Implementation("liger-sum", lambda: _liger_head("sum"), is_weighted=False),
        Implementation("cce", _cce_head),
        Implementation("quack", _quack_head, is_weighted=False),
    ],
    "adamw": [Implementation("torch", _torch_adamw)],
}
