"""The last block does for rows that are not supervised no more than they need: pytest tests/model/test_live_rows.py

Against the plain path, in which every row goes through the whole block and the head leaves out what it does not want.
"""

import ochat_kernels
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ochat.data.batch import Example, pack
from ochat.model.attention import PackedAttention
from ochat.model.config import ModelConfig
from ochat.model.transformer import RECOMPUTE, Transformer
from ochat.train.loss import head_loss

CONFIG = ModelConfig("qwen3", 67, 24, 40, 3, 4, 2, 8, qk_norm=True, windows=(None, 6, 6))
LENGTHS = (9, 1, 30, 4)


def build(tied: bool, recompute: str = "none") -> Transformer:
    model = Transformer(ModelConfig(**{**vars(CONFIG), "tie_embeddings": tied}), ochat_kernels.load("reference"))
    model.initialize(seed=1)
    model.recompute = recompute
    return model.double()


def make_batch(share: float):
    draw = torch.Generator().manual_seed(0)
    examples = []
    for length in LENGTHS:
        ids = torch.randint(0, 67, (length,), generator=draw)
        weights = torch.randn(length, generator=draw) * (torch.rand(length, generator=draw) < share)
        examples.append(Example(ids.numpy(), weights.numpy(), ""))
    return pack(examples, range(len(LENGTHS)), [0] * len(LENGTHS), pad_to=50)


def loss_and_gradients(model: Transformer, batch, *, picks: bool):
    attend = PackedAttention(batch.cu_seqlens, batch.max_seqlen, "sdpa", batch.lengths)
    head, all_rows = head_loss(ochat_kernels.load("reference"), batch), slice(None)
    picked = all_rows if picks else batch.supervised_rows
    out = model(
        batch.input_ids, batch.position_ids, attend, rows=batch.supervised_rows if picks else None,
        head=lambda hidden, weight: head(hidden[picked], weight),
    )  # fmt: skip
    model.zero_grad()
    out.loss_sum.backward()
    return out, {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("tied", [False, True])
def test_loss_and_gradients_are_those_of_the_plain_path(tied, recompute):
    model, batch = build(tied, recompute), make_batch(0.4)
    assert 0 < batch.num_supervised < 0.5 * batch.num_tokens
    (ours, found), (plain, wanted) = (loss_and_gradients(model, batch, picks=picks) for picks in (True, False))
    torch.testing.assert_close(ours.loss_sum, plain.loss_sum, rtol=1e-12, atol=0)
    assert torch.equal(ours.correct, plain.correct)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-10, atol=1e-14, msg=name)


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_without_a_supervised_row_every_parameter_has_a_gradient_and_it_is_zero(recompute):
    """Other processes wait for it."""
    out, gradients = loss_and_gradients(build(False, recompute), make_batch(0.0), picks=True)
    assert out.loss_sum == 0 and out.nll.shape == (0,)
    for name, gradient in gradients.items():
        assert gradient is not None and not gradient.any(), name


def test_other_rows_are_spared_the_products_after_the_last_blocks_attention():
    batch, spared = make_batch(0.4), []
    for picks in (True, False):
        with FlopCounterMode(display=False) as counter:
            loss_and_gradients(build(False), batch, picks=picks)
        spared.append(counter.get_total_flops())
    rows = batch.input_ids.shape[0] - batch.num_supervised
    weights = CONFIG.hidden_size * (CONFIG.num_heads * CONFIG.head_dim + 3 * CONFIG.intermediate_size)
    assert spared[1] - spared[0] == 6 * weights * rows
