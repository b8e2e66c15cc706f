"""AdamW, global-norm clipping, and the update of each parameter inside backward.

    optimizer = build(model, config.optim, ops);  update(optimizer, lr=2e-5, clip=1.0, loss=loss)

Parameters are fp32 masters, or bf16 without masters; moments are fp32 or bf16; bf16 is always rounded stochastically.
Weight decay applies to matrices (embeddings included), never to norms and biases.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.profiler import record_function

from ochat.checkpoint.manifest import MOMENTS
from ochat.config import OptimConfig
from ochat.distributed.local_shards import global_offset, local_shard, trainable_parameters
from ochat.errors import ConfigError
from ochat.model.linear import copy_of, fill_copies
from ochat.train.average import WeightAverage

PIECE = 2**26  # elements whose moments are on the GPU at a time: 512 MiB
CLIP_EPS = 1e-6  # as torch.nn.utils.clip_grad_norm_


class FusedAdamW(torch.optim.Optimizer):
    """torch.optim.AdamW's state and result, computed by a multi-tensor kernel that also scales the gradients.

    `ops`: the operators. Each rank updates its shard of a sharded parameter. Random bits for rounding to bf16 follow
    from `seed`, the step and the element's index in the whole model, so a resumed run and runs on other numbers of
    processes draw the same. `host_moments`: the moments stay in (pinned) host memory and are copied to the GPU piece by
    piece; each step transfers 4 moments' worth of bytes per parameter, and the host waits for them.
    `config.in_backward`: backward updates each parameter as soon as its gradient is complete, and frees the gradient;
    it is not clipped, and one with a NaN or an infinity updates nothing.
    """

    def __init__(self, groups: list[dict], ops: ModuleType, config: OptimConfig, host_moments: bool, seed: int):
        super().__init__(groups, {"lr": 0.0, "betas": config.betas, "eps": config.eps})
        self.ops, self.host_moments, self.seed = ops, host_moments, seed
        self.state_dtype = getattr(torch, config.moment_dtype)
        # () fp32: steps counted in the state that were not applied; on the device, or on the host if in backward
        self.skipped: Tensor | None = None
        self.ids = {parameter: i for i, (_, parameter) in enumerate(self._parameters())}
        self.norms: dict[int, Tensor] | None = {} if config.in_backward else None  # () fp32 of each gradient, by id
        for group, parameter in self._parameters() if config.in_backward else ():
            parameter.register_post_accumulate_grad_hook(partial(self._update_now, group))

    @torch.no_grad()
    def step(self, grad_scale: Tensor) -> None:  # type: ignore[override]
        """Update by the gradients times `grad_scale` () fp32; change nothing if it is NaN or infinite."""
        skipped = torch.zeros_like(grad_scale) if self.skipped is None else self.skipped
        self.skipped = skipped + ~grad_scale.isfinite()  # for the next step
        for group in self.param_groups:
            for has_copy in (True, False):
                chosen = [p for p in group["params"] if p.grad is not None and has_copy == (copy_of(p) is not None)]
                self._update(group, chosen, grad_scale, skipped)

    def zero_moments(self, parameter: Tensor) -> dict[str, Tensor]:
        """Both moments of a parameter as zeros, on the host or the device."""
        if not self.host_moments:
            return {moment: torch.zeros_like(parameter, dtype=self.state_dtype) for moment in MOMENTS}
        like = local_shard(parameter)
        return {moment: torch.zeros(like.shape, dtype=self.state_dtype, pin_memory=like.is_cuda) for moment in MOMENTS}

    def _parameters(self) -> Iterator[tuple[dict, Tensor]]:
        return ((group, parameter) for group in self.param_groups for parameter in group["params"])

    @torch.no_grad()
    @record_function("optimizer")
    def _update_now(self, group: dict, parameter: Tensor) -> None:
        assert self.norms is not None and parameter.grad is not None
        skipped = 0 if self.skipped is None else int(self.skipped)
        if self.host_moments:
            norm = torch.linalg.vector_norm(parameter.grad, dtype=torch.float32)
            scale = torch.where(norm.isfinite(), 1.0, torch.nan)
            self._update(group, [parameter], scale, torch.full_like(norm, skipped))
        else:
            state = self._state(parameter)
            tensors = (parameter, parameter.grad, *(state[moment] for moment in MOMENTS))
            numbers = _numbers(group) | {"step": int(state["step"]), "skipped": skipped, "seed": self.seed}
            numbers |= {"tensor_id": self.ids[parameter], "copy": copy_of(parameter)}
            norm = self.ops.adamw_with_norm(*tensors, **numbers)
        self.norms[self.ids[parameter]] = norm
        parameter.grad = None

    def _update(self, group: dict, parameters: list[Tensor], grad_scale: Tensor, skipped: Tensor) -> None:
        """Those of one group; all have a copy or none has."""
        states = [self._state(p) for p in parameters]
        lists = [parameters, [p.grad for p in parameters], *([s[moment] for s in states] for moment in MOMENTS)]
        copies = [copy for p in parameters if (copy := copy_of(p)) is not None]
        step = int(states[0]["step"]) if states else 1  # a host tensor
        numbers = _numbers(group) | {"step": step, "skipped": skipped, "grad_scale": grad_scale, "seed": self.seed}
        adamw = partial(self.ops.adamw, **numbers)
        places = [self.ids[p] for p in parameters], [global_offset(p) for p in parameters]
        lists = [[local_shard(t) for t in tensors] for tensors in lists]
        if self.host_moments:
            _update_in_pieces(adamw, *places, copies, *lists)
        else:
            adamw(*lists, copies=copies or None, ids=places[0], offsets=places[1])

    def _state(self, parameter: Tensor) -> dict[str, Tensor]:
        state = self.state[parameter]
        if not state:
            state |= self.zero_moments(parameter) | {"step": torch.tensor(0.0)}
        state["step"] += 1
        return state


def build(
    model: nn.Module,
    config: OptimConfig,
    ops: ModuleType | None = None,
    *,
    host_moments: bool = False,
    seed: int = 0,
) -> torch.optim.AdamW | FusedAdamW:
    """AdamW (decoupled weight decay) over the trainable parameters: with the operators `ops` if given, else torch's,
    which cannot do what needs_kernel lists."""
    parameters = list(trainable_parameters(model).values())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    if ops is None:
        assert not needs_kernel(config)
        return torch.optim.AdamW(groups, lr=0.0, betas=config.betas, eps=config.eps, fused=True)
    return FusedAdamW(groups, ops, config, host_moments, seed)


def check(config: OptimConfig, num_processes: int) -> None:
    """Raises: ConfigError for a choice that does not work on so many processes."""
    if config.in_backward and num_processes > 1:
        why = "on several, each holds no more than its shard of the moments anyhow"
        raise ConfigError(f"optim.in_backward = true needs one process, and these are {num_processes}; {why}")


def needs_kernel(config: OptimConfig) -> bool:
    """Whether torch's AdamW does not suffice: it rounds to nearest and updates all parameters at once."""
    return config.in_backward or config.moment_dtype != "float32" or config.master_dtype != "float32"


