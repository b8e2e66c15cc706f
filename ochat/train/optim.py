"""AdamW, global-norm clipping, and the update of each parameter inside backward.

    optimizer = build(model, config.optim, ops.adamw);  update(optimizer, lr=2e-5, clip=1.0, loss=loss)

Parameters are fp32 masters, or bf16 without any; moments fp32 or bf16; bf16 is always rounded stochastically. Weight
decay is applied to matrices (embeddings included), never to norms and biases.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.profiler import record_function

from ochat.checkpoint.manifest import MOMENTS
from ochat.config import OptimConfig
from ochat.distributed.local_shards import global_offset, local_shard, trainable_parameters
from ochat.errors import ConfigError

PIECE = 2**26  # elements whose moments are on the card at a time: 512 MiB
CLIP_EPS = 1e-6  # that of torch.nn.utils.clip_grad_norm_


class FusedAdamW(torch.optim.Optimizer):
    """torch.optim.AdamW's state and result by a multi-tensor kernel, which also scales the gradients as it reads them.

    `adamw`: that of ochat_kernels. A sharded parameter is updated where its shard lies. `state`: the moments' dtype;
    bf16, like a bf16 parameter, is rounded by bits that follow from `seed`, the step and the element's place in the
    whole model, so that a resumed run draws the same and so do other numbers of processes. `host_moments`: the moments
    lie in (pinned) host memory and come to the parameter a piece at a time; four times the bytes of `state` cross the
    bus for a parameter each step, and the host waits for them.
    """

    def __init__(
        self,
        groups: list[dict],
        adamw: Callable[..., None],
        betas: tuple[float, float],
        eps: float,
        host_moments: bool = False,
        state: torch.dtype = torch.float32,
        seed: int = 0,
    ):
        super().__init__(groups, {"lr": 0.0, "betas": betas, "eps": eps})
        self.skipped: Tensor | None = None  # () fp32 on the device: of the steps that the state counts, those left out
        self.adamw, self.host_moments, self.state_dtype, self.seed = adamw, host_moments, state, seed
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        self.ids = {parameter: i for i, parameter in enumerate(parameters)}
        self.norms: dict[int, Tensor] | None = None  # in backward: of this step's gradients, () fp32 by id

    @torch.no_grad()
    def step(self, grad_scale: Tensor) -> None:  # type: ignore[override]
        """One update by the gradients times `grad_scale` () fp32; none at all where that is NaN or infinite."""
        skipped = torch.zeros_like(grad_scale) if self.skipped is None else self.skipped
        self.skipped = skipped + ~grad_scale.isfinite()  # for the next step
        for group in self.param_groups:
            self._update(group, [p for p in group["params"] if p.grad is not None], grad_scale, skipped)

    def step_in_backward(self) -> None:
        """From now on backward updates each parameter as soon as its gradient is there, and lets go of it: at the rate
        its group has then, by the gradient as it is; not at all where that has a NaN or an infinity."""
        self.norms = {}
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.register_post_accumulate_grad_hook(partial(self._update_now, group))

    def zero_moments(self, parameter: Tensor) -> dict[str, Tensor]:
        """AdamW's two, where they are kept."""
        if not self.host_moments:
            return {moment: torch.zeros_like(parameter, dtype=self.state_dtype) for moment in MOMENTS}
        like = local_shard(parameter)
        return {moment: torch.zeros(like.shape, dtype=self.state_dtype, pin_memory=like.is_cuda) for moment in MOMENTS}

    @torch.no_grad()
    @record_function("optimizer")
    def _update_now(self, group: dict, parameter: Tensor) -> None:
        assert self.norms is not None and parameter.grad is not None
        norm = torch.linalg.vector_norm(parameter.grad, dtype=torch.float32)
        self.norms[self.ids[parameter]] = norm
        skipped = torch.zeros_like(norm) if self.skipped is None else self.skipped
        self._update(group, [parameter], torch.where(norm.isfinite(), 1.0, torch.nan), skipped)
        parameter.grad = None

    def _update(self, group: dict, parameters: list[Tensor], grad_scale: Tensor, skipped: Tensor) -> None:
        states = [self._state(p) for p in parameters]
        lists = [parameters, [p.grad for p in parameters], *([s[moment] for s in states] for moment in MOMENTS)]
        numbers = {name: group[name] for name in ("lr", "betas", "eps", "weight_decay")} | {"skipped": skipped}
        step = int(states[0]["step"]) if states else 1  # a host tensor
        adamw = partial(self.adamw, **numbers, step=step, grad_scale=grad_scale, seed=self.seed)
        places = [self.ids[p] for p in parameters], [global_offset(p) for p in parameters]
        lists = [[local_shard(t) for t in tensors] for tensors in lists]
        if self.host_moments:
            _update_in_pieces(adamw, *places, *lists)
        else:
            adamw(*lists, ids=places[0], offsets=places[1])

    def _state(self, parameter: Tensor) -> dict[str, Tensor]:
        state = self.state[parameter]
        if not state:
            state |= self.zero_moments(parameter) | {"step": torch.tensor(0.0)}
        state["step"] += 1
        return state


