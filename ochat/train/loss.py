"""The loss of a step: `sum w * nll / sum |w|` over all its bins and ranks.

The weight of the whole step is summed over ranks once, before the first backward. Each micro-batch then adds its own
`loss_sum / step_weight`; gradients are summed over ranks, never averaged.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
from ochat_kernels import LossOutput
from torch import Tensor

from ochat.data.batch import PackedBatch
from ochat.model.transformer import Transformer


def head_loss(ops: ModuleType, model: Transformer, batch: PackedBatch) -> Callable[[Tensor, Tensor], LossOutput]:
    """A head for `model(..., rows=batch.supervised_rows)`: (hidden (R, H) of these rows, head weight (V, H)) ->
    LossOutput, nll and correct (R,)."""
    softcap, tokens = model.config.logit_softcap, model.head.tokens

    def head(hidden: Tensor, weight: Tensor) -> LossOutput:
        labels, weights = batch.supervised_labels, batch.supervised_weights
        rows = torch.arange(len(labels), device=labels.device)  # all of them are live
        out = ops.linear_cross_entropy(hidden, weight, labels, weights, rows=rows, softcap=softcap)
        if tokens is None or not torch.is_grad_enabled():
            return out
        term = tokens.loss_term(hidden, weight, labels, weights, rows, out.nll, softcap)
        return out._replace(loss_sum=out.loss_sum + term)

    return head
