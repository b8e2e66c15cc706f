"""AdamW over lists of tensors: one launch updates all tensors of the same dtypes, in place.

    adamw(params, grads, exp_avgs, exp_avg_sqs, lr=1e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, step=1)
A program finds its tensor in a table of addresses, then reads and writes every value of one block once, in fp32
between; bf16 is rounded stochastically, with random bits from a hash that costs some sixteen integer operations.
`copies` take what fp32 parameters are to compute with, rounded to nearest, in the same pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ochat_kernels import reference_adamw as definition
from ochat_kernels.launch import check_device, launch
from ochat_kernels.reference_adamw import tensor_key
from ochat_kernels.rounding import narrow

BLOCK = 1024  # 8 elements a thread: 16-byte accesses in bf16
COLUMNS = 8  # int64 of the table: elements; hash key; offset; addresses of param, grad, two moments and copy (or 0)
TRITON = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}

HASH_1, HASH_2, HASH_3 = (tl.constexpr(x) for x in (definition.HASH_1, definition.HASH_2, definition.HASH_3))
HIGH_1, HIGH_2 = tl.constexpr(definition.HIGH_1), tl.constexpr(definition.HIGH_2)


@triton.jit
def random_words(key, start, lanes):
    """For the elements start + lanes: 32 random bits for the two moments, and 16 for the parameter. Some 16 integer
    operations an element; a Philox would take about 100, more than a GPU has time for while it moves the bytes."""
    element = start + lanes  # a block that starts anywhere may cross a multiple of 2^32
    high = (element >> 32).to(tl.uint32)
    word_1 = key.to(tl.uint32) + high * HIGH_1
    word_2 = (key >> 32).to(tl.uint32) + high * HIGH_2
    x = element.to(tl.uint32) + word_1
    x ^= x >> 16
    x = x * HASH_1 + word_2
    x ^= x >> 15
    x *= HASH_2
    x ^= x >> 16
    return x, ((x ^ word_2) * HASH_3) >> 16


@triton.jit
def round_with(x, bits, dtype: tl.constexpr):
    """fp32 `x` in `dtype`; bf16 by 16 random `bits`, which a NaN (whose payload they could carry away) survives."""
    if dtype == tl.bfloat16:
        word = tl.where(x == x, x.to(tl.uint32, bitcast=True) + bits, 0x7FC00000)
        x = (word >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x


@triton.jit
def block_of(table_ptr, column, start, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointer to element `start` of the tensor whose address is in this column."""
    pointer = tl.load(table_ptr + column).to(tl.pointer_type(dtype)) + start  # pyright: ignore[reportArgumentType]
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


