"""The loss of a step: `sum w * nll / sum |w|` over all its bins and ranks; [loss] changes w above the line, not below.

The weight of the whole step is summed over ranks once, before the first forward, and the tokens' weights are divided by
it: the head's gradient is then final as soon as it is made. Gradients are summed over ranks, never averaged.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
from ochat_kernels import Dynamic, LossOutput
from torch import Tensor

from ochat.config import LossConfig
from ochat.data.batch import PackedBatch
from ochat.model import linear
from ochat.model.transformer import Transformer


def dynamic_at(config: LossConfig, step: int, num_steps: int) -> Dynamic | None:
    """How weights change in `step` (counted from 0) of so many; None: not at all. A pure function: a run that was
    stopped goes on as it would have."""
    stage = config.stage2 if step >= round(config.stage2.from_ * num_steps) else config
    return None if stage.dynamic == "none" else Dynamic(stage.dynamic, stage.eaft_alpha)


def has_dynamic(config: LossConfig) -> bool:
    """Whether weights change in some step."""
    return {config.dynamic, config.stage2.dynamic} != {"none"}


def head_loss(
    ops: ModuleType,
    model: Transformer,
    batch: PackedBatch,
    step_weight: Tensor | None = None,
    dynamic: Dynamic | None = None,
) -> Callable[[Tensor, Tensor], LossOutput]:
    """A head for `model(..., rows=batch.supervised_rows)`: (hidden (R, H) of these rows, the head's parameter (V, H))
    -> LossOutput, nll, correct and effective (R,).

    `step_weight` () float64: sum |w| of the whole step. The weights are divided by it, so that loss_sum is this
    batch's share of the step's loss. `dynamic`: what changes them; not for "unlikelihood" with trained rows of tokens.
    Forward adds the head's gradient to its sum at once: call loss_sum.backward().
    """
    softcap, tokens = model.config.logit_softcap, model.head.tokens
    is_tied = model.head.weight is model.embed.weight

    def head(hidden: Tensor, parameter: Tensor) -> LossOutput:
        labels, weights = batch.supervised_labels, batch.supervised_weights
        rows = torch.arange(len(labels), device=labels.device)  # all are live, or of weight 0
        options = {"rows": rows, "softcap": softcap, "dynamic": dynamic}
        if step_weight is None:
            weight = linear.cast(parameter, hidden.dtype)
        else:
            weights, weight = (weights.double() / step_weight).float(), linear.read(parameter, hidden.dtype)
            if parameter.requires_grad:
                options["grad_weight"], options["accumulate"] = linear.start_gradient(parameter)
        out = ops.linear_cross_entropy(hidden, weight, labels, weights, **options)
        if "grad_weight" in options and not is_tied:  # tied: the embedding adds its part in backward
            linear.finish_gradient(parameter)
        if tokens is None or not torch.is_grad_enabled():
            return out
        used = weights if out.effective is None else out.effective
        term = tokens.loss_term(hidden, weight, labels, used, rows, out.nll, softcap)
        return out._replace(loss_sum=out.loss_sum + term)

    return head