def begin(optimizer: torch.optim.AdamW | FusedAdamW, *, lr: float) -> None:
    """Set the learning rate of a step, before its backward."""
    for group in optimizer.param_groups:
        group["lr"] = lr


@record_function("optimizer")  # its name in a trace
def update(
    optimizer: torch.optim.AdamW | FusedAdamW,
    *,
    lr: float,
    clip: float,
    loss: Tensor,
    average: WeightAverage | None = None,
) -> Tensor:
    """One step at rate `lr` with the gradients clipped to a global 2-norm of `clip` (0: not clipped); frees the
    gradients, and takes the weights into their `average`. Returns the norm before clipping, () fp32.

    If the norm or `loss` () of the whole step is NaN or infinite, parameters, moments, the step count of the bias
    correction and the average do not change. The norm is over all ranks' shards; the host does not wait.

    An optimizer that steps in backward has updated already: only the norm is computed.
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
        optimizer.found_inf = (~is_good).float()  # type: ignore[attr-defined]  # as torch.amp.GradScaler does
        optimizer.step()
        fill_copies(parameters)
    optimizer.zero_grad()
    if average is not None:
        average.update(is_good)
    return norm


def start_state(optimizer: torch.optim.AdamW | FusedAdamW, steps_done: int, skipped: int = 0) -> None:
    """Create zero moments for every parameter, as after `steps_done` steps of which `skipped` were not applied; a
    checkpoint is then copied into them."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if isinstance(optimizer, FusedAdamW):
                state = optimizer.zero_moments(parameter) | {"step": torch.tensor(float(steps_done))}
                device = "cpu" if optimizer.norms is not None else local_shard(parameter).device
                optimizer.skipped = torch.tensor(float(skipped), device=device)
            else:
                state = {name: torch.zeros_like(parameter) for name in MOMENTS}
                state["step"] = torch.full((), float(steps_done - skipped), device=parameter.device)
            optimizer.state[parameter] = state


def _numbers(group: dict) -> dict:
    """The group's settings that both operators take."""
    return {name: group[name] for name in ("lr", "betas", "eps", "weight_decay")}


def _update_in_pieces(
    adamw: Callable[..., None], ids: list[int], offsets: list[int], copies: list[Tensor], *lists: list[Tensor]
) -> None:
    """`adamw` with moments in host memory, copied to the device and back piece by piece."""
    for i, (number, offset, *tensors) in enumerate(zip(ids, offsets, *lists, strict=True)):
        for start in range(0, tensors[0].numel(), PIECE):
            piece = slice(start, start + PIECE)
            parameter, gradient, *kept = (tensor.view(-1)[piece] for tensor in tensors)
            moments = [[moment.to(parameter.device, non_blocking=True, copy=True)] for moment in kept]
            place = {"ids": [number], "offsets": [offset + start]}
            adamw([parameter], [gradient], *moments, copies=[copies[i].view(-1)[piece]] if copies else None, **place)
            for moment, (new,) in zip(kept, moments, strict=True):
                moment.copy_(new, non_blocking=True)
    if lists[0] and lists[0][0].is_cuda:
        torch.cuda.current_stream().synchronize()  # a checkpoint reads the moments on the host


def _in_fp32(gradient: Tensor) -> Tensor:
    """A tensor whose 2-norm is the gradient's in fp32; torch would compute a bf16 gradient's norm in bf16."""
    if gradient.dtype == torch.float32:
        return gradient
    return torch.linalg.vector_norm(gradient, dtype=torch.float32)
