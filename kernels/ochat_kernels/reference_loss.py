"""The definition of `linear_cross_entropy` in plain PyTorch: per-token weighted cross-entropy of the linear head.

Logits exist one chunk of rows at a time; statistics are fp32 (float64 for float64 inputs).
Letters: T packed tokens, R live rows, H hidden, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ochat_kernels.dynamic_weights import Dynamic, check_dynamic, row_losses

IGNORE_INDEX = -100
LOGITS_PER_CHUNK = 2**26  # 256 MiB of fp32 logits at a time

# (nll (n,) fp32 detached, weights (n,) fp32) -> weights (n,) fp32, element by element
WeightTransform = Callable[[Tensor, Tensor], Tensor]
Passes = tuple[Callable[..., tuple[Tensor, Tensor, Tensor, Tensor | None]], Callable[..., Tensor]]


class LossOutput(NamedTuple):
    """What `linear_cross_entropy` returns."""

    loss_sum: Tensor  # () fp32, what is minimised, sum of w * nll, with gradient to hidden and weight
    weight_sum: Tensor  # () fp32, sum of |w| where label != IGNORE_INDEX
    nll: Tensor  # (T,) fp32, detached; 0 in rows that are not live
    correct: Tensor  # (T,) bool: the largest logit (the first of equals) is the label's; False in rows not live
    effective: Tensor | None = None  # with `dynamic` (T,) fp32, detached: the weight in the loss; 0 in rows not live


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    loss_weights: Tensor,
    *,
    rows: Tensor | None = None,
    chunk_rows: int | None = None,
    softcap: float = 0.0,
    weight_transform: WeightTransform | None = None,
    dynamic: Dynamic | None = None,
    grad_weight: Tensor | None = None,
    accumulate: bool = False,
) -> LossOutput:
    """Per-token weighted cross-entropy of the linear head, without the (T, V) logits ever existing whole.

    loss_sum = sum_t w_t * (logsumexp(z_t) - z_t[label_t]),  z_t = hidden_t @ weight.T

    Args: hidden (T, H); weight (V, H) of hidden's dtype; labels (T,) int64, IGNORE_INDEX where there is none;
    loss_weights (T,) fp32 of any sign; rows (R,) int64 indices, each once, of the live rows (label present, weight not
    0) and perhaps of others, which give 0; found here when not given, which on CUDA synchronises once; chunk_rows: rows
    of logits held at a time.
    softcap c > 0: z becomes c * tanh(z / c), as in Gemma 2; 0: it stays. weight_transform f: called as f(nll, w) on
    detached (n,) fp32 values of some live rows at a time; its result replaces w in the loss (not in weight_sum),
    without a gradient of its own. dynamic: how the model's probabilities change w in the loss (not in weight_sum), or
    the loss of negative w (see Dynamic). grad_weight (V, H), fp32: the call writes the gradient of loss_sum to weight
    here, or adds it with `accumulate`; backward then gives none to weight, and reaches hidden alone: for a caller whose
    loss is loss_sum itself.
    Raises: ValueError for shapes, dtypes and options that do not fit, and for a label outside the vocabulary.
    Costs: forward makes loss and gradients in one pass, 6 R H V FLOPs, one chunk of logits + dW in fp32 + dhidden.
    """
    options = rows, chunk_rows, softcap, weight_transform, dynamic, grad_weight, accumulate
    return by_chunks((statistics, gradient), hidden, weight, labels, loss_weights, *options)


def by_chunks(
    passes: Passes,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    loss_weights: Tensor,
    rows: Tensor | None,
    chunk_rows: int | None,
    softcap: float,
    weight_transform: WeightTransform | None,
    dynamic: Dynamic | None,
    grad_weight: Tensor | None,
    accumulate: bool,
) -> LossOutput:
    """`linear_cross_entropy` with these passes over a chunk of logits: `statistics` and `gradient`, or the compiled."""
    check_arguments(hidden, weight, labels, loss_weights, rows, chunk_rows)
    check_softcap(softcap)
    check_dynamic(dynamic, weight_transform is not None)
    check_grad_weight(grad_weight, weight)
    check_labels(labels, weight.shape[0])
    if rows is None:
        rows = live_rows(labels, loss_weights)
    if chunk_rows is None:
        chunk_rows = rows_at_a_time(weight.shape[0], hidden.is_cuda)
    if grad_weight is not None:
        weight = weight.detach()
    options = passes, chunk_rows, softcap, weight_transform, dynamic, grad_weight, accumulate
    loss_sum, *found = _LinearCrossEntropy.apply(hidden, weight, labels, loss_weights, rows, *options)  # type: ignore[misc]
    return LossOutput(loss_sum, weight_sum(labels, loss_weights), *found)


class _LinearCrossEntropy(torch.autograd.Function):
    """Loss and gradients chunk by chunk in forward, so that no logits are kept or made again; backward only scales."""

    @staticmethod
    def forward(
        ctx, hidden, weight, labels, loss_weights, rows, passes, chunk_rows, cap, transform, dynamic, total, accumulate
    ):
        wide = statistics_dtype(hidden)
        want_hidden, want_weight = ctx.needs_input_grad[:2]
        loss_sum = torch.zeros((), dtype=wide, device=hidden.device)
        nll = torch.zeros(hidden.shape[0], dtype=wide, device=hidden.device)
        correct = torch.zeros(hidden.shape[0], dtype=torch.bool, device=hidden.device)
        effective = None if dynamic is None else torch.zeros_like(nll)
        grad_rows = hidden.new_empty(rows.shape[0], hidden.shape[1]) if want_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if want_weight else total
        if total is not None and not accumulate:
            total.zero_()
        for start in range(0, rows.shape[0], chunk_rows):
            chunk = rows[start : start + chunk_rows]
            x, y, w = hidden[chunk], labels[chunk], loss_weights[chunk].to(wide)
            logits = F.linear(x, weight)  # (chunk, V)
            nll[chunk], correct[chunk], lse, extra = passes[0](logits, y, w, cap, dynamic.kind if dynamic else "")
            if transform is not None:
                w = torch.where(w != 0, transform(nll[chunk], w).to(w.dtype), 0)
            found = row_losses(dynamic, is_live(y, w), w, nll[chunk], lse, extra)
            loss_sum += found.loss.sum()
            if effective is not None:
                effective[chunk] = found.weight
            if grad_rows is None and grad_weight is None:
                continue
            dlogits = passes[1](logits, y, found.factor, found.lse, cap, found.excluded)
            if grad_rows is not None:
                grad_rows[start : start + chunk_rows] = dlogits @ weight
            if grad_weight is not None:
                grad_weight += dlogits.T @ x
        ctx.shape = hidden.shape
        ctx.dtypes = hidden.dtype, weight.dtype
        ctx.save_for_backward(rows, grad_rows, grad_weight if want_weight else None)
        ctx.mark_non_differentiable(nll, correct, *([] if effective is None else [effective]))
        return loss_sum, nll, correct, effective

    @staticmethod
    def backward(ctx, grad_loss, *_):  # type: ignore[override]
        rows, grad_rows, grad_weight = ctx.saved_tensors
        grad_hidden = None
        if grad_rows is not None:
            scaled = (grad_rows * grad_loss).to(ctx.dtypes[0])
            grad_hidden = scaled.new_zeros(ctx.shape).index_copy_(0, rows, scaled)
        if grad_weight is not None:
            grad_weight = (grad_weight * grad_loss).to(ctx.dtypes[1])
        return grad_hidden, grad_weight, *[None] * 10


def rows_at_a_time(vocab_size: int, is_cuda: bool) -> int:
    """Rows of a chunk of logits: LOGITS_PER_CHUNK numbers, within bounds."""
    return min(max(LOGITS_PER_CHUNK // vocab_size, 1024 if is_cuda else 256), 8192)


def soft_cap(logits: Tensor, cap: float) -> Tensor:
    """`cap * tanh(logits / cap)`, or the logits themselves where the cap is 0."""
    return cap * torch.tanh(logits / cap) if cap else logits


def statistics(
    logits: Tensor, y: Tensor, w: Tensor, cap: float, kind: str = ""
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(nll, correct, logsumexp, extra) of the rows of a chunk (n, V); nll 0 and correct False where a row is not live.

    extra, by Dynamic.kind: "eaft": the entropy; "unlikelihood": the label's logit - logsumexp of the others; else None.
    """
    live, z, extra = is_live(y, w), soft_cap(logits.to(w.dtype), cap), None
    lse = z.logsumexp(-1)
    label_logit = z.gather(1, y.clamp_min(0)[:, None]).squeeze(1)
    if kind == "eaft":
        extra = torch.special.entr((z - lse[:, None]).exp()).sum(-1)
    elif kind == "unlikelihood":
        extra = label_logit - torch.where(one_hot(y, z.shape[1]), -math.inf, z).logsumexp(-1)
    return torch.where(live, lse - label_logit, 0), live & (z.argmax(-1) == y), lse, extra


