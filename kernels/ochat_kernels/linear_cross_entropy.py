"""Linear head and per-token weighted cross-entropy in one pass: loss and gradients by chunks of rows, nothing twice.

    out = linear_cross_entropy(hidden, weight, labels, loss_weights, rows=rows);  (out.loss_sum / total).backward()
Per chunk: logits by a matrix product, one kernel that takes the statistics and writes the gradient over the logits, two
products for dhidden and dW. Rows that carry no loss never enter. The definition is reference_loss.py.
"""

from __future__ import annotations

from typing import cast
from weakref import WeakValueDictionary

import torch
import triton
from torch import Tensor

from ochat_kernels import lce_kernels
from ochat_kernels.dynamic_weights import Dynamic, Kind, check_dynamic
from ochat_kernels.launch import check_floats
from ochat_kernels.products import add_product
from ochat_kernels.reference_loss import (
    LossOutput,
    WeightTransform,
    check_arguments,
    check_grad_weight,
    check_labels,
    check_softcap,
    live_rows,
    weight_sum,
)

LOGITS_BYTES = 2**31  # of a chunk: 8192 rows of a vocabulary of 128k in bf16
CHUNK_ROWS = (1024, 8192)  # fewer rows: adding dW up in fp32 costs more than its product; more: only memory
ROW_ALIGNMENT = 128  # rows of a tile of a matrix product
COLUMN_ALIGNMENT = 64  # columns: every row of logits starts on a 128-byte line, for every V

_transforms: WeakValueDictionary[str, WeightTransform] = WeakValueDictionary()  # an operator's arguments are plain


