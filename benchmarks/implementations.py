"""Every operator by our kernels, its PyTorch definition, torch.compile, torch and other packages.

    for each in of("rms_norm"): function = each.load(); outputs = function(arguments)
`load` imports when it is called; if it fails, the table shows the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial, reduce
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


def _torch_adamw() -> Function:
    """torch.optim.AdamW(fused=True) on the given states; it has no stochastic rounding."""
    made: list[torch.optim.Optimizer] = []

    def step(a: Arguments) -> None:
        if not made or made[0].param_groups[0]["params"][0] is not a["params"][0]:
            made[:] = [_optimizer(a)]
        made[0].step()
        if "copies" in a:
            torch._foreach_copy_(a["copies"], a["params"])  # pyright: ignore[reportPrivateImportUsage]

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


def peer(name: str, path: str, call: Callable[[Any, Arguments], Any], **flags: Any) -> Implementation:
    """Another package's operator: `path` is "module:name", `call` passes our arguments to it."""

    def load() -> Function:
        module, _, names = path.partition(":")
        return partial(call, reduce(getattr, names.split("."), import_module(module)))

    return Implementation(name, load, **flags)


def _rope_heads_first(apply: Callable, a: Arguments) -> list[Tensor]:
    """Liger takes (1, heads, T, D) and one angle a pair, and rotates q and k in place."""
    heads = [a[name].transpose(0, 1)[None] for name in ("q", "k")]
    q, k = apply(*heads, a["cos"], a["sin"], None, 1, a["q"].shape[-1])
    return [q[0].transpose(0, 1), k[0].transpose(0, 1)]


def _liger_head(apply: Callable, a: Arguments, reduction: str) -> Tensor:
    options = (None, None, -100, 0.0, 0.0, reduction, None, False, torch.float32)  # the last: dW is summed in fp32
    loss = apply(a["hidden"], a["weight"], a["labels"], *options)[0]
    return loss if reduction == "sum" else (loss * a["loss_weights"]).sum()


def _weighted_head(function: Callable, a: Arguments) -> Tensor:
    return (function(a["hidden"], a["weight"], a["labels"], reduction="none") * a["loss_weights"]).sum()


LIGER, LIGER_HEAD = "liger_kernel.ops", "liger_kernel.ops:LigerFusedLinearCrossEntropyFunction.apply"
QUACK_NORM = "quack.rmsnorm:rmsnorm"
_OTHERS = {
    "rms_norm": [
        peer("torch", "torch.nn.functional:rms_norm",
             lambda f, a: f(a["x"], a["weight"].shape, a["weight"], a["eps"])),
        peer("liger", f"{LIGER}:LigerRMSNormFunction.apply",  # not in place: that overwrites the upstream gradient
             lambda f, a: f(a["x"], a["weight"], a["eps"], 0.0, "llama", False)),
        peer("quack", QUACK_NORM, lambda f, a: f(a["x"], a["weight"], eps=a["eps"])),
    ],
    "add_rms_norm": [
        peer("liger", f"{LIGER}:LigerFusedAddRMSNormFunction.apply",
             lambda f, a: f(a["x"], a["residual"], a["weight"], a["eps"], 0.0, "llama", False)),
        peer("quack", QUACK_NORM,
             lambda f, a: f(a["x"], a["weight"], residual=a["residual"], eps=a["eps"], prenorm=True)),
    ],
    "rope": [
        peer("liger", f"{LIGER}:LigerRopeFunction.apply", _rope_heads_first),
        peer("quack", "quack.rotary:apply_rotary_emb",  # it takes (1, T, heads, D), one tensor at a time
             lambda f, a: [f(a[name][None], a["cos"], a["sin"])[0] for name in ("q", "k")]),
    ],
    "qkv_rope": [],
    "qkv_norm_rope": [],
    "swiglu": [peer("liger", f"{LIGER}:LigerFusedGateUpSiLUMulFunction.apply", lambda f, a: f(a["gate_up"]))],
    "geglu": [
        peer("liger", f"{LIGER}:LigerGELUMulFunction.apply", lambda f, a: f(*a["gate_up"].chunk(2, dim=-1))),
    ],
    "linear_cross_entropy": [
        peer("torch", "torch.nn.functional:linear_cross_entropy", _weighted_head),  # torch >= 2.13
        peer("liger", LIGER_HEAD, partial(_liger_head, reduction="none")),
        peer("liger-sum", LIGER_HEAD, partial(_liger_head, reduction="sum"), is_weighted=False),
        peer("cce", "cut_cross_entropy:linear_cross_entropy", _weighted_head),
        peer("quack", "quack.linear_cross_entropy:chunked_linear_cross_entropy",
             lambda f, a: f(a["hidden"], a["weight"], a["labels"], reduction="sum"), is_weighted=False),
    ],
    "adamw": [Implementation("torch", _torch_adamw)],
}  # fmt: skip