def gradient(logits: Tensor, y: Tensor, w: Tensor, lse: Tensor, cap: float, excluded: Tensor | None = None) -> Tensor:
    """w * (exp(z - lse) - onehot), to the logits before the cap, (n, V) of their dtype; 0 where a row is not live.

    With lse that of z: the gradient of w * nll. In rows that are `excluded` (n,) exp(z - lse) of the label counts as 0.
    """
    z = soft_cap(logits.to(w.dtype), cap)
    is_label = one_hot(y, z.shape[1])
    softmax = (z - lse[:, None]).exp()
    if excluded is not None:
        softmax = torch.where(is_label & excluded[:, None], 0, softmax)
    slope = softmax - is_label.to(z.dtype)
    if cap:
        slope = slope * (1 - (z / cap).square())
    return torch.where(is_live(y, w)[:, None], slope * w[:, None], 0).to(logits.dtype)


def one_hot(y: Tensor, vocab_size: int) -> Tensor:
    """(n, V) bool: where the label is."""
    return torch.arange(vocab_size, device=y.device) == y[:, None]


def is_live(labels: Tensor, loss_weights: Tensor) -> Tensor:
    """Bool: where there is a label and the weight is not 0."""
    return (labels != IGNORE_INDEX) & (loss_weights != 0)


