"""Packed attention against a float64 softmax written out: SDPA, and flex as it is written; what is passed on to the
kernels of varlen, for both signatures, and flash2."""

import sys
import types

import pytest
import torch
import torch._dynamo
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import flex_attention

from ochat.errors import ConfigError
from ochat.model import flex, hf, transformer
from ochat.model.attention import BACKENDS, PackedAttention, check, default_backend
from ochat.model.sdpa import Scores
from tests.model_families import make, peer_logits, random_ids
from tests.numerics import assert_close


def attend(q, k, v, cu_seqlens, max_seqlen, window=None, backend="sdpa", scale=None, softcap=0.0):
    scores = Scores(window, scale, softcap)
    return PackedAttention(cu_seqlens, max_seqlen, backend, windows=[window])(0, q, k, v, scores)


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
    check_against_truth("sdpa", lengths, kv_heads, groups, head_dim, window, scale, softcap)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("lengths", [[7], [0, 3, 1, 0, 9], [130, 5, 0]])
@pytest.mark.parametrize(("window", "scale", "softcap"), [(None, None, 0.0), (3, 0.4, 0.0), (129, None, 2.0)])
def test_flex_equals_it_too(monkeypatch, lengths, window, scale, softcap):
    """Without blocks or a compiler: the mask and the scores as they are given to it. torch refuses gradients on a CPU,
    though it has them."""
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)
    check_against_truth("flex", lengths, 2, 2, 16, window, scale, softcap)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@torch.no_grad()
def test_a_whole_model_of_mixed_windows_and_softcaps_is_the_peers_with_flex(monkeypatch, tmp_path):
    peer, ours = make("gemma2", tmp_path), hf.load(tmp_path, dtype="float32")
    monkeypatch.setattr(transformer, "default_backend", lambda *_: "flex")
    sequences = random_ids(9, 1, 30)
    for sequence, found in zip(sequences, ours.logits(sequences), strict=True):
        wanted = peer_logits(peer, sequence)
        assert (found - wanted).abs().max() <= 2e-5 * wanted.abs().max()


def check_against_truth(backend, lengths, kv_heads, groups, head_dim, window, scale, softcap):
    q, k, v, cu_seqlens = tensors(lengths, kv_heads * groups, kv_heads, head_dim)
    options = {"window": window, "scale": scale, "softcap": softcap}
    found, wanted = (
        value_and_gradients(function, q, k, v)
        for function in (
            lambda *qkv: attend(*qkv, cu_seqlens, max(lengths), backend=backend, **options),
            lambda *qkv: truth(*qkv, lengths, **options).float(),
        )
    )
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)  # a few fp32 roundings of values near 1
    assert (found[0] - wanted[0]).abs().max() < 5e-6  # scores of 16 are rounded to 1e-6, values reach 4


def value_and_gradients(function, *inputs):
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    return out.detach(), *torch.autograd.grad((out * out.detach().cos()).sum(), leaves)


LISTS = [f"{full}{side}_{what}" for full in ("", "full_") for side in ("kv", "q") for what in ("num_blocks", "indices")]


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.sampled_from([0, 1, 5, 127, 128, 129, 200, 400]), min_size=1, max_size=6).filter(any),
    window=st.none() | st.sampled_from([1, 2, 100, 128, 129, 256, 1000]),
)
def test_the_blocks_are_those_that_torch_finds_in_the_whole_mask(lengths, window):
    cu_seqlens, total = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32), sum(lengths)
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))

    def is_seen(_batch, _head, i, j):
        return (document[i] == document[j]) & (i >= j) & (i - j < (window or total))

    found = flex.block_mask(cu_seqlens, total, window)
    wanted = flex_attention.create_block_mask(is_seen, None, None, total, total, device="cpu")
    assert found.shape == wanted.shape and found.BLOCK_SIZE == wanted.BLOCK_SIZE
    for name in LISTS:
        assert torch.equal(getattr(found, name), getattr(wanted, name)), name


def test_flex_is_compiled_once_for_batches_of_one_size(monkeypatch):
    """Other documents, windows and layers are other tensors, not other graphs."""
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    compiled = torch.compile(flex_attention.flex_attention, fullgraph=True, backend=backend)
    monkeypatch.setattr(flex, "_function", lambda _: compiled)
    torch._dynamo.reset()
    for lengths in ([200, 56], [256], [1, 255, 0, 0]):
        q, k, v, cu_seqlens = tensors(lengths, 4, 2, 16)
        packed = PackedAttention(cu_seqlens, 256, "flex", lengths, [None, 9])
        for layer, window in enumerate([None, 9, None]):
            out = packed(layer, q, k, v, Scores(window, softcap=5.0))
            torch.testing.assert_close(out, attend(q, k, v, cu_seqlens, 256, window=window, softcap=5.0))
    assert len(graphs) == 1


