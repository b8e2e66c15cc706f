"""Packed attention against a float64 softmax written out: SDPA, and flex as it is written. What is passed on to the
packages' functions, varlen's and cuDNN's, by stand-ins with their signatures; on a card, every backend."""

import dataclasses
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
import torch._dynamo
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import flex_attention

from ochat.errors import ConfigError
from ochat.model import hf, transformer
from ochat.model.attention import flex
from ochat.model.attention.backends import BACKENDS, Needs, check
from ochat.model.attention.packed import PackedAttention, default_backend, few_shapes
from ochat.model.attention.sdpa import Scores, heads_first
from ochat.model.config import ModelConfig
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
    pytest.importorskip("transformers")  # a machine with a GPU may lack it
    from tests.model_families import make, peer_logits, random_ids

    peer, ours = make("gemma2", tmp_path), hf.load(tmp_path, dtype="float32")
    monkeypatch.setattr(transformer, "default_backend", lambda *_: "flex")
    any_dims = dataclasses.replace(BACKENDS["flex"], head_dims=range(1, 257))  # 12, which only a compiler cannot take
    monkeypatch.setitem(BACKENDS, "flex", any_dims)
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


def gradients(function, upstream, *inputs):
    leaves = [x.detach().requires_grad_() for x in inputs]
    return torch.autograd.grad(function(*leaves), leaves, upstream)


def value_and_gradients(function, *inputs):
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    return out.detach(), *torch.autograd.grad((out * out.detach().cos()).sum(), leaves)


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.sampled_from([0, 1, 2, 63, 64, 65, 150, 520]), min_size=1, max_size=5).filter(any),
    kv_heads=st.integers(1, 3),
    groups=st.integers(1, 3),
    head_dim=st.sampled_from([6, 16, 64]),
    scale=st.none() | st.sampled_from([0.07, 1.0]),
    window=st.none() | st.sampled_from([64, 200]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
)
def test_blocks_on_a_cpu_are_as_exact_as_torchs_own(lengths, kv_heads, groups, head_dim, scale, window, dtype):
    """In half precision; a window that is shorter than a document leaves it to torch."""
    q, k, v, cu_seqlens = tensors(lengths, kv_heads * groups, kv_heads, head_dim, dtype)

    def by_torch(*qkv):
        parts = zip(*(x.split(lengths) for x in qkv), strict=True)
        masks = (torch.ones(n, n, dtype=torch.bool).tril().triu(1 - (window or n)) for n in lengths)
        return torch.cat(
            [
                heads_first(*(x.transpose(0, 1)[None] for x in each), mask, Scores(None, scale))[0].transpose(0, 1)
                for each, mask in zip(parts, masks, strict=True)
                if each[0].numel()
            ]
        )

    upstream = torch.randn(q.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    functions = [
        lambda *qkv: attend(*qkv, cu_seqlens, max(lengths), window=window, scale=scale),
        by_torch,
        lambda *qkv: truth(*qkv, lengths, window, scale),
    ]
    found = [
        (function(q, k, v), *gradients(function, upstream.to(out), q.to(out), k.to(out), v.to(out)))
        for function, out in zip(functions, (dtype, dtype, torch.float64), strict=True)
    ]
    for ours, torchs, exact in zip(*found, strict=True):
        assert ours.dtype == dtype
        assert_close(ours, torchs, exact, atol=torch.finfo(dtype).eps / 2 * exact.abs().max().item())


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
    q, k, v, cu_seqlens = tensors([4, 3], 2, 2, 8)
    with pytest.raises(ValueError, match="lengths sum to 6, but there are 7"):
        PackedAttention(cu_seqlens, 4, "sdpa", [4, 2])(0, q, k, v, Scores())
    with pytest.raises(ConfigError, match="'flash2'.*flash, fa3, .*sdpa"):
        PackedAttention(cu_seqlens, 4, "flash2")
    with pytest.raises(ConfigError, match="'varlen' computes in half precision, not torch.float32; .* to one of sdpa"):
        attend(q, k, v, cu_seqlens, 4, backend="varlen")
    with pytest.raises(ConfigError, match="'varlen' has no softcap, but the model's is 50; .* flash, fa3, fa4, sdpa"):
        attend(*(x.bfloat16() for x in (q, k, v)), cu_seqlens, 4, backend="varlen", softcap=50.0)


HALF, CUDA, CPU = Needs(torch.bfloat16, 128, Scores()), torch.device("cuda"), torch.device("cpu")
WINDOW, SOFTCAP = HALF._replace(scores=Scores(9)), HALF._replace(scores=Scores(softcap=50.0))
LACKING = [
    (HALF._replace(dtype=torch.float32), ["flash", "fa3", "fa4", "cudnn", "varlen"], "half precision"),
    (HALF._replace(head_dim=36), ["flash", "fa3", "fa4", "cudnn", "varlen"], "to 256 in steps of 8, not 36|to 128 in"),
    (HALF._replace(head_dim=256), ["cudnn"], "from 8 to 128 in steps of 8, not 256"),
    (HALF._replace(head_dim=8), ["flex"], "from 16 to 256 in steps of 1, not 8"),
    (WINDOW, ["cudnn"], "no sliding window, but the model's is 9"),
    (SOFTCAP, ["cudnn", "varlen"], "no softcap, but the model's is 50"),
    (HALF._replace(is_deterministic=True), ["fa3", "cudnn"], "run.deterministic is true"),
    (HALF._replace(has_empty=True), ["cudnn"], "NaN for the empty documents"),
]


@pytest.mark.parametrize(("needs", "without", "why"), LACKING)
def test_what_a_backend_lacks_is_told_with_what_has_it(monkeypatch, needs, without, why):
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)
    for name in BACKENDS:
        if name in without:
            able = [other for other in BACKENDS if other not in without]
            with pytest.raises(ConfigError, match=f"'{name}' .*({why}).*; .*'auto', or to one of {', '.join(able)}$"):
                check(name, needs)
        else:
            check(name, needs)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 92500)
    assert not BACKENDS["cudnn"].lacks(HALF._replace(has_empty=True))


