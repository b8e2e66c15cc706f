"""The loss of a step: a packed batch in fp32 against conversations one at a time in float64, gradients included."""

import ochat_kernels
import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from ochat.data.batch import Example, pack
from ochat.model.attention import PackedAttention
from ochat.model.config import ModelConfig
from ochat.model.transformer import Transformer
from ochat.train.loss import head_loss
from tests import tiny
from tests.model_families import from_hf, to_hf
from tests.numerics import relative_error

OPS = ochat_kernels.load("reference")
CONFIG = tiny.MODEL | {"rms_norm_eps": 1e-5, "initializer_range": 0.2}


def conversations(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weights = torch.tensor([0.0, 0.1, 1.0, -0.7, 0.25])
    examples = []
    for length in lengths:
        ids = torch.randint(0, CONFIG["vocab_size"], (length,), generator=generator)
        drawn = weights[torch.randint(0, 5, (length,), generator=generator)]
        examples.append(Example(ids.numpy(), drawn.numpy(), "GPT4"))
    return examples


def packed_gradients(model, examples, pad_to, step_weight):
    batch = pack(examples, range(len(examples)), [0] * len(examples), pad_to=pad_to)
    attend = PackedAttention(batch.cu_seqlens, batch.max_seqlen, "sdpa", batch.lengths)
    out = model(batch.input_ids, batch.position_ids, attend, head=head_loss(OPS, batch), rows=batch.supervised_rows)
    loss = out.loss_sum / step_weight
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


def gradients_by_hand(model, examples, step_weight, tied):
    """Each conversation alone through transformers' Llama in float64; label t is the next id, with the next id's
    weight."""
    with torch.device("cpu"):
        theirs = LlamaForCausalLM(LlamaConfig(**CONFIG, tie_word_embeddings=tied, attn_implementation="eager")).double()
    state = to_hf(model.config, ((name, p.detach()) for name, p in model.named_parameters()))
    theirs.load_state_dict({name: tensor.double() for name, tensor in state.items()}, strict=not tied)
    total = torch.zeros((), dtype=torch.float64)
    for example in examples:
        ids = torch.from_numpy(example.input_ids)
        logits = theirs(ids[None]).logits[0, :-1]
        nll = F.cross_entropy(logits, ids[1:], reduction="none")
        total = total + (nll * torch.from_numpy(example.loss_weights[1:]).double()).sum()
    loss = total / step_weight
    loss.backward()
    grads = {name: p.grad for name, p in theirs.named_parameters()}
    return loss.detach(), from_hf(model.config, grads)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("lengths", "pad_to"), [((7, 1, 19, 2), None), ((5, 31), 64)])
def test_packed_loss_and_gradients_equal_conversations_alone_in_float64(tied, lengths, pad_to):
    model = Transformer(ModelConfig.from_hf(CONFIG | {"tie_word_embeddings": tied}), OPS)
    model.initialize(seed=1)
    examples = conversations(lengths)
    step_weight = sum(abs(float(w)) for e in examples for w in e.loss_weights[1:]) + 3.5  # other bins have weight too
    loss, gradients = packed_gradients(model, examples, pad_to, step_weight)
    truth, expected = gradients_by_hand(model, examples, step_weight, tied)
    assert abs(loss.double() - truth) <= 1e-6 * abs(truth)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert relative_error(gradient, expected[name]) < 1e-5, name