def chunk_size(num_rows: int, vocab_size: int, itemsize: int) -> int:
    """Rows of logits at a time: as many as fit LOGITS_BYTES, within CHUNK_ROWS, the chunks about equal."""
    least, most = CHUNK_ROWS
    rows = min(max(LOGITS_BYTES // (vocab_size * itemsize), least), most)
    num_chunks = max(triton.cdiv(num_rows, rows), 1)
    return max(triton.cdiv(triton.cdiv(num_rows, num_chunks), ROW_ALIGNMENT) * ROW_ALIGNMENT, ROW_ALIGNMENT)


def lce_fwd(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    loss_weights: Tensor,
    rows: Tensor | None,
    chunk_rows: int,
    softcap: float,
    weight_transform: str,
    kind: str,
    alpha: float,
    full_entropy: float,
    want_hidden: bool,
    want_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss_sum (), nll (T,), correct (T,), effective (T,), grad_hidden (T, H), grad_weight (V, H) fp32); the last
    three are empty where not wanted.

    `chunk_rows` 0: chosen here; `weight_transform`: a key of _transforms, or empty; kind, alpha and full_entropy: of a
    Dynamic, or an empty kind.
    """
    gradients = _Gradients(hidden, weight, want_hidden, want_weight)
    options = rows, chunk_rows, softcap, weight_transform, _dynamic(kind, alpha, full_entropy), gradients
    found = _by_chunks(hidden, weight, labels, loss_weights, *options)
    return *found, gradients.hidden, gradients.weight


def lce_fwd_into(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    loss_weights: Tensor,
    rows: Tensor | None,
    chunk_rows: int,
    softcap: float,
    weight_transform: str,
    kind: str,
    alpha: float,
    full_entropy: float,
    want_hidden: bool,
    total: Tensor,
    accumulate: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As lce_fwd, but grad_weight is written or added to `total` (V, H) fp32."""
    gradients = _Gradients(hidden, weight, want_hidden, True, total, accumulate)
    options = rows, chunk_rows, softcap, weight_transform, _dynamic(kind, alpha, full_entropy), gradients
    found = _by_chunks(hidden, weight, labels, loss_weights, *options)
    return *found, gradients.hidden


def _dynamic(kind: str, alpha: float, full_entropy: float) -> Dynamic | None:
    return Dynamic(cast(Kind, kind), alpha, full_entropy) if kind else None


def _by_chunks(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    loss_weights: Tensor,
    rows: Tensor | None,
    chunk_rows: int,
    softcap: float,
    weight_transform: str,
    dynamic: Dynamic | None,
    gradients: _Gradients,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """loss_sum (), nll and correct (T,), effective (T,) or (0,); the gradients chunk by chunk."""
    check_labels(labels, weight.shape[0])  # here, where nothing is traced
    transform = _transforms[weight_transform] if weight_transform else None
    rows = live_rows(labels, loss_weights) if rows is None else rows
    R, V = rows.shape[0], weight.shape[0]
    chunk_rows = min(chunk_rows or chunk_size(R, V, hidden.element_size()), max(R, 1))
    y, w = labels.index_select(0, rows), loss_weights.index_select(0, rows).float()
    stats = lce_kernels.RowStatistics(R, hidden.device, has_loss=dynamic is not None)
    logits = hidden.new_empty(chunk_rows, triton.cdiv(V, COLUMN_ALIGNMENT) * COLUMN_ALIGNMENT)[:, :V]
    for start in range(0, R, chunk_rows):
        end = min(start + chunk_rows, R)
        x, z = hidden.index_select(0, rows[start:end]), logits[: end - start]
        torch.mm(x, weight.t(), out=z)
        part = stats.slice(start, end)
        chunk_y, chunk_w = y[start:end], w[start:end]
        lce_kernels.lce_stats(z, chunk_y, chunk_w, part, softcap, gradients.wanted and transform is None, dynamic)
        if transform is not None:
            chunk_w.copy_(torch.where(chunk_w != 0, transform(part["nll_ptr"], chunk_w), 0))
            if gradients.wanted:
                lce_kernels.lce_grad(z, chunk_y, chunk_w, part["lse_ptr"], softcap)
        gradients.add(rows[start:end], x, z)
    gradients.finish()
    loss_sum = (stats.nll * w if stats.loss is None else stats.loss).sum()
    nll = torch.zeros_like(labels, dtype=torch.float32).index_copy_(0, rows, stats.nll)
    correct = torch.zeros_like(labels, dtype=torch.bool).index_copy_(0, rows, stats.correct.view(torch.bool))
    effective = nll.new_empty(0) if dynamic is None else torch.zeros_like(nll).index_copy_(0, rows, w)
    return loss_sum, nll, correct, effective


class _Gradients:
    """dhidden and dW as they grow; empty tensors where no gradient is needed. `total`: where dW goes, otherwise to a
    tensor of its own."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        want_hidden: bool,
        want_weight: bool,
        total: Tensor | None = None,
        accumulate: bool = False,
    ):
        self.wanted = want_hidden or want_weight
        self.hidden = hidden.new_zeros(hidden.shape if want_hidden else 0)
        own = weight.new_empty(weight.shape if want_weight and total is None else 0, dtype=torch.float32)
        self.weight = own if total is None else total
        self.head, self.want_hidden, self.want_weight = weight, want_hidden, want_weight
        self.accumulate = accumulate

    def add(self, rows: Tensor, x: Tensor, dlogits: Tensor) -> None:
        """The part of a chunk: rows (n,), their hidden states x (n, H), dlogits (n, V)."""
        if self.want_hidden:
            self.hidden.index_copy_(0, rows, torch.mm(dlogits, self.head))
        if self.want_weight:
            add_product(self.weight, dlogits.t(), x, accumulate=self.accumulate)
            self.accumulate = True

    def finish(self) -> None:
        """Without rows nothing was written yet."""
        if self.want_weight and not self.accumulate:
            self.weight.zero_()


_forward = torch.library.custom_op("ochat_kernels::linear_cross_entropy", lce_fwd, mutates_args=())
_forward_into = torch.library.custom_op(
    "ochat_kernels::add_linear_cross_entropy", lce_fwd_into, mutates_args=("total",)
)
_scale = torch.library.custom_op("ochat_kernels::scale", lce_kernels.lce_scale, mutates_args=())


@_forward.register_fake
def _(hidden, weight, labels, loss_weights, rows, chunk_rows, softcap, transform, kind, alpha, full, want_h, want_w):
    grad_weight = weight.new_empty(weight.shape if want_w else (0,), dtype=torch.float32)
    return *_fake(hidden, labels, kind, want_h), grad_weight


@_forward_into.register_fake
def _(hidden, weight, labels, weights, rows, chunk_rows, softcap, transform, kind, alpha, full, want_h, total, add):
    return _fake(hidden, labels, kind, want_h)


def _fake(
    hidden: Tensor, labels: Tensor, kind: str, want_hidden: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    loss_sum = hidden.new_empty((), dtype=torch.float32)
    nll = torch.empty_like(labels, dtype=torch.float32)
    correct = torch.empty_like(labels, dtype=torch.bool)
    effective = nll.new_empty(nll.shape if kind else (0,))
    return loss_sum, nll, correct, effective, hidden.new_empty(hidden.shape if want_hidden else (0,))


@_scale.register_fake
def _(x, factor, dtype):
    return torch.empty_like(x, dtype=dtype)


def _save(ctx, inputs, output):
    _, *others, grad_hidden, grad_weight = output
    ctx.mark_non_differentiable(*others, grad_hidden, grad_weight)
    ctx.set_materialize_grads(False)  # else backward begins with zeros of grad_weight's size
    ctx.want_hidden, ctx.want_weight = inputs[-2:]
    ctx.dtypes = inputs[0].dtype, inputs[1].dtype
    ctx.save_for_backward(grad_hidden, grad_weight)


def _differentiate(ctx, grad_loss, *_):
    grad_hidden, grad_weight = ctx.saved_tensors
    scaled_hidden = _scale(grad_hidden, grad_loss, ctx.dtypes[0]) if ctx.want_hidden else None
    scaled_weight = _scale(grad_weight, grad_loss, ctx.dtypes[1]) if ctx.want_weight else None
    return scaled_hidden, scaled_weight, *[None] * 11


_forward.register_autograd(_differentiate, setup_context=_save)


class _Attach(torch.autograd.Function):
    """loss_sum, whose backward gives hidden the gradient that forward made; torch gives none to an operator that writes
    an argument."""

    @staticmethod
    def forward(ctx, hidden, loss_sum, grad_hidden):
        ctx.save_for_backward(grad_hidden)
        return loss_sum.view_as(loss_sum)

    @staticmethod
    def backward(ctx, grad_loss):  # type: ignore[override]
        (grad_hidden,) = ctx.saved_tensors
        return _scale(grad_hidden, grad_loss, grad_hidden.dtype), None, None


@torch.compiler.assume_constant_result
def _name(transform: WeightTransform) -> str:
    """A key under which the operator finds the function, for as long as its caller keeps it."""
    key = f"{getattr(transform, '__qualname__', type(transform).__name__)} at {id(transform):x}"
    _transforms[key] = transform
    return key


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

    Args: hidden (T, H) fp32, bf16 or fp16; weight (V, H) of its dtype; labels (T,) int64, -100 where there is none;
    loss_weights (T,) float of any sign; rows (R,) int64 indices, each once, of the live rows (label present, weight not
    0) and perhaps of others, which give 0; chunk_rows: rows of logits held at a time, chosen from V by default (see
    chunk_size).
    softcap, weight_transform, dynamic, grad_weight and accumulate: as in the definition (reference_loss.py).
    Returns: LossOutput; gradients flow from loss_sum to hidden and weight.
    Raises: ValueError for shapes, dtypes, devices and options that do not fit; a label outside the vocabulary makes the
    loss NaN on a GPU (in the interpreter, a ValueError).
    Costs: 6 R H V FLOPs, all in forward (2 R H V where nothing wants a gradient); memory: a chunk of logits, dW in
    fp32, dhidden; the kernel moves 3 chunk x V elements (one read more where the L2 does not hold a row). No sync with
    `rows` given, else one.
    """
    check_arguments(hidden, weight, labels, loss_weights, rows, chunk_rows)
    check_softcap(softcap)
    check_dynamic(dynamic, weight_transform is not None)
    check_grad_weight(grad_weight, weight)
    check_floats("hidden", hidden)
    transform = "" if weight_transform is None else _name(weight_transform)
    inputs = (hidden, weight, labels, loss_weights, rows, chunk_rows or 0, softcap, transform)
    inputs += dynamic or ("", 0.0, 0.0)
    wanted = [torch.is_grad_enabled() and tensor.requires_grad for tensor in (hidden, weight)]
    if grad_weight is None:
        loss_sum, nll, correct, effective, _, _ = _forward(*inputs, *wanted)
    else:
        with torch.no_grad():
            loss_sum, nll, correct, effective, grad_hidden = _forward_into(*inputs, wanted[0], grad_weight, accumulate)
        loss_sum = _Attach.apply(hidden, loss_sum, grad_hidden)
    effective = None if dynamic is None else effective
    return LossOutput(loss_sum, weight_sum(labels, loss_weights), nll, correct, effective)  # type: ignore[arg-type]
