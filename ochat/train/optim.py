"""AdamW over fp32 masters, global-norm clipping, and the optimizer's state by parameter name.

Weight decay is applied to matrices (embeddings included), never to norms and biases.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ochat.config import OptimConfig

MOMENTS = ("exp_avg", "exp_avg_sq")


def build(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW (decoupled weight decay) over the model's parameters, which are its fp32 masters."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=config.betas, eps=config.eps, fused=True)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The learning rate of the next step, for every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def clip_gradients(parameters: Iterable[Tensor], largest: float) -> Tensor:
    """Scales all gradients so that their joint 2-norm is at most `largest` (0: leaves them); returns the norm before,
    () fp32.

    The norm runs over every rank's shards; nothing waits on the host.
    """
    parameters = [p for p in parameters if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    if largest > 0:
        nn.utils.clip_grads_with_norm_(parameters, largest, norm)
    return norm


def moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, str, Tensor]]:
    """(parameter name, moment name, tensor as it is sharded) of every parameter that has optimizer state."""
    for name, parameter in model.named_parameters():
        for moment in MOMENTS:
            if moment in optimizer.state.get(parameter, {}):
                yield name, moment, optimizer.state[parameter][moment]


def start_state(optimizer: torch.optim.Optimizer, steps_done: int) -> None:
    """Creates zero moments for every parameter, as after `steps_done` steps, so that a checkpoint can be copied
    into them."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = {moment: torch.zeros_like(parameter) for moment in MOMENTS}
            state["step"] = torch.tensor(float(steps_done), device=parameter.device)
            optimizer.state[parameter] = state