def test_what_cannot_run_on_a_device_is_refused(monkeypatch):
    for name in BACKENDS:
        if name != "sdpa":
            with pytest.raises(ConfigError, match=f"'{name}' runs on CUDA, but the run is on a CPU; .*sdpa"):
                check(name, HALF, CPU)
    check("sdpa", HALF, CPU)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 6))
    with pytest.raises(ConfigError, match=r"'fa3' needs a GPU of compute capability 9.x, but this one's is 8.6;"):
        check("fa3", HALF, CUDA)
    with pytest.raises(ConfigError, match=r"'fa4' .*capability 9.x or 10.x or 11.x"):
        check("fa4", HALF, CUDA)
    with pytest.raises(
        ConfigError, match=r"'flash' cannot be imported \(ModuleNotFoundError: .*; pip install flash-attn;"
    ):
        check("flash", HALF, CUDA)
    for name in ("varlen", "flex", "sdpa"):
        check(name, HALF, CUDA)
    broken = types.ModuleType("flash_attn")  # the namespace that flash-attn-4 leaves
    monkeypatch.setitem(sys.modules, "flash_attn", broken)
    assert "AttributeError" in BACKENDS["flash"].is_missing(CUDA)


def test_needs_are_the_most_that_a_layer_asks():
    model = ModelConfig("gemma2", 64, 32, 64, 3, 4, 2, 16, windows=(None, 8, 4), attention_softcap=5.0)
    assert Needs.of(model, torch.bfloat16) == Needs(torch.bfloat16, 16, Scores(4, None, 5.0))
    assert Needs.of(dataclasses.replace(model, windows=()), torch.float32).scores.window is None


def test_the_default_has_what_a_model_needs():
    everything = [(HALF, "varlen"), (HALF._replace(dtype=torch.float32), "flex"), (SOFTCAP, "flex")]
    for needs, on_cuda in [*everything, (HALF._replace(head_dim=4), "sdpa")]:
        assert default_backend("cuda", needs) == on_cuda and default_backend("cpu", needs) == "sdpa"


