"""The definition of `linear_cross_entropy` in plain PyTorch: per-token weighted cross-entropy of the linear head.

Logits exist one chunk of rows at a time; statistics are fp32 (float64 for float64 inputs).
Letters: T packed tokens, R live rows, H hidden, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100
LOGITS_PER_CHUNK = 2**26  # 256 MiB of fp32 logits at a time


class LossOutput(NamedTuple):
    """What `linear_cross_entropy` returns."""

    loss_sum: Tensor  # () fp32, sum of w * nll, with gradient to hidden and weight
    weight_sum: Tensor  # () fp32, sum of |w| where label != IGNORE_INDEX
    nll: Tensor  # (T,) fp32, detached; 0 in rows that are not live
    correct: Tensor  # (T,) bool: the largest logit is the label's; False in rows that are not live


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    loss_weights: Tensor,
    *,
    rows: Tensor | None = None,
    chunk_rows: int | None = None,
) -> LossOutput:
    """Per-token weighted cross-entropy of the linear head, without the (T, V) logits ever existing whole.

    loss_sum = sum_t w_t * (logsumexp(hidden_t @ weight.T) - (hidden_t @ weight.T)[label_t])

    Args: hidden (T, H); weight (V, H) of hidden's dtype; labels (T,) int64, IGNORE_INDEX where there is none;
    loss_weights (T,) fp32 of any sign; rows (R,) int64 indices of the live rows (label present, weight not 0), found
    here when not given, which on CUDA synchronises once; chunk_rows: rows of logits held at a time.
    Raises: ValueError for shapes and dtypes that do not fit.
    Costs: forward makes loss and gradients in one pass, 6 R H V FLOPs, one chunk of logits + dW in fp32 + dhidden.
    """
    _check_loss_arguments(hidden, weight, labels, loss_weights, rows, chunk_rows)
    live = labels != IGNORE_INDEX
    if rows is None:
        rows = (live & (loss_weights != 0)).nonzero().squeeze(1)
    if chunk_rows is None:
        chunk_rows = min(max(LOGITS_PER_CHUNK // weight.shape[0], 256), 8192)
    loss_sum, nll, correct = _LinearCrossEntropy.apply(hidden, weight, labels, loss_weights, rows, chunk_rows)  # type: ignore[misc]
    weight_sum = (loss_weights.abs() * live).sum(dtype=statistics_dtype(loss_weights))
    return LossOutput(loss_sum, weight_sum, nll, correct)


class _LinearCrossEntropy(torch.autograd.Function):
    """Loss and gradients chunk by chunk in forward, so that no logits are kept or made again; backward only scales."""

    @staticmethod
    def forward(ctx, hidden, weight, labels, loss_weights, rows, chunk_rows):
        wide = statistics_dtype(hidden)
        want_hidden, want_weight = ctx.needs_input_grad[:2]
        loss_sum = torch.zeros((), dtype=wide, device=hidden.device)
        nll = torch.zeros(hidden.shape[0], dtype=wide, device=hidden.device)
        correct = torch.zeros(hidden.shape[0], dtype=torch.bool, device=hidden.device)
        grad_rows = hidden.new_empty(rows.shape[0], hidden.shape[1]) if want_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if want_weight else None
        for start in range(0, rows.shape[0], chunk_rows):
            chunk = rows[start : start + chunk_rows]
            x, y, w = hidden[chunk], labels[chunk], loss_weights[chunk].to(wide)
            logits = F.linear(x, weight).to(wide)  # (chunk, V)
            lse = logits.logsumexp(-1)
            chunk_nll = lse - logits.gather(1, y[:, None]).squeeze(1)
            nll[chunk] = chunk_nll
            correct[chunk] = logits.argmax(-1) == y
            loss_sum += (chunk_nll * w).sum()
            if not (want_hidden or want_weight):
                continue
            logits.sub_(lse[:, None]).exp_()  # softmax
            logits[torch.arange(len(y), device=y.device), y] -= 1
            dlogits = logits.mul_(w[:, None]).to(hidden.dtype)
            if grad_rows is not None:
                grad_rows[start : start + chunk_rows] = dlogits @ weight
            if grad_weight is not None:
                grad_weight += dlogits.T @ x
        ctx.shape = hidden.shape
        ctx.dtypes = hidden.dtype, weight.dtype
        ctx.save_for_backward(rows, grad_rows, grad_weight)
        ctx.mark_non_differentiable(nll, correct)
        return loss_sum, nll, correct

    @staticmethod
    def backward(ctx, grad_loss, _grad_nll, _grad_correct):  # type: ignore[override]
        rows, grad_rows, grad_weight = ctx.saved_tensors
        grad_hidden = None
        if grad_rows is not None:
            scaled = (grad_rows * grad_loss).to(ctx.dtypes[0])
            grad_hidden = scaled.new_zeros(ctx.shape).index_copy_(0, rows, scaled)
        if grad_weight is not None:
            grad_weight = (grad_weight * grad_loss).to(ctx.dtypes[1])
        return grad_hidden, grad_weight, None, None, None, None


def statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _check_loss_arguments(hidden, weight, labels, loss_weights, rows, chunk_rows) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)}: expected (T, H) and (V, H)")
    if hidden.dtype != weight.dtype:
        raise ValueError(f"hidden is {hidden.dtype} and weight {weight.dtype}: expected one dtype")
    expected = (hidden.shape[0],)
    if tuple(labels.shape) != expected or labels.dtype != torch.int64:
        raise ValueError(f"labels are {labels.dtype} {tuple(labels.shape)}: expected int64 {expected}")
    if tuple(loss_weights.shape) != expected or not loss_weights.is_floating_point():
        raise ValueError(
            f"loss_weights are {loss_weights.dtype} {tuple(loss_weights.shape)}: expected float {expected}"
        )
    if rows is not None and (rows.dim() != 1 or rows.dtype != torch.int64):
        raise ValueError(f"rows are {rows.dtype} {tuple(rows.shape)}: expected int64 (R,)")
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows is {chunk_rows}: expected at least 1")
