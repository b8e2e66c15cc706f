"""Who computes attention over packed documents: a row for each says what it can do, and an adapter calls it.

    row = BACKENDS["fa3"]; row.lacks(Needs(torch.bfloat16, 128, Scores())), row.is_missing(device)  # "": nothing
    out = row.call(row.load(), q, k, v, documents, scores)
All group heads: query head n reads key/value head n // (N / K). Letters: T, N, K, D; S documents.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ochat.errors import ConfigError
from ochat.model.attention import sdpa
from ochat.model.attention.flex import FlexAttention
from ochat.model.attention.sdpa import HALF, Scores
from ochat.model.config import ModelConfig

FLOATS = (*HALF, torch.float32, torch.float64)
CUDNN_EMPTY = 92500  # earlier ones give NaN in the rows of a batch with documents of length 0


class Needs(NamedTuple):
    """What a model and a run ask of attention; `scores`: the most that a layer asks."""

    dtype: torch.dtype
    head_dim: int
    scores: Scores
    is_deterministic: bool = False
    has_empty: bool = False  # documents of length 0

    @classmethod
    def of(
        cls, model: ModelConfig, dtype: torch.dtype, is_deterministic: bool = False, has_empty: bool = False
    ) -> Needs:
        window = min((each for each in model.windows if each is not None), default=None)
        scores = Scores(window, model.attention_scale, model.attention_softcap)
        return cls(dtype, model.head_dim, scores, is_deterministic, has_empty)


class Documents(NamedTuple):
    """Those of a packed batch, as an adapter reads them."""

    cu_seqlens: Tensor  # (S+1,) int32 on the device
    max_seqlen: int  # at least the longest
    lengths: Sequence[int] | None  # S of them, for a backend that reads them
    prepared: Any = None  # what Backend.prepare made


@dataclass(frozen=True)
class Backend:
    """What one backend can do, and how it is called."""

    title: str
    call: Callable[..., Tensor]  # (what `load` gave, q, k, v, Documents, Scores) -> (T, N, D)
    load: Callable[[], Any] = lambda: None  # imports it. Raises: ImportError and whatever else a package raises
    install: str = ""  # of another package
    majors: tuple[int, ...] = (8, 9, 10, 11, 12)  # of the GPU's compute capability; (): any device
    dtypes: tuple[torch.dtype, ...] = HALF
    head_dims: range = range(8, 257, 8)
    has_window: bool = True
    has_softcap: bool = True
    is_deterministic: bool = True  # backward too, if torch is asked to be
    takes_empty: Callable[[], bool] = lambda: True  # documents of length 0
    reads_lengths: bool = False  # on the host
    plans_shapes: bool = False  # anew for each number of documents and longest one, which takes a while
    prepare: Callable[[Tensor, int, Iterable[int | None]], Any] | None = None  # once a batch; see FlexAttention

    def lacks(self, needs: Needs) -> str:
        """What it has not got of these, the first that is found; "": nothing."""
        window, softcap, dims = needs.scores.window, needs.scores.softcap, self.head_dims
        if needs.dtype not in self.dtypes:
            return f"computes in half precision, not {needs.dtype}"
        if needs.head_dim not in dims:
            return f"takes head dimensions from {dims[0]} to {dims[-1]} in steps of {dims.step}, not {needs.head_dim}"
        if window is not None and not self.has_window:
            return f"has no sliding window, but the model's is {window}"
        if softcap and not self.has_softcap:
            return f"has no softcap, but the model's is {softcap:g}"
        if needs.is_deterministic and not self.is_deterministic:
            return "has a backward that sums in any order, but run.deterministic is true"
        if needs.has_empty and not self.takes_empty():
            return "gives NaN for the empty documents that train.compile = true needs"
        return ""

    def is_missing(self, device: torch.device) -> str:
        """Why it cannot run on this device, or be imported; "": it can."""
        if not self.majors:
            return ""
        if device.type != "cuda":
            return "runs on CUDA, but the run is on a CPU"
        major, minor = torch.cuda.get_device_capability(device)
        if major not in self.majors:
            wanted = " or ".join(f"{each}.x" for each in self.majors)
            return f"needs a GPU of compute capability {wanted}, but this one's is {major}.{minor}"
        try:
            self.load()
        except Exception as problem:  # a package that was built for another torch raises whatever it likes
            remedy = f"; {self.install}" if self.install else ""
            return f"cannot be imported ({type(problem).__name__}: {first_line(problem)}){remedy}"
        return ""


def check(name: str, needs: Needs, device: torch.device | None = None) -> None:
    """Raises: ConfigError for a backend that is not known, lacks one of the needs, or is missing on the device where
    one is given. It says what else has what is needed."""
    if name not in BACKENDS:
        raise ConfigError(f"attention = {name!r} is not known; expected one of {', '.join(BACKENDS)}")
    row = BACKENDS[name]
    problem = row.lacks(needs) or (row.is_missing(device) if device else "")
    if problem:
        able = ", ".join(other for other, each in BACKENDS.items() if other != name and not each.lacks(needs))
        raise ConfigError(f"attention = {name!r} {problem}; set train.attention to 'auto', or to one of {able}")


def first_line(problem: Exception) -> str:
    """Of an exception's message, for a line of a log."""
    return (str(problem).strip().splitlines() or [""])[0][:160]