@given(lengths=st.lists(st.integers(0, 40), min_size=1, max_size=150).filter(any))
def test_few_shapes_hold_the_same_documents(lengths):
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    spread, longest = few_shapes(cu_seqlens, max(lengths))
    count = len(spread) - 1
    assert torch.equal(spread[: len(cu_seqlens)], cu_seqlens) and spread.dtype == torch.int32
    assert (spread[len(cu_seqlens) :] == cu_seqlens[-1]).all()
    assert count.bit_count() == longest.bit_count() == 1 and max(lengths) <= longest < 2 * max(lengths)
    assert len(lengths) <= count < max(2 * len(lengths), 65)


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


def computing(cu_seqlens, longest, window, scale, softcap):
    """What a stand-in gives: the definition of what it was told."""
    left = None if window[0] in (None, -1) else window[0] + 1
    return lambda q, k, v: attend(q, k, v, cu_seqlens, longest, window=left, scale=scale, softcap=softcap)


def flash2(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False,
    block_table=None,
):  # fmt: skip
    """flash-attn 2.8."""
    assert causal and torch.equal(cu_seqlens_q, cu_seqlens_k) and max_seqlen_q == max_seqlen_k and not dropout_p
    assert deterministic is torch.are_deterministic_algorithms_enabled()
    return computing(cu_seqlens_q, max_seqlen_q, window_size, softmax_scale, softcap)(q, k, v)


def flash3(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None,
    softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None, window_size=(-1, -1),
    attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0,
    return_attn_probs=False,
):  # fmt: skip
    """flash_attn_interface 3.0; earlier ones gave log-sum-exps, too."""
    out = flash2(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=softmax_scale,
                 causal=causal, window_size=window_size, softcap=softcap, deterministic=deterministic)  # fmt: skip
    return out, None


def flash4(
    q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, min_seqlen_k=None,
    seqused_q=None, seqused_k=None, gather_kv_indices=None, page_table=None, softmax_scale=None, causal=False,
    window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
    score_mod=None, return_lse=False,
):  # fmt: skip
    """flash-attn-4 4.0.0b36, whose -1 beside a 0 is a window."""
    assert window_size == (None, None) or (window_size[0] >= 0 and window_size[1] == 0)
    return flash3(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=softmax_scale,
                  causal=causal, window_size=window_size, softcap=softcap, deterministic=deterministic)  # fmt: skip


PACKAGES = {
    "flash": ("flash_attn", flash2),
    "fa3": ("flash_attn_interface", flash3),
    "fa4": ("flash_attn.cute", flash4),
}


@pytest.mark.parametrize("name", PACKAGES)
@pytest.mark.parametrize("is_deterministic", [False, True])
@pytest.mark.parametrize(("window", "scale", "softcap"), [(None, None, 0.0), (1, 0.7, 0.0), (3, 0.5, 2.0)])
def test_packages_get_what_they_expect(monkeypatch, name, window, scale, softcap, is_deterministic):
    module, function = PACKAGES[name]
    monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, module, made := types.ModuleType(module))
    made.flash_attn_varlen_func = function
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: is_deterministic)
    q, k, v, cu_seqlens = tensors([5, 2], 4, 2, 8, torch.bfloat16)
    options = {"window": window, "scale": scale, "softcap": softcap}
    found = value_and_gradients(lambda *qkv: attend(*qkv, cu_seqlens, 5, backend=name, **options), q, k, v)
    wanted = value_and_gradients(lambda *qkv: attend(*qkv, cu_seqlens, 5, **options), q, k, v)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, atol=0, rtol=0)


