"""What attention is measured on: heads of real models over packed documents, all of one length or as chats have.

    case = Case(MODELS["Llama-3-8B"], "2048"); problem = make_problem(case, torch.device("cuda")); definition(problem)
Letters: T tokens, N query heads, K key/value heads, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from benchmarks import train_step_cases
from benchmarks.attention_backends import Attend, Documents
from benchmarks.cases import ELEMENT_BYTES, MODELS, Cost, Model
from ochat.data import batch
from ochat.model import attention

T = 16384
CHATS = "chats"
LENGTHS = (CHATS, "2048", "1024", "4096", "512", "8192")  # the most wanted first
WINDOW = 1024  # tokens
LONGEST_CHAT = 4096
PASSES = ("forward", "forward+backward")


@dataclass(frozen=True)
class Case:
    """The heads of one model over T tokens."""

    model: Model
    lengths: str  # of every document, or CHATS
    window: int | None = None
    num_tokens: int = T

    @property
    def title(self) -> str:
        return f"{self.model.name}, {self.lengths}" + (f", window {self.window}" if self.window else "")

    def documents(self) -> list[int]:
        """Lengths that sum to T; the last is cut to fit."""
        if self.lengths != CHATS:
            drawn = [int(self.lengths)] * -(-self.num_tokens // int(self.lengths))
        else:
            longest = min(LONGEST_CHAT, self.num_tokens // 2)
            chats = train_step_cases.Case(self.model.name, self.num_tokens, 1, longest=longest)
            drawn = train_step_cases.draw_lengths(chats, np.random.default_rng(0), self.num_tokens).tolist()
        drawn[-1] -= sum(drawn) - self.num_tokens
        return drawn


def cases(names: list[str], window: int | None = None) -> list[Case]:
    """Of these models at every length; with a window, where a document is longer."""
    chosen = [x for x in LENGTHS if window is None or x == CHATS or int(x) > window]
    return [Case(MODELS[name], lengths, window) for name in names for lengths in chosen]


def cost(case: Case, which: str) -> Cost:
    """The work of one pass, causal: a query sees itself and what is before it in its document and its window.

    FLOPs: 2 D a product, query head and seen pair; forward has 2 products, backward 5 (q k^T once more), as
    FlashAttention's own figures and ochat/plan/gpus.py count; MFU counts 4, so 6/7 of forward+backward. Bytes: q, k,
    v read and out written, 2 (N + K) D a token; backward reads them all again with out's gradient, writes three.
    """
    m, is_whole = case.model, which == "forward+backward"
    pairs = sum(_pairs(length, case.window) for length in case.documents())
    moved = 2 * (m.N + m.K) * (3 if is_whole else 1)
    return Cost((14 if is_whole else 4) * m.N * m.D * pairs, ELEMENT_BYTES * case.num_tokens * moved * m.D)


def _pairs(length: int, window: int | None) -> int:
    """Of a query and a key that it sees."""
    full = min(length, window or length)
    return full * (full + 1) // 2 + (length - full) * full


@dataclass(frozen=True)
class Problem:
    """q, k and v with gradients wanted, the gradient from above, and where the documents lie."""

    inputs: tuple[Tensor, Tensor, Tensor]
    upstream: Tensor
    documents: Documents
    window: int | None


def make_problem(case: Case, device: torch.device) -> Problem:
    """Random bf16; documents as the loader hands them on: so many empty ones behind, max_seqlen a power of two."""
    real, total, m = case.documents(), case.num_tokens, case.model
    most = batch.most_documents(np.array([len(real)]), np.array([total]), total)
    lengths, max_seqlen = batch.documents(real, total, most)
    places = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32, device=device)
    generator = torch.Generator(device).manual_seed(0)
    shapes = [(total, heads, m.D) for heads in (m.N, m.K, m.K, m.N)]
    q, k, v, upstream = (torch.randn(x, generator=generator, device=device, dtype=torch.bfloat16) for x in shapes)
    inputs = (q.requires_grad_(), k.requires_grad_(), v.requires_grad_())
    return Problem(inputs, upstream, Documents(places, max_seqlen, lengths), case.window)


def results(attend: Attend, problem: Problem, which: str) -> list[Tensor]:
    """out (T, N, D), and for both passes the gradients of q, k and v."""
    if which == "forward":
        with torch.no_grad():
            return [attend(*(x.detach() for x in problem.inputs))]
    out = attend(*problem.inputs)
    return [out.detach(), *torch.autograd.grad(out, problem.inputs, problem.upstream)]


def definition(problem: Problem) -> list[Tensor]:
    """out and the gradients of q, k and v by per-document SDPA in fp32: one key/value head at a time, so that
    the scores of them all never lie in memory at once."""
    num_heads = problem.inputs[1].shape[1]
    parts = [x.detach().chunk(num_heads, dim=1) for x in (*problem.inputs, problem.upstream)]
    attend = attention.PackedAttention(*problem.documents[:2], "sdpa", problem.documents.lengths)
    found = []
    for q, k, v, upstream in zip(*parts, strict=True):
        wide = (q.float().requires_grad_(), k.float().requires_grad_(), v.float().requires_grad_())
        one = Problem(wide, upstream.float(), problem.documents, problem.window)
        found.append(results(lambda q, k, v: attend(0, q, k, v, problem.window), one, "forward+backward"))
    return [torch.cat(heads, dim=1) for heads in zip(*found, strict=True)]
