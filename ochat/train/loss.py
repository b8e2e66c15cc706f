"""The loss of a step: `sum w * nll / sum |w|` over all its bins and ranks.

The weight of the whole step is summed over ranks once, before the first backward; then each micro-batch adds its own
`loss_sum / step_weight`, and gradients are summed, never averaged.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

from ochat_kernels import LossOutput
from torch import Tensor

from ochat.data.batch import PackedBatch


def head_loss(ops: ModuleType, batch: PackedBatch) -> Callable[[Tensor, Tensor], LossOutput]:
    """A head for `Transformer.forward`: (hidden (T, H), head weight (V, H)) -> LossOutput over the batch's live
    rows."""

    def head(hidden: Tensor, weight: Tensor) -> LossOutput:
        return ops.linear_cross_entropy(hidden, weight, batch.labels, batch.loss_weights, rows=batch.rows)

    return head
