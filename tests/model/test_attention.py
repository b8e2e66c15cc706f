"""Packed attention against a float64 softmax written out; what the varlen backend passes on, for both signatures."""

import sys
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ochat.errors import ConfigError
from ochat.model.attention import PackedAttention
from tests.numerics import assert_close


def attend(q, k, v, cu_seqlens, max_seqlen, window=None, backend="sdpa", scale=None, softcap=0.0):
    return PackedAttention(cu_seqlens, max_seqlen, backend)(0, q, k, v, window, scale, softcap)


def truth(q, k, v, lengths, window, scale=None, softcap=0.0):
    """One softmax over all T keys with the packed mask spelled out, in float64."""
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    place = torch.arange(len(document))
    distance = place[:, None] - place[None, :]
    seen = (document[:, None] == document[None, :]) & (distance >= 0) & (distance < (window or len(place) + 1))
    k, v = (x.double().repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("tnd,snd->nts", q.double(), k) * (scale or q.shape[-1] ** -0.5)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    return torch.einsum("nts,snd->tnd", scores.masked_fill(~seen, float("-inf")).softmax(-1), v)


def tensors(lengths, heads, kv_heads, head_dim, dtype=torch.float32):
    generator = torch.Generator().manual_seed(sum(lengths))
    shapes = [(sum(lengths), n, head_dim) for n in (heads, kv_heads, kv_heads)]
    q, k, v = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return q, k, v, torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(0, 19), min_size=1, max_size=6).filter(any),
    kv_heads=st.integers(1, 3),
    groups=st.integers(1, 3),
    head_dim=st.sampled_from([2, 6, 16]),
    window=st.none() | st.integers(1, 25),
    scale=st.none() | st.floats(0.05, 1.0),
    softcap=st.sampled_from([0.0, 0.5, 3.0]),
)
def test_equals_the_written_out_softmax(lengths, kv_heads, groups, head_dim, window, scale, softcap):
    q, k, v, cu_seqlens = tensors(lengths, kv_heads * groups, kv_heads, head_dim)
    found, wanted = (
        value_and_gradients(function, q, k, v)
        for function in (
            lambda *qkv: attend(*qkv, cu_seqlens, max(lengths), window=window, scale=scale, softcap=softcap),
            lambda *qkv: truth(*qkv, lengths, window, scale, softcap).float(),
        )
    )
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)  # a few fp32 roundings of values near 1
    assert (found[0] - wanted[0]).abs().max() < 2e-6


def value_and_gradients(function, *inputs):
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    return out.detach(), *torch.autograd.grad((out * out.detach().cos()).sum(), leaves)


def test_what_cannot_be_computed_is_refused():
    q, k, v, cu_seqlens = tensors([4, 3], 2, 2, 4)
    with pytest.raises(ValueError, match="lengths sum to 6, but there are 7"):
        PackedAttention(cu_seqlens, 4, "sdpa", [4, 2])(0, q, k, v, None)
    with pytest.raises(ConfigError, match="'flash'.*sdpa, varlen"):
        PackedAttention(cu_seqlens, 4, "flash")
    with pytest.raises(ConfigError, match="half precision, not torch.float32"):
        attend(q, k, v, cu_seqlens, 4, backend="varlen")
    with pytest.raises(ConfigError, match="'varlen' has no softcap, but the model's is 50; .* 'sdpa'"):
        attend(*(x.bfloat16() for x in (q, k, v)), cu_seqlens, 4, backend="varlen", softcap=50.0)


def fake_varlen(has_gqa, calls):
    """Stands in for the CUDA kernel: computes with the other backend, and checks what it was given as torch does."""

    def run(q, k, v, cu_q, cu_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False):
        assert q.shape[1] == k.shape[1] == v.shape[1] or enable_gqa
        assert torch.equal(cu_q, cu_k) and cu_q.dtype == torch.int32 and max_q == max_k
        calls.append(enable_gqa)
        left, right = window_size
        assert right == 0
        return attend(q, k, v, cu_q, max_q, window=None if left < 0 else left + 1, scale=scale)

    def old(q, k, v, cu_q, cu_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
        return run(q, k, v, cu_q, cu_k, max_q, max_k, scale=scale, window_size=window_size)

    return run if has_gqa else old


@pytest.mark.parametrize("has_gqa", [True, False])
@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize(("window", "scale"), [(None, None), (1, None), (3, 0.7)])
def test_varlen_gets_what_either_signature_wants(monkeypatch, has_gqa, kv_heads, window, scale):
    calls = []
    module = types.ModuleType("torch.nn.attention.varlen")
    module.varlen_attn = fake_varlen(has_gqa, calls)
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", module)
    q, k, v, cu_seqlens = tensors([5, 2], 4, kv_heads, 8, torch.bfloat16)
    found = attend(q, k, v, cu_seqlens, 5, window=window, backend="varlen", scale=scale)
    torch.testing.assert_close(found, attend(q, k, v, cu_seqlens, 5, window=window, scale=scale))
    assert calls == [has_gqa and kv_heads == 2]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("window", [None, 7])
def test_varlen_equals_sdpa_on_the_card(window):
    lengths = [130, 1, 64, 300]
    q, k, v, cu_seqlens = (x.cuda() for x in tensors(lengths, 8, 2, 64, torch.bfloat16))
    wanted = truth(q.cpu(), k.cpu(), v.cpu(), lengths, window)
    found = attend(q, k, v, cu_seqlens, 300, window=window, backend="varlen").cpu()
    reference = attend(q, k, v, cu_seqlens, 300, window=window).cpu()
    assert_close(found, reference, wanted, atol=2**-8)  # one bf16 rounding of values near 1