def test_what_cannot_be_computed_is_refused():
    q, k, v, cu_seqlens = tensors([4, 3], 2, 2, 4)
    with pytest.raises(ValueError, match="lengths sum to 6, but there are 7"):
        PackedAttention(cu_seqlens, 4, "sdpa", [4, 2])(0, q, k, v, Scores())
    with pytest.raises(ConfigError, match="'flash'.*sdpa, varlen"):
        PackedAttention(cu_seqlens, 4, "flash")
    for backend in ("varlen", "flash2"):
        with pytest.raises(ConfigError, match=f"'{backend}' .*half precision, not torch.float32; .* flex or sdpa"):
            attend(q, k, v, cu_seqlens, 4, backend=backend)
    with pytest.raises(ConfigError, match="'varlen' has no softcap, but the model's is 50; .* flex, flash2, sdpa"):
        attend(*(x.bfloat16() for x in (q, k, v)), cu_seqlens, 4, backend="varlen", softcap=50.0)


def test_the_default_has_what_a_model_needs():
    chosen = {
        (device, dtype, softcap): default_backend(device, dtype, softcap)
        for device in ("cpu", "cuda")
        for dtype in (torch.float32, torch.bfloat16)
        for softcap in (0.0, 50.0)
    }
    for (_, dtype, softcap), backend in chosen.items():
        check(backend, dtype, softcap)
    assert {backend for (device, _, _), backend in chosen.items() if device == "cpu"} == {"sdpa"}
    assert chosen["cuda", torch.bfloat16, 0.0] == "varlen" and chosen["cuda", torch.bfloat16, 50.0] == "flex"
    assert set(chosen.values()) < set(BACKENDS)


def fake_varlen(has_gqa, calls):
    """Stands in for the CUDA kernel: computes with the other backend, and checks what it was given as torch does (2.11
    takes fewer key/value heads as they are)."""

    def run(q, k, v, cu_q, cu_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False):
        assert torch.equal(cu_q, cu_k) and cu_q.dtype == torch.int32 and max_q == max_k
        calls.append((k.shape[1], v.shape[1], enable_gqa))
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
    assert calls == [(kv_heads, kv_heads, has_gqa)]


@pytest.mark.parametrize("is_deterministic", [False, True])
@pytest.mark.parametrize(("window", "scale", "softcap"), [(None, None, 0.0), (1, 0.7, 0.0), (3, 0.5, 2.0)])
def test_flash2_gets_what_the_package_wants(monkeypatch, window, scale, softcap, is_deterministic):
    """A stand-in with the signature of flash-attn 2.8, which computes with the definition."""

    def function(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
        causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
        return_attn_probs=False, block_table=None,
    ):  # fmt: skip
        assert torch.equal(cu_seqlens_q, cu_seqlens_k) and cu_seqlens_q.dtype == torch.int32 and causal
        assert max_seqlen_q == max_seqlen_k == 5 and not dropout_p and deterministic is is_deterministic
        left = None if window_size[0] < 0 else window_size[0] + 1
        return attend(q, k, v, cu_seqlens_q, max_seqlen_q, window=left, scale=softmax_scale, softcap=softcap)

    module = types.ModuleType("flash_attn")
    module.flash_attn_varlen_func = function
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: is_deterministic)
    q, k, v, cu_seqlens = tensors([5, 2], 4, 2, 8, torch.bfloat16)
    options = {"window": window, "scale": scale, "softcap": softcap}
    found = attend(q, k, v, cu_seqlens, 5, backend="flash2", **options)
    torch.testing.assert_close(found, attend(q, k, v, cu_seqlens, 5, **options), atol=0, rtol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize(("backend", "softcap"), [("varlen", 0.0), ("flex", 0.0), ("flex", 2.0), ("flash2", 2.0)])
def test_a_backend_equals_sdpa_on_the_card(backend, softcap, window):
    if backend == "flash2":
        pytest.importorskip("flash_attn")
    lengths = [130, 1, 64, 300]
    q, k, v, cu_seqlens = (x.cuda() for x in tensors(lengths, 8, 2, 64, torch.bfloat16))
    options = {"window": window, "softcap": softcap}
    wanted = value_and_gradients(lambda *qkv: truth(*qkv, lengths, **options), *(x.cpu() for x in (q, k, v)))
    found, reference = (
        value_and_gradients(lambda *qkv, name=name: attend(*qkv, cu_seqlens, 300, backend=name, **options), q, k, v)
        for name in (backend, "sdpa")
    )
    for ours, plain, exact in zip(found, reference, wanted, strict=True):
        assert_close(ours.cpu(), plain.cpu(), exact, atol=2**-8 * exact.abs().max())  # one bf16 rounding
