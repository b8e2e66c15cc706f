"""LoRA: low-rank adapters on frozen weights, and rows of the embedding and the head that are trained in full.

    attach(model, config.lora, token_ids=(32000,))      # a model in the dtype of the computation, before it is wrapped
    quantize(model)                                     # base.quantize = "nf4": then its linears, still without values

A linear becomes y = x W^T + b + (alpha / r) (x A^T) B^T, A (r, in), B (out, r), with an A and a B for each of the
Hugging Face linears that ours fuses: what PEFT trains. Letters: T packed tokens, r rank, P adapted parts of a
fused linear, n tokens whose rows are trained, R supervised rows, H hidden, V vocabulary.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from ochat_kernels.reference_loss import soft_cap
from torch import Tensor, nn

from ochat.config import LoraConfig
from ochat.errors import ConfigError
from ochat.model import hf, nf4
from ochat.model.config import ModelConfig
from ochat.model.transformer import Linear, Transformer

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


class TargetLinear(NamedTuple):
    """One of the Hugging Face linears that a linear of ours fuses."""

    name: str  # model.layers.0.self_attn.q_proj
    rows: int
    is_adapted: bool


class Adapter(nn.Module):
    """x (T, in), y (T, out) -> y + (alpha / r) (x A^T) B^T of every adapted part, by two skinny products for all.

    `a` (P r, in) and `b` (adapted rows, r) are the parts' concatenated. The second product takes the parts' B as one
    block-diagonal matrix (out, P r): its zeros multiply a product by P that is r / H of the linear's.
    """

    def __init__(self, size_in: int, parts: list[TargetLinear], rank: int, scale: float) -> None:
        super().__init__()
        self.parts, self.scale = parts, scale
        rows = [part.rows for part in parts if part.is_adapted]
        self.a = nn.Parameter(torch.empty(rank * len(rows), size_in))
        self.b = nn.Parameter(torch.empty(sum(rows), rank))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        b = self._diagonal(self.b.to(x.dtype) * self.scale)
        return y.addmm_(
            F.linear(x, self.a.to(x.dtype)), b.t()
        )  # in place: a copy of y would cost more than the product

    def _diagonal(self, b: Tensor) -> Tensor:
        """(out, P r): rows of a part that has no adapter are zero."""
        blocks = iter(b.split([part.rows for part in self.parts if part.is_adapted]))
        return torch.block_diag(*(next(blocks) if p.is_adapted else b.new_empty(p.rows, 0) for p in self.parts))


class TokenRows(nn.Module):
    """The rows of n tokens in a frozen (V, H) weight, trained in full; `weight` (n, H).

    A base has never trained the row of a token that was added to it, or that only its instruction-tuned version uses:
    a frozen end-of-turn token could not be learned.
    """

    def __init__(self, ids: tuple[int, ...], size: int) -> None:
        super().__init__()
        self.ids = ids
        self.weight = nn.Parameter(torch.empty(len(ids), size))
        self._places: Tensor | None = None  # `ids` on the device; no buffer: to_empty() would wipe it

    def places(self, device: torch.device) -> Tensor:
        """(n,) int64."""
        if self._places is None or self._places.device != device:
            self._places = torch.tensor(self.ids, device=device)
        return self._places

    def look_up(self, input_ids: Tensor, found: Tensor) -> Tensor:
        """`found` (T, H) with the trained rows where input_ids (T,) name them."""
        hit = input_ids[:, None] == self.places(input_ids.device)  # (T, n)
        own = hit.to(found.dtype) @ self.weight.to(found.dtype)  # a row times 1 and zeros: exact
        return torch.where(hit.any(1, keepdim=True), own, found)

    @torch.no_grad()
    def write(self, weight: Tensor) -> None:
        """Writes the rows into `weight` (V, H)."""
        weight.index_copy_(0, self.places(weight.device), self.weight.to(weight.dtype))

    def loss_term(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        loss_weights: Tensor,
        rows: Tensor,
        nll: Tensor,
        softcap: float,
    ) -> Tensor:
        """() 0, with the gradient to the rows of sum_t w_t nll_t, of which the head's operator gives none: with x_t
        hidden_t, (w_t (softmax(z_t) - onehot))^T x_t for the n columns alone. With a cap of the logits, softcap, z_t
        are the capped ones, and each column's number is multiplied by 1 - (z / softcap)^2.

        Args: as linear_cross_entropy's; rows (R,) the live ones, perhaps with others, of weight 0; nll (T,) its result,
        which with the label's logit gives logsumexp. Costs: 2 R H (n + 1) FLOPs and a copy of R rows of `weight`,
        instead of the (V, H) gradient.
        """
        with torch.no_grad():
            x, y, w = hidden[rows], labels[rows].clamp_min(0), loss_weights[rows][:, None]
            own = self.weight.to(hidden.dtype)
            label_logit = torch.bmm(x[:, None], weight[y][:, :, None]).flatten()  # rounded as the operator's logits are
            lse = nll[rows] + soft_cap(label_logit.to(nll.dtype), softcap)
            logits = soft_cap(F.linear(x, own).to(nll.dtype), softcap)  # (R, n)
            slope = (logits - lse[:, None]).exp() - (y[:, None] == self.places(y.device)).to(nll.dtype)
            if softcap:
                slope *= 1 - (logits / softcap).square()
            slope = torch.where(w != 0, slope * w, 0)
            gradient = (slope.to(x.dtype).t() @ x).to(self.weight.dtype)
        return ((self.weight - self.weight.detach()) * gradient).sum()


def attach(model: Transformer, config: LoraConfig, token_ids: tuple[int, ...]) -> None:
    """Freezes a model and adds what is trained instead, in fp32 and uninitialised.

    `token_ids`: whose rows of the embedding and the head are trained too; a tied head shares them.
    """
    model.requires_grad_(False)
    for name, parts in adapted_parts(model.config, config.targets).items():
        linear = model.get_submodule(name)
        assert isinstance(linear, Linear)
        with linear.weight.device:
            linear.lora = Adapter(linear.weight.shape[1], parts, config.rank, config.alpha / config.rank)
    if token_ids:
        with model.embed.weight.device:
            model.embed.tokens = TokenRows(token_ids, model.config.hidden_size)
            tied = model.config.tie_embeddings
            model.head.tokens = model.embed.tokens if tied else TokenRows(token_ids, model.config.hidden_size)


def quantize(model: Transformer) -> None:
    """Makes room for the weights of the blocks' linears in NF4 instead, after `attach`; load.load_base fills it."""
    for name, packing in packings(model.config).items():
        linear = model.get_submodule(name)
        assert isinstance(linear, Linear) and linear.fp8 is None and not linear.weight.requires_grad
        stored = linear.weight.new_empty(packing.nbytes // linear.weight.itemsize)
        linear.weight, linear.nf4 = nn.Parameter(stored, requires_grad=False), packing


def packings(config: ModelConfig) -> dict[str, nf4.Packing]:
    """Every linear of the blocks, by our name, and how its weight lies in NF4."""
    return {
        name.removesuffix(".weight"): nf4.Packing(tuple(part.shape[0] for part in parts), parts[0].shape[1])
        for name, parts in hf.parameter_parts(config).items()
        if _is_linear(name, parts)
    }


def target_modules(config: ModelConfig, targets: tuple[str, ...]) -> tuple[str, ...]:
    """`targets` by the names of the model's files, which may hold several linears as one (Phi-3).

    Raises: ConfigError where only some of these are targets.
    """
    found = dict.fromkeys(targets)
    for fused, parts in FUSED.items() if config.fused_files else ():
        if chosen := [part for part in parts if part in found]:
            if len(chosen) < len(parts):
                raise ConfigError(
                    f"lora.targets: {config.model_type} has one {fused} for {', '.join(parts)}; name all or none"
                )
            found = {name: None for name in found if name not in parts} | {fused: None}
    return tuple(found)


def adapted_parts(config: ModelConfig, targets: tuple[str, ...]) -> dict[str, list[TargetLinear]]:
    """Our linears with at least one part among `targets` -> all their parts, in the order of their rows. Raises: as
    target_modules."""
    targets, found = target_modules(config, targets), {}
    for name, tensors in hf.parameter_parts(config).items():
        if not _is_linear(name, tensors):
            continue
        names = [tensor.name.removesuffix(".weight") for tensor in tensors]
        parts = [TargetLinear(n, t.shape[0], n.split(".")[-1] in targets) for n, t in zip(names, tensors, strict=True)]
        if any(part.is_adapted for part in parts):
            found[name.removesuffix(".weight")] = parts
    return found


def _is_linear(name: str, parts: tuple[hf.HFTensor, ...]) -> bool:
    """Whether it is the weight of a linear of a block."""
    return name.startswith("blocks.") and len(parts[0].shape) == 2


def first_value(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """What an adapter's parameter starts from, fp32, as PEFT has it: B zero, A kaiming-uniform with a = sqrt(5), that
    is uniform within 1 / sqrt(in). A pure function of its arguments: every process draws the same."""
    if name.endswith(".b"):
        return torch.zeros(shape)
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    bound = 1 / math.sqrt(shape[1])
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def flops_per_step(
    config: ModelConfig, settings: LoraConfig, num_tokens: int, sum_len_sq: int, num_supervised: int
) -> float:
    """Model FLOPs as ModelConfig.flops_per_step counts them, where a frozen weight has no gradient: 4 a token instead
    of 6; the adapters' numbers 6."""
    attention = config.flops_per_step(0, sum_len_sq, 0)
    products = config.flops_per_step(num_tokens, 0, num_supervised)
    return products * 4 / 6 + attention + 6 * num_parameters(config, settings) * num_tokens


def num_parameters(config: ModelConfig, settings: LoraConfig) -> int:
    """Numbers in all A and B."""
    tensors, found = hf.parameter_parts(config), adapted_parts(config, settings.targets)
    sizes = [
        tensors[f"{name}.weight"][0].shape[1] + p.rows for name, parts in found.items() for p in parts if p.is_adapted
    ]
    return settings.rank * sum(sizes)


def base_digest(base: Path, model: ModelConfig) -> str:
    """The digest of a base: of each tensor the name, dtype, shape, first and last row.

    Costs: a page or two of each tensor is read.
    """
    stored, found = hf.open_tensors(base, model), hashlib.sha256()
    for name, tensor in ((p.name, stored[p.name]) for parts in hf.parameter_parts(model).values() for p in parts):
        found.update(f"{name} {tensor.dtype} {tensor.shape}".encode())
        for row in (0, tensor.shape[0] - 1):
            found.update(tensor.rows(row, row + 1).contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]
