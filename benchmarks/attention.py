"""Attention over packed documents as an operator to measure: documents, least work, inputs, definition.

    case = Case("attention", MODELS["Llama-3-8B"], 16384, variant="2048"); definition(make_problem(case, device, 0))
Letters: T tokens, N query heads, K key/value heads, D head dimension, S documents.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks import step_cases
from benchmarks.cases import ELEMENT_BYTES, MODELS, Case, Cost, Draw, Problem
from ochat.data import batch
from ochat.model.attention.packed import PackedAttention
from ochat.model.attention.sdpa import Scores

T = 16384
CHATS = "chats"
LENGTHS = (CHATS, "2048", "1024", "4096", "512", "8192")  # the most important first
WINDOW = 1024  # tokens
LONGEST_CHAT = 4096


class Documents(NamedTuple):
    """The documents of a batch, as the loader describes them."""

    cu_seqlens: Tensor  # (S+1,) int32 on the device
    max_seqlen: int  # at least the longest
    lengths: list[int]  # S of them


def cases(names: list[str], window: int | None = None) -> list[Case]:
    """These models at every length; with a window, at those where a document is longer."""
    chosen = [x for x in LENGTHS if window is None or x == CHATS or int(x) > window]
    return [Case("attention", MODELS[name], T, variant=x, window=window) for name in names for x in chosen]


def lengths_of(case: Case) -> list[int]:
    """Document lengths that sum to T; the last is cut to fit."""
    if case.variant != CHATS:
        drawn = [int(case.variant)] * -(-case.num_tokens // int(case.variant))
    else:
        chats = step_cases.Case("tiny", case.num_tokens, 1, longest=min(LONGEST_CHAT, case.num_tokens // 2))
        drawn = step_cases.draw_lengths(chats, np.random.default_rng(0), case.num_tokens).tolist()
    drawn[-1] -= sum(drawn) - case.num_tokens
    return drawn


def cost(case: Case, which: str) -> Cost:
    """The work of one causal pass: a query sees itself and earlier tokens of its document, within its window.

    FLOPs: 2 D a product, query head and visible pair; forward has 2 products, backward 5 (q k^T again), as in
    FlashAttention's figures; MFU counts 4, so 6/7 of forward+backward. Bytes: q, k, v read and out written, 2 (N + K) D
    a token; backward reads them again with the gradient of out, and writes three.
    """
    m, is_whole = case.model, which == "forward+backward"
    pairs = sum(_pairs(length, case.window) for length in lengths_of(case))
    moved = 2 * (m.N + m.K) * (3 if is_whole else 1)
    return Cost((14 if is_whole else 4) * m.N * m.D * pairs, ELEMENT_BYTES * case.num_tokens * moved * m.D)


def _pairs(length: int, window: int | None) -> int:
    """Pairs of a query and a key that it sees."""
    full = min(length, window or length)
    return full * (full + 1) // 2 + (length - full) * full


@lru_cache(maxsize=4)
def documents(case: Case, device: torch.device) -> Documents:
    """As the loader lays them out."""
    return _laid_out(lengths_of(case), None, device)


def with_empty(documents: Documents) -> Documents:
    """As the loader lays them out for a compiler: empty documents at the end, max_seqlen a power of two."""
    real, total = documents.lengths, sum(documents.lengths)
    most = batch.most_documents(np.array([len(real)]), np.array([total]), total)
    return _laid_out(real, most, documents.cu_seqlens.device)


def _laid_out(real: list[int], num_documents: int | None, device: torch.device) -> Documents:
    total, places = sum(real), tuple(range(len(real)))
    ids, weights, classes = np.zeros(total, np.int64), np.zeros(total, np.float32), np.zeros(total, np.int64)
    packed = batch.assemble(ids, weights, np.array(real), classes, places, pad_to=total, num_documents=num_documents)
    return Documents(packed.cu_seqlens.to(device), packed.max_seqlen, list(packed.lengths))


def make_problem(case: Case, device: torch.device, seed: int) -> Problem:
    """Random bf16 q, k, v and gradient of out."""
    m, draw = case.model, Draw(device, seed)
    q, k, v, upstream = (draw(case.num_tokens, heads, m.D) for heads in (m.N, m.K, m.K, m.N))
    inputs = {"q": q.requires_grad_(), "k": k.requires_grad_(), "v": v.requires_grad_()}
    return Problem(inputs | {"documents": documents(case, device), "window": case.window}, list(inputs), [upstream])


def definition(problem: Problem) -> list[Tensor]:
    """out and the gradients of q, k and v by per-document SDPA in fp32, one key/value head at a time to save memory."""
    where, window = problem.arguments["documents"], problem.arguments["window"]
    inputs = [problem.arguments[name] for name in "qkv"]
    parts = [x.detach().chunk(inputs[1].shape[1], dim=1) for x in (*inputs, *problem.upstream)]
    attend = PackedAttention(where.cu_seqlens, where.max_seqlen, "sdpa", where.lengths)
    found = []
    for q, k, v, upstream in zip(*parts, strict=True):
        q, k, v = (x.float().requires_grad_() for x in (q, k, v))
        out = attend(0, q, k, v, Scores(window))
        found.append([out.detach(), *torch.autograd.grad(out, (q, k, v), upstream.float())])
    return [torch.cat(heads, dim=1) for heads in zip(*found, strict=True)]
