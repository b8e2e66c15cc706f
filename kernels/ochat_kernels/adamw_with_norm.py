"""AdamW of one tensor whose gradient has just been computed: its norm, and the update unless that is not finite.

    norm = adamw_with_norm(p, p.grad, m, v, lr=1e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, step=1)
Two launches, and nothing sent from the host: at most SUMS programs add up squares; then every program of the update
adds up their sums in the same order, and so knows by itself whether there is anything to do.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ochat_kernels import reference_adamw as definition
from ochat_kernels.adamw import BLOCK, numbers_of, update_block
from ochat_kernels.launch import check_device, launch
from ochat_kernels.reference_adamw import tensor_key

SUMS = 512  # programs of the first launch: four for each processor of an H100, always as many, for the same order
SQUARES_BLOCK, SQUARES_WARPS = 4096, 8  # enough loads on their way to reach the memory's bandwidth
BLOCKS = 8  # of a program of the update, so that the sums, read by each, are 2 % of what it moves


@triton.jit
def square_sums_kernel(grad_ptr, sums_ptr, n, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    squares = tl.zeros((BLOCK,), tl.float32)
    for start in range(tl.program_id(0).to(tl.int64) * BLOCK, n, tl.num_programs(0) * BLOCK):
        g = tl.load(grad_ptr + start + lanes, mask=lanes < n - start, other=0.0).to(tl.float32)
        squares += g * g
    tl.store(sums_ptr + tl.program_id(0), tl.sum(squares, axis=0))


@triton.jit(do_not_specialize=["num_sums", "key", "offset"])
def adamw_with_norm_kernel(
    param_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, copy_ptr, sums_ptr, norm_ptr,
    n, num_sums, key: tl.int64, offset: tl.int64,  # pyright: ignore[reportInvalidTypeForm]
    beta_1, rest_1, beta_2, rest_2, eps, decay, step_size, root_correction,
    SUMS: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sums = tl.arange(0, SUMS)
    squares = tl.sum(tl.load(sums_ptr + sums, mask=sums < num_sums, other=0.0), axis=0)
    if tl.program_id(0) == 0:
        tl.store(norm_ptr, tl.sqrt_rn(squares))
    lanes = tl.arange(0, BLOCK)
    first = tl.program_id(0).to(tl.int64) * (BLOCKS * BLOCK)
    end = tl.minimum(first + BLOCKS * BLOCK, n)
    is_finite = squares < float("inf")  # pyright: ignore[reportOperatorIssue]
    end = tl.where(is_finite, end, first)  # a step to skip reads and writes nothing
    for start in range(first, end, BLOCK):
        mask = lanes < n - start
        g = tl.load(grad_ptr + start + lanes, mask=mask, other=0.0).to(tl.float32)
        copy_at = None
        if copy_ptr is not None:
            copy_at = copy_ptr + start
        update_block(param_ptr + start, g, exp_avg_ptr + start, exp_avg_sq_ptr + start, copy_at, lanes, mask,
                     key, offset + start,
                     beta_1, rest_1, beta_2, rest_2, eps, decay, step_size, root_correction)  # fmt: skip


def adamw_with_norm_step(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    copy: Tensor | None,
    lr: float,
    beta_1: float,
    beta_2: float,
    eps: float,
    weight_decay: float,
    step: int,
    skipped: int,
    key: int,
    offset: int,
) -> Tensor:
    """Launches both; the norm () fp32."""
    n = param.numel()
    sums = grad.new_empty(max(1, min(SUMS, triton.cdiv(n, SQUARES_BLOCK))), dtype=torch.float32)
    arguments = {"grad_ptr": grad, "sums_ptr": sums, "n": n}
    launch(square_sums_kernel, sums.shape, arguments | {"BLOCK": SQUARES_BLOCK}, num_warps=SQUARES_WARPS)
    norm = grad.new_empty((), dtype=torch.float32)
    arguments |= {"param_ptr": param, "exp_avg_ptr": exp_avg, "exp_avg_sq_ptr": exp_avg_sq, "copy_ptr": copy}
    arguments |= {"norm_ptr": norm, "num_sums": sums.numel(), "key": key, "offset": offset}
    arguments |= numbers_of(lr, beta_1, beta_2, eps, weight_decay, step - skipped)
    arguments |= {"SUMS": SUMS, "BLOCKS": BLOCKS, "BLOCK": BLOCK}
    launch(adamw_with_norm_kernel, (max(1, triton.cdiv(n, BLOCKS * BLOCK)),), arguments)
    return norm


WRITTEN = ("param", "exp_avg", "exp_avg_sq", "copy")
_step = torch.library.custom_op("ochat_kernels::adamw_with_norm", adamw_with_norm_step, mutates_args=WRITTEN)


@_step.register_fake
def _(param, grad, *others):
    return grad.new_empty((), dtype=torch.float32)


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
    Returns: the norm () fp32, summed in an order that follows from the size alone.
    Raises: ValueError as adamw.
    Costs: 16 FLOPs an element; moves what adamw moves and reads the gradient once more: 16 bytes an element all in
    bf16, 32 all in fp32; two launches; no sync.
    Source: as adamw.
    """
    copies = None if copy is None else [copy]
    definition.check_adamw([param], [grad], [exp_avg], [exp_avg_sq], copies, None, None)
    definition.check_numbers(lr, betas, eps, weight_decay, step, seed, skipped)
    definition.places(1, [tensor_id], [offset])
    check_device("param", param)
    numbers = (lr, *betas, eps, weight_decay, step, skipped)
    return _step(param, grad, exp_avg, exp_avg_sq, copy, *numbers, tensor_key(seed, step, tensor_id), offset)