def live_rows(labels: Tensor, loss_weights: Tensor) -> Tensor:
    """(R,) int64 indices of the rows with a label and a weight that is not 0; synchronises a CUDA device."""
    return is_live(labels, loss_weights).nonzero().squeeze(1)


def weight_sum(labels: Tensor, loss_weights: Tensor) -> Tensor:
    """() fp32: the sum of |w| where there is a label."""
    return (loss_weights.abs() * (labels != IGNORE_INDEX)).sum(dtype=statistics_dtype(loss_weights))


def statistics_dtype(x: Tensor) -> torch.dtype:
    """fp32, or float64 where x is float64."""
    return torch.promote_types(x.dtype, torch.float32)


def check_arguments(hidden, weight, labels, loss_weights, rows, chunk_rows) -> None:
    """ValueError for tensors of `linear_cross_entropy` that do not fit each other."""
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
    for name, tensor in (("weight", weight), ("labels", labels), ("loss_weights", loss_weights), ("rows", rows)):
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(f"{name} is on {tensor.device} and hidden on {hidden.device}: expected one device")


def check_softcap(cap: float) -> None:
    """ValueError for a cap of the logits that is no finite number >= 0."""
    if not 0 <= cap < math.inf:
        raise ValueError(f"softcap is {cap}: expected a number above 0, or 0 for none")


def check_grad_weight(grad_weight: Tensor | None, weight: Tensor) -> None:
    """ValueError for a sum that does not fit the weight."""
    if grad_weight is None:
        return
    expected = weight.shape, statistics_dtype(weight), weight.device
    if (grad_weight.shape, grad_weight.dtype, grad_weight.device) != expected:
        raise ValueError(
            f"grad_weight is {grad_weight.dtype} {tuple(grad_weight.shape)} on {grad_weight.device}: expected "
            f"{expected[1]} {tuple(expected[0])} on {expected[2]}"
        )


def check_labels(labels: Tensor, vocab_size: int) -> None:
    """ValueError for a label outside the vocabulary, on a CPU; on a GPU the look would cost a synchronisation."""
    if labels.device.type != "cpu":
        return
    wrong = (labels != IGNORE_INDEX) & ((labels < 0) | (labels >= vocab_size))
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(f"labels[{row}] is {int(labels[row])}: expected {IGNORE_INDEX} or 0 to {vocab_size - 1}")