@pytest.fixture
def cudnn_on_cpu():
    """torch's cuDNN operators for a CPU, by the definition; the gradient that torch derives of them is its own. Gives
    the shapes (documents, longest) of forwards and backwards."""
    shapes = []

    def forward(
        q, k, v, bias, cu_q, cu_k, max_q, max_k, has_lse, dropout=0.0, is_causal=False, debug=False, *, scale=None
    ):
        assert bias is None and torch.equal(cu_q, cu_k) and max_q == max_k and not dropout and is_causal and not debug
        shapes.append((len(cu_q) - 1, max_q))
        out = attend(q, k, v, cu_q, max_q, scale=scale)
        lse, seed, offset = torch.full((1,), 7.0) if has_lse else torch.empty(0), torch.tensor(11), torch.tensor(12)
        return out, lse, cu_q, cu_k, max_q, max_k, seed, offset, torch.empty(0)

    def backward(
        grad, q, k, v, out, lse, seed, offset, bias, cu_q, cu_k, max_q, max_k, dropout, is_causal, *, scale=None
    ):
        assert (lse.item(), seed.item(), offset.item(), dropout, is_causal) == (7.0, 11, 12, 0.0, True)
        shapes.append((len(cu_q) - 1, max_q))
        again = partial(attend, cu_seqlens=cu_q, max_seqlen=max_q, scale=scale)
        with ThreadPoolExecutor(1) as thread:  # in which torch records gradients: it does not below an operator
            return thread.submit(gradients, again, grad, q, k, v).result()

    library = torch.library.Library("aten", "IMPL")
    library.impl("_cudnn_attention_forward", forward, "CPU")
    library.impl("_cudnn_attention_backward", backward, "CPU")
    yield shapes
    library._destroy()


@pytest.mark.parametrize(("version", "shape"), [(91900, (2, 5)), (92500, (64, 8))])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_cudnn_gets_what_the_operator_expects(monkeypatch, cudnn_on_cpu, version, shape, scale):
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: version)
    q, k, v, cu_seqlens = tensors([5, 2], 4, 2, 8, torch.bfloat16)
    found = value_and_gradients(lambda *qkv: attend(*qkv, cu_seqlens, 5, backend="cudnn", scale=scale), q, k, v)
    wanted = value_and_gradients(lambda *qkv: attend(*qkv, cu_seqlens, 5, scale=scale), q, k, v)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, atol=0, rtol=0)
    assert cudnn_on_cpu == [shape, shape]


@pytest.mark.parametrize(("name", "module", "function"), [
    ("varlen", "torch.nn.attention.varlen", "varlen_attn"), ("flash", "flash_attn", "flash_attn_varlen_func"),
])  # fmt: skip
def test_a_compiler_sees_one_graph_whatever_the_documents(monkeypatch, name, module, function):
    """And looks through the choice of a backend: other batches are other tensors."""

    def stand_in(q, k, v, *places, enable_gqa=False, cu_seqlens_q=None, **_):
        return q + (places[0] if cu_seqlens_q is None else cu_seqlens_q).sum()

    monkeypatch.setitem(sys.modules, module, types.SimpleNamespace(**{function: stand_in}))
    graphs = []
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda attend, *qkv: attend(0, *qkv, Scores(9)),
        fullgraph=True,
        backend=lambda graph, _: graphs.append(1) or graph,
    )
    for lengths in ([5, 2, 0], [1, 6, 0], [7, 0, 0]):
        q, k, v, cu_seqlens = tensors(lengths, 4, 2, 8, torch.bfloat16)
        compiled(PackedAttention(cu_seqlens, 8, name, lengths), q, k, v)
    assert len(graphs) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("scores", [Scores(), Scores(7), Scores(softcap=2.0), Scores(97, 0.1, 2.0)], ids=str)
@pytest.mark.parametrize("lengths", [[130, 1, 64, 300], [130, 0, 365, 0, 0]], ids=["full", "empty"])
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "sdpa"])
def test_a_backend_equals_sdpa_on_the_card(backend, lengths, scores):
    needs = Needs(torch.bfloat16, 64, scores, has_empty=0 in lengths)
    if problem := BACKENDS[backend].lacks(needs) or BACKENDS[backend].is_missing(CUDA):
        pytest.skip(f"{backend} {problem}")
    q, k, v, cu_seqlens = (x.cuda() for x in tensors(lengths, 8, 2, 64, torch.bfloat16))
    options = dataclasses.asdict(scores)
    wanted = value_and_gradients(lambda *qkv: truth(*qkv, lengths, **options), *(x.cpu() for x in (q, k, v)))
    found, reference = (
        value_and_gradients(lambda *qkv, name=name: attend(*qkv, cu_seqlens, 365, backend=name, **options), q, k, v)
        for name in (backend, "sdpa")
    )
    for ours, plain, exact in zip(found, reference, wanted, strict=True):
        rounding = 2**-8 * exact.abs().max().item()  # of bf16
        assert_close(ours.cpu(), plain.cpu(), exact, atol=rounding)