def _package(module: str, unbounded: int | None) -> dict[str, Any]:
    """`flash_attn_varlen_func` of a package; `unbounded`: its value for a side without a window."""

    def call(function: Any, q: Tensor, k: Tensor, v: Tensor, documents: Documents, scores: Scores) -> Tensor:
        window, places, longest = scores.window, documents.cu_seqlens, documents.max_seqlen
        found = function(
            q, k, v, cu_seqlens_q=places, cu_seqlens_k=places, max_seqlen_q=longest, max_seqlen_k=longest,
            softmax_scale=scores.scale, causal=True, softcap=scores.softcap,
            window_size=(unbounded, unbounded) if window is None else (window - 1, 0),
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )  # fmt: skip
        return found[0] if isinstance(found, tuple) else found  # some versions return log-sum-exps too

    return {"load": lambda: import_module(module).flash_attn_varlen_func, "call": call}


def _load_varlen() -> Any:
    from torch.nn.attention.varlen import varlen_attn  # takes a second

    groups = "enable_gqa" in inspect.signature(varlen_attn).parameters  # torch 2.11 does it unasked
    return partial(varlen_attn, enable_gqa=True) if groups else varlen_attn


def _varlen(function: Any, q: Tensor, k: Tensor, v: Tensor, documents: Documents, scores: Scores) -> Tensor:
    places, longest, window = documents.cu_seqlens, documents.max_seqlen, scores.window
    span = (-1 if window is None else window - 1, 0)  # keys before and after a token's own; -1: all
    return function(q, k, v, places, places, longest, longest, window_size=span, scale=scores.scale)


def _cudnn(function: Any, q: Tensor, k: Tensor, v: Tensor, documents: Documents, scores: Scores) -> Tensor:
    """The operator, whose gradient torch derives. `varlen_attn` never selects it (torch 2.11, 2.13), and would give its
    backward the arguments in another order."""
    places, longest = documents.cu_seqlens, documents.max_seqlen
    has_lse = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    return function(q, k, v, None, places, places, longest, longest, has_lse, 0.0, True, False, scale=scores.scale)[0]


def _cudnn_takes_empty() -> bool:
    return (torch.backends.cudnn.version() or 0) >= CUDNN_EMPTY


def _flex(_: Any, q: Tensor, k: Tensor, v: Tensor, documents: Documents, scores: Scores) -> Tensor:
    return documents.prepared(q, k, v, scores)


def _sdpa(_: Any, q: Tensor, k: Tensor, v: Tensor, documents: Documents, scores: Scores) -> Tensor:
    assert documents.lengths is not None
    return sdpa.documents(q, k, v, documents.lengths, scores)


BACKENDS = {
    "flash": Backend(
        "FlashAttention-2, package flash-attn",
        **_package("flash_attn", -1),
        install="pip install flash-attn",
    ),
    "fa3": Backend(
        "FlashAttention-3, package flash_attn_interface",
        **_package("flash_attn_interface", -1),
        install="build the folder hopper/ of Dao-AILab/flash-attention",
        majors=(9,),
        is_deterministic=False,  # dq is summed by atomics even if asked not to be
    ),
    "fa4": Backend(
        "FlashAttention-4, package flash-attn-4",
        **_package("flash_attn.cute", None),
        install="pip install flash-attn-4",
        majors=(9, 10, 11),
    ),
    "cudnn": Backend(
        "cuDNN's attention, through torch",
        _cudnn,
        lambda: torch.ops.aten._cudnn_attention_forward.default,
        majors=(9, 10),
        head_dims=range(8, 129, 8),
        has_window=False,
        has_softcap=False,
        is_deterministic=False,
        takes_empty=_cudnn_takes_empty,
        plans_shapes=True,
    ),
    "varlen": Backend("FlashAttention-2 inside torch", _varlen, _load_varlen, has_softcap=False),
    "flex": Backend(
        "torch's flex_attention, compiled",
        _flex,
        majors=(7, 8, 9, 10, 11, 12),
        dtypes=(*HALF, torch.float32),
        head_dims=range(16, 257),
        reads_lengths=True,
        prepare=FlexAttention,
    ),
    "sdpa": Backend(
        "torch's SDPA, document by document; blocks.py on a CPU in half precision",
        _sdpa,
        majors=(),
        dtypes=FLOATS,
        head_dims=range(1, 1 << 20),
        reads_lengths=True,
    ),
}  # fmt: skip