def build(
    model: nn.Module,
    config: OptimConfig,
    adamw: Callable[..., None] | None = None,
    *,
    host_moments: bool = False,
    micro_batches: int = 1,
    seed: int = 0,
) -> torch.optim.AdamW | FusedAdamW:
    """AdamW (decoupled weight decay) over the model's parameters; by the kernel `adamw` where one is given, else
    torch's, which cannot do what needs_kernel says.

    Gradients of bf16 parameters are bf16, as backward makes them; where they are added up over `micro_batches` of a
    process, fp32.
    """
    parameters = list(trainable_parameters(model).values())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    if adamw is None:
        assert not needs_kernel(config)
        return torch.optim.AdamW(groups, lr=0.0, betas=config.betas, eps=config.eps, fused=True)
    for parameter in parameters:
        if micro_batches > 1 and not isinstance(parameter, DTensor):  # a wrapper adds up in its own reduce_dtype
            parameter.grad_dtype = torch.float32
    state = getattr(torch, config.moment_dtype)
    optimizer = FusedAdamW(groups, adamw, config.betas, config.eps, host_moments, state, seed)
    if config.in_backward:
        optimizer.step_in_backward()
    return optimizer


def check(config: OptimConfig, num_processes: int) -> None:
    """Raises: ConfigError for a choice that so many processes cannot make."""
    if config.in_backward and num_processes > 1:
        raise ConfigError(
            f"optim.in_backward = true needs one process, and these are {num_processes}; on several, each holds no "
            "more than its shard of the moments anyhow"
        )


def needs_kernel(config: OptimConfig) -> bool:
    """Whether torch's AdamW will not do: it rounds to nearest, and updates all parameters at once."""
    return config.in_backward or config.moment_dtype != "float32" or config.master_dtype != "float32"


def begin(optimizer: torch.optim.AdamW | FusedAdamW, *, lr: float) -> None:
    """Before the backward of a step that is to be taken at rate `lr`."""
    for group in optimizer.param_groups:
        group["lr"] = lr


@record_function("optimizer")  # its name in a trace
def update(optimizer: torch.optim.AdamW | FusedAdamW, *, lr: float, clip: float, loss: Tensor) -> Tensor:
    """One step at rate `lr` with the gradients scaled so that their joint 2-norm is at most `clip` (0: as they are);
    gradients are then gone. Returns the norm before, () fp32.

    Where the norm or `loss` () of the whole step is NaN or infinite, parameters, moments and the count of steps that
    corrects their bias stay as they are. The norm runs over every rank's shards; nothing waits on the host.

    Of an optimizer that steps in backward only the norm is left to do.
    """
    if isinstance(optimizer, FusedAdamW) and optimizer.norms is not None:
        norms = [optimizer.norms[i] for i in sorted(optimizer.norms)]
        optimizer.norms.clear()
        return torch.linalg.vector_norm(torch.stack(norms))
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = nn.utils.get_total_norm([_in_fp32(p.grad) for p in parameters])
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    is_good = norm.isfinite() & loss.isfinite().to(norm.device)
    begin(optimizer, lr=lr)
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


def start_state(optimizer: torch.optim.AdamW | FusedAdamW, steps_done: int, skipped: int = 0) -> None:
    """Creates zero moments for every parameter, as after `steps_done` steps of which `skipped` were not applied, so
    that a checkpoint can be copied into them."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if isinstance(optimizer, FusedAdamW):
                state = optimizer.zero_moments(parameter) | {"step": torch.tensor(float(steps_done))}
                optimizer.skipped = torch.tensor(float(skipped), device=local_shard(parameter).device)
            else:
                state = {name: torch.zeros_like(parameter) for name in MOMENTS}
                state["step"] = torch.full((), float(steps_done - skipped), device=parameter.device)
            optimizer.state[parameter] = state


def _update_in_pieces(adamw: Callable[..., None], ids: list[int], offsets: list[int], *lists: list[Tensor]) -> None:
    """`adamw` on parameters, gradients and moments that lie on the host; these are back there when it returns."""
    for number, offset, *tensors in zip(ids, offsets, *lists, strict=True):
        for start in range(0, tensors[0].numel(), PIECE):
            parameter, gradient, *kept = (tensor.view(-1)[start : start + PIECE] for tensor in tensors)
            moments = [[moment.to(parameter.device, non_blocking=True, copy=True)] for moment in kept]
            adamw([parameter], [gradient], *moments, ids=[number], offsets=[offset + start])
            for moment, (new,) in zip(kept, moments, strict=True):
                moment.copy_(new, non_blocking=True)
    if lists[0] and lists[0][0].is_cuda:
        torch.cuda.current_stream().synchronize()  # who saves the moments reads them on the host


def _in_fp32(gradient: Tensor) -> Tensor:
    """What has the gradient's 2-norm in fp32: itself, or the norm, which torch would give in bf16."""
    if gradient.dtype == torch.float32:
        return gradient
    return torch.linalg.vector_norm(gradient, dtype=torch.float32)
