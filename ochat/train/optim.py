"""AdamW over fp32 masters, and global-norm clipping.

Weight decay is applied to matrices (embeddings included), never to norms and biases.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.profiler import record_function

from ochat.config import OptimConfig

MOMENTS = ("exp_avg", "exp_avg_sq")
PIECE = 2**26  # elements whose moments are on the card at a time: 512 MiB
CLIP_EPS = 1e-6  # that of torch.nn.utils.clip_grad_norm_


class FusedAdamW(torch.optim.Optimizer):
    """torch.optim.AdamW's state and result by a multi-tensor kernel, which also scales the gradients as it reads them.

    `adamw`: that of ochat_kernels. A sharded parameter is updated where its shard lies. `host_moments`: the moments lie
    in (pinned) host memory and come to the parameter a piece at a time; 16 bytes a parameter cross the bus each step,
    and the host waits for them.
    """

    def __init__(
        self,
        groups: list[dict],
        adamw: Callable[..., None],
        betas: tuple[float, float],
        eps: float,
        host_moments: bool = False,
    ):
        super().__init__(groups, {"lr": 0.0, "betas": betas, "eps": eps})
        self.skipped: Tensor | None = None  # () fp32 on the device: of the steps that the state counts, those left out
        self.adamw, self.host_moments = adamw, host_moments

    @torch.no_grad()
    def step(self, grad_scale: Tensor) -> None:  # type: ignore[override]
        """One update by the gradients times `grad_scale` () fp32; none at all where that is NaN or infinite."""
        skipped = torch.zeros_like(grad_scale) if self.skipped is None else self.skipped
        self.skipped = skipped + ~grad_scale.isfinite()  # for the next step
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            states = [self._state(p) for p in parameters]
            lists = [parameters, [p.grad for p in parameters], *([s[moment] for s in states] for moment in MOMENTS)]
            numbers = {name: group[name] for name in ("lr", "betas", "eps", "weight_decay")} | {"skipped": skipped}
            step = int(states[0]["step"]) if states else 1  # a host tensor
            adamw = partial(self.adamw, **numbers, step=step, grad_scale=grad_scale)
            lists = [[local(t) for t in tensors] for tensors in lists]
            if self.host_moments:
                _update_in_pieces(adamw, *lists)
            else:
                adamw(*lists)

    def zero_moments(self, parameter: Tensor) -> dict[str, Tensor]:
        """AdamW's two, where they are kept."""
        if not self.host_moments:
            return {moment: torch.zeros_like(parameter) for moment in MOMENTS}
        like = local(parameter)
        return {moment: torch.zeros(like.shape, dtype=like.dtype, pin_memory=like.is_cuda) for moment in MOMENTS}

    def _state(self, parameter: Tensor) -> dict[str, Tensor]:
        state = self.state[parameter]
        if not state:
            state |= self.zero_moments(parameter) | {"step": torch.tensor(0.0)}
        state["step"] += 1
        return state


def build(
    model: nn.Module, config: OptimConfig, adamw: Callable[..., None] | None = None, *, host_moments: bool = False
) -> torch.optim.AdamW | FusedAdamW:
    """AdamW (decoupled weight decay) over the model's parameters, which are its fp32 masters; by the kernel `adamw`
    where one is given, else torch's."""
    parameters = list(trained(model).values())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    if adamw is not None:
        return FusedAdamW(groups, adamw, config.betas, config.eps, host_moments)
    return torch.optim.AdamW(groups, lr=0.0, betas=config.betas, eps=config.eps, fused=True)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are not frozen, by name: those that an optimizer updates and a checkpoint holds."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@record_function("optimizer")  # its name in a trace
def update(optimizer: torch.optim.AdamW | FusedAdamW, *, lr: float, clip: float, loss: Tensor) -> Tensor:
    """One step at rate `lr` with the gradients scaled so that their joint 2-norm is at most `clip` (0: as they are);
    gradients are then gone. Returns the norm before, () fp32.

    Where the norm or `loss` () of the whole step is NaN or infinite, parameters, moments and the count of steps that
    corrects their bias stay as they are. The norm runs over every rank's shards; nothing waits on the host.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in parameters])
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    is_good = norm.isfinite() & loss.isfinite().to(norm.device)
    for group in optimizer.param_groups:
        group["lr"] = lr
    if isinstance(optimizer, FusedAdamW):
        scale = (clip / (norm + CLIP_EPS)).clamp_max(1.0) if clip > 0 else torch.ones_like(norm)
        optimizer.step(torch.where(is_good, scale, torch.nan))
    else:
        if clip > 0:
            nn.utils.clip_grads_with_norm_(parameters, clip, norm)
        optimizer.found_inf = (~is_good).float()  # type: ignore[attr-defined]  # as torch.amp.GradScaler tells it
        optimizer.step()
    optimizer.zero_grad()
    return norm


def start_state(optimizer: torch.optim.AdamW | FusedAdamW, steps_done: int) -> None:
    """Creates zero moments for every parameter, as after `steps_done` steps that were not skipped, so that a checkpoint
    can be copied into them."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if isinstance(optimizer, FusedAdamW):
                state = optimizer.zero_moments(parameter) | {"step": torch.tensor(0.0)}
            else:
                state = {name: torch.zeros_like(parameter) for name in MOMENTS}
                state["step"] = torch.zeros((), device=parameter.device)
            state["step"] += float(steps_done)
            optimizer.state[parameter] = state
    if isinstance(optimizer, FusedAdamW):
        optimizer.skipped = None


def _update_in_pieces(adamw: Callable[..., None], *lists: list[Tensor]) -> None:
    """`adamw` on parameters, gradients and moments that lie on the host; these are back there when it returns."""
    for tensors in zip(*lists, strict=True):
        for start in range(0, tensors[0].numel(), PIECE):
            parameter, gradient, *kept = (tensor.view(-1)[start : start + PIECE] for tensor in tensors)
            moments = [moment.to(parameter.device, non_blocking=True, copy=True) for moment in kept]
            adamw([parameter], [gradient], *([moment] for moment in moments))
            for moment, new in zip(kept, moments, strict=True):
                moment.copy_(new, non_blocking=True)
    if lists[0] and lists[0][0].is_cuda:
        torch.cuda.current_stream().synchronize()  # who saves the moments reads them on the host


def local(tensor: Tensor) -> Tensor:
    """The part of a sharded tensor that this rank holds; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