@triton.jit
def adamw_kernel(
    table_ptr, programs_ptr, grad_scale_ptr, corrections_ptr,
    beta_1, rest_1, beta_2, rest_2, eps, decay, step_size, root_correction,
    PARAM: tl.constexpr, GRAD: tl.constexpr, STATE: tl.constexpr, COPY: tl.constexpr, ALIGNED: tl.constexpr,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = programs_ptr + tl.program_id(0).to(tl.int64) * 2
    row = table_ptr + tl.load(program) * COLUMNS
    start = tl.load(program + 1).to(tl.int64) * BLOCK
    left = tl.minimum(tl.load(row) - start, BLOCK).to(tl.int32)
    if grad_scale_ptr is not None:
        grad_scale = tl.load(grad_scale_ptr)
        left = tl.where(tl.abs(grad_scale) < float("inf"), left, 0)  # a step to skip reads and writes nothing
    if ALIGNED:
        left = tl.multiple_of(left, 16)
    lanes = tl.arange(0, BLOCK)
    mask = lanes < left
    if corrections_ptr is not None:
        step_size, root_correction = tl.load(corrections_ptr), tl.load(corrections_ptr + 1)
    g = tl.load(block_of(row, 4, start, GRAD, ALIGNED) + lanes, mask=mask, other=0.0).to(tl.float32)
    if grad_scale_ptr is not None:
        g *= grad_scale
    p_at = block_of(row, 3, start, PARAM, ALIGNED)
    m_at, v_at = block_of(row, 5, start, STATE, ALIGNED), block_of(row, 6, start, STATE, ALIGNED)
    copy_at = None
    if COPY is not None:
        copy_at = block_of(row, 7, start, COPY, ALIGNED)
    update_block(p_at, g, m_at, v_at, copy_at, lanes, mask, tl.load(row + 1), tl.load(row + 2) + start,
                 beta_1, rest_1, beta_2, rest_2, eps, decay, step_size, root_correction)  # fmt: skip


@triton.jit
def update_block(p_at, g, m_at, v_at, copy_at, lanes, mask, key, first,
                 beta_1, rest_1, beta_2, rest_2, eps, decay, step_size, root_correction):  # fmt: skip
    """Moves the parameter, the moments and the copy (or None) at these addresses by the gradient g, where `mask` says;
    `first`: the place of the block's first element in its whole tensor."""
    STATE: tl.constexpr = m_at.dtype.element_ty
    m = tl.load(m_at + lanes, mask=mask, other=0.0).to(tl.float32)
    v = tl.load(v_at + lanes, mask=mask, other=0.0).to(tl.float32)
    p = tl.load(p_at + lanes, mask=mask, other=0.0).to(tl.float32)
    m = m * beta_1 + g * rest_1
    v = v * beta_2 + g * g * rest_2
    p = p * decay - m / (tl.sqrt(v) * root_correction + eps) * step_size

    bits, bits_p = random_words(key, first, lanes)
    tl.store(m_at + lanes, round_with(m, bits & 0xFFFF, STATE), mask=mask)
    tl.store(v_at + lanes, round_with(v, bits >> 16, STATE), mask=mask)
    tl.store(p_at + lanes, round_with(p, bits_p, p_at.dtype.element_ty), mask=mask)
    if copy_at is not None:
        tl.store(copy_at + lanes, narrow(p, copy_at.dtype.element_ty), mask=mask)


def adamw_step(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    copies: list[Tensor],
    grad_scale: Tensor | None,
    skipped: Tensor | None,
    lr: float,
    beta_1: float,
    beta_2: float,
    eps: float,
    weight_decay: float,
    step: int,
    seed: int,
    ids: list[int],
    offsets: list[int],
) -> None:
    """Launches the step, once for each combination of dtypes; `copies` may be none. Tensors that allow no 16-byte
    accesses (an odd size, an odd place in a buffer) have a launch of their own and slow no other."""
    columns = [params, grads, exp_avgs, exp_avg_sqs, copies or [None] * len(params)]
    keys = [tensor_key(seed, step, i) for i in ids]
    rows = [_row(*row) for row in zip(zip(*columns, strict=True), keys, offsets, strict=True)]
    groups: dict[tuple, list[int]] = {}
    for i, row in enumerate(rows):
        aligned = all(value % 16 == 0 for value in (row[0], *row[3:]))
        groups.setdefault((params[i].dtype, grads[i].dtype, exp_avgs[i].dtype, aligned), []).append(i)
    if not groups:
        return
    device, numbers = params[0].device, numbers_of(lr, beta_1, beta_2, eps, weight_decay, step)
    corrections = None
    if skipped is not None:
        corrections = torch.stack(definition.corrections(lr, (beta_1, beta_2), step - skipped.double())).float()
    common = {"table_ptr": _upload(rows, torch.int64, device), "grad_scale_ptr": grad_scale} | numbers
    common["corrections_ptr"] = corrections
    for (param, grad, state, aligned), members in groups.items():
        programs = _programs(tuple((i, params[i].numel()) for i in members), device, _stream(device))
        constants = {"PARAM": TRITON[param], "GRAD": TRITON[grad], "STATE": TRITON[state]}
        constants |= {"COPY": tl.bfloat16 if copies else None, "ALIGNED": aligned, "COLUMNS": COLUMNS, "BLOCK": BLOCK}
        launch(adamw_kernel, (programs.shape[0],), common | constants | {"programs_ptr": programs})


def numbers_of(
    lr: float, beta_1: float, beta_2: float, eps: float, weight_decay: float, count: int
) -> dict[str, float]:
    """What update_block takes in the `count`-th step; all stay floats, since Triton compiles anew for integers that are
    1 or multiples of 16."""
    step_size, root_correction = definition.corrections(lr, (beta_1, beta_2), count)
    numbers = {"beta_1": beta_1, "rest_1": 1 - beta_1, "beta_2": beta_2, "rest_2": 1 - beta_2, "eps": eps}
    return numbers | {"decay": 1 - lr * weight_decay, "step_size": step_size, "root_correction": root_correction}


def _row(tensors: Sequence[Tensor | None], key: int, offset: int) -> list[int]:
    """One parameter's row of the table."""
    assert tensors[0] is not None
    return [tensors[0].numel(), key, offset, *(0 if tensor is None else tensor.data_ptr() for tensor in tensors)]


@lru_cache(maxsize=16)
def _programs(sizes: tuple[tuple[int, int], ...], device: torch.device, stream: int) -> Tensor:
    """(programs, 2) int32 for the (row of the table, elements) of tensors: each program's row, and its block there.
    One for each `stream`: another would not wait for the copy."""
    blocks = torch.tensor([triton.cdiv(size, BLOCK) for _, size in sizes])
    rows = torch.tensor([row for row, _ in sizes]).repeat_interleave(blocks)
    first = (blocks.cumsum(0) - blocks).repeat_interleave(blocks)
    return _upload(torch.stack((rows, torch.arange(len(rows)) - first), dim=1), torch.int32, device)


def _stream(device: torch.device) -> int:
    """The number of the stream that work is queued in; 0 without a GPU."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def _upload(values: Tensor | list[list[int]], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Copied without waiting; the allocator of pinned memory keeps the source until the copy is done."""
    host = torch.as_tensor(values, dtype=dtype)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


WRITTEN = ("params", "exp_avgs", "exp_avg_sqs", "copies")
_step = torch.library.custom_op("ochat_kernels::adamw", adamw_step, mutates_args=WRITTEN)


@_step.register_fake
def _(params, grads, exp_avgs, exp_avg_sqs, copies, grad_scale, skipped, *numbers):
    return None


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
    """One step of AdamW over lists of tensors, in place, in fp32.

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
    Costs: 14 FLOPs an element; moves each value once: 14 bytes an element all in bf16, 28 all in fp32, 2 more with
    copies; keeps 8 bytes for 1024 elements; no sync. Not for a CUDA graph: each call sends a table of addresses from
    the host, since gradients move.
    Source: Loshchilov and Hutter 2019, arXiv:1711.05101; stochastic rounding: Gupta et al. 2015, arXiv:1502.02551.
    """
    definition.check_adamw(params, grads, exp_avgs, exp_avg_sqs, copies, grad_scale, skipped)
    definition.check_numbers(lr, betas, eps, weight_decay, step, seed)
    places = definition.places(len(params), ids, offsets)
    for i, param in enumerate(params):
        check_device(f"params[{i}]", param)
    lists = [list(tensors) for tensors in (params, grads, exp_avgs, exp_avg_sqs, copies or ())]
    _step(*lists, grad_scale, skipped, lr, *betas, eps, weight_decay, step, seed, *places)
