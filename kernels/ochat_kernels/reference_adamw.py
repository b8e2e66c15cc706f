"""The definition of `adamw` in plain PyTorch: one optimizer step in place, bf16 values rounded stochastically.

    adamw([p], [p.grad], [m], [v], lr=1e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, step=1)
A value between two bf16 neighbours goes to either with the probability that leaves its mean unchanged; the random bits
are a hash of (seed, step, tensor, element, stream): a step can be repeated exactly, and parts of a tensor are rounded
as within the whole.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ochat_kernels.reference_loss import statistics_dtype

# Odd multipliers, chosen among random ones for the hash's avalanche: flipping any bit of the counter flips every bit
# of the result with probability 1/2, as far as 65536 samples can tell.
HASH_1, HASH_2, HASH_3 = 0x9B363043, 0x5E2F2C5D, 0x8216950F
HIGH_1, HIGH_2 = 0xBAD68D35, 0x1A332C3F  # for the bits of an element's offset above the 32nd
WORD = 0xFFFFFFFF
STREAMS = EXP_AVG, EXP_AVG_SQ, PARAM = 0, 1, 2
DTYPES = (torch.float32, torch.bfloat16)


@torch.no_grad()
def adamw(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int,
    copies: Sequence[Tensor] | None = None,
    grad_scale: Tensor | None = None,
    skipped: Tensor | None = None,
    seed: int = 0,
    ids: Sequence[int] | None = None,
    offsets: Sequence[int] | None = None,
) -> None:
    """One step of AdamW over lists of tensors, in place; computed in fp32 (float64 for float64 parameters).

    g = grad * grad_scale; m = b1 m + (1 - b1) g; v = b2 v + (1 - b2) g^2
    n = step - skipped; p = p (1 - lr weight_decay) - lr / (1 - b1^n) * m / (sqrt(v / (1 - b2^n)) + eps)

    Args: params, fp32 or bf16 of any shape, contiguous; grads of their shapes, fp32 or bf16; exp_avgs and exp_avg_sqs
    likewise, the two of a parameter of one dtype; step counts from 1. copies: bf16, of the shapes of params, then all
    fp32; they receive the new params rounded to nearest even. grad_scale () fp32: multiplies every gradient; if it is
    NaN or infinite, the step is skipped and nothing changes, bit for bit. skipped () fp32: how many of the steps
    before were skipped. seed: for stochastic rounding of bf16 params and moments; the bits of an element also follow
    from its tensor's id (ids, default 0, 1, ...) and its position, counted from the tensor's offset (offsets, default
    0), which says where in the whole tensor a shard or a piece begins. The update uses the moments before rounding.
    Raises: ValueError for lists, shapes, dtypes, devices, layouts and numbers that do not fit.
    Costs: 14 FLOPs an element; several passes over memory; no sync.
    Source: Loshchilov and Hutter 2019, arXiv:1711.05101; stochastic rounding: Gupta et al. 2015, arXiv:1502.02551.
    """
    check_adamw(params, grads, exp_avgs, exp_avg_sqs, copies, grad_scale, skipped, (*DTYPES, torch.float64))
    check_numbers(lr, betas, eps, weight_decay, step, seed)
    ids, offsets = places(len(params), ids, offsets)
    step_size, root_correction = corrections(lr, betas, step if skipped is None else step - skipped.double())
    is_kept = None if grad_scale is None else grad_scale.isfinite()
    for i, (param, grad, exp_avg, exp_avg_sq) in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs, strict=True)):
        wide = statistics_dtype(param)
        g = grad.to(wide) if grad_scale is None else grad.to(wide) * grad_scale.to(wide)
        m = exp_avg.to(wide) * betas[0] + g * (1 - betas[0])
        v = exp_avg_sq.to(wide) * betas[1] + g * g * (1 - betas[1])
        update = m / (v.sqrt() * root_correction + eps)
        p = param.to(wide) * (1 - lr * weight_decay) - update * step_size
        key = tensor_key(seed, step, ids[i])
        _store(exp_avg, m, key, offsets[i], EXP_AVG, is_kept)
        _store(exp_avg_sq, v, key, offsets[i], EXP_AVG_SQ, is_kept)
        _store(param, p, key, offsets[i], PARAM, is_kept)
        if copies is not None:
            copies[i].copy_(p if is_kept is None else torch.where(is_kept, p, copies[i]))


@torch.no_grad()
def adamw_with_norm(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int,
    skipped: int = 0,
    copy: Tensor | None = None,
    seed: int = 0,
    tensor_id: int = 0,
    offset: int = 0,
) -> Tensor:
    """The 2-norm of the gradient; if it is finite, also one step of `adamw` for this parameter, in place.

    Args: as those of adamw, one tensor of each list: param, grad, exp_avg, exp_avg_sq, and copy, tensor_id and offset;
    skipped: how many of the steps before were skipped. If the norm is NaN or infinite, nothing changes, bit for bit.
    Returns: the norm () fp32 (float64 of a float64 gradient).
    Raises: ValueError as adamw.
    Costs: 16 FLOPs an element; several passes over memory; no sync.
    Source: as adamw.
    """
    copies = None if copy is None else [copy]
    check_adamw([param], [grad], [exp_avg], [exp_avg_sq], copies, None, None, (*DTYPES, torch.float64))
    check_numbers(lr, betas, eps, weight_decay, step, seed, skipped)
    norm = torch.linalg.vector_norm(grad, dtype=statistics_dtype(grad))
    numbers = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "step": step, "seed": seed}
    numbers |= {"grad_scale": torch.where(norm.isfinite(), 1.0, torch.nan).float()}
    numbers |= {"skipped": torch.full_like(norm, skipped, dtype=torch.float32)}
    adamw([param], [grad], [exp_avg], [exp_avg_sq], copies=copies, ids=[tensor_id], offsets=[offset], **numbers)
    return norm


def corrections(lr: float, betas: tuple[float, float], count: Any) -> tuple[Any, Any]:
    """What the first moment, and the root of the second, are multiplied with in the `count`-th step, an int or a
    float64 tensor."""
    return lr / (1 - betas[0] ** count), (1 - betas[1] ** count) ** -0.5


def stochastic_round(x: Tensor, bits: Tensor) -> Tensor:
    """fp32 `x` as bf16: up or down as the 16 random `bits` (int64, x's shape) say; NaN and infinities stay."""
    word = x.view(torch.int32).to(torch.int64) + bits  # a carry out of the low half is a step away from zero
    word = torch.where(x.isnan(), 0x7FC00000, word) >> 16
    return word.to(torch.int16).view(torch.bfloat16)


def random_bits(key: int, offsets: Tensor, stream: int) -> Tensor:
    """16 random bits for each element offset (int64) of the tensor with this key, in int64; a hash of the offset."""
    high = offsets >> 32
    word_1 = (key + high * HIGH_1) & WORD
    word_2 = ((key >> 32) + high * HIGH_2) & WORD
    x = (offsets + word_1) & WORD
    x ^= x >> 16
    x = (x * HASH_1 + word_2) & WORD
    x ^= x >> 15
    x = (x * HASH_2) & WORD
    x ^= x >> 16
    if stream == PARAM:
        return ((x ^ word_2) * HASH_3 & WORD) >> 16
    return x & 0xFFFF if stream == EXP_AVG else x >> 16


def tensor_key(seed: int, step: int, index: int) -> int:
    """64 bits, as a signed integer, from which all of a tensor's random bits of a step follow."""
    digest = hashlib.blake2b(f"{seed} {step} {index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def places(count: int, ids: Sequence[int] | None, offsets: Sequence[int] | None) -> tuple[list[int], list[int]]:
    """Id and offset of each of `count` tensors. ValueError for lists that do not fit."""
    ids = list(range(count) if ids is None else ids)
    offsets = [0] * count if offsets is None else list(offsets)
    for name, values in {"ids": ids, "offsets": offsets}.items():
        if len(values) != count or any(not 0 <= value < 2**63 for value in values):
            raise ValueError(f"{name} are {values}: expected {count} integers from 0 to 2^63 - 1, one a tensor")
    return ids, offsets


def check_adamw(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    copies: Sequence[Tensor] | None,
    grad_scale: Tensor | None,
    skipped: Tensor | None,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
) -> None:
    """ValueError unless the lists fit one another and are of `dtypes`."""
    lists = {"params": params, "grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    for name, tensors in (lists if copies is None else lists | {"copies": copies}).items():
        if len(tensors) != len(params):
            raise ValueError(f"{name} has {len(tensors)} tensors: expected {len(params)}, one for each of params")
        for i, (tensor, param) in enumerate(zip(tensors, params, strict=True)):
            _check_tensor(f"{name}[{i}]", tensor, param, params[0].device, DTYPES[1:] if name == "copies" else dtypes)
    wide = [i for i, param in enumerate(params) if param.dtype != torch.float32]
    if copies is not None and wide:
        raise ValueError(f"params[{wide[0]}] is {params[wide[0]].dtype}: expected float32, since there are copies")
    for i, (first, second) in enumerate(zip(exp_avgs, exp_avg_sqs, strict=True)):
        if first.dtype != second.dtype:
            raise ValueError(f"exp_avg_sqs[{i}] is {second.dtype}: expected that of exp_avgs[{i}], {first.dtype}")
    for name, number in {"grad_scale": grad_scale, "skipped": skipped}.items():
        if number is not None and (number.shape != () or number.dtype != torch.float32):
            raise ValueError(f"{name} is {number.dtype} {tuple(number.shape)}: expected float32 ()")
        if number is not None and params and number.device != params[0].device:
            raise ValueError(f"{name} is on {number.device}: expected {params[0].device}, as params are")


def check_numbers(
    lr: float, betas: tuple[float, float], eps: float, weight_decay: float, step: int, seed: int, skipped: int = 0
) -> None:
    """ValueError for a hyperparameter out of its range."""
    for name, value in {"lr": lr, "weight_decay": weight_decay}.items():
        if not 0 <= value < float("inf"):
            raise ValueError(f"{name} is {value}: expected a finite number that is not negative")
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas are {betas}: expected two numbers in [0, 1)")
    if not 0 < eps < float("inf"):
        raise ValueError(f"eps is {eps}: expected a finite number above 0")
    if step < 1:
        raise ValueError(f"step is {step}: expected at least 1")
    if not 0 <= skipped < step:
        raise ValueError(f"skipped is {skipped}: expected a count of the steps before step {step}")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed is {seed}: expected an integer from 0 to 2^63 - 1")


def _check_tensor(
    name: str, tensor: Tensor, param: Tensor, device: torch.device, dtypes: tuple[torch.dtype, ...]
) -> None:
    if tensor.dtype not in dtypes:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes if dtype in DTYPES)
        raise ValueError(f"{name} is {tensor.dtype}: expected {names}")
    if tensor.shape != param.shape or tensor.device != device:
        raise ValueError(
            f"{name} is {tuple(tensor.shape)} on {tensor.device}: expected its parameter's shape {tuple(param.shape)}, "
            f"on {device}"
        )
    if not tensor.is_contiguous():
        raise ValueError(f"{name} has strides {tensor.stride()}: expected a contiguous tensor")


def _store(target: Tensor, value: Tensor, key: int, first: int, stream: int, is_kept: Tensor | None) -> None:
    if target.dtype == torch.bfloat16:
        offsets = torch.arange(first, first + value.numel(), device=value.device).view(value.shape)
        value = stochastic_round(value, random_bits(key, offsets, stream))
    target.copy_(value if is_kept is None else torch.where(is_kept, value, target))
