"""Weights of tokens that follow from the model's own probabilities, taken where the loss is: `Dynamic`.

    linear_cross_entropy(hidden, weight, labels, loss_weights, dynamic=Dynamic("dft"))
`row_losses` is the definition, over the statistics of some rows; lce_kernels.py has it for one row.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

Kind = Literal["dft", "eaft", "unlikelihood"]
KINDS: tuple[str, ...] = get_args(Kind)


class Dynamic(NamedTuple):
    """What becomes of a token's weight w; p: the label's probability, H: the entropy of the whole softmax in nats.

    dft: w p, Dynamic Fine-Tuning (arXiv 2508.05629). eaft: w min(H / full_entropy, 1)^alpha (arXiv 2601.02151, where H
    is that of the 20 likeliest tokens). Neither p nor H has a gradient of its own there. unlikelihood (arXiv
    1908.04319): for w < 0 the loss is |w| * -ln(1 - p), the gradient of which to the logits is no longer than
    sqrt(2) |w|; w > 0 as without.
    """

    kind: Kind
    alpha: float = 1.0
    full_entropy: float = math.log(20)  # nats: from here on the weight is whole


class RowLosses(NamedTuple):
    """Of n rows: what is minimised, and its gradient factor * (exp(z - lse) - onehot) to their logits z."""

    loss: Tensor  # (n,)
    weight: Tensor  # (n,), that multiplied each row; 0 in rows that are not live
    factor: Tensor  # (n,)
    lse: Tensor  # (n,)
    excluded: Tensor | None  # (n,) bool: where exp(z - lse) of the label counts as 0


def row_losses(
    dynamic: Dynamic | None, live: Tensor, w: Tensor, nll: Tensor, lse: Tensor, extra: Tensor | None
) -> RowLosses:
    """The loss of rows by their statistics, all (n,): as `reference_loss.statistics` gives them for this kind."""
    if dynamic is None:
        return RowLosses(nll * w, w, w, lse, None)
    if dynamic.kind == "dft":
        w = w * torch.exp(-nll)
    elif dynamic.kind == "eaft":
        assert extra is not None
        w = w * (extra / dynamic.full_entropy).clamp_max(1) ** dynamic.alpha
    w = torch.where(live, w, 0)
    if dynamic.kind != "unlikelihood":
        return RowLosses(nll * w, w, w, lse, None)
    assert extra is not None
    is_negative, unlikelihood = w < 0, -F.logsigmoid(-extra)  # -ln(1 - p) = logsumexp of all - that of the others
    loss = torch.where(is_negative, -w * unlikelihood, w * nll)
    factor = torch.where(is_negative, w * torch.sigmoid(extra), w)
    return RowLosses(loss, w, factor, torch.where(is_negative, lse - unlikelihood, lse), is_negative)


def check_dynamic(dynamic: Dynamic | None, has_transform: bool) -> None:
    """ValueError for an unknown kind, numbers out of range, and a second way to change weights."""
    if dynamic is None:
        return
    if has_transform:
        raise ValueError(f"weight_transform and dynamic {dynamic.kind!r} both change the weights: expected one of them")
    if dynamic.kind not in KINDS:
        raise ValueError(f"dynamic is {dynamic.kind!r}: expected {', '.join(KINDS)}")
    for name in ("alpha", "full_entropy"):
        if not 0 < getattr(dynamic, name) < math.inf:
            raise ValueError(f"dynamic.{name} is {getattr(dynamic, name)}: expected a number above 0")
